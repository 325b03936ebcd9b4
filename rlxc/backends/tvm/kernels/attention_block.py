"""The inner loops of attention: one block of rows against one block of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx import Ramp, Select, address_of, call_intrin, const
from tvm.tirx import any as any_of
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.cache import TILE, CacheShape
from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, bind, local, serial, when
from rlxc.backends.tvm.kernels.math import exp, reduce_max, tanh
from rlxc.backends.tvm.kernels.rope import dividing
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.errors import OptionError

# A hidden key's score, and the largest score before the first key: finite, so that their differences are, and the
# first far below the second, so that a block without a visible key adds nothing.
_HIDDEN, NOTHING = -3e38, -1e30


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
class Block:
    """The code for one block; the methods follow each other in this order.

    ``start`` is where the kv head's keys and values begin, ``position`` that of the block's first key.
    """

    vectors: Vectors
    knobs: AttentionKnobs
    group: int
    shape: CacheShape
    window: int | None
    soft_cap: float | None

    @property
    def wide(self) -> Vectors:
        """Vectors of channels."""
        return dividing(self.vectors, self.shape.head_dim)

    def token(self, rows: Rows, row: Expr) -> tuple[Expr, Expr]:
        """A row's token within the step, and head."""
        row = settled(T.min(rows.begin + row, rows.total - 1))
        return T.truncdiv(row, self.group), rows.kv_head * self.group + T.truncmod(row, self.group)

    def score(self, cache: Buffer, rows: Rows, state: State, start: Expr, position: Expr) -> None:
        """Scores of a block's keys, capped; of tiles without a visible key, those of the last one with some."""
        dim, lanes, keys = self.shape.head_dim, self.vectors.lanes, self.knobs.keys
        width = 1 << (self.knobs.vectors_beside(state.rows, keys // lanes).bit_length() - 1)
        last = rows.end - 1
        # Few sums make a short loop: take two channels at a time.
        unroll = 2 if state.rows * width <= 8 else 1
        span = width * lanes
        with serial(T.truncdiv(T.min(const(keys), rows.end - position) + (span - 1), span)) as i:
            first = position + i * span
            tiles = [self._key_tile(start, first + t, last) for t in range(0, span, TILE)]
            sums = [local(span, "float32") for _ in range(state.rows)]
            for row in sums:
                for v in range(width):
                    self.vectors.store(row, v * lanes, self.vectors.splat(0.0))
            with serial(dim // unroll) as step:
                for channel in (step * unroll + u for u in range(unroll)):
                    places = (
                        tiles[v * lanes // TILE] + (channel * TILE + v * lanes % TILE) for v in range(width)
                    )
                    loaded = [self._float(self.vectors, cache, place, state.rows) for place in places]
                    self._multiply_add(self.vectors, sums, loaded, state.queries, channel, dim)
            for row, of_row in enumerate(sums):
                for v in range(width):
                    score = self._capped(self.vectors.load(of_row, v * lanes))
                    self.vectors.store(state.scores, row * keys + i * span + v * lanes, score)

    def _key_tile(self, start: Expr, position: Expr, last: Expr) -> Expr:
        """The first channel of a position's key, or, past the last one, of a key in the last one's tile."""
        row = self.shape.row(T.min(position, last - T.truncmod(last, TILE) + T.truncmod(position, TILE)))
        return settled(start + self.shape.key_tile(settled(row)), "int64")

    def _float(self, vectors: Vectors, buffer: Buffer, at: Expr, rows: int) -> Expr:
        """A vector of the cache, as f32."""
        if rows <= self.knobs.rows // 2:
            # Few rows wait for memory: ask for the same place of the next block. Beyond the end, or a ring's turn,
            # that is some other place, which does no harm.
            ahead = address_of(buffer[at + self.knobs.keys * self.shape.head_dim])
            T.evaluate(call_intrin("void", "tirx.prefetch", ahead, 0, 3, 1))
        return bind(vectors.floats(vectors.load(buffer, at)))

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
        cap = self.vectors.splat(self.soft_cap)
        return cap * tanh(self.vectors, score * self.vectors.splat(1 / self.soft_cap))

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
            shrink = bind(exp(vectors, vectors.splat(before) - top))
            vectors.store(state.shrink, row * lanes, shrink)
            vectors.store(total, 0, vectors.load(state.sums, row * lanes) * shrink)
            with serial(keys // (lanes * together)) as i:
                for place in (row * keys + (i * together + v) * lanes for v in range(together)):
                    power = bind(exp(vectors, vectors.load(state.scores, place) - top))
                    vectors.store(state.scores, place, power)
                    vectors.store(total, 0, vectors.load(total, 0) + power)
            vectors.store(state.sums, row * lanes, vectors.load(total, 0))

    def mix(self, values: Buffer, rows: Rows, state: State, start: Expr, position: Expr) -> None:
        """Shrink the mixed values, and add the block's, each times its power."""
        wide, count = self.wide, self.shape.head_dim // self.wide.lanes
        parts = -(-count // self.knobs.vectors_beside(state.rows, count))
        width = -(-count // parts)
        with serial(count // width) as part:
            self._mix_channels(values, rows, state, start, position, part * (width * wide.lanes), width)
        if count % width:
            channel = const(count // width * width * wide.lanes)
            self._mix_channels(values, rows, state, start, position, channel, count % width)

    def _mix_channels(
        self, values: Buffer, rows: Rows, state: State, start: Expr, position: Expr, channel: Expr, width: int
    ) -> None:
        """The same for ``width`` vectors of channels."""
        wide, dim, keys = self.wide, self.shape.head_dim, self.knobs.keys
        sums = [local(width * wide.lanes, "float32") for _ in range(state.rows)]
        for row, of_row in enumerate(sums):
            shrink = bind(wide.load(state.shrink, row * self.vectors.lanes))
            for v in range(0, width * wide.lanes, wide.lanes):
                wide.store(of_row, v, wide.load(state.mixed, row * dim + channel + v) * shrink)
        # The rows of a linear cache lie in one piece, those of a ring in tiles. Rows that nobody sees may never
        # have been written: even times zero they must not count.
        piece = TILE if self.shape.ring else keys
        with serial(T.truncdiv(T.min(const(keys), rows.end - position) + (piece - 1), piece)) as i:
            from_position = settled(position + i * piece)
            place = settled(start + self.shape.row(from_position) * dim + channel, "int64")
            begin = settled(T.max(rows.first - from_position, const(0)))
            end = T.min(const(piece), rows.end - from_position)
            with serial(end, begin) as key:
                at = (place + key * dim + v * wide.lanes for v in range(width))
                loaded = [self._float(wide, values, one, state.rows) for one in at]
                self._multiply_add(wide, sums, loaded, state.scores, i * piece + key, keys)
        for row, of_row in enumerate(sums):
            for v in range(0, width * wide.lanes, wide.lanes):
                wide.store(state.mixed, row * dim + channel + v, wide.load(of_row, v))
