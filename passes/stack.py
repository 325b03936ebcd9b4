"""Stacking weights: which matrix products of one input can become one, and the weight that holds them all."""

from __future__ import annotations

from collections.abc import Sequence

from rlxc.dtypes import DType
from rlxc.ir import Concat, Graph, Node, TensorType, Weight
from rlxc.ir.target import TargetFeatures


def largest_stack(
    graph: Graph, products: Sequence[Node], features: TargetFeatures
) -> tuple[tuple[Node, ...], str]:
    """The largest group of these matrix products that can become one, and why not all can ("" if they can)."""
    free = [node for node in products if _owns_weights(graph, node)]
    if len(free) < len(products):
        reason = "a weight is also used elsewhere, or not stored"
    elif len({node.inputs[0] for node in free}) > 1:
        reason = "they read different inputs"
    elif len({len(node.inputs) for node in free}) > 1:
        reason = "only some have a bias"
    elif len({_storage(graph, node, features) for node in free}) > 1:
        reason = f"their formats differ: {', '.join(str(_format(graph, node)) for node in free)}"
    else:
        return tuple(free), ""
    groups: dict[tuple[str, int, str], list[Node]] = {}
    for node in free:
        key = (node.inputs[0], len(node.inputs), _storage(graph, node, features))
        groups.setdefault(key, []).append(node)
    return max(map(tuple, groups.values()), key=len, default=()), reason


def stack(
    graph: Graph, name: str, products: Sequence[Node], features: TargetFeatures
) -> tuple[Node, tuple[Weight, ...]]:
    """One matrix product with result ``name`` for a group that `largest_stack` found, and its weights."""
    parts = [graph.weight[node.inputs[1]] for node in products]
    formats = {part.type.dtype for part in parts}
    widest = features.widest[_storage(graph, products[0], features)] if len(formats) > 1 else formats.pop()
    weights = [_concat(f"{name}.weight", widest, parts)]
    if len(products[0].inputs) == 3:
        biases = [graph.weight[node.inputs[2]] for node in products]
        weights.append(_concat(f"{name}.bias", DType.F32, biases))
    inputs = (products[0].inputs[0], *(weight.name for weight in weights))
    return Node(products[0].op, inputs, (name,)), tuple(weights)


def _owns_weights(graph: Graph, node: Node) -> bool:
    """Whether matrix and bias are weights, and nobody else reads the matrix: a copy would store it twice."""
    stored = all(name in graph.weight for name in node.inputs[1:])
    return stored and graph.users[node.inputs[1]] == (node,)


def _format(graph: Graph, node: Node) -> DType:
    return graph.weight[node.inputs[1]].type.dtype


def _storage(graph: Graph, node: Node, features: TargetFeatures) -> str:
    """What stacks: formats of one storage that has a name for the whole, else only equal formats."""
    dtype = _format(graph, node)
    storage = features.storage.get(dtype, "")
    return storage if storage in features.widest else dtype.value


def _concat(name: str, dtype: DType, parts: Sequence[Weight]) -> Weight:
    rows = sum(int(part.type.shape[0]) for part in parts)
    return Weight(name, TensorType(dtype, (rows, *parts[0].type.shape[1:])), Concat(tuple(parts)))
