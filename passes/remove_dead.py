"""Removes what no output needs."""

from __future__ import annotations

from rlxc.ir import Alias, Graph
from rlxc.passes.base import Pass, PassResult


class RemoveDead(Pass):
    """Removes nodes and weights that no output depends on. Inputs stay: they are the graph's interface."""

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        needed = set(graph.outputs)
        kept = []
        for node in reversed(graph.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        for name in needed & graph.weight.keys():
            while isinstance(recipe := graph.weight[name].recipe, Alias):
                name = recipe.target
                needed.add(name)
        weights = [weight for weight in graph.weights if weight.name in needed]
        if len(kept) == len(graph.nodes) and len(weights) == len(graph.weights):
            return PassResult(graph, False)
        return PassResult(graph.with_nodes(reversed(kept), weights), True)
