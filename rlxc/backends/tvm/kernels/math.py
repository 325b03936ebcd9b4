"""Functions of f32 vectors: exponentials, what is built on them, and reductions over the lanes.

The polynomials are least-squares fits, reweighted until the largest error is the least one; the error that stands
beside each is that of the fit, before rounding to f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm.tirx import Select, Shuffle, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Expr, bind
from rlxc.backends.tvm.kernels.vector import Vectors

# Added to a number below 2^22 in size, it leaves the nearest integer in the low bits of the sum.
_ROUNDER = 1.5 * 2.0**23

# ln 2 as a number of few bits, whose products with exponents are exact, and the rest.
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH

# (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: 3e-9 in e^r.
_EXP = (0.5000000095, 0.1666651884, 0.0416662058, 0.0083688894, 0.0013950491)

# (tanh(x) / x - 1) / x^2 in x^2, for |x| <= 0.625: 4e-9 of tanh(x).
_TANH = (-0.3333328393, 0.1333149129, -0.0537434981, 0.0206505872, -0.005717045)
_TANH_SMALL = 0.625

_EXP_LEAST, _EXP_MOST = -87.0, 88.0


def polynomial(vectors: Vectors, x: Expr, coefficients: Sequence[float]) -> Expr:
    """``coefficients[0] + coefficients[1] * x + ...``; ``x`` is used once for each, so bind it first."""
    value = vectors.splat(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = vectors.fma(value, x, vectors.splat(coefficient))
    return value


def exp(vectors: Vectors, x: Expr) -> Expr:
    """e^x for x <= 88, within 2e-7 of it; below -87 it stays at e^-87, about 1.6e-38.

    Clamps, here and below, have the number last: it comes out where it is NaN.
    """
    x = bind(T.max(vectors.splat(_EXP_LEAST), x))
    shifted = bind(vectors.fma(x, vectors.splat(1 / math.log(2)), vectors.splat(_ROUNDER)))
    power = bind(shifted - vectors.splat(_ROUNDER))
    rest = vectors.fma(power, vectors.splat(-_LN2_HIGH), x)
    rest = bind(vectors.fma(power, vectors.splat(-_LN2_LOW), rest))
    tail = vectors.fma(polynomial(vectors, rest, _EXP), rest * rest, rest)
    # The rounder's own bits leave at the upper end: what is left is the power, added to the exponent.
    exponent = vectors.as_words(shifted) << vectors.splat(23, "int32")
    return vectors.as_floats(vectors.as_words(tail + vectors.splat(1.0)) + exponent)


def vanishing_exp(vectors: Vectors, x: Expr) -> Expr:
    """As :func:`exp`, but 0 below -87: what weighs nothing must not decide how a sum is rounded."""
    x = bind(x)
    return Select(x < vectors.splat(_EXP_LEAST), vectors.splat(0.0), exp(vectors, x))


def sigmoid(vectors: Vectors, x: Expr) -> Expr:
    """1 / (1 + e^-x)."""
    one = vectors.splat(1.0)
    return one / (one + exp(vectors, T.min(vectors.splat(0.0) - x, vectors.splat(_EXP_MOST))))


def silu(vectors: Vectors, x: Expr) -> Expr:
    """The number times its sigmoid."""
    x = bind(x)
    return x * sigmoid(vectors, x)


def tanh(vectors: Vectors, x: Expr) -> Expr:
    """The hyperbolic tangent, for numbers of any size."""
    x = bind(x)
    square = bind(x * x)
    small = vectors.fma(polynomial(vectors, square, _TANH), square * x, x)
    one, two = vectors.splat(1.0), vectors.splat(2.0)
    # Beyond 10 the tangent is 1 in f32; the clamp keeps the exponential finite, and the square may overflow.
    size = bind(T.max(x, vectors.splat(0.0) - x))
    power = exp(vectors, T.min(vectors.splat(20.0), two * size))
    large = bind(one - two / (one + power))
    signed = Select(x < vectors.splat(0.0), vectors.splat(0.0) - large, large)
    return Select(size < vectors.splat(_TANH_SMALL), small, signed)


def gelu_tanh(vectors: Vectors, x: Expr) -> Expr:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x times a sigmoid, which loses nothing below zero."""
    x = bind(x)
    scale = 2 * math.sqrt(2 / math.pi)
    inner = vectors.fma(x * x, vectors.splat(0.044715 * scale), vectors.splat(scale))
    # Beyond a size of 1e12 the cube overflows, where the sigmoid is 0 or 1 long since.
    return x * sigmoid(vectors, x * inner)


def soft_cap(vectors: Vectors, x: Expr, cap: float) -> Expr:
    """``cap * tanh(x / cap)``."""
    return vectors.splat(cap) * tanh(vectors, x * vectors.splat(1 / cap))


def clamped_swiglu(vectors: Vectors, gate: Expr, up: Expr, alpha: float, limit: float) -> Expr:
    """``g sigmoid(alpha g) (u + 1)``, where g is at most ``limit`` and u within it on both sides."""
    most = vectors.splat(limit)
    gate = bind(T.min(most, gate))
    up = T.max(vectors.splat(-limit), T.min(most, up))
    return gate * sigmoid(vectors, gate * vectors.splat(alpha)) * (up + vectors.splat(1.0))


def reduce_max(vectors: Vectors, x: Expr) -> Expr:
    """The largest lane, a scalar."""
    return _reduce(vectors, x, T.max)


def reduce_sum(vectors: Vectors, x: Expr) -> Expr:
    """The sum of the lanes, a scalar, added in pairs."""
    return _reduce(vectors, x, lambda a, b: a + b)


def _reduce(vectors: Vectors, x: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    lanes = vectors.lanes
    while lanes > 1:
        lanes //= 2
        x = bind(x)
        x = combine(lanes_of(x, range(lanes)), lanes_of(x, range(lanes, 2 * lanes)))
    return x


def lanes_of(x: Expr, which: Sequence[int]) -> Expr:
    """The lanes of a vector, in the order of ``which``; one of them is a scalar."""
    return Shuffle([x], [const(lane) for lane in which])
