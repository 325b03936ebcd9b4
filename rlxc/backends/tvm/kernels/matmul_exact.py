"""``y = x W^T + bias`` with f32 activations: weights in float formats, and packed ones when nothing may be rounded.

Each weight becomes an f32 in a register, where all tokens of a pass multiply it; sums are f32. Formats with a codebook
are multiplied so even if activations are rounded elsewhere: a codebook's values are no integers.
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
from rlxc.backends.tvm.kernels.matmul import FEW
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.tiles import TileReader, groups_of
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, GROUPS, TILE, FloatLayout, Layout, PackedLayout
from rlxc.dtypes import DType

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
        product = _Product(vectors, knobs["prefetch"], layout, weight, x, stride, bias_buffer, out, output)
        with parallel(layout.tiles) as index:
            tile = bind(Cast("int64", index))
            added = None
            if lora is not None:
                added = UpTile(vectors, lora, stacks, tile)
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
    name = (
        f"matmul_exact_{layout.dtype}_{layout.rows}x{layout.columns}_{stride}_{output.stride}"
        f"{'_bias' if bias else ''}"
    )
    params += [Pointer("out", "float32"), Number("tokens")]
    if lora is not None:
        name, params = f"{name}_{lora.name}", [*params, *lora.params]
    return Kernel(name, tuple(params), body)


@dataclass(frozen=True)
class _Product:
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

    def emit(self, tile: Expr, tokens: int, start: Expr, added: UpTile | None) -> None:
        """All rows of the tile, times ``tokens`` tokens from ``start`` on."""
        vectors = self.vectors
        rows = [bind((start + token) * self.stride) for token in range(tokens)]
        for first in range(0, TILE, vectors.lanes):
            sums = [Register(vectors.lanes, vectors.splat(0.0)) for _ in range(tokens)]
            if isinstance(self.layout, PackedLayout):
                self._packed(TileReader(vectors, self.layout, self.weight, tile, first), sums, rows)
            else:
                self._float(self.layout, tile, first, sums, rows)
            if added is not None:
                added.add(sums, start, first)
            self.output.finish(vectors, sums, self.bias, self.out, start, tile, first)

    def _float(
        self, layout: FloatLayout, tile: Expr, first: int, sums: list[Register], rows: list[Expr]
    ) -> None:
        vectors = self.vectors
        values = view(self.weight, _DTYPES[layout.dtype])
        start = bind(tile * (layout.columns * TILE) + first)
        with serial(layout.columns) as column:
            weight = vectors.load(values, start + column * TILE)
            widen = vectors.widen_bf16 if layout.dtype is DType.BF16 else vectors.floats
            self._multiply(bind(widen(weight)), column, sums, rows)

    def _packed(self, reader: TileReader, sums: list[Register], rows: list[Expr]) -> None:
        layout: PackedLayout = reader.layout
        format = layout.format
        per_scale, sub_blocks = format.block_size // BLOCK, BLOCK // format.sub_block
        with serial(layout.blocks // per_scale) as super_block:
            scale = bind(reader.scale(super_block))
            minimum = bind(reader.minimum(super_block)) if format.has_mins else None
            with serial(per_scale) as index:
                block = bind(super_block * per_scale + index)
                if len(rows) <= FEW and self.prefetch:
                    reader.prefetch(block, self.prefetch)
                for part in range(sub_blocks):
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
        vectors, layout = self.vectors, reader.layout
        sub_block = bind(block * (BLOCK // layout.format.sub_block) + part)
        if layout.has_factors:
            scale = bind(scale * reader.scale_factor(sub_block))
        if minimum is not None and layout.has_factors:
            minimum = bind(minimum * reader.minimum_factor(sub_block))
        low = vectors.splat(layout.format.code_min, "int32")
        codebook = Codebook(vectors, layout.format.codebook) if layout.format.codebook else None
        for group in groups_of(layout.format.sub_block, part):
            words = bind(vectors.as_words(reader.codes(block, group)))
            for i in range(BLOCK // GROUPS):
                code = (words >> vectors.splat(8 * i, "int32")) & vectors.splat(0xFF, "int32")
                weight = (codebook[code] if codebook else vectors.floats(code + low)) * scale
                if minimum is not None:
                    weight = weight - minimum
                column = block * BLOCK + group * (BLOCK // GROUPS) + i
                self._multiply(bind(weight), column, sums, rows)

    def _multiply(self, weight: Expr, column: Expr, sums: list[Register], rows: list[Expr]) -> None:
        for at, total in zip(rows, sums):
            total.set(self.vectors.fma(weight, self.vectors.splat(self.x[at + column]), total.get()))
