"""Reading a packed weight's tiles: vectors of codes, of scales and of minimums, for some rows of a tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlxc.backends.tvm.kernels.codebook import ByteTable
from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, bind, prefetch, serial
from rlxc.backends.tvm.kernels.scales import StoredScales
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, GROUPS, PackedLayout
from rlxc.weights.fields import Scale

_LINE = 64


@dataclass(frozen=True)
class SubBlock:
    """A sub-block of some rows.

    Attributes:
        block: the block of 32 columns that it is in.
        index: its own number among the sub-blocks of a row.
        groups: its groups of four columns in the block.
        scale: f32, a vector.
        minimum: f32, a vector, if the format has minimums.
        ahead: how many bytes before they are read codes are asked for; 0 if they are not.
    """

    block: Expr
    index: Expr
    groups: range
    scale: Expr
    minimum: Expr | None
    ahead: int


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
        self._table = ByteTable(vectors, layout.table) if layout.table else None
        self._group_bytes = 4 * layout.tile

    def walk(self, ahead: int, visit: Callable[[SubBlock], None], *, flush: bool = False) -> None:
        """Visit all sub-blocks in order.

        Args:
            ahead: how many bytes before they are read codes are asked for; 0 if they are not.
            visit: emits the code for a sub-block.
            flush: as :class:`~rlxc.backends.tvm.kernels.scales.StoredScales` has it.
        """
        layout = self.layout
        sub_block = layout.format.sub_block
        parts = BLOCK // sub_block
        blocks = max(1, layout.scale_columns // BLOCK)
        with serial(layout.blocks // blocks) as super_block:
            shared = None
            if layout.scale_columns >= BLOCK:
                shared = self._scales(super_block, flush)
            with serial(blocks) as number:
                block = bind(super_block * blocks + number)
                for part in range(parts):
                    index = bind(block * parts + part)
                    scale, minimum = shared or self._scales(
                        index // (layout.scale_columns // sub_block), flush
                    )
                    if layout.has_factors:
                        scale = bind(scale * self._factor("scale_factors", index))
                        if minimum is not None:
                            minimum = bind(minimum * self._factor("minimum_factors", index))
                    visit(SubBlock(block, index, groups_of(sub_block, part), scale, minimum, ahead))

    def numbers(self, part: SubBlock, group: int) -> Expr:
        """The stored numbers of one of a sub-block's groups: ``uint8 [rows, 4]``."""
        line = group * self._group_bytes
        if part.ahead and group < self.layout.bits and line % _LINE == 0:
            self._prefetch(part, line)
        codes = self.codes(part.block, group)
        return codes if self._table is None else self._table[codes]

    def codes(self, block: Expr, group: int) -> Expr:
        """The unsigned codes of a group, ``layout.shift`` bits to the left: ``uint8 [rows, 4]``."""
        vectors, layout = self.vectors, self.layout
        if layout.planes == (8,):
            return self._plane(block, group)
        word = None
        first, low = 0, layout.shift
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

    def _prefetch(self, part: SubBlock, line: int) -> None:
        """Ask for one of the lines of codes to come, as many as a block has; several at once would be too many."""
        block = self._start("codes") + part.block * (self.layout.bits * self._group_bytes)
        prefetch(self._bytes, block + part.ahead + line)

    def _scales(self, index: Expr, flush: bool) -> tuple[Expr, Expr | None]:
        """The ``index``-th scale and minimum of the rows, as stored."""
        format = self.layout.format
        minimum = bind(self._float("minimum", format.minimum, index, flush)) if format.minimum else None
        return bind(self._float("scale", format.scale, index, flush)), minimum

    def _plane(self, block: Expr, index: int) -> Expr:
        start = self._start("codes") + 4 * self._first
        return self.vectors.load_bytes(
            self._bytes, start + (block * self.layout.bits + index) * self._group_bytes
        )

    def _float(self, section: str, scale: Scale | None, index: Expr, flush: bool) -> Expr:
        assert scale is not None
        stored = StoredScales(self._bytes, scale.kind, scale.unit, flush=flush)
        return stored.read(self._start(section), self._first + index * self.layout.tile, self.vectors.lanes)

    def _factor(self, section: str, index: Expr) -> Expr:
        start = self._start(section) + self._first
        return self.vectors.floats(self.vectors.load(self._bytes, start + index * self.layout.tile))

    def _start(self, section: str) -> Expr:
        found = self.layout.sections[section]
        return found.offset + self._tile * found.tile_bytes


def groups_of(sub_block: int, part: int) -> range:
    """The groups of the ``part``-th sub-block of a block of 32."""
    size = sub_block // (BLOCK // GROUPS)
    return range(part * size, (part + 1) * size)
