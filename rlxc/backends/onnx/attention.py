"""Attention in ONNX: one ``GroupQueryAttention``, which rotates, writes and reads the cache, and attends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from rlxc.backends.onnx.lora import MICROSOFT
from rlxc.dtypes import DType
from rlxc.errors import UnsupportedError
from rlxc.ir import Node, RopeSpec, ops

if TYPE_CHECKING:
    from rlxc.backends.onnx.lower import Lowering

_CACHE_DTYPES = (DType.F32, DType.F16)


def attend(op: ops.GroupQueryAttention, node: Node, to: Lowering) -> None:
    """Append the nodes of one attention.

    Raises:
        UnsupportedError: ONNX Runtime has no such caches, or no heads of this size.
    """
    (out, *presents), (q, k, v, key_cache, value_cache, *_) = node.outputs, node.inputs
    _, factors, sinks = op.optional(node.inputs)
    cache = to.types[key_cache]
    kv_heads, dim = int(cache.shape[1]), int(cache.shape[3])
    _check(op, cache.dtype, dim, f"%{out}")
    attributes: dict[str, Any] = {"num_heads": op.heads, "kv_num_heads": kv_heads, "scale": op.scale}
    tables = ["", ""]
    if op.rope is not None and _rotates(op.rope, dim):
        tables = to.rope_tables(op.rope, *factors)
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(op.rope.interleaved)}
    elif op.rope is not None:
        angles = [*to.rope_tables(op.rope, *factors), _positions(q, to)]
        q = _rotated(q, angles, op.heads, op.rope, to)
        k = _rotated(k, angles, kv_heads, op.rope, to)
    if op.window is not None:
        attributes["local_window_size"] = op.window if to.runtime.counts_own_key else op.window - 1
    if op.layout == "ring":
        attributes["sliding_window_cache"] = 1
    if op.soft_cap is not None:
        attributes["softcap"] = op.soft_cap

    def typed(name: str) -> str:
        """A float in the cache's type, in which the op computes."""
        return to.cast(name, cache.dtype) if name and cache.dtype is not DType.F32 else name

    inputs = [*map(typed, (q, k, v)), key_cache, value_cache, *_lengths(to), *map(typed, tables)]
    if sinks:
        inputs += [
            "",
            "",
            typed(to.float_weight(sinks[0])),
        ]  # after positions and a bias, which are not given
    result = out if cache.dtype is DType.F32 else f"{out}.{cache.dtype}"
    to.add("GroupQueryAttention", inputs, [result, *presents], MICROSOFT, **attributes)
    if result != out:
        to.add("Cast", [result], [out], to=TensorProto.FLOAT)


def _check(op: ops.GroupQueryAttention, cache: DType, dim: int, source: str) -> None:
    problem = ""
    if op.layout == "paged":
        problem = "paged caches"
    elif cache not in _CACHE_DTYPES:
        problem = f"caches of {cache}"
    elif dim % 8:
        problem = f"attention with heads of {dim} channels, only of multiples of 8"
    if problem:
        raise UnsupportedError(
            f"the ONNX backend has no {problem}", source=source, remedy="choose the tvm backend"
        )


def _rotates(rope: RopeSpec, dim: int) -> bool:
    """Whether ``GroupQueryAttention`` rotates heads of this size so; it refuses other sizes when it runs."""
    return dim % 16 == 0 and rope.dim % 16 == 0


def _rotated(x: str, angles: list[str], heads: int, rope: RopeSpec, to: Lowering) -> str:
    """Heads rotated by an op of their own."""
    rotated = f"{x}.rotated"
    to.add(
        "RotaryEmbedding",
        [x, *angles],
        [rotated],
        interleaved=int(rope.interleaved),
        num_heads=heads,
        rotary_embedding_dim=rope.dim,
    )
    return rotated


def _lengths(to: Lowering) -> list[str]:
    """Last positions and total length, which attention asks for, from ``attention_mask [batch, total]``."""
    last, total = "last_positions", "total_length"
    if to.is_new(last):
        one = to.constant("one", np.array([1]))
        to.add("ReduceSum", ["attention_mask", one], ["mask_sums"], keepdims=0)
        to.add("Sub", ["mask_sums", one], [f"{last}.i64"])
        to.add("Cast", [f"{last}.i64"], [last], to=TensorProto.INT32)
        to.add("Shape", ["attention_mask"], ["mask_shape"])
        to.add("Gather", ["mask_shape", to.constant("index_one", np.array(1))], [f"{total}.i64"])
        to.add("Cast", [f"{total}.i64"], [total], to=TensorProto.INT32)
    return [last, total]


def _positions(x: str, to: Lowering) -> str:
    """The positions ``[batch, seq]`` of this step's tokens, which x has one row of each."""
    positions = "token_positions"
    if to.is_new(positions):
        _lengths(to)
        zero, one = (to.constant(f"index_{name}", np.array(i)) for i, name in enumerate(("zero", "one")))
        to.add("Shape", [x], ["step.shape"], start=1, end=2)
        to.add("Squeeze", ["step.shape"], ["step"])
        to.add("Range", [zero, "step", one], ["step.tokens"])
        to.add("Sub", ["mask_sums", "step"], ["first_positions"])
        column = to.constant("one", np.array([1]))
        to.add("Unsqueeze", ["first_positions", column], ["first_positions.column"])
        to.add("Add", ["first_positions.column", "step.tokens"], [positions])
    return positions
