"""``y = x W^T + bias`` with f32 activations: weights in float formats, and packed ones when nothing may be rounded.

Each weight becomes an f32 in a register, without its scale if nothing else is added to it, where all tokens of a pass
multiply it; sums are f32, and the scale multiplies those of its sub-block. Formats with a codebook whose values are no
integers are multiplied so even if activations are rounded elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx import Cast

from rlxc.backends.tvm.kernels.codebook import Codebook
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
    pieces_of,
    serial,
    view,
    when,
)
from rlxc.backends.tvm.kernels.lora import LoraUp, UpTile
from rlxc.backends.tvm.kernels.matmul import FEW, IN_ORDER, Places
from rlxc.backends.tvm.kernels.output import OutputRows, TileRows
from rlxc.backends.tvm.kernels.tiles import SubBlock, TileReader
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, GROUPS, TILE, FloatLayout, Layout, PackedLayout
from rlxc.dtypes import DType

_TOGETHER = 16
"""Columns of floats that are added up on their own, while the CPU begins with the next ones."""

_DTYPES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "uint16"}


def exact_matmul_kernel(
    vectors: Vectors,
    knobs: Knobs,
    layout: Layout,
    output: OutputRows,
    *,
    stride: int,
    bias: bool,
    lora: LoraUp | None = None,
) -> Kernel:
    """The kernel for one weight's layout.

    Its knobs are those of :func:`~rlxc.backends.tvm.kernels.matmul.matmul_kernel`.

    Its parameters: the weight's bytes; x f32 ``[tokens, columns]``, ``stride`` numbers from token to token; the bias
    f32 ``[rows]`` if there is one; the output, f32 ``[tokens, rows]`` as ``output`` says; the number of tokens;
    what ``lora`` takes.
    """

    def body(weight: Buffer, x: Buffer, *rest: Buffer) -> None:
        bias_buffer = rest[0] if bias else None
        out, count, *stacks = rest[bias:]
        product = ExactProduct(
            vectors, knobs["prefetch"], layout, weight, x, stride, bias_buffer, out, output
        )
        with parallel(layout.tiles) as index:
            tile = bind(Cast("int64", index))
            added = None
            if lora is not None:
                added = UpTile(vectors, lora, stacks, tile, layout.tile)
                with when(count <= FEW):
                    added.prefetch()
            for_tokens(
                count,
                pieces_of(knobs["tokens"]),
                lambda tokens, start: product.emit(tile, tokens, start, added),
            )

    params: list[Pointer | Number] = [Pointer("weight", "int8"), Pointer("x", "float32")]
    if bias:
        params.append(Pointer("bias", "float32"))
    name = f"matmul_exact_{layout.name}_{stride}_{output.name}{'_bias' if bias else ''}"
    params += [Pointer("out", "float32"), Number("tokens")]
    if lora is not None:
        name, params = f"{name}_{lora.name}", [*params, *lora.params]
    return Kernel(name, tuple(params), body)


@dataclass(frozen=True)
class ExactProduct:
    """The buffers of one product; emits the code for a tile and some tokens."""

    vectors: Vectors
    prefetch: int
    layout: Layout
    weight: Buffer
    x: Buffer
    stride: int
    bias: Buffer | None
    out: Buffer
    output: OutputRows
    places: Places = IN_ORDER

    def emit(self, tile: Expr, tokens: int, start: Expr, added: UpTile | None = None) -> None:
        """All rows of the tile, times ``tokens`` tokens from ``start`` on."""
        vectors = self.vectors
        rows = [bind(self.places.read(start + token) * self.stride) for token in range(tokens)]
        written = [self.places.write(start + token) for token in range(tokens)]
        stored = self.places.first_tile + tile
        for first in range(0, self.layout.tile, vectors.lanes):
            sums = [Register(vectors.lanes, vectors.splat(0.0)) for _ in range(tokens)]
            if isinstance(self.layout, PackedLayout):
                self._packed(TileReader(vectors, self.layout, self.weight, stored, first), sums, rows)
            else:
                self._float(self.layout, stored, first, sums, rows)
            if added is not None:
                added.add(sums, start, first)
            place = TileRows(tile, first, stored, self.layout.tile)
            self.output.finish(vectors, sums, self.bias, self.out, written, place)

    def _float(
        self, layout: FloatLayout, tile: Expr, first: int, sums: list[Register], rows: list[Expr]
    ) -> None:
        vectors = self.vectors
        values = view(self.weight, _DTYPES[layout.dtype])
        start = bind(tile * (layout.columns * TILE) + first)
        widen = vectors.widen_bf16 if layout.dtype is DType.BF16 else vectors.floats

        def add(first_column: Expr, columns: int) -> None:
            # Sums of its own, since each addition waits for the one before. However many tokens share a pass, they are
            # added in one order: a token's bits do not depend on others.
            own = [Register(vectors.lanes, vectors.splat(0.0)) for _ in rows]
            for index in range(columns):
                column = bind(first_column + index)
                weight = vectors.load(values, start + column * TILE)
                self._multiply(bind(widen(weight)), column, own, rows)
            for total, added in zip(sums, own):
                total.set(total.get() + added.get())

        whole = layout.columns // _TOGETHER
        with serial(whole) as block:
            add(bind(block * _TOGETHER), _TOGETHER)
        if layout.columns % _TOGETHER:
            add(whole * _TOGETHER, layout.columns % _TOGETHER)

    def _packed(self, reader: TileReader, sums: list[Register], rows: list[Expr]) -> None:
        vectors, layout = self.vectors, reader.layout
        low = vectors.splat(layout.low, "int32")
        codebook = None
        if layout.format.codebook is not None and not layout.has_integers:
            codebook = Codebook(vectors, layout.format.codebook)

        def add(part: SubBlock) -> None:
            # Sums of its own, since each addition waits for the one before.
            own = [Register(vectors.lanes, vectors.splat(0.0)) for _ in rows]
            for group in part.groups:
                words = bind(vectors.as_words(reader.numbers(part, group)))
                for i in range(BLOCK // GROUPS):
                    number = (words >> vectors.splat(8 * i, "int32")) & vectors.splat(0xFF, "int32")
                    value = codebook[number] if codebook else vectors.floats(number + low)
                    if part.minimum is not None:
                        value = value * part.scale - part.minimum
                    column = part.block * BLOCK + group * (BLOCK // GROUPS) + i
                    self._multiply(bind(value), column, own, rows)
            for total, added in zip(sums, own):
                if part.minimum is None:
                    total.set(vectors.fma(added.get(), part.scale, total.get()))
                else:
                    total.set(total.get() + added.get())

        reader.walk(self.prefetch if len(rows) <= FEW else 0, add)

    def _multiply(self, weight: Expr, column: Expr, sums: list[Register], rows: list[Expr]) -> None:
        for at, total in zip(rows, sums):
            total.set(self.vectors.fma(weight, self.vectors.splat(self.x[at + column]), total.get()))
