"""Which waiting request runs next: those that use the same adapter together, and none too late."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlxc.errors import OptionError

Item = TypeVar("Item")


@dataclass
class _Waiting(Generic[Item]):
    item: Item
    adapter: Hashable
    overtaken: int = 0


class AdapterScheduler(Generic[Item]):
    """A queue of requests, grouped by adapter.

    A batch goes on with the adapter of the one before while requests for it wait, then with the adapter whose first
    request has waited longest. Requests for one adapter run in the order in which they came.

    No request waits forever: one that was overtaken by a younger one in ``patience`` batches comes before all others
    that were not. So with batches of ``n``, a request that found ``k`` others waiting runs in batch
    ``patience + k // n + 1`` after it came, or before.

    Args:
        patience: in how many batches a request can be overtaken; with 0, all run in the order in which they came.

    Raises:
        OptionError: ``patience`` is no integer, 0 or more.
    """

    def __init__(self, patience: int = 4) -> None:
        self._patience = _checked_count("patience", patience)
        self._waiting: dict[int, _Waiting[Item]] = {}  # by ticket, the oldest first
        self._tickets = 0
        self._current: Hashable = None

    def __len__(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    def submit(self, item: Item, adapter: Hashable = None) -> int:
        """Add a request.

        Args:
            item: given back when its turn comes.
            adapter: what to group by: equal values are the same adapter.

        Returns:
            A ticket for :meth:`cancel`.
        """
        self._tickets += 1
        self._waiting[self._tickets] = _Waiting(item, adapter)
        return self._tickets

    def cancel(self, ticket: int) -> bool:
        """Take a request out of the queue; returns whether it still waited."""
        return self._waiting.pop(ticket, None) is not None

    def next_batch(self, limit: int) -> list[Item]:
        """Take out the requests that run next, at most ``limit``; fewer only if no more wait.

        Raises:
            OptionError: ``limit`` is no integer, 0 or more.
        """
        limit = _checked_count("limit", limit)
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


def _checked_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OptionError(f"{name} must be an integer, 0 or more, got {value!r}")
    return value
