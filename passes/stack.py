"""Stacking weights: which may share one matrix product, and the weight that holds them all."""

from __future__ import annotations

from collections.abc import Sequence

from rlxc.dtypes import DType
from rlxc.ir import Concat, Graph, Node, TensorType, Weight
from rlxc.ir.target import TargetFeatures


def why_not_stackable(graph: Graph, nodes: Sequence[Node], features: TargetFeatures) -> str | None:
    """Why these matrix products of one input cannot become one, or None if they can."""
    weights = [graph.weight[node.inputs[1]] for node in nodes]
    if len({node.inputs[0] for node in nodes}) > 1:
        return "they read different inputs"
    if any(len(graph.users[weight.name]) > 1 for weight in weights) or len({w.name for w in weights}) < len(
        weights
    ):
        return "a weight is also used elsewhere"
    if len({len(node.inputs) for node in nodes}) > 1:
        return "only some have a bias"
    dtypes = [weight.type.dtype for weight in weights]
    if len(set(dtypes)) > 1 and len({features.storage.get(dtype, dtype.value) for dtype in dtypes}) > 1:
        return f"their formats differ: {', '.join(dict.fromkeys(map(str, dtypes)))}"
    return None


def stack(
    graph: Graph, name: str, nodes: Sequence[Node], features: TargetFeatures
) -> tuple[Node, tuple[Weight, ...]]:
    """One matrix product with result ``name`` for several of the same input, and its weights."""
    parts = [graph.weight[node.inputs[1]] for node in nodes]
    dtypes = {part.type.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else features.widest[features.storage[parts[0].type.dtype]]
    weights = [_concat(f"{name}.weight", dtype, parts)]
    if len(nodes[0].inputs) == 3:
        biases = [graph.weight[node.inputs[2]] for node in nodes]
        weights.append(_concat(f"{name}.bias", DType.F32, biases))
    inputs = (nodes[0].inputs[0], *(weight.name for weight in weights))
    return Node(nodes[0].op, inputs, (name,)), tuple(weights)


def _concat(name: str, dtype: DType, parts: Sequence[Weight]) -> Weight:
    rows = sum(int(part.type.shape[0]) for part in parts)
    return Weight(name, TensorType(dtype, (rows, *parts[0].type.shape[1:])), Concat(tuple(parts)))
