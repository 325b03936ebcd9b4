"""One matrix product for the gate and the input of a gated MLP, and one op for what follows."""

from __future__ import annotations

from rlxc.ir import Graph, Node
from rlxc.ir.ops import DequantMatMul, Gelu, Glu, MatMul, Mul, Silu, Split
from rlxc.ir.target import TargetFeatures
from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.rewrite import Replacement, rewrite
from rlxc.passes.stack import largest_stack, stack


class FuseGatedMlp(Pass):
    """``act(gate(x)) * up(x)`` becomes one product and a Glu, where the two weights' formats stack.

    What is one product already, split in halves of gate and up, becomes a Glu.
    """

    def __init__(self, features: TargetFeatures) -> None:
        self.features = features

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        return rewrite(graph, self._rule) if self.features.glu else PassResult(graph, False)

    def _rule(self, graph: Graph, node: Node) -> Replacement | NoMatch | None:
        if not isinstance(node.op, Mul):
            return None
        for active_name, up_name in (node.inputs, node.inputs[::-1]):
            active, up = graph.producer.get(active_name), graph.producer.get(up_name)
            if active is None or up is None or not isinstance(active.op, (Silu, Gelu)):
                continue
            gate = graph.producer.get(active.inputs[0])
            if gate is up and isinstance(up.op, Split):
                return _of_halves(graph, node, active, up)
            if gate is None or not all(isinstance(n.op, (DequantMatMul, MatMul)) for n in (gate, up)):
                continue
            _, reason = largest_stack(graph, (gate, up), self.features)
            if graph.types[active_name] != graph.types[up_name]:
                reason = "their sizes differ"
            if any(graph.only_user(n.outputs[0]) is None for n in (gate, up, active)):
                reason = "a part is also used elsewhere"
            if reason:
                return NoMatch(f"gate and up stay apart: {reason}", node)
            product, weights = stack(graph, f"{gate.outputs[0]}_up", (gate, up), self.features)
            glu = Node(_glu(active), product.outputs, node.outputs)
            return Replacement((gate, up, active, node), (product, glu), weights=weights)
        return None


def _of_halves(graph: Graph, node: Node, active: Node, halves: Node) -> Replacement | NoMatch:
    """A Glu of what is split into gate and up."""
    problem = ""
    if any(graph.only_user(name) is None for name in (*halves.outputs, *active.outputs)):
        problem = "a part is also used elsewhere"
    elif len(halves.outputs) != 2 or active.inputs[0] != halves.outputs[0]:
        problem = "the gate is not the first of two halves"
    elif graph.types[halves.outputs[0]] != graph.types[halves.outputs[1]]:
        problem = "their sizes differ"
    if problem:
        return NoMatch(f"gate and up stay split: {problem}", node)
    return Replacement((halves, active, node), (Node(_glu(active), halves.inputs, node.outputs),))


def _glu(active: Node) -> Glu:
    return Glu("silu" if isinstance(active.op, Silu) else "gelu")
