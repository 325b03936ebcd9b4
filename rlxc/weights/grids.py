"""Codes that are looked up in a grid: an index gives four or eight of them at once, and signs follow.

The grids are data of ``gguf``, taken from it when a format is first read. A code is a place in the grid's list of
values, plus the length of that list where the weight is negative, so that codes are indices into a codebook as in all
formats that have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import quants

from rlxc.errors import WeightError
from rlxc.weights.fields import Bits, Bytes, Codes, Unsigned, stacked, write_stacked

GridName = Literal["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
"""The type whose class in ``gguf`` has the grid."""

Words = npt.NDArray[np.uint64]

_WORD = 8  # codes that lie in a uint64


@dataclass(frozen=True)
class GridCodes:
    """The codes of a block.

    Attributes:
        grid: which grid.
        index: fields of the indices into it, from the lowest bits up.
        signs: a sign for each weight, eight in an integer of 8 bits, the first in the lowest. In one of 7 bits the
            eighth makes the number of negative weights even. One of 1 bit is a sign that several weights share.
    """

    grid: GridName
    index: tuple[Bits, ...]
    signs: Bits

    @property
    def count(self) -> int:
        """How many codes a block holds."""
        return self.index[0].count * int(_grid(self.grid).codes.shape[1])

    @property
    def low(self) -> int:
        """The least code there can be."""
        return 0

    @property
    def high(self) -> int:
        """The greatest code there can be."""
        return 2 * self._magnitudes - 1

    def read(self, blocks: Bytes) -> Codes:
        """The codes, ``[blocks, count]``, from ``[blocks, block_bytes]``."""
        words = np.take(_grid(self.grid).words, stacked(self.index, blocks)).view(np.uint64)
        signs = np.take(self._sign_words, self.signs.read(blocks))
        by_sign = words.reshape(*signs.shape, words.shape[1] // signs.shape[1])
        by_sign += signs[..., None]
        return words.view(np.int8)

    def read_above_low(self, blocks: Bytes) -> Bytes:
        """The codes, ``[blocks, count]``, of which the least is 0."""
        return self.read(blocks).view(np.uint8)

    def write(self, codes: Codes, blocks: Bytes) -> None:
        """Sets the bits of the codes, all zeros so far.

        Raises:
            WeightError: four or eight codes are not in the grid, or signs are none that the format can have.
        """
        magnitudes = np.uint8(self._magnitudes)
        negative = codes.view(np.uint8) >= magnitudes
        table = _grid(self.grid).words
        words = np.ascontiguousarray(codes.view(np.uint8) - magnitudes * negative).view(table.dtype)
        order = np.argsort(table)
        place = np.minimum(np.searchsorted(table, words, sorter=order), len(table) - 1)
        write_stacked(self.index, order[place].astype(np.uint16), blocks)
        by_sign = negative.reshape(len(blocks), self.signs.count, self.count // self.signs.count)
        self.signs.write(
            np.packbits(by_sign[..., : self.signs.width], axis=2, bitorder="little")[..., 0], blocks
        )
        if not np.array_equal(self.read(blocks), codes):
            raise WeightError(
                f"codes are not in the grid of {self.grid.lower()}", remedy="choose a format without a grid"
            )

    @property
    def _magnitudes(self) -> int:
        return len(_grid(self.grid).values)

    @cached_property
    def _sign_words(self) -> Words:
        """For each integer of signs what is added to eight codes."""
        integers = np.arange(1 << self.signs.width, dtype=np.uint8)
        bits = np.unpackbits(integers[:, None], axis=1, bitorder="little")
        if self.signs.width == 7:
            bits[:, 7] = bits.sum(axis=1) % 2
        elif self.signs.width == 1:
            bits = np.repeat(bits[:, :1], _WORD, axis=1)
        added: Words = (bits * np.uint8(self._magnitudes)).view(np.uint64)[:, 0]
        return added


@dataclass(frozen=True)
class _Grid:
    """A grid: its list of values in ascending order, and the places in it, ``[indices, codes]``."""

    values: tuple[float, ...]
    codes: Bytes

    @cached_property
    def words(self) -> Unsigned:
        """The codes of each index in one integer."""
        words: Unsigned = self.codes.view(f"u{self.codes.shape[1]}")[:, 0]
        return words


@cache
def _grid(name: GridName) -> _Grid:
    data: Any = getattr(quants, name)
    data.init_grid()
    values = tuple(map(float, data.grid_map))
    return _Grid(values, np.searchsorted(values, data.grid.reshape(data.grid_shape)).astype(np.uint8))
