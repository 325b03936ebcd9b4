"""The queue of requests: grouped by adapter, in order within one, bounded, and nobody waits too long."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlxc.errors import OptionError, QueueFullError
from rlxc.runtime import Scheduler

ADAPTERS = st.sampled_from(["a", "b", "c", None])


def queue(adapters: str, patience: int = 4) -> Scheduler[str]:
    """A queue of requests ``a0 b1 a2 ...`` for the adapters named by letters."""
    scheduler: Scheduler[str] = Scheduler(patience)
    for number, adapter in enumerate(adapters):
        scheduler.submit(f"{adapter}{number}", adapter)
    return scheduler


def test_requests_for_one_adapter_run_together() -> None:
    scheduler = queue("abababab")
    assert scheduler.next_batch(4) == ["a0", "a2", "a4", "a6"]
    assert scheduler.next_batch(4) == ["b1", "b3", "b5", "b7"]


def test_batch_goes_on_with_the_adapter_of_the_one_before() -> None:
    scheduler = queue("baaab")
    assert [scheduler.next_batch(1) for _ in range(5)] == [["b0"], ["b4"], ["a1"], ["a2"], ["a3"]]


def test_batch_is_filled_with_other_adapters() -> None:
    assert queue("abcab").next_batch(4) == ["a0", "a3", "b1", "b4"]


def test_next_adapter_is_the_one_whose_first_request_is_the_oldest() -> None:
    scheduler = queue("acbcb")
    assert scheduler.next_batch(1) == ["a0"]
    assert scheduler.next_batch(4) == ["c1", "c3", "b2", "b4"]


def test_overtaken_request_comes_first_when_its_patience_ends() -> None:
    scheduler = queue("ab", patience=2)
    order = []
    for number in range(2, 8):  # another request for `a` is there whenever one has run
        scheduler.submit(f"a{number}", "a")
        order += scheduler.next_batch(1)
    assert order == ["a0", "a2", "a3", "b1", "a4", "a5"]


def test_without_patience_the_first_to_come_is_the_first_to_run() -> None:
    scheduler = queue("abcabcba", patience=0)
    assert scheduler.next_batch(8) == ["a0", "b1", "c2", "a3", "b4", "c5", "b6", "a7"]


def test_cancelled_request_does_not_run() -> None:
    scheduler: Scheduler[int] = Scheduler()
    tickets = [scheduler.submit(number, "a") for number in range(3)]
    assert scheduler.cancel(tickets[1])
    assert not scheduler.cancel(tickets[1])
    assert scheduler.next_batch(3) == [0, 2]
    assert not scheduler.cancel(tickets[0])


def test_empty_queue_has_no_batch() -> None:
    scheduler: Scheduler[int] = Scheduler()
    assert (len(scheduler), scheduler.next_batch(4)) == (0, [])


def test_batch_of_none_changes_nothing() -> None:
    scheduler = queue("ab")
    assert scheduler.next_batch(0) == []
    assert scheduler.next_batch(2) == ["a0", "b1"]


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_counts_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="patience must be an integer, 0 or more"):
        Scheduler(value)
    with pytest.raises(OptionError, match="limit must be an integer, 0 or more"):
        queue("a").next_batch(value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_queue_without_a_bound_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="max_waiting must be an integer, 1 or more"):
        Scheduler(max_waiting=value)


def test_full_queue_takes_no_more_until_one_leaves() -> None:
    scheduler: Scheduler[str] = Scheduler(max_waiting=2)
    tickets = [scheduler.submit(item) for item in "ab"]
    assert scheduler.is_full
    with pytest.raises(QueueFullError, match=r"2 requests wait already.*raise max_waiting"):
        scheduler.submit("c")
    assert scheduler.cancel(tickets[0])
    assert not scheduler.is_full
    scheduler.submit("d")
    assert scheduler.next_batch(4) == ["b", "d"]


def test_expired_requests_are_taken_out_when_their_time_has_come() -> None:
    now = 10.0
    scheduler: Scheduler[str] = Scheduler(max_waiting=4, clock=lambda: now)
    for item, deadline in (("a", 12.0), ("b", 11.0), ("c", math.inf), ("d", 12.5)):
        scheduler.submit(item, deadline=deadline)
    assert scheduler.expired() == []
    now = 12.0
    assert scheduler.is_full
    assert scheduler.expired() == ["a", "b"]
    assert scheduler.expired() == []
    assert scheduler.next_batch(4) == ["c", "d"]


# Each event: requests that come for these adapters, of which the last may be cancelled; then a batch of this size.
EVENTS = st.lists(st.tuples(st.lists(ADAPTERS, max_size=6), st.booleans(), st.integers(0, 4)), max_size=25)


@given(events=EVENTS, patience=st.integers(0, 3))
def test_every_request_runs_once_and_in_order_within_its_adapter(events: Any, patience: int) -> None:
    scheduler: Scheduler[tuple[str | None, int]] = Scheduler(patience)
    expected: set[tuple[str | None, int]] = set()
    ran: list[tuple[str | None, int]] = []
    number = 0
    for adapters, cancels, limit in [*events, ([], False, 10**6)]:
        ticket, item = 0, None
        for adapter in adapters:
            item, number = (adapter, number), number + 1
            ticket = scheduler.submit(item, adapter)
            expected.add(item)
        if cancels and item is not None:
            assert scheduler.cancel(ticket)
            expected.remove(item)
        waiting = len(scheduler)
        batch = scheduler.next_batch(limit)
        assert len(batch) == min(limit, waiting)
        ran += batch
    assert len(ran) == len(set(ran))
    assert set(ran) == expected
    for adapter in {adapter for adapter, _ in ran}:
        numbers = [n for a, n in ran if a == adapter]
        assert numbers == sorted(numbers)


@given(
    arrivals=st.lists(st.lists(ADAPTERS, max_size=8), min_size=1, max_size=30),
    patience=st.integers(0, 3),
    limit=st.integers(1, 4),
)
def test_no_request_waits_longer_than_promised(arrivals: Any, patience: int, limit: int) -> None:
    scheduler: Scheduler[tuple[int, int]] = Scheduler(patience)
    for batch, adapters in enumerate(arrivals + [[]] * 300):
        for adapter in adapters:
            scheduler.submit((batch, len(scheduler)), adapter)  # when it came, and how many it found waiting
        for came, found in scheduler.next_batch(limit):
            assert batch - came <= patience + found // limit
    assert len(scheduler) == 0


@given(
    arrivals=st.lists(
        st.tuples(st.lists(st.tuples(ADAPTERS, st.integers(1, 9)), max_size=8), st.integers(0, 4)),
        min_size=1,
        max_size=30,
    ),
    patience=st.integers(0, 3),
)
def test_no_more_run_before_a_request_than_promised_whatever_the_sizes_of_batches(
    arrivals: Any, patience: int
) -> None:
    """Some expire on their way; that makes nobody wait longer."""
    now, ran, largest = 0, 0, max(limit for _, limit in arrivals) or 1
    scheduler: Scheduler[tuple[int, int]] = Scheduler(patience, clock=lambda: now)
    for now, (requests, limit) in enumerate(arrivals + [([], largest)] * 300):
        for adapter, time in requests:
            deadline = now + time if time < 6 else math.inf
            scheduler.submit((ran, len(scheduler)), adapter, deadline)  # how many ran before, or wait
        scheduler.expired()
        batch = scheduler.next_batch(limit)
        for before, found in batch:
            assert ran - before <= found + patience * largest
        ran += len(batch)
    assert len(scheduler) == 0
