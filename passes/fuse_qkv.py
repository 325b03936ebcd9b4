"""One matrix product for an attention's queries, keys and values."""

from __future__ import annotations

from rlxc.ir import Graph, Node
from rlxc.ir.ops import Attention, DequantMatMul, KvAppend, MatMul, RmsNorm, Rope, Split
from rlxc.ir.target import TargetFeatures
from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.rewrite import Replacement, rewrite
from rlxc.passes.stack import stack, why_not_stackable


class FuseQkv(Pass):
    """The q, k and v projections of one input become one product and a Split, where their formats stack."""

    def __init__(self, features: TargetFeatures) -> None:
        self.features = features

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        return rewrite(graph, self._rule)

    def _rule(self, graph: Graph, node: Node) -> Replacement | NoMatch | None:
        if not isinstance(node.op, Attention):
            return None
        projections = [self._projection(graph, name) for name in node.inputs]
        found = [p for p in projections if p is not None]
        if len(found) < 3:
            return None
        reason = why_not_stackable(graph, found, self.features)
        if reason is not None:
            return NoMatch(f"q, k and v stay apart: {reason}", node)
        outputs = tuple(p.outputs[0] for p in found)
        sizes = tuple(int(graph.types[name].shape[-1]) for name in outputs)
        product, weights = stack(graph, f"{outputs[0]}kv", found, self.features)
        split = Node(Split(sizes), product.outputs, outputs)
        return Replacement(tuple(found), (product, split), early=True, weights=weights)

    def _projection(self, graph: Graph, name: str) -> Node | None:
        """The matrix product that `name` comes from, through cache, rope and per-head norm."""
        node = graph.producer.get(name)
        while node is not None and isinstance(node.op, (KvAppend, Rope, RmsNorm)):
            node = graph.producer.get(node.inputs[1 if isinstance(node.op, KvAppend) else 0])
        return node if node is not None and isinstance(node.op, (DequantMatMul, MatMul)) else None
