"""Computes equal things once."""

from __future__ import annotations

from rlxc.ir import Graph, Node
from rlxc.ir.ops import Op
from rlxc.passes.base import Pass, PassResult


class ShareCommon(Pass):
    """Drops a node whose op and inputs equal an earlier node's; its users read the earlier results."""

    def run(self, graph: Graph) -> PassResult:
        """See the class. A node whose results are graph outputs stays, because their names are the interface."""
        names: dict[str, str] = {}
        seen: dict[tuple[Op, tuple[str, ...]], Node] = {}
        kept = []
        for node in graph.nodes:
            inputs = tuple(names.get(name, name) for name in node.inputs)
            first = seen.setdefault((node.op, inputs), node)
            if first is not node and not set(node.outputs) & set(graph.outputs):
                names.update(zip(node.outputs, first.outputs))
                continue
            kept.append(node if inputs == node.inputs else Node(node.op, inputs, node.outputs))
        if not names:
            return PassResult(graph, False)
        return PassResult(graph.with_nodes(kept), True)
