"""Causal attention of a step's queries over the KV cache, with a running softmax in f32.

A row is the query of one token and one head; the heads of a group share keys and values, so their rows stand side by
side. A task is a sequence, a kv head, a block of rows, and, where there are few such blocks and many keys, a split
of the keys. It walks its keys in blocks: scores, softmax, values. Both products keep their sums in registers: a load
of keys or values serves all rows, and every other instruction of the inner loops is a multiply-add.

Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022 (FlashAttention)
for the walk over blocks of keys; Dao et al. 2023 (Flash-Decoding) for the splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.tirx import Not, Ramp, Select, const
from tvm.tirx import all as all_of
from tvm.tirx import any as any_of
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.cache import TILE, CacheShape
from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    bind,
    local,
    parallel,
    serial,
    when,
)
from rlxc.backends.tvm.kernels.math import exp, reduce_max, reduce_sum, tanh
from rlxc.backends.tvm.kernels.rope import dividing
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.errors import OptionError

# A split has at least so many keys, and there are at most so many tasks that share a block of rows with others.
_SPLIT_KEYS, _SPLITS, _SPLIT_TASKS = 256, (2, 4, 8), 64

# One thread reads so many keys' channels in the two microseconds that a parallel region must save.
_SERIAL_CHANNELS = 16384

# A hidden key's score, and the largest score before the first key: finite, so that their differences are, and the
# first far below the second, so that a block without a visible key adds nothing.
_HIDDEN, _NOTHING = -3e38, -1e30


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


def workspace_floats(knobs: AttentionKnobs, head_dim: int) -> int:
    """The f32 that :func:`attention_kernel` needs as workspace, whatever it is called with."""
    return _SPLIT_TASKS * knobs.rows * (head_dim + 2)


def attention_kernel(
    vectors: Vectors,
    knobs: AttentionKnobs,
    *,
    heads: int,
    shape: CacheShape,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: bool,
    out_stride: int,
) -> Kernel:
    """Attention of queries ``rotated f32[M, heads * D]`` into rows of ``out``, ``out_stride`` elements apart.

    Token ``b * step + s`` has position ``past[b] + s``; it sees the positions up to its own, or the last ``window``
    of these. Their keys and values lie in the cache already, ``caches[b]`` bytes from ``keys`` and from ``values``;
    a ring holds at least ``window + step - 1`` positions. Scores are scaled, then ``soft_cap`` c makes c tanh(s / c)
    of s. ``sinks f32[heads]``, a parameter if asked for, are scores of a key without a value.

    Raises:
        OptionError: heads do not share kv heads evenly.
        UnsupportedError: the head's channels do not divide among vectors.
    """
    if heads % shape.kv_heads:
        raise OptionError(
            f"{heads} heads for {shape.kv_heads} kv heads", source="attention", remedy="take a multiple"
        )
    attention = _Attention(vectors, knobs, heads, shape, scale, window, soft_cap, out_stride)
    inputs = [
        Pointer("rotated", "float32"),
        Pointer("keys", shape.dtype),
        Pointer("values", shape.dtype),
        Pointer("caches", "int64"),
        Pointer("past", "int32"),
        *([Pointer("sinks", "float32")] if sinks else []),
    ]
    outputs = (Pointer("workspace", "float32"), Pointer("out", "float32"))

    def body(*values: Buffer | Expr) -> None:
        read, sink, (workspace, out, sequences, step) = values[:5], values[5:-4], values[-4:]
        attention.emit(_Call(*read, sink[0] if sinks else None, workspace, out, sequences, step))

    options = f"{'sinks_' if sinks else ''}{window or 'all'}_{_digits(scale)}_{_digits(soft_cap or 0)}"
    sizes = f"{vectors.lanes}_{knobs.rows}_{knobs.keys}_{knobs.registers}"
    name = f"attention_{sizes}_{heads}_{shape.name}_{options}_{out_stride}"
    return Kernel(name, (*inputs, *outputs, Number("sequences"), Number("step")), body)


def _digits(number: float) -> str:
    """A float as part of a C name, different for different floats."""
    return float(number).hex().translate(str.maketrans("+-.", "pmd"))


@dataclass(frozen=True)
class _Call:
    """The kernel's parameters."""

    rotated: Buffer
    keys: Buffer
    values: Buffer
    caches: Buffer
    past: Buffer
    sinks: Buffer | None
    workspace: Buffer
    out: Buffer
    sequences: Expr
    step: Expr


@dataclass(frozen=True)
class _Rows:
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
class _State:
    """A task's memory for ``rows`` rows: scaled queries, scores, then what the softmax carries from block to block."""

    rows: int
    queries: Buffer
    scores: Buffer
    largest: Buffer
    sums: Buffer
    shrink: Buffer
    mixed: Buffer


@dataclass(frozen=True)
class _Attention:
    vectors: Vectors
    knobs: AttentionKnobs
    heads: int
    shape: CacheShape
    scale: float
    window: int | None
    soft_cap: float | None
    out_stride: int

    @property
    def group(self) -> int:
        """Heads of a kv head."""
        return self.heads // self.shape.kv_heads

    @property
    def wide(self) -> Vectors:
        """Vectors of channels."""
        return dividing(self.vectors, self.shape.head_dim)

    @property
    def slot(self) -> int:
        """Floats of one row's result in the workspace: its channels, largest score and sum."""
        return self.shape.head_dim + 2

    @property
    def row_counts(self) -> list[int]:
        """The numbers of rows that there is code for: a decoded token's, a few tokens', a prompt's."""
        most = self.knobs.rows
        few = [most // 2] if self.group <= most // 4 else []
        return sorted({min(self.group, most), *few, most})

    def emit(self, call: _Call) -> None:
        total = bind(call.step * self.group)
        blocks = bind(T.truncdiv(total + (self.knobs.rows - 1), self.knobs.rows))
        tasks = bind(call.sequences * self.shape.kv_heads * blocks)
        seen = self._most_seen(call)
        splits = bind(self._splits(tasks, seen))
        # Little work for one token: a parallel region would cost more than it saves.
        work = tasks * seen * self.shape.head_dim
        small = bind(all_of(total <= self.row_counts[0], splits == 1, work <= _SERIAL_CHANNELS))
        with when(small), serial(tasks) as task:
            rows = self._rows(call, task, const(0), total)
            self._attend(call, rows, self.row_counts[0], const(0), const(1), task)
        with when(Not(small)):
            with parallel(tasks * splits) as task:
                order = bind(T.truncmod(task, blocks))
                # Late blocks see more keys: take them in turn with early ones, and threads' shares are even.
                block = Select(T.truncmod(order, 2) == 0, T.truncdiv(order, 2), blocks - 1 - T.truncdiv(order, 2))
                head = T.truncdiv(T.truncdiv(task, blocks), splits)
                rows = self._rows(call, head, bind(block), total)
                split = bind(T.truncmod(T.truncdiv(task, blocks), splits))
                slot = bind((head * blocks + block) * splits + split)
                least = 0
                for count in self.row_counts:
                    with when(all_of(rows.count > least, rows.count <= count)):
                        self._attend(call, rows, count, split, splits, slot)
                    least = count
            with when(splits > 1), serial(tasks) as task:
                rows = self._rows(call, T.truncdiv(task, blocks), bind(T.truncmod(task, blocks)), total)
                with serial(rows.count) as row:
                    self._combine(call, rows, row, splits, task)

    def _most_seen(self, call: _Call) -> Expr:
        """How many positions the tokens of the longest sequence see together."""
        longest = local(1, "int32")
        T.buffer_store(longest, const(0), [0])
        with serial(call.sequences) as b:
            T.buffer_store(longest, T.max(longest[0], call.past[b]), [0])
        seen = longest[0] + call.step
        return bind(seen if self.window is None else T.min(seen, call.step + (self.window - 1)))

    def _splits(self, tasks: Expr, seen: Expr) -> Expr:
        splits: Expr = const(1)
        for count in _SPLITS:
            worth = (seen >= count * _SPLIT_KEYS) & (tasks * count <= _SPLIT_TASKS)
            splits = Select(worth, const(count), splits)
        return splits

    def _rows(self, call: _Call, head: Expr, block: Expr, total: Expr) -> _Rows:
        sequence = bind(T.truncdiv(head, self.shape.kv_heads))
        begin = bind(block * self.knobs.rows)
        count = bind(T.min(const(self.knobs.rows), total - begin))
        past = bind(call.past[sequence])
        first: Expr = const(0)
        if self.window is not None:
            first = bind(T.max(past + T.truncdiv(begin, self.group) - (self.window - 1), const(0)))
        end = bind(past + T.truncdiv(begin + count - 1, self.group) + 1)
        kv_head = bind(T.truncmod(head, self.shape.kv_heads))
        return _Rows(sequence, kv_head, begin, total, count, past, first, end)

    def _attend(self, call: _Call, rows: _Rows, count: int, split: Expr, splits: Expr, slot: Expr) -> None:
        """One task, with code for ``count`` rows: those beyond the block's last are that one again."""
        dim, lanes, keys = self.shape.head_dim, self.vectors.lanes, self.knobs.keys
        state = _State(
            count,
            queries=local(count * dim, "float32"),
            scores=local(count * keys, "float32"),
            largest=local(count, "float32"),
            sums=local(count * lanes, "float32"),
            shrink=local(count * lanes, "float32"),
            mixed=local(count * dim, "float32"),
        )
        self._start(call, rows, state)
        start = bind(self.shape.start(call.caches, rows.sequence, rows.kv_head))
        # Blocks start at whole tiles of the cache, and splits at whole blocks.
        from_tile = T.truncdiv(rows.first, TILE)
        blocks = T.truncdiv(rows.end - from_tile * TILE + (keys - 1), keys)
        share = bind(T.truncdiv(blocks + splits - 1, splits))
        begin = bind(from_tile * TILE + split * share * keys)
        mine = T.max(T.min(share, blocks - split * share), const(0))
        with serial(mine) as block:
            position = bind(begin + block * keys)
            self._score(call, rows, state, start, position)
            self._hide(rows, state, position)
            self._soften(state)
            self._mix(call, rows, state, start, position)
        with serial(rows.count) as row:
            with when(splits == 1):
                self._finish(call, rows, state, row)
            with when(splits > 1):
                self._leave(call, state, row, (slot * self.knobs.rows + row) * self.slot)

    def _token(self, rows: _Rows, row: Expr) -> tuple[Expr, Expr]:
        """A row's token within the step, and head."""
        row = bind(T.min(rows.begin + row, rows.total - 1))
        return T.truncdiv(row, self.group), rows.kv_head * self.group + T.truncmod(row, self.group)

    def _start(self, call: _Call, rows: _Rows, state: _State) -> None:
        dim, wide = self.shape.head_dim, self.wide
        zero = self.vectors.splat(0.0)
        with serial(state.rows) as row:
            token, head = self._token(rows, row)
            at = bind(((rows.sequence * call.step + token) * self.heads + head) * dim)
            with serial(dim // wide.lanes) as i:
                query = wide.load(call.rotated, at + i * wide.lanes) * wide.splat(self.scale)
                wide.store(state.queries, row * dim + i * wide.lanes, query)
                wide.store(state.mixed, row * dim + i * wide.lanes, wide.splat(0.0))
            T.buffer_store(state.largest, const(_NOTHING, "float32"), [row])
            self.vectors.store(state.sums, row * self.vectors.lanes, zero)

    def _score(self, call: _Call, rows: _Rows, state: _State, start: Expr, position: Expr) -> None:
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
                    places = (tiles[v * lanes // TILE] + (channel * TILE + v * lanes % TILE) for v in range(width))
                    loaded = [self._float(self.vectors, call.keys, place) for place in places]
                    self._multiply_add(self.vectors, sums, loaded, state.queries, channel, dim)
            for row, of_row in enumerate(sums):
                for v in range(width):
                    score = self._capped(self.vectors.load(of_row, v * lanes))
                    self.vectors.store(state.scores, row * keys + i * span + v * lanes, score)

    def _key_tile(self, start: Expr, position: Expr, last: Expr) -> Expr:
        """The first channel of a position's key, or, past the last one, of a key in the last one's tile."""
        row = self.shape.row(T.min(position, last - T.truncmod(last, TILE) + T.truncmod(position, TILE)))
        return bind(start + self.shape.key_tile(bind(row)))

    def _float(self, vectors: Vectors, buffer: Buffer, at: Expr) -> Expr:
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

    def _hide(self, rows: _Rows, state: _State, position: Expr) -> None:
        """Hide keys that a row does not see, in blocks that have such keys."""
        lanes, keys = self.vectors.lanes, self.knobs.keys
        some = position + keys > rows.past + T.truncdiv(rows.begin, self.group) + 1
        if self.window is not None:
            some = any_of(some, position < rows.end - self.window)
        with when(some), serial(state.rows) as row:
            token, _ = self._token(rows, row)
            newest = bind(rows.past + token - position)
            for at in range(0, keys, lanes):
                key = Ramp(const(at), const(1), lanes)
                place = row * keys + at
                hidden = self.vectors.splat(_HIDDEN)
                score = Select(key <= self.vectors.splat(newest), self.vectors.load(state.scores, place), hidden)
                if self.window is not None:
                    score = Select(key > self.vectors.splat(newest - self.window), score, hidden)
                self.vectors.store(state.scores, place, score)

    def _soften(self, state: _State) -> None:
        """Scores become powers, relative to the largest so far; what older blocks left must shrink by as much."""
        vectors, lanes, keys = self.vectors, self.vectors.lanes, self.knobs.keys
        with serial(state.rows) as row:
            scores = [bind(vectors.load(state.scores, row * keys + at)) for at in range(0, keys, lanes)]
            largest = scores[0]
            for score in scores[1:]:
                largest = bind(T.max(largest, score))
            before = bind(state.largest[row])
            now = bind(T.max(before, reduce_max(vectors, largest)))
            T.buffer_store(state.largest, now, [row])
            top = bind(vectors.splat(now))
            shrink = bind(exp(vectors, vectors.splat(before) - top))
            vectors.store(state.shrink, row * lanes, shrink)
            total = vectors.load(state.sums, row * lanes) * shrink
            for i, score in enumerate(scores):
                power = bind(exp(vectors, score - top))
                vectors.store(state.scores, row * keys + i * lanes, power)
                total = bind(total + power)
            vectors.store(state.sums, row * lanes, total)

    def _mix(self, call: _Call, rows: _Rows, state: _State, start: Expr, position: Expr) -> None:
        """Shrink the mixed values, and add the block's, each times its power."""
        wide, count = self.wide, self.shape.head_dim // self.wide.lanes
        parts = -(-count // self.knobs.vectors_beside(state.rows, count))
        width = -(-count // parts)
        with serial(count // width) as part:
            self._mix_channels(call, rows, state, start, position, part * (width * wide.lanes), width)
        if count % width:
            channel = const(count // width * width * wide.lanes)
            self._mix_channels(call, rows, state, start, position, channel, count % width)

    def _mix_channels(
        self, call: _Call, rows: _Rows, state: _State, start: Expr, position: Expr, channel: Expr, width: int
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
            from_position = bind(position + i * piece)
            place = bind(start + self.shape.row(from_position) * dim + channel)
            begin = bind(T.max(rows.first - from_position, const(0)))
            end = T.min(const(piece), rows.end - from_position)
            with serial(T.max(end - begin, const(0)), begin) as key:
                at = (place + key * dim + v * wide.lanes for v in range(width))
                loaded = [self._float(wide, call.values, one) for one in at]
                self._multiply_add(wide, sums, loaded, state.scores, i * piece + key, keys)
        for row, of_row in enumerate(sums):
            for v in range(0, width * wide.lanes, wide.lanes):
                wide.store(state.mixed, row * dim + channel + v, wide.load(of_row, v))

    def _finish(self, call: _Call, rows: _Rows, state: _State, row: Expr) -> None:
        """The only split of a row: divide by the sum."""
        wide, dim = self.wide, self.shape.head_dim
        token, head = self._token(rows, row)
        total = reduce_sum(self.vectors, self.vectors.load(state.sums, row * self.vectors.lanes))
        largest = bind(wide.splat(state.largest[row]))
        top = self._with_sink(call, head, largest)
        shrink = bind(exp(wide, largest - top))
        factor = bind(shrink / self._total_with_sink(call, head, bind(wide.splat(total)) * shrink, top))
        to = bind((rows.sequence * call.step + token) * self.out_stride + head * dim)
        with serial(dim // wide.lanes) as i:
            wide.store(call.out, to + i * wide.lanes, wide.load(state.mixed, row * dim + i * wide.lanes) * factor)

    def _leave(self, call: _Call, state: _State, row: Expr, at: Expr) -> None:
        """One of several splits of a row: leave all in the workspace."""
        wide, dim, at = self.wide, self.shape.head_dim, bind(at)
        with serial(dim // wide.lanes) as i:
            wide.store(call.workspace, at + i * wide.lanes, wide.load(state.mixed, row * dim + i * wide.lanes))
        total = reduce_sum(self.vectors, self.vectors.load(state.sums, row * self.vectors.lanes))
        T.buffer_store(call.workspace, state.largest[row], [at + dim])
        T.buffer_store(call.workspace, total, [at + dim + 1])

    def _combine(self, call: _Call, rows: _Rows, row: Expr, splits: Expr, task: Expr) -> None:
        """Add up what a row's splits have left, each shrunk to the largest score of all."""
        wide, dim = self.wide, self.shape.head_dim
        token, head = self._token(rows, row)
        at = bind((task * splits * self.knobs.rows + row) * self.slot)
        apart = self.knobs.rows * self.slot
        largest = local(wide.lanes, "float32")
        wide.store(largest, 0, wide.splat(_NOTHING))
        with serial(splits) as split:
            wide.store(largest, 0, T.max(wide.load(largest, 0), wide.splat(call.workspace[at + split * apart + dim])))
        top = self._with_sink(call, head, wide.load(largest, 0))
        factors, total = local(max(_SPLITS) * wide.lanes, "float32"), local(wide.lanes, "float32")
        wide.store(total, 0, wide.splat(0.0))
        with serial(splits) as split:
            factor = bind(exp(wide, wide.splat(call.workspace[at + split * apart + dim]) - top))
            wide.store(factors, split * wide.lanes, factor)
            share = wide.splat(call.workspace[at + split * apart + dim + 1])
            wide.store(total, 0, wide.load(total, 0) + factor * share)
        divisor = bind(self._total_with_sink(call, head, wide.load(total, 0), top))
        to = bind((rows.sequence * call.step + token) * self.out_stride + head * dim)
        mixed = local(wide.lanes, "float32")
        with serial(dim // wide.lanes) as i:
            wide.store(mixed, 0, wide.splat(0.0))
            with serial(splits) as split:
                part = wide.load(call.workspace, at + split * apart + i * wide.lanes)
                wide.store(mixed, 0, wide.fma(part, wide.load(factors, split * wide.lanes), wide.load(mixed, 0)))
            wide.store(call.out, to + i * wide.lanes, wide.load(mixed, 0) / divisor)

    def _with_sink(self, call: _Call, head: Expr, largest: Expr) -> Expr:
        """The largest score, the sink's included."""
        if call.sinks is None:
            return bind(largest)
        return bind(T.max(largest, self.wide.splat(call.sinks[head])))

    def _total_with_sink(self, call: _Call, head: Expr, total: Expr, top: Expr) -> Expr:
        """The sum of powers, the sink's included."""
        if call.sinks is None:
            return total
        return total + exp(self.wide, self.wide.splat(call.sinks[head]) - top)
