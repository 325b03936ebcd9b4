"""The oracle: runs any graph in numpy, in float64, slowly and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import ops
from rlxc.ir.graph import Alias, Balance, Concat, Encode, Fold, Graph, Node, Source, Weight
from rlxc.ir.rope import RopeSpec

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]
Table = npt.NDArray[np.integer[Any]]
Store = Callable[[Floats], Floats]
ReadTensor = Callable[[str], npt.NDArray[np.float32]]
"""Gives a tensor of the model file, decoded, by its name: ``f32 [out, in]`` or ``[n]``."""


def run(graph: Graph, feeds: Mapping[str, Array], read: ReadTensor) -> dict[str, Array]:
    """Run the graph once.

    Args:
        graph: the graph.
        feeds: an array for every graph input; caches of an in-place layout are not modified. A cache is given by
            the numbers that its elements stand for, also where it holds 8-bit codes.
        read: gives the decoded tensors of the model file.

    Returns:
        The graph's outputs by name; floats are float64.

    Raises:
        GraphError: an input is missing, or a step writes more rows than a cache can take.
    """
    missing = [value.name for value in graph.inputs if value.name not in feeds]
    if missing:
        raise GraphError(f"no array for input %{missing[0]}", source=graph.name)
    values: dict[str, Array] = {value.name: _widen(feeds[value.name]) for value in graph.inputs}
    for node in graph.nodes:
        inputs = [
            values[n] if n in values else weight_array(graph, graph.weight[n], read) for n in node.inputs
        ]
        for name, result in zip(node.outputs, evaluate(node.op, inputs, _cache_dtype(graph, node))):
            values[name] = result
    return {name: values[name] for name in graph.outputs}


def weight_array(graph: Graph, weight: Weight, read: ReadTensor) -> Floats:
    """A weight decoded by its recipe: ``f64 [out, in]`` or ``[n]``."""
    match weight.recipe:
        case Source(tensor):
            return read(tensor).astype(np.float64)
        case Alias():
            return weight_array(graph, graph.stored(weight), read)
        case Concat(parts):
            return np.concatenate([weight_array(graph, part, read) for part in parts])
        case Encode(part):
            # The oracle of what a graph means, not of what encoding loses.
            return weight_array(graph, part, read)
        case Fold() as fold:
            base, a, b, *magnitude = (weight_array(graph, part, read) for part in fold.parts)
            delta = fold.scale * b @ a
            folded = base + (delta.T if fold.transposed else delta)
            if magnitude:
                folded *= (magnitude[0] / np.linalg.norm(folded, axis=1))[:, None]
            return folded
        case Balance() as balance:
            own, other = (weight_array(graph, part, read) for part in balance.parts)
            if not own.any() or not other.any():
                return own
            return np.asarray(own * np.sqrt(_sizes(other, balance) / _sizes(own, balance)))


def _sizes(vector: Floats, balance: Balance) -> Floats:
    """What counts as each channel's size when vectors are balanced."""
    sizes, half = abs(vector), balance.dim // 2
    for i in range(half):
        pair = [2 * i, 2 * i + 1] if balance.interleaved else [i, i + half]
        sizes[pair] = np.linalg.norm(vector[pair])
    return np.asarray(np.maximum(sizes, balance.FLOOR * sizes.mean()))


def evaluate(op: ops.Op, inputs: list[Array], cache_dtype: DType = DType.F32) -> tuple[Array, ...]:
    """The results of one op on arrays (floats as float64).

    An op that writes to caches rounds what it writes to what their type can hold; f32 counts as exact.
    """
    if isinstance(op, (ops.KvWrite, ops.GroupQueryAttention)):
        result = _evaluate(op, *inputs, store=_STORED[cache_dtype])
    else:
        result = _evaluate(op, *inputs)
    return result if isinstance(result, tuple) else (result,)


def _cache_dtype(graph: Graph, node: Node) -> DType:
    """The type of the caches that a node writes to, f32 where it writes to none."""
    if isinstance(node.op, (ops.KvWrite, ops.GroupQueryAttention)):
        return graph.types[node.outputs[-1]].dtype
    return DType.F32


def _widen(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


@singledispatch
def _evaluate(op: ops.Op, *inputs: Array, **options: Store) -> Array | tuple[Array, ...]:
    raise GraphError(f"the interpreter does not know {op.name}")


@_evaluate.register
def _(op: ops.Constant) -> Array:
    return np.asarray(op.value, np.float64)


@_evaluate.register
def _(op: ops.Add, a: Floats, b: Floats) -> Array:
    return a + b


@_evaluate.register
def _(op: ops.Mul, a: Floats, b: Floats) -> Array:
    return a * b


@_evaluate.register
def _(op: ops.Square, x: Floats) -> Array:
    return x * x


@_evaluate.register
def _(op: ops.Sqrt, x: Floats) -> Array:
    return np.sqrt(x)


@_evaluate.register
def _(op: ops.Rsqrt, x: Floats) -> Array:
    return 1 / np.sqrt(x)


@_evaluate.register
def _(op: ops.Mean, x: Floats) -> Array:
    return np.asarray(x.mean(-1, keepdims=True))


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


@_evaluate.register
def _(op: ops.Silu, x: Floats) -> Array:
    return _silu(x)


@_evaluate.register
def _(op: ops.Gelu, x: Floats) -> Array:
    return _gelu(x)


@_evaluate.register
def _(op: ops.SoftCap, x: Floats) -> Array:
    return np.asarray(op.cap * np.tanh(x / op.cap))


@_evaluate.register
def _(op: ops.ClampedSwiglu, gate: Floats, up: Floats) -> Array:
    gate, up = np.minimum(gate, op.limit), np.clip(up, -op.limit, op.limit)
    with np.errstate(over="ignore"):
        return np.asarray(gate / (1 + np.exp(-op.alpha * gate)) * (up + 1))


@_evaluate.register
def _(op: ops.Glu, x: Floats) -> Array:
    gate, up = np.split(x, 2, axis=-1)
    return (_silu(gate) if op.activation == "silu" else _gelu(gate)) * up


@_evaluate.register
def _(op: ops.RmsNorm, x: Floats, weight: Floats) -> Array:
    parts = x.reshape(*x.shape[:-1], op.heads, -1)
    normed = parts / np.sqrt((parts * parts).mean(-1, keepdims=True) + op.eps) * weight
    return np.asarray(normed.reshape(x.shape))


@_evaluate.register
def _(op: ops.LayerNorm, x: Floats, weight: Floats, bias: Floats | None = None) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + op.eps) * weight
    return np.asarray(normed if bias is None else normed + bias)


@_evaluate.register
def _(op: ops.AddRmsNorm, x: Floats, residual: Floats, weight: Floats) -> tuple[Array, ...]:
    total = x + residual
    return total / np.sqrt((total * total).mean(-1, keepdims=True) + op.eps) * weight, total


@_evaluate.register
def _(op: ops.Embed, ids: npt.NDArray[np.int64], table: Floats) -> Array:
    return np.asarray(table[ids])


@_evaluate.register(ops.MatMul)
@_evaluate.register(ops.DequantMatMul)
def _(op: ops.Op, x: Floats, weight: Floats, bias: Floats | None = None) -> Array:
    return x @ weight.T if bias is None else x @ weight.T + bias


@_evaluate.register
def _(op: ops.LoraDown, x: Floats, a: Floats, scales: Floats) -> Array:
    return np.asarray(np.einsum("bsi,bpri->bspr", x, a) * scales[:, None, None])


@_evaluate.register
def _(op: ops.LoraMatMul, x: Floats, weight: Floats, *rest: Floats) -> Array:
    *bias, u, b = rest
    y = np.asarray(x @ weight.T + (bias[0] if bias else 0))
    start = 0
    for part, size in enumerate(op.sizes, op.first):
        rows = slice(start, start + size)
        y[..., rows] += np.einsum("bsr,bor->bso", u[:, :, part], b[:, rows])
        start += size
    return y


@_evaluate.register
def _(
    op: ops.LoraEmbed, x: Floats, ids: npt.NDArray[np.int64], a: Floats, scales: Floats, b: Floats
) -> Array:
    gathered = np.take_along_axis(a, ids[..., None], axis=1) * scales[:, None]
    return np.asarray(x + np.einsum("bsr,bor->bso", gathered, b))


@_evaluate.register
def _(op: ops.Route, scores: Floats) -> tuple[Array, ...]:
    experts = np.argsort(-scores, axis=-1, kind="stable")[..., : op.used]
    chosen = np.take_along_axis(scores, experts, axis=-1)
    powers = np.exp(chosen - chosen.max(-1, keepdims=True))
    return experts, powers / powers.sum(-1, keepdims=True)


@_evaluate.register
def _(
    op: ops.ExpertMatMul,
    x: Floats,
    weight: Floats,
    experts: npt.NDArray[np.int64],
    bias: Floats | None = None,
) -> Array:
    slots = x[:, :, None] if x.ndim == 3 else x
    y = np.einsum("bsui,bsuoi->bsuo", np.broadcast_to(slots, (*experts.shape, x.shape[-1])), weight[experts])
    return np.asarray(y if bias is None else y + bias[experts])


@_evaluate.register
def _(op: ops.MixExperts, x: Floats, weights: Floats) -> Array:
    return np.asarray(np.einsum("bsun,bsu->bsn", x, weights))


@_evaluate.register
def _(op: ops.Split, x: Array) -> tuple[Array, ...]:
    return tuple(np.split(x, np.cumsum(op.sizes)[:-1], axis=-1))


@_evaluate.register
def _(op: ops.SelectRows, x: Array, rows: npt.NDArray[np.int64]) -> Array:
    return x[:, rows]


@_evaluate.register
def _(op: ops.Positions, ids: npt.NDArray[np.int64], past: Array) -> Array:
    length = int(past) if past.ndim == 0 else past.shape[2]
    return np.broadcast_to(length + np.arange(ids.shape[1], dtype=np.int64), ids.shape)


@_evaluate.register
def _(op: ops.Rope, x: Floats, positions: npt.NDArray[np.int64], factors: Floats | None = None) -> Array:
    return rotate(x, positions, op.heads, op.spec, factors)


def rotate(
    x: Floats,
    positions: npt.NDArray[np.int64],
    heads: int,
    spec: RopeSpec,
    factors: Floats | None = None,
) -> Floats:
    """``x [B, S, heads * D]`` with every head rotated by its token's position ``[B, S]``."""
    cos, sin = spec.angles(positions, None if factors is None else factors.astype(np.float32))
    cos, sin = cos[:, :, None], sin[:, :, None]
    out = x.reshape(*x.shape[:2], heads, -1).copy()
    half = spec.dim // 2
    first = slice(0, spec.dim, 2) if spec.interleaved else slice(0, half)
    second = slice(1, spec.dim, 2) if spec.interleaved else slice(half, spec.dim)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out.reshape(x.shape)


def _rows(new: Floats, kv_heads: int) -> Floats:
    """``[B, S, K * D]`` as cache rows ``[B, K, S, D]``."""
    return new.reshape(*new.shape[:2], kv_heads, -1).transpose(0, 2, 1, 3)


@_evaluate.register
def _(op: ops.KvAppend, past: Floats, new: Floats) -> Array:
    return np.concatenate([past, _rows(new, past.shape[1])], axis=2)


@_evaluate.register
def _(
    op: ops.KvWrite, cache: Floats, new: Floats, past: Array, table: Table | None = None, *, store: Store
) -> Array:
    return _write(op.layout, cache, store(_rows(new, cache.shape[1])), int(past), table)


def _write(layout: str, cache: Floats, rows: Floats, past: int, table: Table | None) -> Floats:
    """The cache after ``rows [B, K, S, D]`` were written to it."""
    capacity, step = cache.shape[2], rows.shape[2]
    written = cache.copy()
    if table is not None:
        pages, slots = _pages(cache, table, past + np.arange(step))
        places = pages * capacity + slots
        if len(np.unique(places)) < places.size:
            raise GraphError("two sequences write to one row of a page")
        written[pages, :, slots] = rows.transpose(0, 2, 1, 3)
        return written
    if (past + step if layout == "linear" else step) > capacity:
        raise GraphError(f"{past} + {step} rows do not fit a {layout} cache of {capacity}")
    written[:, :, (past + np.arange(step)) % capacity] = rows
    return written


@_evaluate.register
def _(op: ops.KvRead, cache: Floats, new: Floats, past: Array, table: Table | None = None) -> Array:
    return _visible(cache, new.shape[1], int(past), op.window, table)


def _visible(cache: Floats, step: int, past: int, window: int | None, table: Table | None) -> Floats:
    total = past + step
    count = total if window is None else min(total, window + step - 1)
    positions = np.arange(total - count, total)
    if table is not None:
        pages, slots = _pages(cache, table, positions)
        return np.asarray(cache[pages, :, slots].transpose(0, 2, 1, 3))
    if count > cache.shape[2]:
        raise GraphError(f"a step of {step} tokens needs {count} rows of a ring of {cache.shape[2]}")
    return np.asarray(cache[:, :, positions % cache.shape[2]])


def _pages(cache: Floats, table: Table, positions: Table) -> tuple[Table, Table]:
    """The page and the row in it, each ``[B, n]``, that hold these positions of every sequence."""
    entries, slots = np.divmod(positions, cache.shape[2])
    if len(entries) and entries[-1] >= table.shape[1]:
        raise GraphError(f"position {positions[-1]} is beyond a table of {table.shape[1]} pages")
    pages = table[:, entries]
    strange = pages[(pages < 0) | (pages >= len(cache))]
    if strange.size:
        raise GraphError(f"a block table names page {strange[0]} of {len(cache)}")
    return pages, np.broadcast_to(slots, pages.shape)


def _as_bf16(rows: Floats) -> Floats:
    bits = rows.astype(np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    return ((bits + (0x7FFF + even) >> 16) << 16).view(np.float32).astype(np.float64)


def _as_int8(rows: Floats) -> Floats:
    """Codes of -127 ... 127 times a scale, which is f32, for each row."""
    scales = (abs(rows).max(-1, keepdims=True) / 127).astype(np.float32).astype(np.float64)
    codes = np.rint(rows / np.where(scales, scales, 1))
    return np.asarray(codes * scales)


_STORED: Mapping[DType, Store] = {
    DType.F32: lambda rows: rows,
    DType.F16: lambda rows: rows.astype(np.float16).astype(np.float64),
    DType.BF16: _as_bf16,
    DType.INT8: _as_int8,
}
"""Rows as a cache of each type gives them back; halves are rounded to even."""


@_evaluate.register
def _(op: ops.Attention, q: Floats, k: Floats, v: Floats, sinks: Floats | None = None) -> Array:
    return _attend(op, q, k, v, sinks)


def _attend(
    op: ops.Attention | ops.GroupQueryAttention, q: Floats, k: Floats, v: Floats, sinks: Floats | None
) -> Floats:
    group = op.heads // k.shape[1]
    queries = _rows(q, op.heads)
    keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = op.scale * queries @ keys.transpose(0, 1, 3, 2)
    if op.soft_cap is not None:
        scores = op.soft_cap * np.tanh(scores / op.soft_cap)
    step, total = scores.shape[-2:]
    age = (np.arange(step)[:, None] + total - step) - np.arange(total)
    hidden = (age < 0) if op.window is None else (age < 0) | (age >= op.window)
    scores = np.where(hidden, -np.inf, scores)
    if sinks is not None:  # one more key, whose value is zero
        sink = np.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        scores, values = np.concatenate([scores, sink], -1), np.pad(values, [(0, 0)] * 2 + [(0, 1), (0, 0)])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ values
    return np.asarray(out.transpose(0, 2, 1, 3).reshape(q.shape))


@_evaluate.register
def _(
    op: ops.GroupQueryAttention,
    q: Floats,
    k: Floats,
    v: Floats,
    key_cache: Floats,
    value_cache: Floats,
    past: Array,
    *rest: Any,
    store: Store,
) -> tuple[Array, ...]:
    tables, factors, sinks = op.optional((q, k, v, key_cache, value_cache, past, *rest))
    table = tables[0] if tables else None
    if op.rope is not None:
        positions = np.broadcast_to(int(past) + np.arange(q.shape[1], dtype=np.int64), q.shape[:2])
        q = rotate(q, positions, op.heads, op.rope, *factors)
        k = rotate(k, positions, key_cache.shape[1], op.rope, *factors)
    kv_heads, window = key_cache.shape[1], None if op.layout == "linear" else op.window
    key_cache = _write(op.layout, key_cache, store(_rows(k, kv_heads)), int(past), table)
    value_cache = _write(op.layout, value_cache, store(_rows(v, kv_heads)), int(past), table)
    keys = _visible(key_cache, q.shape[1], int(past), window, table)
    values = _visible(value_cache, q.shape[1], int(past), window, table)
    return _attend(op, q, keys, values, sinks[0] if sinks else None), key_cache, value_cache
