"""Every op of the IR: its attributes (the dataclass fields), what it computes, and its shape rule.

Shape letters: ``B`` batch, ``S`` tokens of this step, ``T`` tokens with a key, ``H`` heads, ``K`` key/value heads,
``D`` head dim. Activations are ``f32[B, S, features]``; heads lie side by side in the last dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir.graph import Dim, TensorType
from rlxc.ir.rope import RopeSpec

Types = tuple[TensorType, ...]


@dataclass(frozen=True)
class Op(ABC):
    """What a node computes. Subclasses are frozen dataclasses whose fields are the op's attributes."""

    arity: ClassVar[tuple[int, int]] = (1, 1)
    """Smallest and largest number of inputs."""

    @property
    def name(self) -> str:
        """The op's name in IR text."""
        return type(self).__name__

    def infer(self, inputs: Types) -> Types:
        """The types of the results for these input types.

        Raises:
            GraphError: the op does not accept them.
        """
        low, high = self.arity
        self.require(low <= len(inputs) <= high, f"takes {low} to {high} inputs, got {len(inputs)}")
        return self.shape_rule(inputs)

    @abstractmethod
    def shape_rule(self, inputs: Types) -> Types:
        """The types of the results, given the right number of inputs."""

    def require(self, condition: bool, problem: str) -> None:
        """Raise a GraphError naming this op unless the condition holds."""
        if not condition:
            raise GraphError(problem, source=self.name)


def add_dims(a: Dim, b: Dim) -> Dim:
    """The sum of two dimensions, symbolic where either is."""
    return a + b if isinstance(a, int) and isinstance(b, int) else f"{a}+{b}"


def _f32(*shape: Dim) -> TensorType:
    return TensorType(DType.F32, shape)


def _part_size(op: Op, x: TensorType, parts: int) -> int:
    """The size of each of ``parts`` equal parts of the last dimension of ``x``, which must be f32."""
    op.require(x.dtype is DType.F32, f"needs f32, got {x}")
    size = x.shape[-1] if x.shape else None
    op.require(
        isinstance(size, int) and parts > 0 and size % parts == 0,
        f"the last dimension of {x} must be a multiple of {parts}",
    )
    assert isinstance(size, int)
    return size // parts


# --- constants and elementwise arithmetic -----------------------------------------------------------------------


@dataclass(frozen=True)
class Constant(Op):
    """A small f32 constant: a scalar, or a vector from a tuple."""

    arity = (0, 0)
    value: float | tuple[float, ...]

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[]`` or ``f32[n]``."""
        return (_f32(len(self.value)) if isinstance(self.value, tuple) else _f32(),)


@dataclass(frozen=True)
class Binary(Op):
    """Elementwise arithmetic of two f32 tensors, one of which may broadcast to the other as in numpy."""

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of the larger input."""
        b, a = sorted(inputs, key=lambda t: (len(t.shape), [dim != 1 for dim in t.shape]))
        self.require(a.dtype is b.dtype is DType.F32, f"needs f32, got {a} and {b}")
        tail = a.shape[len(a.shape) - len(b.shape) :]
        fits = all(y in (x, 1) for x, y in zip(tail, b.shape))
        self.require(fits, f"cannot broadcast {b} to {a}")
        return (a,)


@dataclass(frozen=True)
class Add(Binary):
    """``a + b``."""


@dataclass(frozen=True)
class Mul(Binary):
    """``a * b``."""


@dataclass(frozen=True)
class Unary(Op):
    """An elementwise function of one f32 tensor."""

    def shape_rule(self, inputs: Types) -> Types:
        """The input's shape."""
        self.require(inputs[0].dtype is DType.F32, f"needs f32, got {inputs[0]}")
        return inputs


@dataclass(frozen=True)
class Square(Unary):
    """``x * x``."""


@dataclass(frozen=True)
class Sqrt(Unary):
    """The square root."""


@dataclass(frozen=True)
class Rsqrt(Unary):
    """``1 / sqrt(x)``."""


@dataclass(frozen=True)
class Silu(Unary):
    """``x * sigmoid(x)``."""


@dataclass(frozen=True)
class Gelu(Unary):
    """GELU in its tanh approximation: ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``."""


@dataclass(frozen=True)
class Mean(Unary):
    """The mean over the last dimension, which stays as 1."""

    def shape_rule(self, inputs: Types) -> Types:
        """``[..., 1]``."""
        (x,) = super().shape_rule(inputs)
        self.require(len(x.shape) > 0, f"needs a last dimension, got {x}")
        return (_f32(*x.shape[:-1], 1),)


# --- norms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RmsNorm(Op):
    """``x / sqrt(mean(x^2) + eps) * weight``, over the last dimension or over each of its ``heads`` equal parts.

    Inputs: x ``f32[..., N]``, weight ``f32[N / heads]``. Source: Zhang and Sennrich 2019.
    """

    arity = (2, 2)
    eps: float
    heads: int = 1

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of x."""
        x, weight = inputs
        self.require(weight == _f32(_part_size(self, x, self.heads)), f"weight {weight} for {x}")
        return (x,)


@dataclass(frozen=True)
class AddRmsNorm(Op):
    """The residual sum ``x + residual`` and its RMS norm, in one pass over memory.

    Inputs: x and residual ``f32[..., N]``, weight ``f32[N]``. Results: norm, sum.
    """

    arity = (3, 3)
    eps: float

    def shape_rule(self, inputs: Types) -> Types:
        """Twice the shape of x."""
        x, residual, weight = inputs
        self.require(x == residual, f"residual {residual} for {x}")
        self.require(weight == _f32(_part_size(self, x, 1)), f"weight {weight} for {x}")
        return (x, x)


# --- matrices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embed(Op):
    """Rows of a table. Inputs: ids ``i64[B, S]``, table ``[vocab, N]`` of any format. Result: ``f32[B, S, N]``."""

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, N]``."""
        ids, table = inputs
        self.require(ids.dtype is DType.I64 and len(ids.shape) == 2, f"ids must be i64[B, S], got {ids}")
        self.require(len(table.shape) == 2, f"table must be [vocab, N], got {table}")
        return (_f32(*ids.shape, table.shape[1]),)


@dataclass(frozen=True)
class _Linear(Op):
    """``y = x W^T + bias``. Inputs: x ``f32[..., in]``, weight ``[out, in]``, optional bias ``f32[out]``."""

    arity = (2, 3)
    formats: ClassVar[frozenset[DType]]
    """The types that the weight may have."""

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[..., out]``."""
        x, weight = inputs[:2]
        self.require(x.dtype is DType.F32, f"x must be f32, got {x}")
        self.require(weight.dtype in self.formats, f"cannot read a weight of type {weight}")
        self.require(
            len(weight.shape) == 2 and x.shape[-1:] == weight.shape[1:], f"weight {weight} for x {x}"
        )
        for bias in inputs[2:]:
            self.require(bias == _f32(weight.shape[0]), f"bias {bias} for weight {weight}")
        return (_f32(*x.shape[:-1], weight.shape[0]),)


@dataclass(frozen=True)
class MatMul(_Linear):
    """``y = x W^T + bias`` with a float weight (f32, f16 or bf16)."""

    formats = frozenset((DType.F32, DType.F16, DType.BF16))


@dataclass(frozen=True)
class DequantMatMul(_Linear):
    """``y = x W^T + bias`` with a packed weight, decoded on the way to the multiplication."""

    formats = frozenset(dtype for dtype in DType if dtype.is_packed)


@dataclass(frozen=True)
class Split(Op):
    """Cuts the last dimension into parts of these sizes."""

    sizes: tuple[int, ...]

    def shape_rule(self, inputs: Types) -> Types:
        """One result per size."""
        (x,) = inputs
        self.require(_part_size(self, x, 1) == sum(self.sizes), f"sizes {self.sizes} for {x}")
        return tuple(_f32(*x.shape[:-1], size) for size in self.sizes)


@dataclass(frozen=True)
class Glu(Op):
    """A gated activation: ``act(gate) * up``, where x ``f32[..., 2 F]`` holds gate and up side by side.

    ``activation`` is ``silu`` or ``gelu`` (tanh). Source: Shazeer 2020.
    """

    activation: str

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[..., F]``."""
        (x,) = inputs
        self.require(self.activation in ("silu", "gelu"), f"unknown activation {self.activation!r}")
        return (_f32(*x.shape[:-1], _part_size(self, x, 2)),)


@dataclass(frozen=True)
class SelectRows(Op):
    """Chosen tokens of a step. Inputs: x ``f32[B, S, N]``, rows ``i64[R]`` (negative counts from the end)."""

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, R, N]``."""
        x, rows = inputs
        self.require(rows.dtype is DType.I64 and len(rows.shape) == 1, f"rows must be i64[R], got {rows}")
        self.require(x.dtype is DType.F32 and len(x.shape) == 3, f"x must be f32[B, S, N], got {x}")
        return (_f32(x.shape[0], rows.shape[0], x.shape[2]),)


# --- LoRA: adapters that come at run time ----------------------------------------------------------------------


@dataclass(frozen=True)
class LoraDown(Op):
    """The narrow side of LoRA for matrices that read one input: ``u = scales * (x A^T)``, one A for each of them.

    Each sequence has a stack of adapters, their ranks side by side. Inputs: x ``f32[B, S, in]``, the A's
    ``f32[B, parts, rank, in]``, scales ``f32[B, rank]``. Result: ``f32[B, S, parts, rank]``. Source: Hu et al. 2021.
    """

    arity = (3, 3)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, parts, rank]``."""
        x, a, scales = inputs
        self.require(
            len(x.shape) == 3 and len(a.shape) == 4, f"x {x} must be [B, S, in], A {a} [B, parts, rank, in]"
        )
        batch, parts, rank, columns = a.shape
        self.require(x == _f32(batch, x.shape[1], columns) and a.dtype is DType.F32, f"A {a} for x {x}")
        self.require(isinstance(parts, int), f"parts of {a} must be a number")
        self.require(scales == _f32(batch, rank), f"scales {scales} for A {a}")
        return (_f32(*x.shape[:2], parts, rank),)


@dataclass(frozen=True)
class LoraMatMul(Op):
    """A matrix product with LoRA: ``y = x W^T + bias``, plus ``u B^T`` for each part of W's rows.

    ``sizes`` are the parts' rows; the parts of u that belong to them begin at ``first``. Inputs: x ``f32[B, S, in]``,
    weight ``[out, in]`` of any format, optional bias ``f32[out]``, u ``f32[B, S, parts, rank]``, B's
    ``f32[B, out, rank]``. Result: ``f32[B, S, out]``.
    """

    arity = (4, 5)
    sizes: tuple[int, ...]
    first: int = 0

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, out]``."""
        *base, u, b = inputs
        x, weight = base[:2]
        product: Op = DequantMatMul() if weight.dtype.is_packed else MatMul()
        (result,) = product.infer(tuple(base))
        self.require(
            len(x.shape) == 3 and len(u.shape) == 4, f"x {x} must be [B, S, in], u {u} [B, S, parts, rank]"
        )
        parts, rank = u.shape[2:]
        self.require(isinstance(parts, int), f"parts of {u} must be a number")
        assert isinstance(parts, int)
        self.require(u == _f32(*x.shape[:2], parts, rank), f"u {u} for x {x}")
        self.require(self.first >= 0 and self.first + len(self.sizes) <= parts, f"u has {parts} parts")
        self.require(sum(self.sizes) == weight.shape[0], f"sizes {self.sizes} for weight {weight}")
        self.require(b == _f32(x.shape[0], weight.shape[0], rank), f"B {b} for weight {weight} and u {u}")
        return (result,)


@dataclass(frozen=True)
class LoraEmbed(Op):
    """An embedding with LoRA: ``y = x + (scales * A[ids]) B^T``.

    Inputs: x ``f32[B, S, N]``, ids ``i64[B, S]``, A's ``f32[B, vocab, rank]``, scales ``f32[B, rank]``, B's
    ``f32[B, N, rank]``. Result: the shape of x.
    """

    arity = (5, 5)

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of x."""
        x, ids, a, scales, b = inputs
        self.require(
            len(x.shape) == 3 and len(a.shape) == 3, f"x {x} must be [B, S, N], A {a} [B, vocab, rank]"
        )
        self.require(ids == TensorType(DType.I64, x.shape[:2]), f"ids {ids} for x {x}")
        batch, _, rank = a.shape
        self.require(a.dtype is DType.F32 and batch == x.shape[0], f"A {a} for x {x}")
        self.require(scales == _f32(batch, rank), f"scales {scales} for A {a}")
        self.require(
            x.dtype is DType.F32 and b == _f32(batch, x.shape[2], rank), f"B {b} for x {x} and A {a}"
        )
        return (x,)


# --- positions, cache and attention -----------------------------------------------------------------------------


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
        _check_rope(self, self.spec, _part_size(self, x, self.heads), inputs[2:])
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
        batch, heads, length, dim = _cache_shape(self, past, new)
        return (TensorType(past.dtype, (batch, heads, add_dims(length, new.shape[1]), dim)),)


@dataclass(frozen=True)
class KvWrite(Op):
    """Writes this step's rows into a fixed buffer, f32 or f16, in place.

    ``layout`` is ``linear`` (row = position) or ``ring`` (row = position mod capacity).
    Inputs: cache ``f32[B, K, capacity, D]``, new ``f32[B, S, K * D]``, past length ``i32[]``. Result: the cache.
    """

    arity = (3, 3)
    layout: str

    def shape_rule(self, inputs: Types) -> Types:
        """The cache's shape."""
        cache, new, past = inputs
        _cache_shape(self, cache, new)
        _check_layout(self, self.layout, past)
        return (cache,)


@dataclass(frozen=True)
class KvRead(Op):
    """The rows of a cache that this step's tokens may see, oldest first.

    All of them in a ``linear`` layout; in a ``ring`` the last ``window + S - 1``.
    Inputs: cache ``f32[B, K, capacity, D]``, this step's rows ``f32[B, S, K * D]`` (for ``S``), past length ``i32[]``.
    Result: ``f32[B, K, T, D]``.
    """

    arity = (3, 3)
    layout: str
    window: int | None = None

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, K, T, D]`` with a symbolic ``T``."""
        cache, new, past = inputs
        batch, heads, _, dim = _cache_shape(self, cache, new)
        _check_layout(self, self.layout, past)
        self.require(
            (self.layout == "ring") is (self.window is not None),
            "a ring is read by window, a linear cache is not",
        )
        return (_f32(batch, heads, "visible", dim),)


@dataclass(frozen=True)
class Attention(Op):
    """Causal grouped-query attention: ``softmax(scale * q k^T + mask) v``.

    The last of the ``T`` keys belongs to the last of the ``S`` queries. With a ``window``, a query sees that many
    keys, its own included. Inputs: q ``f32[B, S, heads * D]``, k and v ``f32[B, K, T, D]``. Result: the shape of q.
    Source: Ainslie et al. 2023.
    """

    arity = (3, 3)
    heads: int
    scale: float
    window: int | None = None

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of q."""
        q, k, v = inputs
        self.require(k == v, f"keys {k} and values {v} differ")
        _check_heads(self, self.heads, q, _cache_dims(self, k))
        return (q,)


@dataclass(frozen=True)
class GroupQueryAttention(Op):
    """Rope, cache write and read, and attention in one: what ONNX Runtime's op of that name does.

    Inputs: q ``f32[B, S, heads * D]``, k and v ``f32[B, S, K * D]``, key cache and value cache
    ``f32[B, K, capacity, D]``, past length ``i32[]``, optional rope factors ``f32[dim/2]``.
    Results: the attention's output (the shape of q), key cache, value cache.
    """

    arity = (6, 7)
    heads: int
    scale: float
    layout: str
    window: int | None = None
    rope: RopeSpec | None = None

    def shape_rule(self, inputs: Types) -> Types:
        """The shapes of q and of the two caches."""
        q, k, v, key_cache, value_cache, past = inputs[:6]
        self.require(k == v and key_cache == value_cache, "keys and values differ in shape")
        cache = _cache_shape(self, key_cache, k)
        _check_layout(self, self.layout, past)
        self.require(self.layout == "linear" or self.window is not None, "a ring has a window")
        _check_heads(self, self.heads, q, cache)
        self.require(q.shape[1] == k.shape[1], f"q {q} and k {k} differ in tokens")
        self.require(self.rope is not None or not inputs[6:], "rope factors without rope")
        if self.rope is not None:
            _check_rope(self, self.rope, cache[3], inputs[6:])
        return (q, key_cache, value_cache)


def _cache_dims(op: Op, cache: TensorType) -> tuple[Dim, int, Dim, int]:
    """``B, K, T, D`` of a cache."""
    fits = cache.dtype in (DType.F32, DType.F16) and len(cache.shape) == 4
    op.require(fits, f"a cache is f32 or f16 [B, K, T, D], got {cache}")
    batch, heads, length, dim = cache.shape
    numbers = isinstance(heads, int) and isinstance(dim, int) and heads > 0
    op.require(numbers, f"heads and head dim of {cache} must be numbers")
    assert isinstance(heads, int) and isinstance(dim, int)
    return batch, heads, length, dim


def _cache_shape(op: Op, cache: TensorType, new: TensorType) -> tuple[Dim, int, Dim, int]:
    """``B, K, T, D`` of a cache that takes rows of the type ``new``."""
    batch, heads, length, dim = _cache_dims(op, cache)
    fits = len(new.shape) == 3 and new == _f32(batch, new.shape[1], heads * dim)
    op.require(fits, f"new rows {new} do not fit cache {cache}")
    return batch, heads, length, dim


def _check_layout(op: Op, layout: str, past: TensorType) -> None:
    op.require(layout in ("linear", "ring"), f"unknown layout {layout!r}")
    op.require(past == TensorType(DType.I32, ()), f"past length must be i32[], got {past}")


def _check_heads(op: Op, heads: int, q: TensorType, cache: tuple[Dim, int, Dim, int]) -> None:
    batch, kv_heads, _, dim = cache
    fits = len(q.shape) == 3 and q == _f32(batch, q.shape[1], heads * dim)
    op.require(fits, f"q {q} does not hold {heads} heads of {dim}")
    op.require(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} key/value heads")


def _check_rope(op: Op, spec: RopeSpec, head_dim: int, factors: Types) -> None:
    fits = spec.dim <= head_dim and spec.dim % 2 == 0
    op.require(fits, f"{spec.dim} rotated channels do not fit a head of {head_dim}")
    for given in factors:
        op.require(given == _f32(spec.dim // 2), f"factors {given}, expected {spec.dim // 2}")
