"""Reading a packed weight's tiles: vectors of codes, of scales and of minimums, for some rows of a tile."""

from __future__ import annotations

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, prefetch, size_of, view
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, GROUPS, TILE, PackedLayout

_GROUP_BYTES = 4 * TILE


class TileReader:
    """Reads ``lanes`` rows, starting at row ``first`` of a tile, of a packed weight.

    Args:
        vectors: the vectors to read.
        layout: how the weight lies.
        weight: its bytes, an int8 buffer.
        tile: which tile, an int64.
        first: which rows of it.
    """

    def __init__(
        self, vectors: Vectors, layout: PackedLayout, weight: Buffer, tile: Expr, first: int
    ) -> None:
        self.vectors, self.layout, self._first, self._tile = vectors, layout, first, tile
        self._bytes = weight
        self._floats = view(weight, layout.scale_type)

    def codes(self, block: Expr, group: int) -> Expr:
        """The unsigned codes of a group: ``uint8 [rows, 4]``."""
        vectors, layout = self.vectors, self.layout
        if layout.planes == (8,):
            return self._plane(block, group)
        word = None
        first = low = 0
        for width in layout.planes:
            part = vectors.as_words(self._plane(block, first + group % width))
            shift = group // width * width - low
            if shift:
                amount = vectors.splat(abs(shift), "int32")
                part = part >> amount if shift > 0 else part << amount
            mask = ((1 << width) - 1 << low) * 0x01010101
            part = part & vectors.splat(mask - (mask >> 31 << 32), "int32")
            word = part if word is None else word | part
            first += width
            low += width
        return vectors.as_bytes(word)

    def prefetch(self, block: Expr, distance: int) -> None:
        """Ask for the codes ``distance`` bytes after those of a block, as many bytes as a block has."""
        start = self._start("codes") + block * (self.layout.bits * _GROUP_BYTES) + distance
        for line in range(self.layout.bits):
            prefetch(self._bytes, start + line * _GROUP_BYTES)

    def scale(self, block: Expr) -> Expr:
        """The scale of a block of the format, as f32."""
        return self._float("scale", block)

    def minimum(self, block: Expr) -> Expr:
        """The minimum of a block of the format, as f32."""
        return self._float("minimum", block)

    def scale_factor(self, sub_block: Expr) -> Expr:
        """The integer that multiplies the scale in a sub-block, as f32."""
        return self._factor("scale_factors", sub_block)

    def minimum_factor(self, sub_block: Expr) -> Expr:
        """The integer that multiplies the minimum in a sub-block, as f32."""
        return self._factor("minimum_factors", sub_block)

    def _plane(self, block: Expr, index: int) -> Expr:
        start = self._start("codes") + 4 * self._first
        return self.vectors.load_bytes(self._bytes, start + (block * self.layout.bits + index) * _GROUP_BYTES)

    def _float(self, section: str, index: Expr) -> Expr:
        start = self._start(section) // size_of(self.layout.scale_type) + self._first
        return self.vectors.floats(self.vectors.load(self._floats, start + index * TILE))

    def _factor(self, section: str, index: Expr) -> Expr:
        start = self._start(section) + self._first
        return self.vectors.floats(self.vectors.load(self._bytes, start + index * TILE))

    def _start(self, section: str) -> Expr:
        found = self.layout.sections[section]
        return found.offset + self._tile * found.tile_bytes


def groups_of(sub_block: int, part: int) -> range:
    """The groups of the ``part``-th sub-block of a block of 32."""
    size = sub_block // (BLOCK // GROUPS)
    return range(part * size, (part + 1) * size)
