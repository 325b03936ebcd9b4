"""Doing work in another thread, a few items ahead of who needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_ITEMS_AHEAD = 3
"""How many items may wait, and take memory."""


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, none of which is None, made in another thread while earlier ones are in use."""
    making = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="rlxc-weights") as pool:
        coming: deque[Future[T | None]] = deque()
        while True:
            while len(coming) < _ITEMS_AHEAD:
                coming.append(pool.submit(next, making, None))
            item = coming.popleft().result()
            if item is None:
                return
            yield item
