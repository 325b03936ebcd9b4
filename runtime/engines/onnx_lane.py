"""Sequences side by side in memory, so that ONNX Runtime reads the weights once for all of them.

GroupQueryAttention takes several sequences in one step when each adds one token and their caches are one tensor
``[batch, heads, capacity, head_dim]``. A lane has such a tensor for every layer's keys and values; each slot of it is
one sequence's.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def size(self) -> int:
        """The number of slots."""
        return len(self._slots)

    def gather(self, caches: Sequence[OnnxCache]) -> Gathered:
        """Bring caches side by side, at most :attr:`size`, ready for a token each.

        As many as possible stay where they are. The caches go on holding what they do: whoever runs the step lets them
        hold what comes out of it.

        Raises:
            MemoryError: there is none for what must move; the caches hold what they did.
        """
        staying = {self._slot(cache): i for i, cache in enumerate(caches) if _stays(cache)}
        starts = range(self.size - len(caches) + 1)
        start = max(starts, key=lambda first: sum(first + i in staying for i in range(len(caches))))
        window = range(start, start + len(caches))
        order = [staying.get(slot, -1) for slot in window]
        moving = iter([i for i in range(len(caches)) if i not in order])
        groups = []
        for place, slot in enumerate(window):
            if order[place] >= 0:
                groups.append(_extended(caches[order[place]]))
                continue
            order[place] = next(moving)
            into = self._slots[slot]
            for rows, buffers in zip(caches[order[place]].groups, into):
                if buffers.holders:  # whoever it is, even the same sequence, copies from elsewhere
                    buffers.vacate(rows.group)
            groups.append(_extended(caches[order[place]], into))
        return Gathered(order, groups, [[a[start : window.stop] for a in arrays] for arrays in self._arrays])

    def _slot(self, cache: OnnxCache) -> int | None:
        """The slot that holds all of a cache."""
        slot = self._number.get(id(cache.groups[0].buffers))
        if slot is None or any(rows.buffers is not own for rows, own in zip(cache.groups, self._slots[slot])):
            return None
        return slot


def _stays(cache: OnnxCache) -> bool:
    return all(rows.stays(cache.position, cache.position + 1) for rows in cache.groups)


def _extended(cache: OnnxCache, into: Sequence[Buffers] | None = None) -> list[GroupRows]:
    """What a cache will hold after one more token."""
    places: Sequence[Buffers | None] = into or [None] * len(cache.groups)
    return [
        rows.extended(cache.position, cache.position + 1, place) for rows, place in zip(cache.groups, places)
    ]
