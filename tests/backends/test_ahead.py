"""Items made in another thread: the same ones, a few ahead of who takes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rlxc.backends.ahead import ahead
from rlxc.errors import WeightError


def test_items_are_the_same_in_the_same_order() -> None:
    assert list(ahead(range(20))) == list(range(20))


def test_nothing_gives_nothing() -> None:
    assert list(ahead([])) == []


def test_an_item_is_made_while_the_one_before_it_is_in_use() -> None:
    made = threading.Event()

    def items() -> Iterator[str]:
        yield "first"
        made.set()
        yield "second"

    coming = ahead(items())
    assert next(coming) == "first"
    assert made.wait(30)
    assert list(coming) == ["second"]


def test_few_items_wait_whatever_there_are() -> None:
    made: list[int] = []
    waiting = [len(made) - taken for taken in ahead(made.append(i) or i for i in range(100))]
    assert max(waiting) <= 4  # the one in use among them


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise WeightError("is not finite")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(WeightError, match="is not finite"):
        next(coming)


def test_who_takes_no_more_ends_the_thread() -> None:
    coming = ahead(range(100))
    next(coming)
    coming.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rlxc-weights")]
