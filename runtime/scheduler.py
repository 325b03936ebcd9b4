"""Which waiting request runs next: those that use the same adapter together, and none too late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlxc.errors import OptionError, QueueFullError

Item = TypeVar("Item")

Clock = Callable[[], float]
"""Seconds from some moment on, never less than before."""


@dataclass
class _Waiting(Generic[Item]):
    item: Item
    adapter: Hashable
    deadline: float
    overtaken: int = 0


class Scheduler(Generic[Item]):
    """A bounded queue of requests, grouped by adapter.

    A batch goes on with the adapter of the one before while requests for it wait, then with the adapter whose first
    request has waited longest. Requests for one adapter run in the order in which they came.

    No request waits forever: one that was overtaken by a younger one in ``patience`` batches comes before all others
    that were not. So with batches of ``n``, a request that found ``k`` others waiting runs in batch
    ``patience + k // n + 1`` after it came, or before. However large each batch is, at most ``k + patience * n`` others
    run before it, where ``n`` is the largest. Requests that are cancelled or expire make the wait no longer.

    Args:
        patience: in how many batches a request can be overtaken; with 0, all run in the order in which they came.
        max_waiting: how many requests wait at most.
        clock: what deadlines are compared with.

    Raises:
        OptionError: ``patience`` is no integer, 0 or more, or ``max_waiting`` none, 1 or more.
    """

    def __init__(self, patience: int = 4, *, max_waiting: int = 1024, clock: Clock = time.monotonic) -> None:
        self._patience = checked_count("patience", patience, 0)
        self._max_waiting = checked_count("max_waiting", max_waiting, 1)
        self._clock = clock
        self._waiting: dict[int, _Waiting[Item]] = {}  # by ticket, the oldest first
        self._tickets = 0
        self._current: Hashable = None

    def __len__(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether as many requests wait as may; those that expired count until :meth:`expired` takes them out."""
        return len(self._waiting) >= self._max_waiting

    def submit(self, item: Item, adapter: Hashable = None, deadline: float = math.inf) -> int:
        """Add a request.

        Args:
            item: given back when its turn comes.
            adapter: what to group by: equal values are the same adapter.
            deadline: when nobody wants it any more, in seconds of the clock.

        Returns:
            A ticket for :meth:`cancel`.

        Raises:
            QueueFullError: the queue is full.
        """
        self.check_room()
        self._tickets += 1
        self._waiting[self._tickets] = _Waiting(item, adapter, deadline)
        return self._tickets

    def check_room(self) -> None:
        """Refuse a request more than may wait.

        Raises:
            QueueFullError: the queue is full.
        """
        if self.is_full:
            raise QueueFullError(
                f"{len(self._waiting)} requests wait already, as many as may",
                remedy="submit it again when some have run, or raise max_waiting",
            )

    def cancel(self, ticket: int) -> bool:
        """Take a request out of the queue; returns whether it still waited."""
        return self._waiting.pop(ticket, None) is not None

    def expired(self) -> list[Item]:
        """Take out the requests whose deadline has come, the oldest first."""
        now = self._clock()
        over = [ticket for ticket, waiting in self._waiting.items() if waiting.deadline <= now]
        return [self._waiting.pop(ticket).item for ticket in over]

    def next_batch(self, limit: int) -> list[Item]:
        """Take out the requests that run next, at most ``limit``; fewer only if no more wait.

        It looks at no deadlines: take out what has expired before.

        Raises:
            OptionError: ``limit`` is no integer, 0 or more.
        """
        limit = checked_count("limit", limit, 0)
        if not limit:
            return []
        chosen = self._choose(limit)
        items = [self._waiting.pop(ticket).item for ticket in chosen]
        newest = max(chosen, default=0)
        for ticket, waiting in self._waiting.items():
            if ticket > newest:
                break
            waiting.overtaken += 1
        return items

    def _choose(self, limit: int) -> list[int]:
        # Whoever overtakes a request overtakes all older ones: the overdue ones are the oldest of all, so that taking
        # them first keeps the order within their adapters.
        overdue = [ticket for ticket, w in self._waiting.items() if w.overtaken >= self._patience]
        chosen = overdue[:limit]
        groups: dict[Hashable, list[int]] = {}
        for ticket, waiting in self._waiting.items():
            if waiting.overtaken < self._patience:
                groups.setdefault(waiting.adapter, []).append(ticket)
        for adapter in sorted(groups, key=lambda adapter: adapter != self._current):
            if len(chosen) == limit:
                break
            chosen += groups[adapter][: limit - len(chosen)]
            self._current = adapter
        return chosen


def checked_count(name: str, value: int, least: int) -> int:
    """An option that counts something, ``least`` or more.

    Raises:
        OptionError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be an integer, {least} or more, got {value!r}")
    return value
