"""One matrix product for an attention's queries, keys and values."""

from __future__ import annotations

from rlxc.ir import Graph, Node
from rlxc.ir.ops import Attention, DequantMatMul, KvAppend, MatMul, RmsNorm, Rope, Split
from rlxc.ir.target import TargetFeatures
from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.rewrite import Replacement, rewrite
from rlxc.passes.stack import largest_stack, stack


class FuseQkv(Pass):
    """The q, k and v projections of one input become one product and a Split, or those two whose formats stack."""

    def __init__(self, features: TargetFeatures) -> None:
        self.features = features

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        return rewrite(graph, self._rule)

    def _rule(self, graph: Graph, node: Node) -> Replacement | NoMatch | None:
        if not isinstance(node.op, Attention):
            return None
        traced = [_projection(graph, name) for name in node.inputs[:3]]
        projections = [projection for projection in dict.fromkeys(traced) if projection is not None]
        if len(projections) < 2:
            return None
        group, reason = largest_stack(graph, projections, self.features)
        apart = NoMatch(f"q, k and v stay apart: {reason}", node)
        if len(group) < 2:
            return apart
        outputs = tuple(projection.outputs[0] for projection in group)
        sizes = tuple(int(graph.types[name].shape[-1]) for name in outputs)
        name = outputs[0] + "".join(output.rpartition(".")[2] for output in outputs[1:])
        product, weights = stack(graph, name, group, self.features)
        split = Node(Split(sizes), product.outputs, outputs)
        return Replacement(
            group, (product, split), early=True, weights=weights, missed=(apart,) if reason else ()
        )


def _projection(graph: Graph, name: str) -> Node | None:
    """The matrix product that `name` comes from, through cache, rope and per-head norm."""
    node = graph.producer.get(name)
    while node is not None and isinstance(node.op, (KvAppend, Rope, RmsNorm)):
        node = graph.producer.get(node.inputs[1 if isinstance(node.op, KvAppend) else 0])
    return node if node is not None and isinstance(node.op, (DequantMatMul, MatMul)) else None
