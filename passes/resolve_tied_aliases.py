"""Makes every user of a tied weight read the one matrix that is stored."""

from __future__ import annotations

from rlxc.errors import GraphError
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
        aliases = {w.name: w.recipe.target for w in graph.weights if isinstance(w.recipe, Alias)}
        if not aliases:
            return PassResult(graph, False)
        for name in aliases:
            self._check_chain(graph, name, aliases)
        kept = [weight for weight in graph.weights if weight.name not in aliases]
        return PassResult(graph.with_nodes(rename(graph.nodes, aliases), kept), True)

    def _check_chain(self, graph: Graph, name: str, aliases: dict[str, str]) -> None:
        seen = [name]
        while seen[-1] in aliases:
            target = aliases[seen[-1]]
            if target in seen:
                raise GraphError(f"@{' -> @'.join([*seen, target])} is a cycle of aliases", source=graph.name)
            seen.append(target)
        if seen[-1] not in graph.weight:
            raise GraphError(
                f"@{seen[-2]} is an alias of @{seen[-1]}, which is not a weight", source=graph.name
            )
