"""LoRA beside matrix products: what each sequence's adapters add, read from units of 16 ranks.

A unit has a byte for each matrix, 1 if it changes that one; A as ``[columns, 16 ranks]``; and B as ``[tiles, 16 ranks,
16 rows]``. Units lie anywhere: kernels get the distance of each from an anchor, and pointers to where a unit at the
anchor would have what they read. Sequence ``s`` uses those from number ``starts[s]`` up to ``starts[s + 1]``, its
stack. What a unit lacks is skipped by all kernels alike, so nobody has to write zeros.

The narrow side, ``u = scale * x A^T``, is a kernel of its own, for all matrices that read x. The wide side, ``u B^T``,
is added to a product's sums while they are in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tvm.tirx import Cast, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    Register,
    bind,
    for_rows,
    for_tokens,
    local,
    parallel,
    prefetch,
    serial,
    size_of,
    when,
)
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import TILE

RANKS = 16
"""Ranks of a unit."""

_TILE_NUMBERS = TILE * RANKS

# Tokens of a sequence that one task multiplies with A, and how many of them share a load of it.
_CHUNK, _SHARING = 32, (8, 4, 1)

# One token's sums over columns are spread over so many registers, to hide the latency of adding.
_CHAINS = 4

# How far ahead one token asks for A, in bytes, and the bytes that come at a time.
_AHEAD, _LINE = 2048, 64

# So many columns times tokens are multiplied with A in about the time that a parallel region takes to begin.
_SERIAL_NUMBERS = 1024

Element = Literal["float16", "float32"]
"""How the numbers of adapters are stored."""

_STACKS = (Pointer("starts", "int32"), Pointer("units", "int64"))


@dataclass(frozen=True)
class LoraDown:
    """The narrow side: one x, and an A for each part.

    Attributes:
        element: the type of A's numbers.
        columns: those of x and of every A.
        places: where each part's A begins, in bytes from the first one's.
        units: of a stack at most; u is f32 ``[tokens, parts, units, 16]``.
    """

    element: Element
    columns: int
    places: tuple[int, ...]
    units: int

    @property
    def parts(self) -> int:
        """How many matrices read x."""
        return len(self.places)

    @property
    def width(self) -> int:
        """Numbers of u for each token."""
        return self.parts * self.units * RANKS


def lora_down_kernel(vectors: Vectors, down: LoraDown, *, stride: int) -> Kernel:
    """``u = scale * x A^T``, of every unit that a token's sequence uses.

    Its parameters: x f32 ``[tokens, columns]``, ``stride`` numbers from token to token; the anchored bytes that say
    whether the first part is there, and the first part's A; starts int32 ``[sequences + 1]``; units int64 and scales
    f32 ``[uses]``; u; the numbers of sequences and of tokens in each one's step.
    """
    size = size_of(down.element)

    def body(
        x: Buffer,
        present: Buffer,
        downs: Buffer,
        starts: Buffer,
        units: Buffer,
        scales: Buffer,
        u: Buffer,
        sequences: Expr,
        step: Expr,
    ) -> None:
        places = [const(place // size, "int64") for place in down.places]
        chunks = bind(T.truncdiv(step + (_CHUNK - 1), _CHUNK))
        tasks = bind(starts[sequences] * (down.parts * chunks))

        def task(index: Expr) -> None:
            use = bind(T.truncdiv(index, down.parts * chunks))
            part = bind(T.truncmod(T.truncdiv(index, chunks), down.parts))
            chunk = bind(T.truncmod(index, chunks) * _CHUNK)
            unit = bind(units[use])
            with when(present[unit + part] > 0):
                sequence = _sequence_of(use, starts, sequences)
                begin = bind(T.truncdiv(unit, size) + _table(places)[part])
                depth = bind(use - starts[sequence])
                first = bind(sequence * step + chunk)
                scale = bind(scales[use])

                def multiply(count: int, start: Expr) -> None:
                    tokens = [bind(first + start + token) for token in range(count)]
                    rows = [bind(token * stride) for token in tokens]
                    outs = [((token * down.parts + part) * down.units + depth) * RANKS for token in tokens]
                    for rank in range(0, RANKS, vectors.lanes):
                        sums = _sums(vectors, down.columns, x, rows, downs, begin + rank, size)
                        for out, total in zip(outs, sums):
                            vectors.store(u, out + rank, total * vectors.splat(scale))

                for_tokens(bind(T.min(step - chunk, _CHUNK)), _SHARING, multiply)

        with T.If(T.And(tasks > 1, tasks * T.min(step, _CHUNK) > _SERIAL_NUMBERS // down.columns)):
            with T.Then(), parallel(tasks) as index:
                task(index)
            with T.Else(), serial(tasks) as index:
                task(index)

    params = (
        Pointer("x", "float32"),
        Pointer("present", "int8"),
        Pointer("downs", down.element),
        *_STACKS,
        Pointer("scales", "float32"),
        Pointer("u", "float32"),
        Number("sequences"),
        Number("step"),
    )
    places = "_".join(map(str, down.places))
    return Kernel(f"lora_down_{down.element}_{down.columns}_{stride}_{places}_{down.units}", params, body)


def _sums(
    vectors: Vectors, columns: int, x: Buffer, rows: Sequence[Expr], downs: Buffer, start: Expr, size: int
) -> list[Expr]:
    """The sums over all columns, of some ranks of A from ``start`` on, for tokens whose x begin at ``rows``."""
    chains = _CHAINS if len(rows) == 1 else 1
    sums = [[Register(vectors.lanes, vectors.splat(0.0)) for _ in range(chains)] for _ in rows]

    def add(column: Expr | int, chain: int) -> None:
        a = bind(vectors.floats(vectors.load(downs, start + column * RANKS)))
        for row, of_token in zip(rows, sums):
            total = of_token[chain]
            total.set(vectors.fma(a, vectors.splat(x[row + column]), total.get()))

    with serial(columns // chains) as index:
        if len(rows) == 1:
            for number in range(0, chains * RANKS, _LINE // size):
                prefetch(downs, start + index * (chains * RANKS) + _AHEAD // size + number)
        for chain in range(chains):
            add(index * chains + chain, chain)
    for column in range(columns // chains * chains, columns):
        add(column, 0)
    for first, *others in sums:
        for other in others:
            first.set(first.get() + other.get())
    return [of_token[0].get() for of_token in sums]


def _sequence_of(use: Expr, starts: Buffer, sequences: Expr) -> Expr:
    """The sequence that a use belongs to: as many others end before it."""
    found = local(1, "int32")
    T.buffer_store(found, const(0, "int32"), [0])
    with serial(sequences - 1) as other:
        T.buffer_store(found, found[0] + Cast("int32", starts[other + 1] <= use), [0])
    return bind(found[0])


@dataclass(frozen=True)
class UpPart:
    """A part of a product's rows: it is in ``tiles`` tiles from ``first_tile`` on.

    Its B lies ``place`` bytes from the first part's.
    """

    first_tile: int
    tiles: int
    place: int


@dataclass(frozen=True)
class LoraUp:
    """The wide side: what is added to a product.

    Attributes:
        element: the type of B's numbers.
        parts: the product's, in the order of its rows.
        first: which of u's parts the first of them is.
        of: how many parts u has.
        units: of a stack at most, as u has it.
    """

    element: Element
    parts: tuple[UpPart, ...]
    first: int
    of: int
    units: int

    @property
    def name(self) -> str:
        """All of it, as part of a kernel's name."""
        parts = "_".join(f"{part.first_tile}x{part.tiles}at{part.place}" for part in self.parts)
        return f"lora_{self.element}_{parts}_{self.first}of{self.of}_{self.units}"

    @property
    def params(self) -> tuple[Pointer | Number, ...]:
        """What a kernel takes for it, after all else.

        The anchored bytes that say whether the product's first part is there, and that part's B; starts int32
        ``[sequences + 1]`` and units int64 ``[uses]``; u, as :class:`LoraDown` makes it; the numbers of sequences and
        of tokens in each one's step.
        """
        pointers = (
            Pointer("present", "int8"),
            Pointer("ups", self.element),
            *_STACKS,
            Pointer("u", "float32"),
        )
        return (*pointers, Number("sequences"), Number("step"))


class UpTile:
    """One tile of a product, and what sequences' adapters add to it."""

    def __init__(
        self, vectors: Vectors, up: LoraUp, buffers: Sequence[Buffer | Expr], tile: Expr, rows: int
    ) -> None:
        """Finds the parts that the tile belongs to: two, where one of them ends in it.

        Args:
            vectors: the target's.
            up: what is added.
            buffers: an argument for each of ``up.params``.
            tile: which one, an int64.
            rows: of the product's tile, 16 or a part of it; adapters' tiles always have 16.
        """
        self._vectors, self._up = vectors, up
        self._within = bind(tile % (TILE // rows) * rows)
        tile = bind(tile // (TILE // rows))
        self._present, self._ups, self._starts, self._units, self._u, self._sequences, self._step = buffers
        self._any = bind(self._starts[self._sequences] > 0)
        begins = [part.first_tile for part in up.parts]
        ends = [part.first_tile + part.tiles for part in up.parts]
        self._low, self._high = bind(_reached(tile, ends)), bind(_reached(tile, begins))
        size = size_of(up.element)
        self._places = _table(
            [(tile - part.first_tile) * _TILE_NUMBERS + part.place // size for part in up.parts]
        )

    def prefetch(self) -> None:
        """Ask for all that will be added to the tile: it is read only when the product's sums are known."""
        size = size_of(self._up.element)
        with when(self._any), serial(self._sequences) as sequence:

            def ask(part: Expr, unit: Expr, depth: Expr) -> None:
                start = bind(self._begin(part, unit))
                for number in range(0, _TILE_NUMBERS, 64 // size):
                    prefetch(self._ups, start + number)

            self._each_use(sequence, ask)

    def add(self, sums: Sequence[Register], start: Expr, first: int) -> None:
        """Add to the sums of tokens from ``start`` on, for the tile's rows from ``first`` on."""
        with when(self._any):
            sequence = bind(T.truncdiv(start, self._step))
            if len(sums) == 1:
                self._add(sums, sequence, start, first)
                return
            last = bind(T.truncdiv(start + (len(sums) - 1), self._step))
            with T.If(sequence == last):
                with T.Then():
                    self._add(sums, sequence, start, first)
                with T.Else():
                    self._add_one_by_one(sums, start, first)

    def _add_one_by_one(self, sums: Sequence[Register], start: Expr, first: int) -> None:
        """The same for tokens of different sequences: a loop, as its code for every one of them would be large."""
        vectors = self._vectors
        stored = local(len(sums) * vectors.lanes, "float32")
        for token, total in enumerate(sums):
            vectors.store(stored, token * vectors.lanes, total.get())
        with serial(len(sums)) as index:
            total = Register(vectors.lanes, vectors.load(stored, index * vectors.lanes))
            token = bind(start + index)
            self._add([total], bind(T.truncdiv(token, self._step)), token, first)
            vectors.store(stored, index * vectors.lanes, total.get())
        for token, total in enumerate(sums):
            total.set(vectors.load(stored, token * vectors.lanes))

    def _add(self, sums: Sequence[Register], sequence: Expr, start: Expr, first: int) -> None:
        """The same for tokens of one sequence."""
        vectors, up = self._vectors, self._up

        def add(part: Expr, unit: Expr, depth: Expr) -> None:
            begin = bind(self._begin(part, unit) + self._within + first)
            rows = [
                bind((((start + token) * up.of + (part + up.first)) * up.units + depth) * RANKS)
                for token in range(len(sums))
            ]

            def rank(index: Expr | int, totals: Sequence[Register]) -> None:
                b = bind(vectors.floats(vectors.load(self._ups, begin + index * TILE)))
                for row, total in zip(rows, totals):
                    total.set(vectors.fma(b, vectors.splat(self._u[row + index]), total.get()))

            if len(sums) > 1:
                with serial(RANKS) as index:
                    rank(index, sums)
                return
            other = Register(vectors.lanes, vectors.splat(0.0))
            with serial(RANKS // 2) as pair:
                rank(2 * pair, sums)
                rank(2 * pair + 1, [other])
            sums[0].set(sums[0].get() + other.get())

        self._each_use(sequence, add)

    def _each_use(self, sequence: Expr, visit: Callable[[Expr, Expr, Expr], None]) -> None:
        """Visit what a sequence adds to the tile: a part, a unit that has it, and how deep in the stack it is."""
        begin = bind(self._starts[sequence])
        with serial(self._starts[sequence + 1] - begin) as depth:
            unit = bind(self._units[begin + depth])
            with serial(self._high - self._low) as index:
                part = bind(self._low + index)
                with when(self._present[unit + part] > 0):
                    visit(part, unit, depth)

    def _begin(self, part: Expr, unit: Expr) -> Expr:
        """Where a unit's B for the tile begins."""
        return T.truncdiv(unit, size_of(self._up.element)) + self._places[part]


def lora_embed_kernel(
    vectors: Vectors, *, element: Element, columns: int, stride: int, out_stride: int, place: int
) -> Kernel:
    """``y = x + scale * A[id] B^T`` of every unit that a token's sequence uses, with A ``[vocab, 16 ranks]``.

    Its parameters: x f32 ``[tokens, columns]``, ``stride`` numbers from token to token; ids int64 ``[tokens]``; the
    anchored bytes that say whether the table is there, and its A, whose B lies ``place`` bytes further; starts int32
    ``[sequences + 1]``; units int64 and scales f32 ``[uses]``; y f32, ``out_stride``, a multiple of 16, numbers from
    token to token; the numbers of sequences and of tokens in each one's step.
    """
    size = size_of(element)
    tiles = -(-columns // TILE)

    def body(
        x: Buffer,
        ids: Buffer,
        present: Buffer,
        numbers: Buffer,
        starts: Buffer,
        units: Buffer,
        scales: Buffer,
        out: Buffer,
        sequences: Expr,
        step: Expr,
    ) -> None:
        def add(unit: Expr, scale: Expr, id: Expr, row: Expr) -> None:
            u = local(RANKS, "float32")
            start = bind(T.truncdiv(unit, size))
            for rank in range(0, RANKS, vectors.lanes):
                a = vectors.floats(vectors.load(numbers, start + id * RANKS + rank))
                vectors.store(u, rank, a * vectors.splat(scale))
            with serial(tiles) as tile:
                begin = bind(start + place // size + tile * _TILE_NUMBERS)
                for first in range(0, TILE, vectors.lanes):
                    at = row + tile * TILE + first
                    total = Register(vectors.lanes, vectors.load(out, at))
                    for rank in range(RANKS):
                        b = vectors.floats(vectors.load(numbers, begin + rank * TILE + first))
                        total.set(vectors.fma(b, vectors.splat(u[rank]), total.get()))
                    vectors.store(out, at, total.get())

        def token(index: Expr, _: Expr) -> None:
            row = bind(index * out_stride)
            with serial(columns) as column:
                T.buffer_store(out, x[index * stride + column], [row + column])
            for column in range(columns, tiles * TILE):
                T.buffer_store(out, const(0.0, "float32"), [row + column])
            sequence = bind(T.truncdiv(index, step))
            begin = bind(starts[sequence])
            with serial(starts[sequence + 1] - begin) as depth:
                unit = bind(units[begin + depth])
                with when(present[unit] > 0):
                    add(unit, bind(scales[begin + depth]), bind(ids[index]), row)

        for_rows(bind(sequences * step), token)

    params = (
        Pointer("x", "float32"),
        Pointer("ids", "int64"),
        Pointer("present", "int8"),
        Pointer("numbers", element),
        *_STACKS,
        Pointer("scales", "float32"),
        Pointer("out", "float32"),
        Number("sequences"),
        Number("step"),
    )
    return Kernel(f"lora_embed_{element}_{columns}_{stride}_{out_stride}_{place}", params, body)


def _reached(tile: Expr, tiles: Sequence[int]) -> Expr:
    """How many of some ascending tiles are this one or one before it."""
    count: Expr = const(0, "int32")
    for other in tiles:
        count = count + Cast("int32", tile >= other)
    return count


def _table(values: Sequence[Expr]) -> Buffer:
    """Values to choose from; comparing the index with each would take TVM's simplifier seconds to see through."""
    table = local(len(values), "int64")
    for index, value in enumerate(values):
        T.buffer_store(table, value, [index])
    return table
