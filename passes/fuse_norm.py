"""Recognises RMS norms, and joins each with the residual sum before it where the target can."""

from __future__ import annotations

from rlxc.dtypes import DType
from rlxc.ir import Graph, Node, TensorType
from rlxc.ir.ops import Add, AddRmsNorm, Constant, Mean, Mul, RmsNorm, Rsqrt, Square
from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.rewrite import Replacement, rewrite


class FuseNorm(Pass):
    """``x * rsqrt(mean(x^2) + eps) * weight`` becomes RmsNorm; ``norm(x + residual)`` becomes AddRmsNorm."""

    def __init__(self, *, with_residual: bool) -> None:
        self.with_residual = with_residual

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        spelled = rewrite(graph, _spelled_out)
        if not self.with_residual:
            return spelled
        joined = rewrite(spelled.graph, _with_residual)
        return PassResult(
            joined.graph, spelled.modified or joined.modified, missed=(*spelled.missed, *joined.missed)
        )


def _spelled_out(graph: Graph, node: Node) -> Replacement | NoMatch | None:
    if not isinstance(node.op, Mul):
        return None
    for scaled_name, weight in (node.inputs, node.inputs[::-1]):
        scaled = graph.producer.get(scaled_name)
        if weight not in graph.weight or scaled is None or not isinstance(scaled.op, Mul):
            continue
        for x, inverse_name in (scaled.inputs, scaled.inputs[::-1]):
            chain = _inverse_root_mean_square(graph, inverse_name, x)
            if chain is None:
                continue
            eps, inner = chain
            old = (*inner, scaled, node)
            if any(graph.only_user(name) is None for n in old[:-1] for name in n.outputs):
                return NoMatch("a part of the norm is also used elsewhere", node)
            if graph.types[weight] != TensorType(DType.F32, graph.types[x].shape[-1:]):
                return NoMatch(f"the weight is {graph.types[weight]} for {graph.types[x]}", node)
            return Replacement(old, (Node(RmsNorm(eps), (x, weight), node.outputs),))
    return None


def _inverse_root_mean_square(graph: Graph, name: str, x: str) -> tuple[float, tuple[Node, ...]] | None:
    """The eps and nodes of ``rsqrt(mean(square(x)) + eps)``, if `name` is that."""
    root = graph.producer.get(name)
    if root is None or not isinstance(root.op, Rsqrt):
        return None
    total = graph.producer.get(root.inputs[0])
    if total is None or not isinstance(total.op, Add):
        return None
    for mean_name, eps_name in (total.inputs, total.inputs[::-1]):
        mean, eps = graph.producer.get(mean_name), graph.producer.get(eps_name)
        if mean is None or eps is None or not isinstance(mean.op, Mean) or not isinstance(eps.op, Constant):
            continue
        square = graph.producer.get(mean.inputs[0])
        if (
            square is not None
            and square.op == Square()
            and square.inputs == (x,)
            and isinstance(eps.op.value, float)
        ):
            return eps.op.value, (square, mean, total, root)
    return None


def _with_residual(graph: Graph, node: Node) -> Replacement | NoMatch | None:
    if not isinstance(node.op, RmsNorm):
        return None
    total = graph.producer.get(node.inputs[0])
    if total is None or not isinstance(total.op, Add):
        return None
    if node.op.heads != 1:
        return NoMatch("the norm is per head", node)
    a, b = total.inputs
    if graph.types[a] != graph.types[b]:
        return NoMatch("the sum broadcasts", node)
    if any(name in graph.weight for name in total.inputs):
        return NoMatch("the sum is with a weight", node)
    if node.inputs[1] not in graph.weight:
        return NoMatch("the norm's weight is computed", node)
    fused = Node(AddRmsNorm(node.op.eps), (a, b, node.inputs[1]), (*node.outputs, *total.outputs))
    return Replacement((total, node), (fused,), early=True)
