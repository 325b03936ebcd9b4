"""Causal attention of a step's queries over the KV cache, with a running softmax in f32.

A row is the query of one token and one head; the heads of a group share keys and values, so their rows stand side by
side. A task is a sequence, a kv head and a block of rows. It walks its keys in blocks: scores, softmax, values. Both
products keep their sums in registers: a load of keys or values serves all rows, and every other instruction of the
inner loops is a multiply-add.

Keys are cut into segments at fixed positions; what the segments give is added up in their order. Where there are few
tasks and many keys, each segment is a task of its own. So a token's result is the same, bit for bit, whatever other
tokens are in its step: a guess that is verified gives the logits that it would give alone.

Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022 (FlashAttention)
for the walk over blocks of keys; Dao et al. 2023 (Flash-Decoding) for the segments.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx import Not, Select, bitwise_and, const
from tvm.tirx import all as all_of
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.attention_block import NOTHING, AttentionKnobs, Block, Rows, State, settled
from rlxc.backends.tvm.kernels.cache import CacheShape, Pages
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
from rlxc.backends.tvm.kernels.math import exp, reduce_sum, vanishing_exp
from rlxc.backends.tvm.kernels.rope import digits
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import OptionError

__all__ = ["AttentionKnobs", "attention_kernel", "workspace_floats"]

# Positions of a segment: whole pages and blocks.
_SEGMENT = 512

# With more tasks, none is cut into segments; the workspace holds the results of so many segments.
_FEW_TASKS, _SLOTS = 32, 512

# One thread reads so many keys' channels in the two microseconds that a parallel region must save.
_SERIAL_CHANNELS = 16384


def workspace_floats(knobs: AttentionKnobs, head_dim: int) -> int:
    """The f32 that :func:`attention_kernel` needs as workspace, whatever it is called with."""
    return _SLOTS * knobs.rows * (head_dim + 2)


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
    of these. Their keys and values lie in pages already; entries of a block table before the first position that a
    token sees, or behind the last token's, are not read. Scores are scaled, then ``soft_cap`` c makes c tanh(s / c)
    of s. ``sinks f32[heads]``, a parameter if asked for, are scores of a key without a value.

    Raises:
        OptionError: heads do not share kv heads evenly, or a block has more keys than a page.
        UnsupportedError: the head's channels do not divide among vectors.
    """
    if heads % shape.kv_heads:
        raise OptionError(
            f"{heads} heads for {shape.kv_heads} kv heads", source="attention", remedy="take a multiple"
        )
    block = Block(vectors, knobs, heads // shape.kv_heads, shape, window, soft_cap)
    attention = _Attention(block, heads, scale, out_stride)
    inputs = [
        Pointer("rotated", "float32"),
        *shape.params,
        Pointer("past", "int32"),
        *([Pointer("sinks", "float32")] if sinks else []),
    ]
    outputs = (Pointer("workspace", "float32"), Pointer("out", "float32"))

    def body(*values: Buffer | Expr) -> None:
        memory = len(shape.params)
        rotated, pages = values[0], Pages.of(shape, values[1 : 1 + memory])
        past, *sink, workspace, out, sequences, step = values[1 + memory :]
        given = sink[0] if sinks else None
        attention.emit(_Call(rotated, pages, past, given, workspace, out, sequences, step))

    options = f"{'sinks_' if sinks else ''}{window or 'all'}_{digits(scale)}_{digits(soft_cap or 0)}"
    sizes = f"{vectors.lanes}_{knobs.rows}_{knobs.keys}_{knobs.registers}"
    name = f"attention_{sizes}_{heads}_{shape.name}_{options}_{out_stride}"
    return Kernel(name, (*inputs, *outputs, Number("sequences"), Number("step")), body)


@dataclass(frozen=True)
class _Call:
    """The kernel's parameters."""

    rotated: Buffer
    pages: Pages
    past: Buffer
    sinks: Buffer | None
    workspace: Buffer
    out: Buffer
    sequences: Expr
    step: Expr


@dataclass(frozen=True)
class _Sums:
    """What the segments of some rows have given so far: values, and in every lane the largest score and the powers."""

    mixed: Buffer
    largest: Buffer
    total: Buffer


@dataclass(frozen=True)
class _Attention:
    """Tasks of blocks."""

    block: Block
    heads: int
    scale: float
    out_stride: int

    @property
    def slot(self) -> int:
        """Floats of one row's result in the workspace: its channels, largest score and sum."""
        return self.block.shape.head_dim + 2

    @property
    def row_counts(self) -> list[int]:
        """The numbers of rows that there is code for: a decoded token's, a few tokens', a prompt's."""
        most = self.block.knobs.rows
        few = [most // 2] if self.block.group <= most // 4 else []
        return sorted({min(self.block.group, most), *few, most})

    def emit(self, call: _Call) -> None:
        total = settled(call.step * self.block.group)
        blocks = settled(T.truncdiv(total + (self.block.knobs.rows - 1), self.block.knobs.rows))
        tasks = settled(call.sequences * self.block.shape.kv_heads * blocks)
        seen = self._most_seen(call)
        splits = bind(self._splits(tasks, seen))
        # Little work for one token: a parallel region would cost more than it saves.
        least = _SERIAL_CHANNELS // self.block.shape.head_dim
        small = bind(all_of(total <= self.row_counts[0], splits == 1, tasks * seen <= least))
        with when(small), serial(tasks) as task:
            rows = self._rows(call, task, const(0), total)
            self._attend(call, rows, self.row_counts[0], const(0), const(1), const(0))
        with when(Not(small)):
            with parallel(tasks * splits) as task:
                order = settled(T.truncmod(task, blocks))
                # Late blocks see more keys: take them in turn with early ones, and threads' shares are even.
                block = Select(
                    T.truncmod(order, 2) == 0, T.truncdiv(order, 2), blocks - 1 - T.truncdiv(order, 2)
                )
                head = T.truncdiv(T.truncdiv(task, blocks), splits)
                rows = self._rows(call, head, settled(block), total)
                split = settled(T.truncmod(T.truncdiv(task, blocks), splits))
                slot = settled(((head * blocks + block) * splits + split) * self.block.knobs.rows)
                least = 0
                for count in self.row_counts:
                    with when(all_of(rows.count > least, rows.count <= count)):
                        self._attend(call, rows, count, split, splits, slot)
                    least = count
            with when(splits > 1), serial(tasks) as task:
                rows = self._rows(call, T.truncdiv(task, blocks), settled(T.truncmod(task, blocks)), total)
                with serial(rows.count) as row:
                    self._combine(call, rows, row, splits, task)

    def _most_seen(self, call: _Call) -> Expr:
        """How many positions the tokens of the longest sequence see together."""
        longest = local(1, "int32")
        T.buffer_store(longest, const(0), [0])
        with serial(call.sequences) as b:
            T.buffer_store(longest, T.max(longest[0], call.past[b]), [0])
        seen = longest[0] + call.step
        return settled(
            seen if self.block.window is None else T.min(seen, call.step + (self.block.window - 1))
        )

    def _splits(self, tasks: Expr, seen: Expr) -> Expr:
        """Into how many segments tasks are cut: as many as the longest sequence has, or 1 for none."""
        segments = settled(T.truncdiv(seen + (_SEGMENT - 1), _SEGMENT))
        if self.block.window is not None:
            segments = settled(segments + 1)  # a window may begin inside one
        worth = (seen > _SEGMENT) & (tasks <= _FEW_TASKS) & (tasks * segments <= _SLOTS)
        return Select(worth, segments, const(1))

    def _rows(self, call: _Call, head: Expr, block: Expr, total: Expr) -> Rows:
        sequence = settled(T.truncdiv(head, self.block.shape.kv_heads))
        begin = settled(block * self.block.knobs.rows)
        count = settled(T.min(const(self.block.knobs.rows), total - begin))
        past = settled(call.past[sequence])
        first: Expr = const(0)
        if self.block.window is not None:
            first = settled(
                T.max(past + T.truncdiv(begin, self.block.group) - (self.block.window - 1), const(0))
            )
        end = settled(past + T.truncdiv(begin + count - 1, self.block.group) + 1)
        kv_head = settled(T.truncmod(head, self.block.shape.kv_heads))
        return Rows(sequence, kv_head, begin, total, count, past, first, end)

    def _attend(self, call: _Call, rows: Rows, count: int, split: Expr, splits: Expr, slot: Expr) -> None:
        """One task, with code for ``count`` rows: those beyond the block's last are that one again.

        It takes in all segments that the rows see, or, of several ``splits``, segment number ``split`` of them, and
        leaves what that gives in the workspace, from row ``slot`` on.
        """
        wide, dim = self.block.wide, self.block.shape.head_dim
        state, sums = self._state(count), self._sums(count)
        self._load_queries(call, rows, state)
        with serial(count) as row:
            self._clear(sums, row)
        begin = settled(T.truncdiv(rows.first, _SEGMENT) + split)
        seen = T.truncdiv(rows.end - 1, _SEGMENT) + 1 - begin
        with serial(Select(splits == 1, seen, const(1))) as segment:
            self._walk(call, rows, state, settled(begin + segment))
            with serial(rows.count) as row:
                self._add(sums, row, state.mixed, row * dim, state.largest[row], self._total(state, row))
        with serial(rows.count) as row:
            with when(splits == 1):
                self._finish(call, rows, row, sums, row)
            with when(splits > 1):
                at = settled((slot + row) * self.slot)
                with serial(dim // wide.lanes) as i:
                    mixed = wide.load(sums.mixed, row * dim + i * wide.lanes)
                    wide.store(call.workspace, at + i * wide.lanes, mixed)
                T.buffer_store(call.workspace, sums.largest[row * wide.lanes], [at + dim])
                T.buffer_store(call.workspace, sums.total[row * wide.lanes], [at + dim + 1])

    def _combine(self, call: _Call, rows: Rows, row: Expr, splits: Expr, task: Expr) -> None:
        """Add up what the segments of a row have left."""
        dim, sums = self.block.shape.head_dim, self._sums(1)
        self._clear(sums, const(0))
        with serial(splits) as split:
            at = settled(((task * splits + split) * self.block.knobs.rows + row) * self.slot)
            largest, total = (call.workspace[at + dim + i] for i in range(2))
            self._add(sums, const(0), call.workspace, at, largest, total)
        self._finish(call, rows, row, sums, const(0))

    def _state(self, count: int) -> State:
        dim, lanes, keys = self.block.shape.head_dim, self.block.vectors.lanes, self.block.knobs.keys
        return State(
            count,
            queries=local(count * dim, "float32"),
            scores=local(count * keys, "float32"),
            largest=local(count, "float32"),
            sums=local(count * lanes, "float32"),
            shrink=local(count * lanes, "float32"),
            mixed=local(count * dim, "float32"),
        )

    def _sums(self, count: int) -> _Sums:
        dim, lanes = self.block.shape.head_dim, self.block.wide.lanes
        sizes = (count * dim, count * lanes, count * lanes)
        return _Sums(*(local(size, "float32") for size in sizes))

    def _walk(self, call: _Call, rows: Rows, state: State, segment: Expr) -> None:
        """Take in the keys of one segment that the rows see, if there are any."""
        dim, wide, keys = self.block.shape.head_dim, self.block.wide, self.block.knobs.keys
        with serial(state.rows) as row:
            with serial(dim // wide.lanes) as i:
                wide.store(state.mixed, row * dim + i * wide.lanes, wide.splat(0.0))
            T.buffer_store(state.largest, const(NOTHING, "float32"), [row])
            self.block.vectors.store(
                state.sums, row * self.block.vectors.lanes, self.block.vectors.splat(0.0)
            )
        # Blocks divide pages evenly, and segments are whole blocks.
        begin = settled(T.max(bitwise_and(rows.first, -keys), segment * _SEGMENT))
        end = T.min(rows.end, (segment + 1) * _SEGMENT)
        with serial(T.max(T.truncdiv(end - begin + (keys - 1), keys), const(0))) as block:
            position = settled(begin + block * keys)
            here = self.block.find(call.pages, rows, position)
            ahead = self.block.find_next(call.pages, rows, state, position)
            self.block.score(call.pages, rows, state, position, here, ahead)
            self.block.hide(rows, state, position)
            self.block.soften(state)
            self.block.mix(call.pages, rows, state, position, here, ahead)

    def _load_queries(self, call: _Call, rows: Rows, state: State) -> None:
        dim, wide = self.block.shape.head_dim, self.block.wide
        with serial(state.rows) as row:
            token, head = self.block.token(rows, row)
            at = settled(((rows.sequence * call.step + token) * self.heads + head) * dim)
            with serial(dim // wide.lanes) as i:
                query = wide.load(call.rotated, at + i * wide.lanes) * wide.splat(self.scale)
                wide.store(state.queries, row * dim + i * wide.lanes, query)

    def _total(self, state: State, row: Expr) -> Expr:
        """The sum of a row's powers."""
        lanes = self.block.vectors.lanes
        return reduce_sum(self.block.vectors, self.block.vectors.load(state.sums, row * lanes))

    def _clear(self, sums: _Sums, row: Expr) -> None:
        wide, dim = self.block.wide, self.block.shape.head_dim
        with serial(dim // wide.lanes) as i:
            wide.store(sums.mixed, row * dim + i * wide.lanes, wide.splat(0.0))
        wide.store(sums.largest, row * wide.lanes, wide.splat(NOTHING))
        wide.store(sums.total, row * wide.lanes, wide.splat(0.0))

    def _add(self, sums: _Sums, row: Expr, mixed: Buffer, at: Expr, largest: Expr, total: Expr) -> None:
        """Add a segment to those before it; the one with the smaller largest score shrinks."""
        wide, dim = self.block.wide, self.block.shape.head_dim
        place = row * wide.lanes
        before, new = bind(wide.load(sums.largest, place)), bind(wide.splat(largest))
        top = bind(T.max(before, new))
        shrink, factor = bind(vanishing_exp(wide, before - top)), bind(vanishing_exp(wide, new - top))
        wide.store(sums.largest, place, top)
        wide.store(
            sums.total, place, wide.fma(wide.splat(total), factor, wide.load(sums.total, place) * shrink)
        )
        with serial(dim // wide.lanes) as i:
            to = row * dim + i * wide.lanes
            part = wide.load(mixed, at + i * wide.lanes)
            wide.store(sums.mixed, to, wide.fma(part, factor, wide.load(sums.mixed, to) * shrink))

    def _finish(self, call: _Call, rows: Rows, row: Expr, sums: _Sums, place: Expr) -> None:
        """All segments of a row are there: divide by the sum."""
        wide, dim = self.block.wide, self.block.shape.head_dim
        token, head = self.block.token(rows, row)
        largest = bind(wide.load(sums.largest, place * wide.lanes))
        top = self._with_sink(call, head, largest)
        shrink = bind(exp(wide, largest - top))
        total = wide.load(sums.total, place * wide.lanes) * shrink
        factor = bind(shrink / self._total_with_sink(call, head, total, top))
        to = settled((rows.sequence * call.step + token) * self.out_stride + head * dim)
        with serial(dim // wide.lanes) as i:
            mixed = wide.load(sums.mixed, place * dim + i * wide.lanes)
            wide.store(call.out, to + i * wide.lanes, mixed * factor)

    def _with_sink(self, call: _Call, head: Expr, largest: Expr) -> Expr:
        """The largest score, the sink's included."""
        if call.sinks is None:
            return bind(largest)
        return bind(T.max(largest, self.block.wide.splat(call.sinks[head])))

    def _total_with_sink(self, call: _Call, head: Expr, total: Expr, top: Expr) -> Expr:
        """The sum of powers, the sink's included."""
        if call.sinks is None:
            return total
        return total + exp(self.block.wide, self.block.wide.splat(call.sinks[head]) - top)
