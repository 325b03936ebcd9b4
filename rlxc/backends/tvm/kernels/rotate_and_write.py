"""The kernel that rotates a step's queries and keys, and writes keys and values into the cache."""

from __future__ import annotations

from collections.abc import Iterable

from tvm.tirx import Cast, Select, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.cache import TILE, CacheShape, Pages
from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    Register,
    bind,
    for_rows,
    local,
    serial,
)
from rlxc.backends.tvm.kernels.math import reduce_max
from rlxc.backends.tvm.kernels.rope import dividing, rotate
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.ir.rope import RopeSpec

_MOST = 127
"""The largest code."""


def rotate_and_write_kernel(
    vectors: Vectors,
    *,
    heads: int,
    shape: CacheShape,
    rope: RopeSpec | None,
    q_stride: int,
    k_stride: int,
    v_stride: int,
) -> Kernel:
    """Rotates queries into ``rotated f32[M, heads * D]``, and keys, with the values, into the pages of their positions.

    Token ``b * step + s`` takes position ``past[b] + s`` of sequence ``b``. Rows of q, k and v are ``q_stride``,
    ``k_stride`` and ``v_stride`` elements apart. Without ``rope`` there is no parameter ``angles``, and queries are
    copied. What is stored is rounded to the nearest, of two to the even one; codes are ``round(x / scale)`` of a
    ``scale`` that is the head's largest magnitude, divided by 127.

    Raises:
        UnsupportedError: a number of channels does not divide among vectors.
    """
    dim, kv_heads = shape.head_dim, shape.kv_heads

    def body(q: Buffer, k: Buffer, v: Buffer, *rest: Buffer | Expr) -> None:
        *turns, past = rest[: 1 + (rope is not None)]
        *memory, rotated, sequences, step = rest[len(turns) + 1 :]
        angles, pages = turns[0] if turns else None, Pages.of(shape, memory)

        def write(token: Expr, _: Expr) -> None:
            turn = token * rope.dim if rope is not None else None
            sequence = bind(T.truncdiv(token, step))
            position = bind(past[sequence] + T.truncmod(token, step))
            page = bind(pages.find(sequence, position))
            with serial(heads) as head:
                at = token * q_stride + head * dim
                for narrow, channel, value in rotate(vectors, rope, dim, q, at, angles, turn):
                    narrow.store(rotated, (token * heads + head) * dim + channel, value)
            with serial(kv_heads) as head:
                scale = bind(pages.scale(page, head, position)) if shape.has_scales else None
                at = token * k_stride + head * dim
                turned = rotate(vectors, rope, dim, k, at, angles, turn)
                key = _stored(vectors, shape, turned, pages.key_scales, scale)
                first = bind(pages.key(page, head, position))
                with serial(dim) as channel:
                    T.buffer_store(pages.keys, key[channel], [first + channel * TILE])
                at = token * v_stride + head * dim
                copied = rotate(vectors, None, dim, v, at, None, None)
                value = _stored(vectors, shape, copied, pages.value_scales, scale)
                first = bind(pages.value(page, head, position))
                wide = dividing(vectors, dim)
                with serial(dim // wide.lanes) as i:
                    wide.store(pages.values, first + i * wide.lanes, wide.load(value, i * wide.lanes))

        for_rows(bind(sequences * step), write)

    inputs = [Pointer(name, "float32") for name in ("q", "k", "v", *(["angles"] if rope else []))]
    params = (*inputs, Pointer("past", "int32"), *shape.params, Pointer("rotated", "float32"))
    turned = f"rope{rope.dim}{'i' if rope.interleaved else ''}" if rope is not None else "unrotated"
    strides = f"{q_stride}_{k_stride}_{v_stride}"
    name = f"rotate_and_write_{vectors.lanes}_{heads}_{shape.name}_{turned}_{strides}"
    return Kernel(name, (*params, Number("sequences"), Number("step")), body)


def _stored(
    vectors: Vectors,
    shape: CacheShape,
    pieces: Iterable[tuple[Vectors, int, Expr]],
    scales: Buffer | None,
    at: Expr | None,
) -> Buffer:
    """One head's channels, given in pieces, as elements of the cache; codes' scale is written ``at`` its place."""
    out = local(shape.head_dim, shape.element)
    if scales is None:
        for narrow, channel, value in pieces:
            narrow.store(out, channel, shape.rounded(narrow, value))
        return out
    floats = local(shape.head_dim, "float32")
    for narrow, channel, value in pieces:
        narrow.store(floats, channel, value)
    T.buffer_store(scales, _quantise(vectors, floats, shape.head_dim, out), [at])
    return out


def _quantise(vectors: Vectors, floats: Buffer, count: int, codes: Buffer) -> Expr:
    """Write the codes of ``count`` numbers; their scale."""
    wide = dividing(vectors, count)
    largest = Register(wide.lanes, wide.splat(0.0))
    with serial(count // wide.lanes) as i:
        largest.set(wide.maximum(largest.get(), wide.absolute(wide.load(floats, i * wide.lanes))))
    scale = bind(reduce_max(wide, largest.get()) / const(float(_MOST), "float32"))
    # All zero: whatever they are divided by. And a scale that is hardly a number may leave codes of more than 8 bits.
    divisor = bind(wide.splat(Select(scale > const(0.0, "float32"), scale, const(1.0, "float32"))))
    with serial(count // wide.lanes) as i:
        code = bind(wide.ints(wide.round(wide.load(floats, i * wide.lanes) / divisor)))
        code = T.max(T.min(code, wide.splat(_MOST, "int32")), wide.splat(-_MOST, "int32"))
        wide.store(codes, i * wide.lanes, Cast(f"int8x{wide.lanes}", code))
    return scale
