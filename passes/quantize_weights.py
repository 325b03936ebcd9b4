"""Encodes weights in other formats than the model file's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rlxc.dtypes import DType
from rlxc.ir import Alias, Encode, Graph, Node, TensorType, Weight
from rlxc.ir.ops import DequantMatMul, MatMul
from rlxc.passes.base import Pass, PassResult


class QuantizeWeights(Pass):
    """Each weight that ``formats`` names becomes a recipe that encodes it in that format when it is written.

    It runs before any pass that stacks, folds or ties weights; an alias follows its target.
    """

    def __init__(self, formats: Mapping[str, DType]) -> None:
        self.formats = formats

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        weights = tuple(self._encoded(graph, weight) for weight in graph.weights)
        if weights == graph.weights:
            return PassResult(graph, False)
        packed = {weight.name: weight.type.dtype.is_packed for weight in weights}
        nodes = [with_op(node, packed) for node in graph.nodes]
        return PassResult(graph.with_nodes(nodes, weights), True)

    def _encoded(self, graph: Graph, weight: Weight) -> Weight:
        stored = graph.stored(weight)
        dtype = self.formats.get(stored.name, stored.type.dtype)
        if dtype is stored.type.dtype:
            return weight
        type_ = TensorType(dtype, weight.type.shape)
        if isinstance(weight.recipe, Alias):
            return replace(weight, type=type_)
        return Weight(weight.name, type_, Encode(replace(weight, name=f"{weight.name}.given")))


def with_op(node: Node, packed: Mapping[str, bool]) -> Node:
    """The node, with the op that reads its weight: packed or not."""
    if not isinstance(node.op, MatMul | DequantMatMul):
        return node
    return replace(node, op=DequantMatMul() if packed[node.inputs[1]] else MatMul())
