"""Positions, caches and attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlxc.dtypes import DType
from rlxc.ir.graph import Dim, TensorType
from rlxc.ir.ops.base import Op, Types, add_dims, f32, part_size
from rlxc.ir.rope import RopeSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Positions(Op):
    """Positions of this step's tokens: ``past + 0 .. past + S - 1``.

    Inputs: ids ``i64[B, S]``, and the past: its length ``i32[]``, or a cache ``f32[B, K, past, D]`` that holds it.
    """

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """``i64[B, S]``."""
        ids, past = inputs
        scalar = past == TensorType(DType.I32, ())
        self.require(ids.dtype is DType.I64 and len(ids.shape) == 2, f"ids must be i64[B, S], got {ids}")
        self.require(scalar or len(past.shape) == 4, f"past must be i32[] or a cache, got {past}")
        return (ids,)


@dataclass(frozen=True)
class Rope(Op):
    """Rotates each head by its position.

    Inputs: x ``f32[B, S, heads * D]``, positions ``i64[B, S]``, optional factors ``f32[dim/2]``.
    """

    arity = (2, 3)
    heads: int
    spec: RopeSpec

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of x."""
        x, positions = inputs[:2]
        self.require(len(x.shape) == 3, f"x must be f32[B, S, heads * D], got {x}")
        self.require(positions == TensorType(DType.I64, x.shape[:2]), f"positions {positions} for {x}")
        _check_rope(self, self.spec, part_size(self, x, self.heads), inputs[2:])
        return (x,)


@dataclass(frozen=True)
class KvAppend(Op):
    """A cache with this step's rows after the past ones, as a new value: the pure form that models emit.

    Inputs: past ``f32[B, K, past, D]``, new ``f32[B, S, K * D]``. Result: ``f32[B, K, past + S, D]``.
    """

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, K, past + S, D]``."""
        past, new = inputs
        batch, heads, length, dim = _cache_dims(self, past, (DType.F32,))
        _check_rows(self, new, past, (batch, heads, dim))
        return (TensorType(past.dtype, (batch, heads, add_dims(length, new.shape[1]), dim)),)


@dataclass(frozen=True)
class KvWrite(Op):
    """Writes this step's rows into a cache of fixed size, in place, as its elements' type stores them.

    ``layout`` is ``linear`` (row = position), ``ring`` (row = position mod capacity) or ``paged``: of a sequence's
    block table, entry ``i`` is the number of the page that holds positions ``i * page_size`` and following.
    Inputs: cache ``[B, K, capacity, D]`` or pages ``[pages, K, page_size, D]`` (f32, f16, bf16, or int8: codes with one
    scale for each row of ``D``), new ``f32[B, S, K * D]``, past length ``i32[]``, and of a paged cache the table
    ``i32[B, entries]``. Result: the cache.
    """

    arity = (3, 4)
    layout: str

    def shape_rule(self, inputs: Types) -> Types:
        """The cache's shape."""
        cache, new, past, *table = inputs
        _buffer_dims(self, self.layout, cache, new, past, table)
        return (cache,)


@dataclass(frozen=True)
class KvRead(Op):
    """The rows of a cache that this step's tokens may see, oldest first.

    All of them in a ``linear`` layout; in a ``ring``, or in pages read by ``window``, the last ``window + S - 1``.
    Inputs: those of the write, where this step's rows count for ``S`` only. Result: ``f32[B, K, T, D]``.
    """

    arity = (3, 4)
    layout: str
    window: int | None = None

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, K, T, D]`` with a symbolic ``T``."""
        cache, new, past, *table = inputs
        batch, heads, dim = _buffer_dims(self, self.layout, cache, new, past, table)
        by_window = self.window is not None
        self.require(
            self.layout == "paged" or (self.layout == "ring") is by_window,
            "a ring is read by window, a linear cache is not",
        )
        return (f32(batch, heads, "visible", dim),)


@dataclass(frozen=True)
class Attention(Op):
    """Causal grouped-query attention: ``softmax(scale * q k^T + mask) v``.

    The last of the ``T`` keys belongs to the last of the ``S`` queries. With a ``window``, a query sees that many
    keys, its own included. A ``soft_cap`` c makes c tanh(s / c) of a scaled score s. Sinks are scores of one more key
    for each head, whose value is zero. Inputs: q ``f32[B, S, heads * D]``, k and v ``f32[B, K, T, D]``, optional sinks
    ``f32[heads]``. Result: the shape of q.
    Sources: Ainslie et al. 2023; Gemma Team 2024 for the cap; Xiao et al. 2023 and OpenAI 2025 (gpt-oss) for sinks.
    """

    arity = (3, 4)
    heads: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of q."""
        q, k, v, *sinks = inputs
        _check_scores(self, self.heads, self.soft_cap, sinks)
        self.require(k == v, f"keys {k} and values {v} differ")
        batch, kv_heads, _, dim = _cache_dims(self, k, (DType.F32,))
        _check_heads(self, self.heads, q, (batch, kv_heads, dim))
        return (q,)


@dataclass(frozen=True)
class GroupQueryAttention(Op):
    """Rope, cache write and read, and attention in one: what ONNX Runtime's op of that name does.

    Inputs: q ``f32[B, S, heads * D]``, k and v ``f32[B, S, K * D]``, key cache and value cache (see :class:`KvWrite`),
    past length ``i32[]``, of paged caches their one table ``i32[B, entries]``, optional rope factors ``f32[dim/2]``,
    and, with ``sinks``, those ``f32[heads]``; see :class:`Attention`.
    Results: the attention's output (the shape of q), key cache, value cache.
    """

    arity = (6, 9)
    heads: int
    scale: float
    layout: str
    window: int | None = None
    rope: RopeSpec | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def optional(self, inputs: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """Of all inputs, the block table, the rope's factors and the sinks, each of which may be absent."""
        rest, sinks = (inputs[6:-1], inputs[-1:]) if self.sinks else (inputs[6:], inputs[:0])
        table = rest[:1] if self.layout == "paged" else rest[:0]
        return table, rest[len(table) :], sinks

    def shape_rule(self, inputs: Types) -> Types:
        """The shapes of q and of the two caches."""
        q, k, v, key_cache, value_cache, past = inputs[:6]
        self.require(k == v and key_cache == value_cache, "keys and values differ in shape")
        table, factors, sinks = self.optional(inputs)
        _check_scores(self, self.heads, self.soft_cap, sinks)
        cache = _buffer_dims(self, self.layout, key_cache, k, past, table)
        self.require(self.layout != "ring" or self.window is not None, "a ring has a window")
        _check_heads(self, self.heads, q, cache)
        self.require(q.shape[1] == k.shape[1], f"q {q} and k {k} differ in tokens")
        self.require(len(factors) <= 1, f"takes one input of factors, got {len(factors)}")
        self.require(self.rope is not None or not factors, "rope factors without rope")
        if self.rope is not None:
            _check_rope(self, self.rope, cache[2], factors)
        return (q, key_cache, value_cache)


_CACHE_DTYPES = (DType.F32, DType.F16, DType.BF16, DType.INT8)
"""What a cache's rows can be stored as. 8-bit codes have one f32 scale for each row of the last axis."""


def _buffer_dims(
    op: Op, layout: str, cache: TensorType, new: TensorType, past: TensorType, table: Sequence[TensorType]
) -> tuple[Dim, int, int]:
    """``B, K, D`` of a cache of this layout, after checks that all inputs fit it."""
    op.require(layout in ("linear", "ring", "paged"), f"unknown layout {layout!r}")
    op.require(past == TensorType(DType.I32, ()), f"past length must be i32[], got {past}")
    batch, heads, _, dim = _cache_dims(op, cache, _CACHE_DTYPES)
    if layout == "paged":
        batch = new.shape[0] if new.shape else "batch"
        op.require(isinstance(cache.shape[2], int), f"the size of the pages {cache} must be a number")
        found = [(one.dtype, len(one.shape), *one.shape[:1]) for one in table]
        op.require(found == [(DType.I32, 2, batch)], f"a paged cache needs a table i32[{batch}, entries]")
    else:
        op.require(not table, f"a {layout} cache has no table")
    _check_rows(op, new, cache, (batch, heads, dim))
    return batch, heads, dim


def _cache_dims(op: Op, cache: TensorType, dtypes: tuple[DType, ...]) -> tuple[Dim, int, Dim, int]:
    """``B, K, T, D`` of a cache."""
    fits = cache.dtype in dtypes and len(cache.shape) == 4
    op.require(fits, f"a cache is {' or '.join(map(str, dtypes))} [B, K, T, D], got {cache}")
    batch, heads, length, dim = cache.shape
    numbers = isinstance(heads, int) and isinstance(dim, int) and heads > 0
    op.require(numbers, f"heads and head dim of {cache} must be numbers")
    assert isinstance(heads, int) and isinstance(dim, int)
    return batch, heads, length, dim


def _check_rows(op: Op, new: TensorType, cache: TensorType, dims: tuple[Dim, int, int]) -> None:
    batch, heads, dim = dims
    fits = len(new.shape) == 3 and new == f32(batch, new.shape[1], heads * dim)
    op.require(fits, f"new rows {new} do not fit cache {cache}")


def _check_heads(op: Op, heads: int, q: TensorType, cache: tuple[Dim, int, int]) -> None:
    batch, kv_heads, dim = cache
    fits = len(q.shape) == 3 and q == f32(batch, q.shape[1], heads * dim)
    op.require(fits, f"q {q} does not hold {heads} heads of {dim}")
    op.require(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} key/value heads")


def _check_scores(op: Op, heads: int, soft_cap: float | None, sinks: Sequence[TensorType]) -> None:
    op.require(soft_cap is None or soft_cap > 0, f"soft cap {soft_cap} is not positive")
    for given in sinks:
        op.require(given == f32(heads), f"sinks {given} for {heads} heads")


def _check_rope(op: Op, spec: RopeSpec, head_dim: int, factors: Sequence[TensorType]) -> None:
    fits = spec.dim <= head_dim and spec.dim % 2 == 0
    op.require(fits, f"{spec.dim} rotated channels do not fit a head of {head_dim}")
    for given in factors:
        op.require(given == f32(spec.dim // 2), f"factors {given}, expected {spec.dim // 2}")
