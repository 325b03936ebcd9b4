"""The inner loops of attention: one block of rows against one block of keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.tirx import Ramp, Select, address_of, bitwise_and, call_intrin, const
from tvm.tirx import any as any_of
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.cache import TILE, CacheShape, Pages
from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, bind, local, serial, when
from rlxc.backends.tvm.kernels.math import reduce_max, soft_cap, vanishing_exp
from rlxc.backends.tvm.kernels.rope import dividing
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.errors import OptionError

# A hidden key's score, and the largest score before the first key: finite, so that their differences are, and the
# first far below the second, so that a block without a visible key adds nothing.
_HIDDEN, NOTHING = -3e38, -1e30

# Bytes of a cache line; and a tile's positions, as a number of bits.
_LINE, _TILE_BITS = 64, TILE.bit_length() - 1


@dataclass(frozen=True)
class AttentionKnobs:
    """What may be tuned; results differ in rounding only.

    Attributes:
        rows: queries that share each load of keys and values.
        keys: positions of a block, a power of two from 16 on.
        registers: vector registers; sums take as many as loads leave.

    Raises:
        OptionError: a knob is outside its range.
    """

    rows: int
    keys: int
    registers: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.keys < TILE or self.keys & (self.keys - 1):
            raise OptionError(
                f"{self.rows} rows by {self.keys} keys",
                source="attention knobs",
                remedy=f"take at least one row, and a power of two of at least {TILE} keys",
            )

    @classmethod
    def of(cls, target: CpuTarget) -> AttentionKnobs:
        """The defaults for a target."""
        return cls(12 if target.lanes == 16 else 6, 64, target.registers)

    def vectors_beside(self, rows: int, most: int) -> int:
        """How many sums each of ``rows`` rows may keep in registers, beside that many operands and one more."""
        return max(1, min(most, (self.registers - 1) // (rows + 1)))


def settled(value: Expr, dtype: str = "int32") -> Expr:
    """An integer, computed here and once, of which TVM knows nothing.

    Its analyses put the values of bound variables in their place, again and again, and take minutes for indices that
    build on each other. A load stops them; LLVM makes a register of it.
    """
    place = local(1, dtype)
    T.buffer_store(place, value, [0])
    return bind(place[0])


@dataclass(frozen=True)
class Rows:
    """The rows of a block and the positions that they see: the union is ``first`` .. ``end`` - 1."""

    sequence: Expr
    kv_head: Expr
    begin: Expr
    total: Expr
    count: Expr
    past: Expr
    first: Expr
    end: Expr


@dataclass(frozen=True)
class State:
    """A task's memory for ``rows`` rows: scaled queries, scores, then what the softmax carries from block to block."""

    rows: int
    queries: Buffer
    scores: Buffer
    largest: Buffer
    sums: Buffer
    shrink: Buffer
    mixed: Buffer


@dataclass(frozen=True)
class Place:
    """Where a block's first key, value and scales are, in elements; scales are those of codes."""

    keys: Expr
    values: Expr
    scales: Expr | None


@dataclass(frozen=True)
class Block:
    """The code for one block, whose keys lie in one page; the methods follow each other in this order.

    ``position`` is that of the block's first key, a multiple of the number of keys; ``here`` is its place.

    Raises:
        OptionError: a block has more keys than a page.
    """

    vectors: Vectors
    knobs: AttentionKnobs
    group: int
    shape: CacheShape
    window: int | None
    soft_cap: float | None

    def __post_init__(self) -> None:
        if self.knobs.keys > self.shape.page:
            raise OptionError(
                f"blocks of {self.knobs.keys} keys in pages of {self.shape.page}",
                source="attention knobs",
                remedy="take fewer keys",
            )

    @property
    def wide(self) -> Vectors:
        """Vectors of channels."""
        return dividing(self.vectors, self.shape.head_dim)

    def token(self, rows: Rows, row: Expr) -> tuple[Expr, Expr]:
        """A row's token within the step, and head."""
        row = settled(T.min(rows.begin + row, rows.total - 1))
        return T.truncdiv(row, self.group), rows.kv_head * self.group + T.truncmod(row, self.group)

    def find(self, pages: Pages, rows: Rows, position: Expr) -> Place:
        """The place of a block, whose page is there."""
        page = settled(pages.find(rows.sequence, position), "int64")
        scales = pages.scale(page, rows.kv_head, position) if self.shape.has_scales else None
        return Place(
            settled(pages.key(page, rows.kv_head, position), "int64"),
            settled(pages.value(page, rows.kv_head, position), "int64"),
            None if scales is None else settled(scales, "int64"),
        )

    def find_next(self, pages: Pages, rows: Rows, state: State, position: Expr) -> Place | None:
        """The place of the block behind, or of the last one: few rows wait for memory, and ask for it early."""
        if state.rows > self.knobs.rows // 2:
            return None
        behind = position + self.knobs.keys
        return self.find(pages, rows, settled(Select(behind < rows.end, behind, position)))

    def score(
        self, pages: Pages, rows: Rows, state: State, position: Expr, here: Place, ahead: Place | None
    ) -> None:
        """Scores of a block's keys, capped; of keys that nobody sees, anything."""
        dim, lanes, keys = self.shape.head_dim, self.vectors.lanes, self.knobs.keys
        width = 1 << (self.knobs.vectors_beside(state.rows, keys // lanes).bit_length() - 1)
        # Few sums make a short loop: take some channels at a time, codes by the cache line.
        together = 1
        if state.rows * width <= 8:
            together = math.gcd(dim, 4 if self.shape.element_bytes == 1 else 2)
        span = width * lanes
        with self._spans(rows, position, span) as i:
            # A tile has a channel of 16 positions, then the next one.
            first = settled((i * span >> _TILE_BITS) * (TILE * dim) + bitwise_and(i * span, TILE - 1))
            sums = [local(span, "float32") for _ in range(state.rows)]
            for row in sums:
                for v in range(width):
                    self.vectors.store(row, v * lanes, self.vectors.splat(0.0))
            with serial(dim // together) as step:
                for u in range(together):
                    channel = step * together + u
                    within = [
                        first + (v * lanes // TILE * (TILE * dim) + v * lanes % TILE) + channel * TILE
                        for v in range(width)
                    ]
                    if ahead is not None:
                        for one in within[:: max(1, TILE // lanes)]:
                            self._fetch(pages.keys, ahead.keys + one, u * TILE)
                    loaded = [self._float(self.vectors, pages.keys, here.keys + one) for one in within]
                    self._multiply_add(self.vectors, sums, loaded, state.queries, channel, dim)
            for v in range(width):
                at = i * span + v * lanes
                if here.scales is not None:
                    scales = bind(self.vectors.load(pages.key_scales, here.scales + at))
                for row, of_row in enumerate(sums):
                    score = self.vectors.load(of_row, v * lanes)
                    score = self._capped(score if here.scales is None else score * scales)
                    self.vectors.store(state.scores, row * keys + at, score)

    def _spans(self, rows: Rows, position: Expr, span: int) -> Any:
        """A loop over the parts of a block, ``span`` positions each, that have a key that somebody sees."""
        end = T.truncdiv(T.min(const(self.knobs.keys), rows.end - position) + (span - 1), span)
        if self.window is None:
            return serial(end)
        return serial(end, settled(T.truncdiv(T.max(rows.first - position, const(0)), span)))

    def _fetch(self, buffer: Buffer, at: Expr, offset: int) -> None:
        """Ask for an element's cache line, if it is ``offset`` elements behind the beginning of one, and begins one."""
        if offset * self.shape.element_bytes % _LINE == 0:
            T.evaluate(call_intrin("void", "tirx.prefetch", address_of(buffer[at]), 0, 3, 1))

    def _float(self, vectors: Vectors, buffer: Buffer, at: Expr) -> Expr:
        """A vector of the cache, as f32."""
        return bind(self.shape.floats(vectors, vectors.load(buffer, at)))

    def _multiply_add(
        self, vectors: Vectors, sums: list[Buffer], loaded: list[Expr], factors: Buffer, at: Expr, stride: int
    ) -> None:
        """To each row's sums add what was loaded, times that row's factor; factors lie ``stride`` apart."""
        for row, of_row in enumerate(sums):
            factor = bind(vectors.splat(factors[row * stride + at]))
            for v, value in enumerate(loaded):
                place = v * vectors.lanes
                vectors.store(of_row, place, vectors.fma(value, factor, vectors.load(of_row, place)))

    def _capped(self, score: Expr) -> Expr:
        if self.soft_cap is None:
            return score
        return soft_cap(self.vectors, score, self.soft_cap)

    def hide(self, rows: Rows, state: State, position: Expr) -> None:
        """Hide keys that a row does not see, in blocks that have such keys."""
        lanes, keys = self.vectors.lanes, self.knobs.keys
        some = position + keys > rows.past + T.truncdiv(rows.begin, self.group) + 1
        if self.window is not None:
            some = any_of(some, position < rows.end - self.window)
        with when(some), serial(state.rows) as row:
            token, _ = self.token(rows, row)
            newest = settled(rows.past + token - position)
            with serial(keys // lanes) as i:
                key = Ramp(i * lanes, const(1), lanes)
                place = row * keys + i * lanes
                hidden = self.vectors.splat(_HIDDEN)
                score = Select(
                    key <= self.vectors.splat(newest), self.vectors.load(state.scores, place), hidden
                )
                if self.window is not None:
                    score = Select(key > self.vectors.splat(newest - self.window), score, hidden)
                self.vectors.store(state.scores, place, score)

    def soften(self, state: State) -> None:
        """Scores become powers, relative to the largest so far; what older blocks left must shrink by as much."""
        vectors, lanes, keys = self.vectors, self.vectors.lanes, self.knobs.keys
        # Four vectors at a time hide most of the exponential's latency.
        together = min(4, keys // lanes)
        with serial(state.rows) as row:
            largest, total = local(lanes, "float32"), local(lanes, "float32")
            before = bind(state.largest[row])
            vectors.store(largest, 0, vectors.splat(before))
            with serial(keys // lanes) as i:
                score = vectors.load(state.scores, row * keys + i * lanes)
                vectors.store(largest, 0, T.max(vectors.load(largest, 0), score))
            now = bind(reduce_max(vectors, vectors.load(largest, 0)))
            T.buffer_store(state.largest, now, [row])
            top = bind(vectors.splat(now))
            shrink = bind(vanishing_exp(vectors, vectors.splat(before) - top))
            vectors.store(state.shrink, row * lanes, shrink)
            vectors.store(total, 0, vectors.load(state.sums, row * lanes) * shrink)
            with serial(keys // (lanes * together)) as i:
                for place in (row * keys + (i * together + v) * lanes for v in range(together)):
                    power = bind(vanishing_exp(vectors, vectors.load(state.scores, place) - top))
                    vectors.store(state.scores, place, power)
                    vectors.store(total, 0, vectors.load(total, 0) + power)
            vectors.store(state.sums, row * lanes, vectors.load(total, 0))

    def mix(
        self, pages: Pages, rows: Rows, state: State, position: Expr, here: Place, ahead: Place | None
    ) -> None:
        """Shrink the mixed values, and add the block's, each times its power."""
        if here.scales is not None:
            self._weigh(pages, state, here.scales)
        wide, count = self.wide, self.shape.head_dim // self.wide.lanes
        parts = -(-count // self.knobs.vectors_beside(state.rows, count))
        width = -(-count // parts)
        with serial(count // width) as part:
            channel = part * (width * wide.lanes)
            self._mix_channels(pages, rows, state, position, here, ahead, channel, width)
        if count % width:
            channel = const(count // width * width * wide.lanes)
            self._mix_channels(pages, rows, state, position, here, ahead, channel, count % width)

    def _weigh(self, pages: Pages, state: State, place: Expr) -> None:
        """Multiply powers by the scales of their values; those of keys that nobody sees do not count any more."""
        lanes, keys = self.vectors.lanes, self.knobs.keys
        with serial(keys // lanes) as v:
            scales = bind(self.vectors.load(pages.value_scales, place + v * lanes))
            for row in range(state.rows):
                at = row * keys + v * lanes
                self.vectors.store(state.scores, at, self.vectors.load(state.scores, at) * scales)

    def _mix_channels(
        self,
        pages: Pages,
        rows: Rows,
        state: State,
        position: Expr,
        here: Place,
        ahead: Place | None,
        channel: Expr,
        width: int,
    ) -> None:
        """The same for ``width`` vectors of channels."""
        wide, dim, keys = self.wide, self.shape.head_dim, self.knobs.keys
        sums = [local(width * wide.lanes, "float32") for _ in range(state.rows)]
        for row, of_row in enumerate(sums):
            shrink = bind(wide.load(state.shrink, row * self.vectors.lanes))
            for v in range(0, width * wide.lanes, wide.lanes):
                wide.store(of_row, v, wide.load(state.mixed, row * dim + channel + v) * shrink)
        # Rows that nobody sees may never have been written: even times zero they must not count.
        begin = settled(T.max(rows.first - position, const(0)))
        with serial(T.min(const(keys), rows.end - position), begin) as key:
            within = [key * dim + channel + v * wide.lanes for v in range(width)]
            if ahead is not None:
                for v, one in enumerate(within):
                    self._fetch(pages.values, ahead.values + one, v * wide.lanes)
            loaded = [self._float(wide, pages.values, here.values + one) for one in within]
            self._multiply_add(wide, sums, loaded, state.scores, key, keys)
        for row, of_row in enumerate(sums):
            for v in range(0, width * wide.lanes, wide.lanes):
                wide.store(state.mixed, row * dim + channel + v, wide.load(of_row, v))
