"""Cosines and sines of rotary position embedding, once per step for all layers that share a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tvm.tirx import Broadcast, Cast, Shuffle, bitwise_and, const

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Kernel, Number, Pointer, bind, serial
from rlxc.backends.tvm.kernels.math import polynomial
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import UnsupportedError
from rlxc.ir.rope import RopeSpec

# In r^2 for |r| <= pi / 2: (sin(r) / r - 1) / r^2, 5e-9 of a sine, and (cos(r) - 1) / r^2, 2e-10 of a cosine.
_SINE = (-1.6666657089e-01, 8.3330171043e-03, -1.9806601578e-04, 2.6000244484e-06)
_COSINE = (-4.9999999549e-01, 4.1666640708e-02, -1.3888403221e-03, 2.4761870631e-05, -2.6076816722e-07)


def angles_kernel(vectors: Vectors, *, dim: int, magnitude: float) -> Kernel:
    """``angles f32[M, dim]``: the cosines, then the sines, of every token's ``dim / 2`` angles, times ``magnitude``.

    Token ``b * step + s`` has the position ``past[b] + s``; its angles are that times ``frequencies f64[dim/2]``.
    They are reduced in f64, so that cosines and sines of unit magnitude are right to 5e-7 at any position.

    Raises:
        UnsupportedError: ``dim`` is not a multiple of 4.
    """
    narrow = dividing(vectors, dim // 2)
    lanes, half = narrow.lanes, dim // 2

    def body(past: Buffer, frequencies: Buffer, angles: Buffer, sequences: Expr, step: Expr) -> None:
        with serial(sequences) as b, serial(step) as s:
            position = bind(Broadcast(Cast("float64", past[b] + s), lanes))
            row = bind((b * step + s) * dim)
            with serial(half // lanes) as i:
                cosine, sine = _turn(narrow, position * narrow.load(frequencies, i * lanes), magnitude)
                narrow.store(angles, row + i * lanes, cosine)
                narrow.store(angles, row + half + i * lanes, sine)

    pointers = (Pointer("past", "int32"), Pointer("frequencies", "float64"), Pointer("angles", "float32"))
    name = f"angles_{vectors.lanes}_{dim}_{digits(magnitude)}"
    return Kernel(name, (*pointers, Number("sequences"), Number("step")), body)


def digits(number: float) -> str:
    """A float as part of a C name, different for different floats."""
    return float(number).hex().translate(str.maketrans("+-.", "pmd"))


def _turn(vectors: Vectors, angle: Expr, magnitude: float) -> tuple[Expr, Expr]:
    """Cosine and sine of f64 angles, times ``magnitude``, in f32."""

    def doubles(value: float) -> Expr:
        return Broadcast(const(value, "float64"), vectors.lanes)

    angle = bind(angle)
    # Half turns: neither positions nor frequencies are negative, so that cutting off rounds to the nearest.
    turns = bind(vectors.ints(angle * doubles(1 / math.pi) + doubles(0.5)))
    rest = bind(vectors.floats(angle - Cast(f"float64x{vectors.lanes}", turns) * doubles(math.pi)))
    # An odd number of them changes both signs.
    odd = vectors.floats(bitwise_and(turns, vectors.splat(1, "int32")))
    sign = bind(odd * vectors.splat(-2 * magnitude) + vectors.splat(magnitude))
    square = bind(rest * rest)
    sine = vectors.fma(polynomial(vectors, square, _SINE), square * rest, rest)
    cosine = vectors.fma(polynomial(vectors, square, _COSINE), square, vectors.splat(1.0))
    return cosine * sign, sine * sign


def dividing(vectors: Vectors, size: int) -> Vectors:
    """The same vectors, or the widest narrower ones that divide ``size`` numbers.

    Raises:
        UnsupportedError: ``size`` is odd.
    """
    lanes = math.gcd(vectors.lanes, size)
    if lanes < 2:
        raise UnsupportedError(
            f"{size} channels cannot be divided among vectors",
            source="the TVM backend",
            remedy="use the ONNX backend",
        )
    return replace(vectors, lanes=lanes)


def rotate(
    vectors: Vectors, rope: RopeSpec | None, head_dim: int, x: Buffer, at: Expr, angles: Buffer, row: Expr
) -> Iterator[tuple[Vectors, int, Expr]]:
    """The channels of one head, rotated: pieces as their vectors, their first channel and their value.

    The head lies in ``x`` from ``at`` on, its token's cosines and sines in ``angles`` from ``row`` on, as
    :func:`angles_kernel` leaves them. Channels beyond ``rope.dim``, or all without ``rope``, are left as they are.

    Raises:
        UnsupportedError: a number of channels does not divide among vectors.
    """
    dim = 0 if rope is None else rope.dim
    half = dim // 2
    if rope is not None:
        narrow = dividing(vectors, half)
        lanes = narrow.lanes
        for i in range(0, half, lanes):
            places = (2 * i, 2 * i + lanes) if rope.interleaved else (i, half + i)
            first, second = (bind(narrow.load(x, at + place)) for place in places)
            if rope.interleaved:
                both = [first, second]
                first, second = (bind(_pick(both, range(odd, 2 * lanes, 2))) for odd in (0, 1))
            cosine, sine = (bind(narrow.load(angles, row + place)) for place in (i, half + i))
            a = bind(first * cosine - second * sine)
            b = bind(second * cosine + first * sine)
            if rope.interleaved:
                mixed = [lane for pair in range(lanes) for lane in (pair, lanes + pair)]
                a, b = _pick([a, b], mixed[:lanes]), _pick([a, b], mixed[lanes:])
            yield narrow, places[0], a
            yield narrow, places[1], b
    if dim < head_dim:
        narrow = dividing(vectors, head_dim - dim)
        for i in range(dim, head_dim, narrow.lanes):
            yield narrow, i, narrow.load(x, at + i)


def _pick(pair: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """Lanes of two vectors; those of the second are counted on from the first's."""
    return Shuffle(list(pair), [const(lane) for lane in lanes])
