"""Caches that ONNX Runtime's GroupQueryAttention reads and writes in place, and how they share memory.

A linear buffer has a row for every position. In a sliding-window buffer of ``C`` rows for a window of ``W``, the op
lets go of ``G = C - W + 1`` positions at a time: after ``T`` tokens row 0 holds position 0 while ``T <= C``, then
``G * ceil((T - C) / G)``, and the later ones follow it (the op's own documentation, ONNX Runtime 1.31). Going back over
such a jump needs rows that are no longer there, so those that may still be wanted are set aside before each jump.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from rlxc.artifact import KvLayer, KvPlan
from rlxc.artifact.alignment import align
from rlxc.dtypes import DType
from rlxc.runtime.engines import KvRows
from rlxc.runtime.engines.memory import private_memory

Rows = list[npt.NDArray[Any]]
"""Of each layer of a group, its keys and then its values: ``[1, heads, n, head_dim]`` each."""

_TYPES: Mapping[DType, np.dtype[Any]] = {DType.F32: np.dtype(np.float32), DType.F16: np.dtype(np.float16)}


@dataclass(frozen=True)
class RowGroup:
    """Layers that keep the same positions, and where in their buffers.

    Attributes:
        layers: of the plan.
        window: how many positions attention sees.
        capacity: rows of a buffer; in one of the whole context, nothing ever moves.
        rollback: how many of the newest tokens can be taken back at any time.
    """

    layers: tuple[KvLayer, ...]
    window: int
    capacity: int
    rollback: int

    def base(self, position: int) -> int:
        """The position that lies in row 0 when so many tokens are held."""
        stride = self.capacity - self.window + 1
        return stride * max(0, -(-(position - self.capacity) // stride))

    def longest(self, position: int, count: int) -> int:
        """How many of the next ``count`` tokens one run can add so that no row passes by that may be wanted again.

        A step longer than the window can jump over positions of its own: it has to stop where the buffer is full.
        """
        if self.base(position + count) <= position:
            return count
        return self.base(position) + self.capacity - position

    def wanted(self, position: int) -> int:
        """The oldest position that attention needs once ``rollback`` of so many tokens have been taken back."""
        return max(0, position - self.rollback - self.window + 1)


def row_groups(plan: KvPlan) -> list[RowGroup]:
    """The layers of a plan that keep alike. What a ring keeps for rollback is set aside, and not in its buffer."""
    groups: dict[tuple[int, int], list[KvLayer]] = {}
    for layer in plan.layers:
        capacity = layer.capacity - plan.rollback if layer.layout == "ring" else layer.capacity
        # A window may be longer than the whole context.
        groups.setdefault((min(layer.window or capacity, capacity), capacity), []).append(layer)
    return [RowGroup(tuple(layers), *key, plan.rollback) for key, layers in groups.items()]


def allocate(group: RowGroup, slots: int) -> Rows:
    """Memory ``[slots, heads, capacity, head_dim]`` for each layer's keys and values.

    Raises:
        MemoryError: there is none.
    """
    shapes = [
        (slots, layer.heads, group.capacity, layer.head_dim) for layer in group.layers for _ in range(2)
    ]
    types = [_TYPES[layer.dtype] for layer in group.layers for _ in range(2)]
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, types)]
    starts = [0, *accumulate(map(align, sizes))]
    memory = private_memory(starts[-1])
    return [
        memory[start : start + size].view(dtype).reshape(shape)
        for start, size, shape, dtype in zip(starts, sizes, shapes, types)
    ]


class Buffers:
    """The memory of one group, for one sequence or several that share it.

    Attributes:
        arrays: ``[1, heads, capacity, head_dim]``, of each layer its keys and then its values.
        holders: whoever needs rows of it.
        used: rows that were ever written; the others take no memory yet.
    """

    def __init__(self, arrays: Rows) -> None:
        self.arrays = arrays
        self.holders: WeakSet[GroupRows] = WeakSet()
        self.used = 0

    @classmethod
    def new(cls, group: RowGroup) -> Buffers:
        """Buffers of their own.

        Raises:
            MemoryError: there is none for them.
        """
        return cls(allocate(group, 1))

    @property
    def is_shared(self) -> bool:
        """Whether several sequences need what it holds."""
        return len(self.holders) > 1

    def vacate(self, group: RowGroup) -> None:
        """Let all holders have what they hold in buffers elsewhere, which they share as they did these.

        Raises:
            MemoryError: there is none for those.
        """
        buffers = Buffers.new(group)
        buffers.fill(0, [array[:, :, : self.used] for array in self.arrays])
        for holder in list(self.holders):
            holder.buffers = buffers
            buffers.holders.add(holder)
        self.holders.clear()
        self.used = 0

    def fill(self, row: int, rows: Rows) -> None:
        """Write these, the first of them to ``row``."""
        end = row + rows[0].shape[2]
        for array, source in zip(self.arrays, rows):
            array[:, :, row:end] = source
        self.used = max(self.used, end)

    @cached_property
    def row_bytes(self) -> int:
        """The bytes of one position."""
        return sum(array.nbytes // array.shape[2] for array in self.arrays)


class GroupRows:
    """What one sequence holds of one group: positions ``first`` and following.

    Those from ``base`` on lie in the buffers, from row 0 on; those before have been set aside. Rows that others see
    too are never written: a sequence appends in place from ``writable_from`` on, and before that to a copy.
    """

    def __init__(
        self, group: RowGroup, buffers: Buffers, base: int, first: int, aside: Rows, writable_from: int = 0
    ) -> None:
        self.group, self.buffers, self.base, self.first, self.aside = group, buffers, base, first, aside
        self.writable_from = writable_from
        buffers.holders.add(self)

    @classmethod
    def of(cls, group: RowGroup, position: int, first: int, rows: Rows, buffers: Buffers) -> GroupRows:
        """Rows of positions ``first`` to ``position - 1``, copied to where a next step expects them."""
        base = group.base(position)
        buffers.fill(max(first - base, 0), [source[:, :, max(base - first, 0) :] for source in rows])
        aside = [source[:, :, : base - first].copy() for source in rows] if first < base else []
        return cls(group, buffers, base, first, aside)

    @property
    def oldest(self) -> int:
        """The least number of tokens whose last window is still held."""
        return self.first + self.group.window - 1 if self.first else 0

    def fork(self, position: int) -> GroupRows:
        """The same rows for another sequence, which copies them before it writes. This one goes on in place."""
        self.writable_from = max(self.writable_from, position) if self.buffers.is_shared else position
        never = self.base + self.group.capacity
        return GroupRows(self.group, self.buffers, self.base, self.first, self.aside, never)

    def rows(self, first: int, end: int) -> Rows:
        """Positions ``first`` to ``end - 1``, all of them held; views where they lie in one piece."""
        inside = slice(max(first - self.base, 0), max(end - self.base, 0))
        later = [array[:, :, inside] for array in self.buffers.arrays]
        if first >= self.base:
            return later
        start = self.base - self.aside[0].shape[2]
        earlier = [array[:, :, first - start : end - start] for array in self.aside]
        return [np.concatenate(pair, axis=2) for pair in zip(earlier, later)]

    def stays(self, position: int, end: int) -> bool:
        """Whether a run from ``position`` tokens to ``end`` can use the buffers as they are."""
        base = self.group.base(position)
        if base != self.base or base != self.group.base(end):  # taken back over a jump, or going to jump
            return False
        return position >= self.writable_from or not self.buffers.is_shared

    def extended(self, position: int, end: int, into: Buffers | None = None) -> GroupRows:
        """What will be held when a run has taken the sequence from ``position`` tokens to ``end``.

        The run is to use these buffers, which are ready for it: the same ones as now if it can, or ``into``, which
        nobody holds. Until it is done this object stays as good as it was: a run only adds rows, and jumps in buffers
        of its own.

        Raises:
            MemoryError: there is none for a copy.
        """
        group, rows = self.group, self
        base, after = group.base(position), group.base(end)
        if into is not None or not self.stays(position, end):
            rows = self._copy(position, after > base, into or Buffers.new(group))
        rows.buffers.used = max(rows.buffers.used, min(end - base, group.capacity))
        if after == base:
            return rows
        first = max(self.first, min(after, group.wanted(end)))
        aside = [array.copy() for array in self.rows(first, after)] if first < after else []
        return GroupRows(group, rows.buffers, after, first, aside)

    def _copy(self, position: int, jumps: bool, into: Buffers) -> GroupRows:
        """The same rows in other buffers; before a jump, those that attention sees are enough."""
        group = self.group
        if group.base(position) != self.base:
            return GroupRows.of(group, position, self.first, self.rows(self.first, position), into)
        first = max(self.first, self.base, position - group.window + 1 if jumps else 0)
        into.fill(first - self.base, self.rows(first, position))
        return GroupRows(group, into, self.base, self.first, self.aside)


class OnnxCache:
    """Keys and values of one sequence; see :class:`rlxc.runtime.engines.Cache`."""

    def __init__(self, position: int, groups: Sequence[GroupRows]) -> None:
        self.position, self.groups = position, list(groups)

    @property
    def oldest(self) -> int:
        """See the protocol."""
        return max(group.oldest for group in self.groups)

    def truncate(self, position: int) -> None:
        """See the protocol. Rows that must move for it do so before the next step."""
        assert self.oldest <= position <= self.position
        self.position = position

    def fork(self) -> OnnxCache:
        """See the protocol."""
        return OnnxCache(self.position, [rows.fork(self.position) for rows in self.groups])

    @property
    def memory(self) -> dict[int, int]:
        """See the protocol."""
        memory = {}
        for rows in self.groups:
            memory[id(rows.buffers)] = rows.buffers.used * rows.buffers.row_bytes
            memory |= {id(array): array.nbytes for array in rows.aside}
        return memory

    def rows(self) -> list[KvRows]:
        """See the protocol."""
        held: dict[int, KvRows] = {}
        for rows in self.groups:
            arrays = [_by_position(array) for array in rows.rows(rows.first, self.position)]
            for layer, keys, values in zip(rows.group.layers, arrays[::2], arrays[1::2]):
                held[layer.index] = KvRows(rows.first, keys, values)
        return [held[index] for index in sorted(held)]


def empty_cache(groups: Sequence[RowGroup]) -> OnnxCache:
    """A cache that holds nothing.

    Raises:
        MemoryError: there is none for its buffers.
    """
    return OnnxCache(0, [GroupRows(group, Buffers.new(group), 0, 0, []) for group in groups])


def loaded_cache(groups: Sequence[RowGroup], position: int, layers: Sequence[KvRows]) -> OnnxCache:
    """A cache of ``position`` tokens with the rows that :meth:`OnnxCache.rows` gave, one of each layer of the plan.

    Raises:
        MemoryError: there is none for its buffers.
    """
    held = []
    for group in groups:
        kept = [(layer, layers[layer.index]) for layer in group.layers]
        arrays = [_by_head(part, layer) for layer, rows in kept for part in (rows.keys, rows.values)]
        held.append(GroupRows.of(group, position, kept[0][1].first, arrays, Buffers.new(group)))
    return OnnxCache(position, held)


def _by_position(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy ``[n, kv_dim]`` of rows ``[1, heads, n, head_dim]``."""
    _, heads, count, dim = array.shape
    return np.array(array[0].transpose(1, 0, 2)).reshape(count, heads * dim)


def _by_head(rows: npt.NDArray[Any], layer: KvLayer) -> npt.NDArray[Any]:
    """Rows ``[n, kv_dim]`` as ``[1, heads, n, head_dim]``."""
    return rows.reshape(len(rows), layer.heads, layer.head_dim).transpose(1, 0, 2)[None]
