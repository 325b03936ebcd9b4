"""Where LoRA adapters meet a compiled model: which matrices take them, and how an adapter lies in memory.

An adapter's ranks are cut into units of 16, the last one padded with zeros, so that adapters of any rank are made of
the same units and swap without compiling again. A unit holds 16 ranks for every matrix of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rlxc.artifact.alignment import align
from rlxc.artifact.fields import Count, Index
from rlxc.dtypes import DType

UNIT_RANK = 16
"""Ranks of a unit; also the rows of B that lie side by side in it."""

DEFAULT_MAX_RANK = 128
"""Ranks that a sequence's stack of adapters can have, unless the user says otherwise."""


@dataclass(frozen=True)
class LoraPart:
    """A matrix ``[rows, columns]`` that takes adapters.

    ``tensor`` is its name in the model file. Its B is rows ``first_row`` and following of the graph input ``up``, which
    has ``up_rows`` in all: the matrix may be stacked with others in one product.
    """

    tensor: str
    rows: Count
    columns: Count
    up: str
    first_row: Index
    up_rows: Count


@dataclass(frozen=True)
class LoraGroup:
    """Matrices that read one input: their A's are parts of one graph input ``down``.

    ``kind`` is ``linear``, or ``embedding`` for a table whose rows are looked up: its A is ``[rank, vocab]``.
    """

    kind: Literal["linear", "embedding"]
    down: str
    parts: tuple[LoraPart, ...]


@dataclass(frozen=True)
class UnitPart:
    """Where one matrix's share of a unit lies, in bytes from its start.

    ``down`` is A as ``[columns, 16 ranks]``. ``up`` is B as ``[tiles, 16 ranks, 16 rows]``: tiles of the product's rows
    from number ``first_tile`` on; rows of other matrices in them are zero.
    """

    down: int
    up: int
    first_tile: int
    tiles: int


@dataclass(frozen=True)
class LoraPlan:
    """Which matrices take adapters while the model runs.

    Adapters' numbers are kept as ``dtype``. A sequence's stack has at most ``max_rank`` ranks, counted in whole units.
    """

    dtype: DType
    max_rank: Count
    groups: tuple[LoraGroup, ...]

    @property
    def parts(self) -> tuple[LoraPart, ...]:
        """All matrices, in the order in which a unit holds them."""
        return tuple(part for group in self.groups for part in group.parts)

    @property
    def max_units(self) -> int:
        """Units of a stack at most."""
        return self.max_rank // UNIT_RANK

    @property
    def unit(self) -> tuple[UnitPart, ...]:
        """Where each of :attr:`parts` lies in a unit.

        A unit starts with a byte for each part, 1 if the adapter has that matrix; numbers follow, from multiples of 64
        on.
        """
        return self._layout[0]

    @property
    def unit_bytes(self) -> int:
        """The size of a unit."""
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[tuple[UnitPart, ...], int]:
        itemsize = {DType.F32: 4, DType.F16: 2}[self.dtype]
        offset, places = align(len(self.parts)), []
        for part in self.parts:
            first_tile = part.first_row // UNIT_RANK
            tiles = -(-(part.first_row + part.rows) // UNIT_RANK) - first_tile
            up = offset + align(part.columns * UNIT_RANK * itemsize)
            places.append(UnitPart(offset, up, first_tile, tiles))
            offset = up + align(tiles * UNIT_RANK * UNIT_RANK * itemsize)
        return tuple(places), offset
