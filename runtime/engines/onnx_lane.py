"""Sequences side by side in memory, so that ONNX Runtime reads the weights once for all of them.

GroupQueryAttention takes several sequences in one step when each adds one token and their caches are one tensor
``[batch, heads, capacity, head_dim]``. A lane has such a tensor for every layer's keys and values, with more slots
than a step has sequences: one that cannot go on in place, because others share its rows or its window jumps, goes on
in another slot.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from rlxc.runtime.engines.onnx_cache import Buffers, GroupRows, OnnxCache, RowGroup, Rows, allocate


@dataclass(frozen=True)
class Gathered:
    """Sequences in consecutive slots.

    Attributes:
        order: the number of the sequence in each of these slots.
        groups: what each of them will hold after the run, in the same order.
        arrays: their part of the lane's memory, for each group of layers.
    """

    order: list[int]
    groups: list[list[GroupRows]]
    arrays: list[Rows]


class Lane:
    """Slots for sequences that are decoded together.

    Raises:
        MemoryError: there is none for so many.
    """

    def __init__(self, groups: Sequence[RowGroup], slots: int) -> None:
        self._arrays = [allocate(group, slots) for group in groups]
        self._slots = [
            [Buffers([array[slot : slot + 1] for array in arrays]) for arrays in self._arrays]
            for slot in range(slots)
        ]
        self._number = {id(buffers): slot for slot, all_ in enumerate(self._slots) for buffers in all_}

    @property
    def is_used(self) -> bool:
        """Whether anybody holds rows in it."""
        return any(buffers.holders for slot in self._slots for buffers in slot)

    def gather(self, caches: Sequence[OnnxCache]) -> Gathered | None:
        """Bring caches side by side, ready for a token each; None if they cannot be in this lane.

        As many as possible stay where they are. The caches themselves do not change: whoever runs the step lets them
        hold what comes out of it.

        Raises:
            MemoryError: there is none for what must move; nothing has changed that anybody holds.
        """
        slots = [self._slot(cache) for cache in caches]
        staying = {slot: i for i, slot in enumerate(slots) if slot is not None and _stays(caches[i])}
        held = {self._number.get(id(rows.buffers)) for cache in caches for rows in cache.groups}
        start = self._place(len(caches), staying, held - staying.keys())
        if start is None:
            return None
        window = range(start, start + len(caches))
        order = [staying.get(slot, -1) for slot in window]
        moving = iter([i for i in range(len(caches)) if i not in order])
        groups = []
        for place, slot in enumerate(window):
            if order[place] >= 0:
                groups.append(_extended(caches[order[place]]))
                continue
            order[place] = next(moving)
            self._vacate(caches[order[place]], slot)
            groups.append(_extended(caches[order[place]], self._slots[slot]))
        return Gathered(order, groups, [[a[start : window.stop] for a in arrays] for arrays in self._arrays])

    def _slot(self, cache: OnnxCache) -> int | None:
        """The slot that holds all of a cache."""
        slot = self._number.get(id(cache.groups[0].buffers))
        if slot is None or any(rows.buffers is not own for rows, own in zip(cache.groups, self._slots[slot])):
            return None
        return slot

    def _place(self, count: int, staying: Container[int], left: set[int | None]) -> int | None:
        """Where so many slots begin that most caches stay in, and that none is being copied from."""
        starts = [
            start
            for start in range(len(self._slots) - count + 1)
            if left.isdisjoint(range(start, start + count))
        ]
        if not starts:
            return None
        return max(starts, key=lambda start: sum(slot in staying for slot in range(start, start + count)))

    def _vacate(self, cache: OnnxCache, slot: int) -> None:
        """Make room: whatever is held here by sequences that take no part goes elsewhere."""
        for rows, buffers in zip(cache.groups, self._slots[slot]):
            if buffers.holders:
                buffers.vacate(rows.group)


def _stays(cache: OnnxCache) -> bool:
    return all(rows.stays(cache.position, cache.position + 1) for rows in cache.groups)


def _extended(cache: OnnxCache, into: Sequence[Buffers] | None = None) -> list[GroupRows]:
    """What a cache will hold after one more token."""
    places: Sequence[Buffers | None] = into or [None] * len(cache.groups)
    return [
        rows.extended(cache.position, cache.position + 1, place) for rows, place in zip(cache.groups, places)
    ]
