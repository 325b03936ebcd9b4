"""``y = x W^T + bias`` with a packed weight and int8 activations.

The weight's codes are multiplied as they are, four at a time, and never unpacked to memory. A task takes ``tiles``
tiles of 16 rows and multiplies them with all tokens, ``tokens`` at a time, so that every weight is read from memory
once. With centre ``c``, sub-blocks ``s``, activation scale ``a``:

    y = sum_s  scale_s a_s (codes_s . int8_s - c sum(int8_s))  +  sum_s (c scale_s - minimum_s) sum(x_s)

The second sum is there for formats with minimums only; in others the centre is the code of zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx import Cast

from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Expr,
    Kernel,
    Knobs,
    Number,
    Pointer,
    Register,
    bind,
    for_tokens,
    parallel,
    serial,
    view,
)
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.tiles import TileReader, groups_of
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, GROUPS, TILE, PackedLayout

FEW = 2
"""Tokens up to which reading weights takes longer than multiplying them."""


def matmul_kernel(
    vectors: Vectors, knobs: Knobs, layout: PackedLayout, output: OutputRows, *, bias: bool
) -> Kernel:
    """The kernel for one weight's layout.

    Its knobs: ``tokens`` that share a pass over a tile, so many that their sums stay in registers; ``prefetch``, how
    many bytes ahead the weight is asked for where reading it takes longer than multiplying it.

    Its parameters: the weight's bytes; activations as :class:`QuantisedRow` rows; the bias f32 ``[rows]`` if there is
    one; the output, f32 ``[tokens, rows]`` with the stride of ``output``; the number of tokens.
    """
    row = QuantisedRow.of(layout, vectors)

    def body(weight: Buffer, activations: Buffer, *rest: Buffer) -> None:
        bias_buffer = rest[0] if bias else None
        out, count = rest[-2:]
        ints, floats = view(activations, "int32"), view(activations, "float32")
        product = _Product(
            vectors, knobs["prefetch"], layout, row, weight, ints, floats, bias_buffer, out, output
        )
        with parallel(layout.tiles) as index:
            tile = bind(Cast("int64", index))
            for_tokens(count, knobs["tokens"], lambda tokens, start: product.emit(tile, tokens, start))

    params = [Pointer("weight", "int8"), Pointer("activations", "int8")]
    if bias:
        params.append(Pointer("bias", "float32"))
    name = f"matmul_{layout.dtype}_{layout.rows}x{layout.columns}_{output.stride}{'_bias' if bias else ''}"
    return Kernel(name, (*params, Pointer("out", "float32"), Number("tokens")), body)


@dataclass(frozen=True)
class _Product:
    """The buffers of one product; emits the code for a tile and some tokens."""

    vectors: Vectors
    prefetch: int
    layout: PackedLayout
    row: QuantisedRow
    weight: Buffer
    ints: Buffer
    floats: Buffer
    bias: Buffer | None
    out: Buffer
    output: OutputRows

    def emit(self, tile: Expr, tokens: int, start: Expr) -> None:
        """All rows of the tile, times ``tokens`` tokens from ``start`` on."""
        vectors = self.vectors
        rows = [bind((start + token) * self.row.stride) for token in range(tokens)]
        for first in range(0, TILE, vectors.lanes):
            reader = TileReader(vectors, self.layout, self.weight, tile, first)
            sums = [Register(vectors.lanes, vectors.splat(0.0)) for _ in range(tokens)]
            self._accumulate(reader, sums, rows)
            if self.bias is not None:
                biases = bind(vectors.load(self.bias, tile * TILE + first))
                for total in sums:
                    total.set(total.get() + biases)
            for token, total in enumerate(sums):
                self.output.store(vectors, self.out, start + token, tile, first, total)

    def _accumulate(self, reader: TileReader, sums: list[Register], rows: list[Expr]) -> None:
        """Add all columns to the sums."""
        format = self.layout.format
        per_scale = format.block_size // BLOCK
        with serial(self.row.blocks // per_scale) as super_block:
            scale = bind(reader.scale(super_block))
            minimum = bind(reader.minimum(super_block)) if format.has_mins else None
            with serial(per_scale) as index:
                block = bind(super_block * per_scale + index)
                if len(rows) <= FEW and self.prefetch:
                    reader.prefetch(block, self.prefetch)
                for part in range(BLOCK // self.row.sub_block):
                    self._sub_block(reader, sums, rows, block, part, scale, minimum)

    def _sub_block(
        self,
        reader: TileReader,
        sums: list[Register],
        rows: list[Expr],
        block: Expr,
        part: int,
        scale: Expr,
        minimum: Expr | None,
    ) -> None:
        """Add the ``part``-th sub-block of a block of 32 columns."""
        vectors, row, layout = self.vectors, self.row, self.layout
        ints, floats = self.ints, self.floats
        sub_block = bind(block * (BLOCK // row.sub_block) + part)
        dots = [
            Register(vectors.lanes, vectors.splat(ints[(at + row.starts) // 4 + sub_block]), "int32")
            for at in rows
        ]
        for group in groups_of(row.sub_block, part):
            codes = bind(reader.codes(block, group))
            for at, dot in zip(rows, dots):
                word = ints[at // 4 + block * GROUPS + group]
                dot.set(vectors.dot(dot.get(), codes, word, layout.max_code))
        if layout.has_factors:
            scale = bind(scale * reader.scale_factor(sub_block))
        for at, dot, total in zip(rows, dots, sums):
            activation_scale = vectors.splat(floats[(at + row.scales) // 4 + block])
            total.set(vectors.fma(vectors.floats(dot.get()), scale * activation_scale, total.get()))
        if minimum is None:
            return
        if layout.has_factors:
            minimum = minimum * reader.minimum_factor(sub_block)
        rest = bind(scale * vectors.splat(float(layout.centre)) - minimum)
        for at, total in zip(rows, sums):
            total.set(vectors.fma(rest, vectors.splat(floats[(at + row.sums) // 4 + sub_block]), total.get()))
