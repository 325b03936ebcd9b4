"""The paged cache: what a sequence holds never changes by what others do, and memory comes back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_caches import (
    CONTEXT,
    MAX_STEP,
    PAGE,
    PLAN,
    ROLLBACK,
    WINDOWS,
    Allocator,
    addresses,
    make_cache,
    page_address,
    seen,
    step,
)

from rlxc.runtime.engines import pages
from rlxc.runtime.engines.pages import PagedCache


@dataclass
class Held:
    """A cache, what it holds, and the furthest position that a step of its past began at, or that it was saved at."""

    cache: PagedCache
    tokens: list[int]
    furthest: int

    def check(self) -> None:
        assert self.cache.position == len(self.tokens)
        for table, window in enumerate(WINDOWS):
            first = 0 if window is None else max(0, self.cache.oldest - window + 1)
            assert seen(self.cache, table) == self.tokens[first:]
        assert self.cache.oldest <= max(0, self.furthest - ROLLBACK)

    def state(self) -> Any:
        return self.cache.position, self.cache.oldest, self.cache.writable_from, dict(self.cache.memory)


WHICH = st.integers(0, 99)
ACTION = st.one_of(
    st.tuples(st.just("step"), WHICH, st.integers(1, MAX_STEP)),
    st.tuples(st.just("step"), WHICH, st.integers(1, 3)),
    st.tuples(st.just("starve"), WHICH, st.integers(1, MAX_STEP)),
    st.tuples(st.just("fork"), WHICH, WHICH),
    st.tuples(st.just("truncate"), WHICH, st.integers(0, 40)),
    st.tuples(st.just("load"), WHICH, WHICH),
    st.tuples(st.just("drop"), WHICH, WHICH),
)


@settings(max_examples=500, deadline=None)
@given(actions=st.lists(ACTION, max_size=30))
def test_nothing_that_a_cache_holds_is_ever_changed(actions: list[Any]) -> None:
    # A row that was let go too early is to be a wrong number, not a crash.
    allocator = Allocator(kept=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "private_memory", allocator)
        run_actions(actions, allocator)


def run_actions(actions: list[Any], allocator: Allocator) -> None:
    empty = make_cache()
    live, token = [Held(empty.fork(), [], 0)], 1
    for name, which, number in actions:
        held = live[which % len(live)]
        cache, position = held.cache, held.cache.position
        if name in ("step", "starve") and position + number <= CONTEXT:
            before = held.state()
            allocator.is_full = name == "starve"
            new = list(range(token, token + number))
            try:
                step(cache, new)
            except MemoryError:
                assert allocator.is_full and held.state() == before
            else:
                held.tokens += new
                held.furthest = max(held.furthest, position)
                token += number
            allocator.is_full = False
        elif name == "fork" and len(live) < 6:
            live.append(Held(cache.fork(), held.tokens[:], held.furthest))
        elif name == "truncate":
            back = max(position - number, cache.oldest)
            cache.truncate(back)
            del held.tokens[back:]
        elif name == "load" and len(live) < 6:
            loaded = empty.fork()
            loaded.load(position, cache.rows())
            live.append(Held(loaded, held.tokens[:], max(held.furthest, position)))
        elif name == "drop" and len(live) > 1:
            live.remove(held)
        for each in live:
            each.check()


# --- sharing ------------------------------------------------------------------------------------------------------


def test_fork_shares_its_pages_and_copies_the_last_ones_when_it_writes() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    fork = cache.fork()
    assert addresses(fork) == addresses(cache)
    step(fork, [1])
    copied = addresses(fork) - addresses(cache)
    assert copied == {page_address(PLAN, fork, table, 30) for table in range(len(WINDOWS))}
    step(fork, [2])
    assert copied == addresses(fork) - addresses(cache)


def test_parent_goes_on_in_place() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    before = addresses(cache)
    forks = [cache.fork(), cache.fork().fork()]
    step(cache, [1])
    assert addresses(cache) == before
    assert all(addresses(fork) == before for fork in forks)


def test_cut_back_parent_leaves_the_page_to_its_fork() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    fork = cache.fork()
    cache.truncate(28)
    step(cache, [100, 101])
    assert seen(fork, 0) == list(range(30))
    assert seen(cache, 0) == [*range(28), 100, 101]


def test_cutting_back_without_forks_copies_nothing() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    before = addresses(cache)
    cache.truncate(27)
    step(cache, [1, 2])
    assert addresses(cache) == before


def test_fork_does_not_share_what_its_parent_has_yet_to_write() -> None:
    cache = make_cache()
    step(cache, list(range(16)))
    cache.reserve(20)  # and the step fails
    assert len(addresses(cache)) == 9
    assert len(addresses(cache.fork())) == 3


def test_pages_past_the_end_are_returned() -> None:
    cache = make_cache()
    step(cache, list(range(40)))
    cache.truncate(33)
    assert len(addresses(cache)) == 9
    cache.truncate(32)
    assert len(addresses(cache)) == 6


def test_tables_are_shared_until_they_change() -> None:
    cache = make_cache()
    step(cache, [1])
    fork = cache.fork()
    tables, pages_of_all = len(WINDOWS) * PLAN.table_width * 8, sum(layout.nbytes for layout in PLAN.pages)
    assert sum({**cache.memory, **fork.memory}.values()) == tables + pages_of_all
    step(fork, [2])
    assert sum({**cache.memory, **fork.memory}.values()) == 2 * (tables + pages_of_all)


# --- windows ------------------------------------------------------------------------------------------------------


def test_windows_hold_no_more_than_the_plan_says() -> None:
    cache = make_cache()
    held = []
    for position in range(150):
        step(cache, [position])
        held.append(len(addresses(cache)) - -(-cache.position // PAGE))
    # Rounded up to whole pages, and one more: 5 + 7 + 1 positions, and 33 + 7 + 1.
    assert max(held) <= 2 + 4
    assert max(held[100:]) == max(held)


@pytest.mark.parametrize("count", [1, 3, MAX_STEP])
def test_newest_tokens_can_always_be_taken_back(count: int) -> None:
    cache = make_cache()
    for start in range(0, CONTEXT - count, count):
        step(cache, [start] * count)
        assert cache.oldest <= max(0, cache.position - ROLLBACK)
        assert cache.oldest <= max(
            0, start - ROLLBACK
        )  # nor does a step that is taken back whole cost anything


def test_oldest_says_what_the_windows_still_hold() -> None:
    cache = make_cache()
    step(cache, [0] * 40)
    assert cache.oldest == 0
    step(
        cache, [0] * 10
    )  # one that goes back to 40 - 7 looks back to 29: the narrow window's first page is let go
    assert cache.oldest == PAGE + 5 - 1
    cache.truncate(20)
    assert cache.oldest == 20


@pytest.mark.parametrize("position", [0, 5, 48, 61, 130])
def test_loaded_cache_can_be_cut_back_by_the_rollback(position: int) -> None:
    cache = make_cache()
    for token in range(position):
        step(cache, [token])
    loaded = make_cache()
    loaded.load(position, cache.rows())
    assert loaded.oldest == max(0, position - ROLLBACK)
    for table in range(len(WINDOWS)):
        tokens = seen(loaded, table)
        assert tokens == list(range(position - len(tokens), position))


# --- interrupts ---------------------------------------------------------------------------------------------------


class Interrupt(Exception):
    """Stands for Ctrl-C, which may come between any two lines."""


def interrupted(work: Callable[[], object], line: int) -> bool:
    """Do this up to a line of `pages`; whether there are as many."""
    left = line

    # Python ignores what is raised while an object is deleted.
    deleting = {"__del__", "give_back", "_settle", "_put_back"}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != pages.__file__ or frame.f_code.co_name in deleting:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


WORK: list[Callable[[PagedCache], object]] = [lambda cache: cache.truncate(30), lambda cache: cache.fork()]


@pytest.mark.parametrize("work", WORK, ids=["truncate", "fork"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_interrupt_changes_nothing_for_others(work: Callable[[PagedCache], object], is_shared: bool) -> None:
    def run(line: int) -> bool:
        cache = make_cache()
        others = [cache.fork()]
        step(cache, list(range(40)))
        step(cache, [100] * 10)
        tokens = [[], [*range(40), *[100] * 10]]
        if is_shared:
            others.append(cache.fork())
        was_interrupted = interrupted(lambda: work(cache), line)
        position = cache.position
        assert position in (30, 50)
        step(others[0], list(range(500, 540)))  # in the pages that were returned
        step(cache, [200] * 25)
        assert seen(cache, 0) == [*tokens[1][:position], *[200] * 25]
        tokens[0] = list(range(500, 540))
        assert [seen(other, 0) for other in others] == tokens[: len(others)]
        return was_interrupted

    lines = 0
    while run(lines):
        lines += 1
    assert lines >= 5
