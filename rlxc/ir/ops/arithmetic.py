"""Constants, elementwise arithmetic and norms."""

from __future__ import annotations

from dataclasses import dataclass

from rlxc.dtypes import DType
from rlxc.ir.ops.base import Op, Types, f32, part_size


@dataclass(frozen=True)
class Constant(Op):
    """A small f32 constant: a scalar, or a vector from a tuple."""

    arity = (0, 0)
    value: float | tuple[float, ...]

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[]`` or ``f32[n]``."""
        return (f32(len(self.value)) if isinstance(self.value, tuple) else f32(),)


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
class ClampedSwiglu(Binary):
    """A gated activation with clamps: ``min(g, limit) sigmoid(alpha min(g, limit)) (clip(u, -limit, limit) + 1)``.

    Inputs: gate g and up u, of one shape. Source: the reference implementation of gpt-oss (OpenAI 2025).
    """

    alpha: float
    limit: float

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of both."""
        gate, up = inputs
        self.require(gate == up, f"gate {gate} and up {up} differ")
        return super().shape_rule(inputs)[:1]


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
class SoftCap(Unary):
    """``cap * tanh(x / cap)``. Source: Bello et al. 2016; Gemma Team 2024, "Gemma 2"."""

    cap: float

    def shape_rule(self, inputs: Types) -> Types:
        """The input's shape."""
        self.require(self.cap > 0, f"cap {self.cap} is not positive")
        return super().shape_rule(inputs)


@dataclass(frozen=True)
class Mean(Unary):
    """The mean over the last dimension, which stays as 1."""

    def shape_rule(self, inputs: Types) -> Types:
        """``[..., 1]``."""
        (x,) = super().shape_rule(inputs)
        self.require(len(x.shape) > 0, f"needs a last dimension, got {x}")
        return (f32(*x.shape[:-1], 1),)


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
        self.require(weight == f32(part_size(self, x, self.heads)), f"weight {weight} for {x}")
        return (x,)


@dataclass(frozen=True)
class LayerNorm(Op):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, over the last dimension.

    Inputs: x ``f32[..., N]``, weight ``f32[N]``, optional bias ``f32[N]``. Source: Ba et al. 2016.
    """

    arity = (2, 3)
    eps: float

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of x."""
        x, *vectors = inputs
        for vector in vectors:
            self.require(vector == f32(part_size(self, x, 1)), f"weight or bias {vector} for {x}")
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
        self.require(weight == f32(part_size(self, x, 1)), f"weight {weight} for {x}")
        return (x, x)
