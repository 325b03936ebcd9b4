"""Makes every user of a tied weight read the one matrix that is stored."""

from __future__ import annotations

from rlxc.ir import Alias, Graph
from rlxc.passes.base import Pass, PassResult
from rlxc.passes.rewrite import rename


class ResolveTiedAliases(Pass):
    """Removes weights that are aliases, following chains to the weight that has bytes."""

    def run(self, graph: Graph) -> PassResult:
        """See the class.

        Raises:
            GraphError: a chain of aliases leads nowhere or back to itself.
        """
        stored = {w.name: graph.stored(w).name for w in graph.weights if isinstance(w.recipe, Alias)}
        if not stored:
            return PassResult(graph, False)
        kept = [weight for weight in graph.weights if weight.name not in stored]
        return PassResult(graph.with_nodes(rename(graph.nodes, stored), kept), True)
