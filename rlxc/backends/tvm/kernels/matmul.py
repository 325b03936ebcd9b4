"""``y = x W^T + bias`` with a packed weight and int8 activations.

The weight's codes, or the integers that they stand for in its codebook, are multiplied four at a time, as the stored
numbers of :class:`~rlxc.backends.tvm.layout.PackedLayout`. A task takes a tile of rows and multiplies it with all
tokens, some at a time, so that every weight is read from memory once; where that makes many passes, the tile's numbers
are unpacked before. With centre ``c``, sub-blocks ``s``, activation scale ``a``:

    y = sum_s  scale_s a_s (numbers_s . int8_s - c sum(int8_s))  +  sum_s (c scale_s - minimum_s) sum(x_s)

The second sum is there for formats with minimums only; in others the centre is the number of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.tirx import Cast
from tvm.tirx.script.builder import ir as T

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
    local,
    parallel,
    pieces_of,
    serial,
    view,
    when,
)
from rlxc.backends.tvm.kernels.lora import LoraUp, UpTile
from rlxc.backends.tvm.kernels.output import OutputRows, TileRows
from rlxc.backends.tvm.kernels.tiles import SubBlock, TileReader, groups_of
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, GROUPS, PackedLayout

FEW = 8
"""Tokens up to which reading weights takes longer than multiplying them."""

# From so many passes over a tile on, its codes are unpacked for all of them, into the first-level cache.
_PASSES = 3


def matmul_kernel(
    vectors: Vectors,
    knobs: Knobs,
    layout: PackedLayout,
    output: OutputRows,
    *,
    bias: bool,
    lora: LoraUp | None = None,
) -> Kernel:
    """The kernel for one weight's layout.

    Its knobs: ``tokens`` that share a pass over a tile, so many that their sums stay in registers; ``prefetch``, how
    many bytes ahead the weight is asked for where reading it takes longer than multiplying it.

    Its parameters: the weight's bytes; activations as :class:`QuantisedRow` rows; the bias f32 ``[rows]`` if there is
    one; the output, f32 ``[tokens, rows]`` with the stride of ``output``; the number of tokens; what ``lora`` takes.
    """
    row = QuantisedRow.of(layout, vectors)

    def body(weight: Buffer, activations: Buffer, *rest: Buffer) -> None:
        biases = rest[0] if bias else None
        out, count, *stacks = rest[bias:]
        ints, floats = view(activations, "int32"), view(activations, "float32")
        product = Product(vectors, layout, row, ints, floats, biases, out, output)
        with parallel(layout.tiles) as index:
            tile = bind(Cast("int64", index))
            added = None
            if lora is not None:
                added = UpTile(vectors, lora, stacks, tile, layout.tile)
                with when(count <= FEW):
                    added.prefetch()
            product.multiply(knobs, weight, tile, count, added)

    params: list[Pointer | Number] = [Pointer("weight", "int8"), Pointer("activations", "int8")]
    if bias:
        params.append(Pointer("bias", "float32"))
    name = f"matmul_{layout.name}_{output.name}{'_bias' if bias else ''}"
    params += [Pointer("out", "float32"), Number("tokens")]
    if lora is not None:
        name, params = f"{name}_{lora.name}", [*params, *lora.params]
    return Kernel(name, tuple(params), body)


def _same(token: Expr) -> Expr:
    return token


@dataclass(frozen=True)
class Places:
    """Where a product's tokens lie, and the tiles of its weight.

    Attributes:
        read: the row of the activations that a token has; by default the token's own number.
        write: the row of the results that it has.
        first_tile: the tile of the stored weight, and of the stored bias, that is the product's tile 0.
    """

    read: Callable[[Expr], Expr] = _same
    write: Callable[[Expr], Expr] = _same
    first_tile: Expr = 0


IN_ORDER = Places()
"""Tokens one after the other, and one matrix."""


@dataclass(frozen=True)
class Terms:
    """What a sub-block of some rows adds: its numbers by group, its scale, and what multiplies the sum of x, if any."""

    block: Expr
    index: Expr
    groups: range
    numbers: Callable[[int], Expr]
    scale: Expr
    rest: Expr | None


class PackedRows:
    """A weight's rows as they lie in memory."""

    def __init__(self, reader: TileReader, prefetch: int) -> None:
        self._reader, self._prefetch = reader, prefetch

    def walk(self, tokens: int, visit: Callable[[Terms], None]) -> None:
        """Visit all sub-blocks in order, on behalf of so many tokens."""
        ahead = self._prefetch if tokens <= FEW else 0
        # Rounding x changes more than leaving out the smallest scales does.
        self._reader.walk(ahead, lambda part: visit(self._terms(part)), flush=True)

    def _terms(self, part: SubBlock) -> Terms:
        reader, rest = self._reader, None
        if part.minimum is not None:
            rest = bind(part.scale * reader.vectors.splat(float(reader.layout.centre)) - part.minimum)

        def numbers(group: int) -> Expr:
            return bind(reader.numbers(part, group))

        return Terms(part.block, part.index, part.groups, numbers, part.scale, rest)


class UnpackedRows:
    """The same rows, with each number in a byte and each scale in an f32, unpacked once for many tokens."""

    def __init__(self, vectors: Vectors, layout: PackedLayout, packed: PackedRows) -> None:
        """Unpacks the rows."""
        self._vectors, self._layout = vectors, layout
        sub_blocks = layout.columns // layout.format.sub_block
        self._numbers = local(layout.columns * vectors.lanes, "int8")
        self._scales = local(sub_blocks * vectors.lanes, "float32")
        self._rests = local(sub_blocks * vectors.lanes, "float32") if layout.format.has_mins else None

        def unpack(part: Terms) -> None:
            for group in part.groups:
                vectors.store_bytes(self._numbers, self._place(part.block, group), part.numbers(group))
            vectors.store(self._scales, part.index * vectors.lanes, part.scale)
            if self._rests is not None:
                vectors.store(self._rests, part.index * vectors.lanes, part.rest)

        packed.walk(FEW, unpack)

    def walk(self, tokens: int, visit: Callable[[Terms], None]) -> None:
        """As :meth:`PackedRows.walk`."""
        vectors = self._vectors
        parts = BLOCK // self._layout.format.sub_block
        with serial(self._layout.blocks) as block:
            for part in range(parts):
                index = bind(block * parts + part)
                rest = None
                if self._rests is not None:
                    rest = bind(vectors.load(self._rests, index * vectors.lanes))
                scale = bind(vectors.load(self._scales, index * vectors.lanes))

                def numbers(group: int) -> Expr:
                    return bind(vectors.load_bytes(self._numbers, self._place(block, group)))

                groups = groups_of(self._layout.format.sub_block, part)
                visit(Terms(block, index, groups, numbers, scale, rest))

    def _place(self, block: Expr, group: int) -> Expr:
        return (block * GROUPS + group) * (4 * self._vectors.lanes)


@dataclass(frozen=True)
class Product:
    """The buffers of one product; emits the code for some rows and some tokens.

    ``ints`` and ``floats`` are the activations, :class:`QuantisedRow` rows, seen as numbers of these types.
    """

    vectors: Vectors
    layout: PackedLayout
    row: QuantisedRow
    ints: Buffer
    floats: Buffer
    bias: Buffer | None
    out: Buffer
    output: OutputRows
    places: Places = IN_ORDER

    def multiply(
        self, knobs: Knobs, weight: Buffer, tile: Expr, count: Expr, added: UpTile | None = None
    ) -> None:
        """A tile of the weight's bytes times ``count`` tokens, with :func:`matmul_kernel`'s knobs."""
        vectors, at_once = self.vectors, knobs["tokens"]
        for first in range(0, self.layout.tile, vectors.lanes):
            reader = TileReader(vectors, self.layout, weight, self.places.first_tile + tile, first)
            packed = PackedRows(reader, knobs["prefetch"])

            def run(source: PackedRows | UnpackedRows, sizes: Sequence[int], first: int = first) -> None:
                for_tokens(count, sizes, lambda n, start: self.emit(source, tile, first, n, start, added))

            with T.If(count >= _PASSES * at_once):
                with T.Then():
                    run(UnpackedRows(vectors, self.layout, packed), pieces_of(at_once))
                with T.Else():
                    run(packed, [size for size in (8, 4, 2, 1) if size <= at_once])

    def emit(
        self,
        source: PackedRows | UnpackedRows,
        tile: Expr,
        first: int,
        tokens: int,
        start: Expr,
        added: UpTile | None = None,
    ) -> None:
        """The tile's rows from ``first`` on, as ``source`` has them, times ``tokens`` tokens from ``start`` on."""
        vectors = self.vectors
        rows = [bind(self.places.read(start + token) * self.row.stride) for token in range(tokens)]
        sums = [Register(vectors.lanes, vectors.splat(0.0)) for _ in range(tokens)]
        source.walk(tokens, lambda part: self._add(part, sums, rows))
        if added is not None:
            added.add(sums, start, first)
        written = [self.places.write(start + token) for token in range(tokens)]
        place = TileRows(tile, first, self.places.first_tile + tile, self.layout.tile)
        self.output.finish(vectors, sums, self.bias, self.out, written, place)

    def _add(self, part: Terms, sums: list[Register], rows: list[Expr]) -> None:
        """Add a sub-block to the sums; ``rows`` are where the tokens' activations begin."""
        vectors, row = self.vectors, self.row
        ints, floats = self.ints, self.floats
        dots = [
            Register(vectors.lanes, vectors.splat(ints[(at + row.starts) // 4 + part.index]), "int32")
            for at in rows
        ]
        for group in part.groups:
            numbers = part.numbers(group)
            for at, dot in zip(rows, dots):
                word = ints[at // 4 + part.block * GROUPS + group]
                dot.set(vectors.dot(dot.get(), numbers, word, self.layout.max_number))
        for at, dot, total in zip(rows, dots, sums):
            scale = part.scale * vectors.splat(floats[(at + row.scales) // 4 + part.block])
            total.set(vectors.fma(vectors.floats(dot.get()), scale, total.get()))
        if part.rest is None:
            return
        for at, total in zip(rows, sums):
            sum_x = vectors.splat(floats[(at + row.sums) // 4 + part.index])
            total.set(vectors.fma(part.rest, sum_x, total.get()))
