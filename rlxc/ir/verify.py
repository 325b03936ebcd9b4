"""The invariants of a graph, checked after every pass."""

from __future__ import annotations

from rlxc.errors import GraphError, VerifyError
from rlxc.ir.graph import Alias, Concat, Graph, Node, Weight


def verify(graph: Graph, *, after: str = "") -> None:
    """Check that names are defined once and before use, that types agree, and that weights' recipes make sense.

    Args:
        graph: the graph to check.
        after: what produced the graph (a pass), named in the error.

    Raises:
        VerifyError: naming `after`, the node, and the nodes that its inputs come from.
    """
    try:
        _check_names(graph)
        for weight in graph.weights:
            _check_recipe(graph, weight)
        types = graph.types
    except VerifyError as error:
        raise VerifyError(error.problem, source=after or graph.name) from None
    except GraphError as error:
        problem = f"{error}{_blame(graph)}"
        raise VerifyError(problem, source=after or graph.name) from None
    for name in graph.outputs:
        if name not in types or name in graph.weight:
            raise VerifyError(f"output %{name} is not a value of the graph", source=after or graph.name)


def _check_names(graph: Graph) -> None:
    names = [value.name for value in graph.inputs] + [weight.name for weight in graph.weights]
    names += [name for node in graph.nodes for name in node.outputs]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise VerifyError(f"{name!r} is defined twice")
        seen.add(name)


def _check_recipe(graph: Graph, weight: Weight) -> None:
    match weight.recipe:
        case Alias(target):
            known = graph.weight.get(target)
            if known is None:
                raise VerifyError(f"@{weight.name} is an alias of @{target}, which is not a weight")
            if known.type != weight.type:
                raise VerifyError(f"@{weight.name} is {weight.type}, its target @{target} is {known.type}")
        case Concat(parts):
            columns = {part.type.shape[1:] for part in parts}
            rows = [part.type.shape[0] for part in parts]
            numbers = [row for row in rows if isinstance(row, int)]
            if (
                columns != {weight.type.shape[1:]}
                or len(numbers) != len(rows)
                or sum(numbers) != weight.type.shape[0]
            ):
                raise VerifyError(
                    f"@{weight.name} is {weight.type}, its parts have rows {rows} and columns {columns}"
                )
            for part in parts:
                _check_recipe(graph, part)


def _blame(graph: Graph) -> str:
    """The first node that the shape rules refuse, with the nodes that feed it."""
    for end in range(1, len(graph.nodes) + 1):
        try:
            _ = graph.with_nodes(graph.nodes[:end]).types
        except GraphError:
            return _describe(graph, graph.nodes[end - 1])
    return ""


def _describe(graph: Graph, node: Node) -> str:
    feeders = [
        f"%{name} from {graph.producer[name].op.name}" for name in node.inputs if name in graph.producer
    ]
    origin = f", with {', '.join(feeders)}" if feeders else ""
    return f" (node %{', %'.join(node.outputs)} = {node.op.name}{origin})"
