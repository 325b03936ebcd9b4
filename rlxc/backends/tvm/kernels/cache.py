"""The KV cache: where its elements lie, and the kernel that rotates and writes a step's keys.

A layer's part of a sequence's cache holds keys ``[K][capacity / 16][D][16]``, 16 positions side by side, so that
scores need no sums across a vector; and values ``[K][capacity][D]``. Position p lies in row p of a linear cache,
and in row p mod capacity of a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm.tirx import Cast
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    bind,
    for_rows,
    local,
    serial,
)
from rlxc.backends.tvm.kernels.rope import rotate
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import OptionError
from rlxc.ir.rope import RopeSpec

TILE = 16
"""Positions whose keys lie side by side."""


@dataclass(frozen=True)
class CacheShape:
    """One layer's part of a sequence's cache.

    Raises:
        OptionError: ``capacity`` is not a positive multiple of 16.
    """

    kv_heads: int
    head_dim: int
    capacity: int
    ring: bool
    dtype: Literal["float16", "float32"]

    def __post_init__(self) -> None:
        if self.capacity <= 0 or self.capacity % TILE:
            raise OptionError(
                f"a capacity of {self.capacity} positions",
                source="KV cache",
                remedy=f"round it up to a multiple of {TILE}",
            )

    @property
    def name(self) -> str:
        """All of it, as part of a kernel's name."""
        kind = "ring" if self.ring else "linear"
        return f"{self.kv_heads}x{self.head_dim}_{kind}{self.capacity}_{self.dtype}"

    def start(self, caches: Buffer, sequence: Expr, kv_head: Expr) -> Expr:
        """The first element of a sequence's kv head, in keys and in values; ``caches`` holds bytes."""
        element = 2 if self.dtype == "float16" else 4
        size = self.capacity * self.head_dim
        return T.truncdiv(caches[sequence], element) + Cast("int64", kv_head) * size

    def row(self, position: Expr) -> Expr:
        """The row of a position."""
        return T.truncmod(position, self.capacity) if self.ring else position

    def key_tile(self, row: Expr) -> Expr:
        """Where the first channel of a row's key lies, from :meth:`start` on; the next ones lie 16 apart."""
        return T.truncdiv(row, TILE) * (TILE * self.head_dim) + T.truncmod(row, TILE)


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
    """Rotates queries into ``rotated f32[M, heads * D]``, and keys, with the values, into the caches.

    Token ``b * step + s`` takes position ``past[b] + s`` of sequence ``b``, whose cache lies ``caches[b]`` bytes
    from ``keys`` and from ``values``. Rows of q, k and v are ``q_stride``, ``k_stride`` and ``v_stride`` elements
    apart. Without ``rope`` there is no parameter ``angles``, and queries are copied.

    Raises:
        UnsupportedError: a number of channels does not divide among vectors.
    """
    dim, kv_heads = shape.head_dim, shape.kv_heads

    def body(q: Buffer, k: Buffer, v: Buffer, *rest: Buffer | Expr) -> None:
        *tables, past, caches, keys, values, rotated, sequences, step = rest
        angles = tables[0] if tables else None

        def write(token: Expr, _: Expr) -> None:
            turn = token * rope.dim if rope is not None else None
            sequence = bind(T.truncdiv(token, step))
            row = bind(shape.row(past[sequence] + T.truncmod(token, step)))
            with serial(heads) as head:
                at = token * q_stride + head * dim
                for narrow, channel, value in rotate(vectors, rope, dim, q, at, angles, turn):
                    narrow.store(rotated, (token * heads + head) * dim + channel, value)
            with serial(kv_heads) as head:
                start = bind(shape.start(caches, sequence, head))
                key = local(dim, shape.dtype)
                at = token * k_stride + head * dim
                for narrow, channel, value in rotate(vectors, rope, dim, k, at, angles, turn):
                    narrow.store(key, channel, _stored(narrow, value, shape.dtype))
                first = bind(start + shape.key_tile(row))
                with serial(dim) as channel:
                    T.buffer_store(keys, key[channel], [first + channel * TILE])
                at = token * v_stride + head * dim
                for narrow, channel, value in rotate(vectors, None, dim, v, at, None, None):
                    value = _stored(narrow, value, shape.dtype)
                    narrow.store(values, start + row * dim + channel, value)

        for_rows(bind(sequences * step), write)

    inputs = [Pointer(name, "float32") for name in ("q", "k", "v", *(["angles"] if rope else []))]
    memory = [Pointer("keys", shape.dtype), Pointer("values", shape.dtype), Pointer("rotated", "float32")]
    params = (*inputs, Pointer("past", "int32"), Pointer("caches", "int64"), *memory)
    turned = f"rope{rope.dim}{'i' if rope.interleaved else ''}" if rope is not None else "unrotated"
    strides = f"{q_stride}_{k_stride}_{v_stride}"
    name = f"rotate_and_write_{vectors.lanes}_{heads}_{shape.name}_{turned}_{strides}"
    return Kernel(name, (*params, Number("sequences"), Number("step")), body)


def _stored(vectors: Vectors, value: Expr, dtype: str) -> Expr:
    return Cast(f"{dtype}x{vectors.lanes}", value)
