"""How weights lie in the weights file: the model file's own numbers, in the order in which kernels read them.

Sixteen rows make a tile, because sixteen sums fill a vector register; or eight, where all targets have registers of
eight. In a tile, four codes of each row lie side by
side, since one instruction multiplies and adds four; eight such groups make a block of 32 columns. Codes keep their
width: they are cut into planes of 1, 2, 4 or 8 bits (five bits are four and one), and a plane of ``w`` bits takes
``w`` vectors of 64 bytes for a block, in which group ``g`` has the bits from ``g // w * w`` on of vector ``g % w``.
Scales lie as they are stored in the model file, floats and small integers, sixteen rows side by side, an integer in a
byte. So every number of a weight is exact, it takes the bytes it had (1 to 4 % more in Q3_K to Q5_K and IQ4_XS, 19 % in
Q2_K, whose integers are narrower), and a kernel reads each byte once, in order.

Some formats have codes of no width of their own. Of the eight or four weights that a number of IQ1 to IQ3 stands for,
each becomes a code of 3 bits (IQ3: 4), because finding a grid's row takes longer than reading these; five ternary
digits that share a byte in TQ1_0 become codes of 2 bits. :attr:`PackedLayout.bits_per_weight` says what that takes.

A layout chosen for a target can make codes wider, up to a plane of their own: then a kernel unpacks less. In bytes, the
numbers that a codebook has for its codes are stored instead of the codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.artifact.alignment import align
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout
from rlxc.weights.formats import FORMATS, BlockFormat, Scales

TILE = 16
"""Rows of a tile where nothing else was chosen, and of the tiles that vectors beside a matrix are padded to."""

BLOCK = 32
"""Columns of a block."""

GROUPS = 8
"""Groups of four columns in a block."""

_CODES_AT_ONCE = 1 << 19
"""Codes that are rearranged at a time: enough for numpy to be fast, few enough for the cache."""

_PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}

Bytes = npt.NDArray[np.uint8]
Chunk = dict[str, npt.NDArray[np.generic]]
"""Some tiles' part of each section."""


@dataclass(frozen=True)
class Section:
    """An array of a weight: where it starts, in bytes, and how many bytes each tile has of it."""

    offset: int
    tile_bytes: int


class _Layout(ABC):
    """What packed and float layouts share: tiles of rows, and sections one after the other."""

    dtype: DType
    rows: int
    columns: int

    @property
    def kind(self) -> str:
        """The format, and how else than by default it lies, if it does: a part of kernels' names."""
        return str(self.dtype)

    @property
    def name(self) -> str:
        """Different for different ones: a part of kernels' names."""
        return f"{self.kind}_{self.rows}x{self.columns}"

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return TILE

    @property
    def tiles(self) -> int:
        """Tiles of rows; the last one may be padded with zeros."""
        return -(-self.rows // self.tile)

    @abstractmethod
    def tile_bytes(self) -> dict[str, int]:
        """Bytes that a tile has of each section, in order."""

    @cached_property
    def sections(self) -> dict[str, Section]:
        """Where each section lies."""
        sections, offset = {}, 0
        for name, size in self.tile_bytes().items():
            sections[name] = Section(offset, size)
            offset = align(offset + size * self.tiles)
        return sections

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole weight."""
        return sum(align(section.tile_bytes * self.tiles) for section in self.sections.values())


@dataclass(frozen=True)
class PackedLayout(_Layout):
    """A packed weight ``[rows, columns]``.

    Sections: ``codes``; ``scale`` and ``minimum``, as the format stores them, one per block or several;
    ``scale_factors`` and ``minimum_factors``, the integers that multiply them in each sub-block.

    A kernel makes *stored numbers* of codes: the weight's integer less the least one there is, so none is negative.
    Of a ``chosen`` layout, bits and tile are what counts: blocks always have 32 columns.
    """

    dtype: DType
    rows: int
    columns: int
    chosen: WeightLayout | None = None

    @property
    def format(self) -> BlockFormat:
        """The format's row in the table."""
        return FORMATS[self.dtype]

    @property
    def kind(self) -> str:
        """The format, and how else than by default it lies, if it does: a part of kernels' names."""
        wide = f"_in_{self.bits}" if self.bits != self.code_bits else ""
        rows = f"_by_{self.tile}" if self.tile != TILE else ""
        return f"{self.dtype}{wide}{rows}"

    @property
    def code_bits(self) -> int:
        """The width of the format's codes."""
        return (self.format.code_max - self.format.code_min).bit_length()

    @property
    def bits(self) -> int:
        """The width that a code is stored in."""
        return self.chosen.bits if self.chosen else self.code_bits

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.chosen.tile if self.chosen else TILE

    @property
    def holds_numbers(self) -> bool:
        """Whether stored numbers lie there instead of the codes that stand for them."""
        return self.bits == 8 and self.format.integers is not None

    @property
    def planes(self) -> tuple[int, ...]:
        """The widths of the planes, from the lowest bits up."""
        return _PLANES[self.bits]

    @property
    def low(self) -> int:
        """The least integer, whose stored number is 0."""
        integers = self.format.integers
        return self.format.code_min if integers is None else min(integers)

    @property
    def table(self) -> tuple[int, ...] | None:
        """The stored number of each code, where that is not the code, :attr:`shift` bits to the left."""
        return None if self.shift or self.holds_numbers else self._numbers

    @property
    def shift(self) -> int:
        """How many bits to the left of a code its stored number is: 1 where two codes stand for -1 and 1."""
        return 1 if self.format.integers == (-1, 1) and not self.holds_numbers else 0

    @property
    def centre(self) -> int:
        """The stored number that stands for zero when activations are int8.

        In a format without minimums that is the number of zero. In one with minimums it is the middle of the codes:
        what rounding an activation does grows with what multiplies it. The kernel adds the rest with exact sums.
        """
        return 1 << self.code_bits - 1 if self.format.has_mins else -self.low

    @property
    def max_number(self) -> int:
        """The largest stored number."""
        return max(self._numbers) if self._numbers else (1 << self.code_bits) - 1

    @property
    def has_integers(self) -> bool:
        """Whether codes stand for integers, which int8 activations can be multiplied with as they are."""
        return self.format.codebook is None or self.format.integers is not None

    @property
    def scale_columns(self) -> int:
        """How many columns of a row share a scale as stored."""
        assert self.format.scale is not None
        return self.format.block_size // self.format.scale.bases

    @property
    def has_factors(self) -> bool:
        """Whether integers per sub-block multiply the scales."""
        return self.format.scale is not None and self.format.scale.factors is not None

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of the scales with it."""
        return 8 * sum(self.tile_bytes().values()) / (self.tile * self.columns)

    @property
    def blocks(self) -> int:
        """Blocks of 32 columns."""
        return self.columns // BLOCK

    def tile_bytes(self) -> dict[str, int]:
        """Bytes that a tile has of each section, in order."""
        format = self.format
        assert format.scale is not None
        sizes = {"codes": self.blocks * self.bits * 4 * self.tile}
        for name, scale in (("scale", format.scale), ("minimum", format.minimum)):
            if scale is None:
                continue
            bases = self.columns // format.block_size * scale.bases
            sizes[name] = bases * scale.base.itemsize * self.tile
            if scale.factors is not None:
                sizes[f"{name}_factors"] = self.columns // format.sub_block * self.tile
        return sizes

    def encode(self, data: Bytes) -> Chunk:
        """The sections' parts of some rows, ``uint8 [tile n, row_bytes]`` as in the model file."""
        packed = np.empty((len(data) // self.tile, self.blocks, self.bits, self.tile), np.uint32)
        tiles = max(1, _CODES_AT_ONCE // (self.tile * self.columns))
        for tile in range(0, len(packed), tiles):
            codes = self.format.codes_above_min(data[self.tile * tile : self.tile * (tile + tiles)])
            if self.holds_numbers:
                codes = np.array(self._numbers, np.uint8)[codes]
            self._pack(codes, packed[tile : tile + tiles])
        chunk: Chunk = {"codes": packed}
        for name, scales in zip(("scale", "minimum"), self.format.scales(data)):
            if scales is not None:
                chunk |= self._scale_sections(name, scales)
        return chunk

    @property
    def _numbers(self) -> tuple[int, ...] | None:
        """The stored numbers of the codes that a codebook of integers has."""
        integers = self.format.integers
        return None if integers is None else tuple(integer - self.low for integer in integers)

    def _scale_sections(self, name: str, scales: Scales) -> Chunk:
        sections: Chunk = {name: self._by_tile(scales.base)}
        if scales.factors is not None:
            sections[f"{name}_factors"] = self._by_tile(scales.factors)
        return sections

    def _by_tile(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """``[tile n, m]`` as ``[n, m, tile]``."""
        return np.ascontiguousarray(array.reshape(-1, self.tile, array.shape[1]).transpose(0, 2, 1))

    def _pack(self, codes: Bytes, packed: npt.NDArray[np.uint32]) -> None:
        """Write codes ``[tile n, columns]`` as planes; four codes of a row are one uint32."""
        words = codes.view(np.uint32).reshape(len(packed), self.tile, self.blocks, GROUPS)
        if self.planes == (8,):
            packed[...] = words.transpose(0, 2, 3, 1)
            return
        # The words of a group together, as numpy is fast where much lies side by side; for the same reason, a vector
        # is copied as one item.
        words = np.ascontiguousarray(words.transpose(3, 0, 2, 1))
        vectors = packed.view(f"V{4 * self.tile}")[..., 0]
        low = 0
        for width in self.planes:
            masked = len(self.planes) > 1  # what belongs to another plane, and comes from the next byte
            mask = np.uint32(((1 << width) - 1) * 0x01010101)
            plane = words[:width] >> np.uint32(low)
            if masked:
                plane &= mask
            for first in range(width, GROUPS, width):
                part, left = words[first : first + width], first - low
                part = part << np.uint32(left) if left >= 0 else part >> np.uint32(-left)
                if masked:
                    part &= mask << np.uint32(first)
                plane |= part
            vectors[:, :, low : low + width] = plane.view(vectors.dtype)[..., 0].transpose(1, 2, 0)
            low += width


@dataclass(frozen=True)
class FloatLayout(_Layout):
    """A weight in a float format: ``[tiles, columns, 16 rows]`` of its own type, in one section."""

    dtype: DType
    rows: int
    columns: int

    def tile_bytes(self) -> dict[str, int]:
        """Bytes that a tile has of the section."""
        return {"values": self.columns * TILE * self._element.itemsize}

    def encode(self, data: Bytes) -> Chunk:
        """The section's part of some rows, ``uint8 [16 n, row_bytes]``."""
        values = data.view(self._element).reshape(-1, TILE, self.columns)
        return {"values": np.ascontiguousarray(values.transpose(0, 2, 1))}

    @property
    def _element(self) -> np.dtype[Any]:
        return np.dtype(np.uint32 if self.dtype is DType.F32 else np.uint16)


Layout = PackedLayout | FloatLayout


def layout_of(dtype: DType, rows: int, columns: int, chosen: WeightLayout | None = None) -> Layout:
    """How a matrix of this type and shape lies; only packed ones leave a choice."""
    if dtype.is_packed:
        return PackedLayout(dtype, rows, columns, chosen)
    return FloatLayout(dtype, rows, columns)


def tiled(rows: int) -> int:
    """So many rows and what fills their last tile."""
    return -(-rows // TILE) * TILE


def in_tiles(parts: Iterable[Bytes], chunk_rows: int, tile: int = TILE) -> Iterator[Bytes]:
    """Rows as chunks of whole tiles, at most ``chunk_rows`` rows long; the last tile is padded with zeros.

    Args:
        parts: rows, ``uint8 [rows, row_bytes]``, all of one width.
        chunk_rows: a multiple of ``tile``.
        tile: rows of a tile.
    """
    rest: Bytes | None = None  # rows that did not fill a tile
    for rows in parts:
        if rest is not None:
            missing = tile - len(rest)
            rest, rows = np.concatenate([rest, rows[:missing]]), rows[missing:]
            if len(rest) < tile:
                continue
            yield rest
        whole = len(rows) // tile * tile
        for start in range(0, whole, chunk_rows):
            yield rows[start : min(start + chunk_rows, whole)]
        rest = rows[whole:] if whole < len(rows) else None
    if rest is not None:
        yield np.pad(rest, ((0, -len(rest) % tile), (0, 0)))
