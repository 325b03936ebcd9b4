"""Rewriting: replace groups of nodes by others, in one sweep over an immutable graph.

A rewrite looks at one node at a time. It answers None (nothing to do here), a NoMatch (it nearly applied), or a
Replacement: nodes that take the place of the matched ones. The new nodes stand where the last of the matched ones
stood, so that their inputs are defined, or, with ``early``, where the first stood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rlxc.ir import Graph, Node, Weight
from rlxc.passes.base import NoMatch, PassResult


@dataclass(frozen=True)
class Replacement:
    """``new`` nodes in the place of ``old`` ones.

    ``weights`` are added to the graph; ``missed`` says what was left out. Results that somebody still reads must
    keep their names.
    """

    old: tuple[Node, ...]
    new: tuple[Node, ...]
    early: bool = False
    weights: tuple[Weight, ...] = ()
    missed: tuple[NoMatch, ...] = ()


Rewrite = Callable[[Graph, Node], "Replacement | NoMatch | None"]


def rewrite(graph: Graph, rule: Rewrite) -> PassResult:
    """Apply a rule at every node, first match first; a node is matched once at most in a sweep."""
    order = {id(node): i for i, node in enumerate(graph.nodes)}
    taken: set[int] = set()
    placed: dict[int, tuple[Node, ...]] = {}  # by position in the graph
    weights = list(graph.weights)
    missed: list[NoMatch] = []
    for node in graph.nodes:
        if id(node) in taken:
            continue
        found = rule(graph, node)
        if isinstance(found, Replacement) and any(id(old) in taken for old in found.old):
            found = NoMatch("another match took a part of it", node)
        if isinstance(found, NoMatch):
            missed.append(found)
        if not isinstance(found, Replacement):
            continue
        missed += found.missed
        taken.update(id(old) for old in found.old)
        positions = [order[id(old)] for old in found.old]
        placed[min(positions) if found.early else max(positions)] = found.new
        weights += found.weights
    if not taken:
        return PassResult(graph, False, missed=tuple(missed))
    nodes: list[Node] = []
    for position, node in enumerate(graph.nodes):
        nodes += placed.get(position, () if id(node) in taken else (node,))
    return PassResult(graph.with_nodes(nodes, weights), True, missed=tuple(missed))


def rename(nodes: Iterable[Node], names: dict[str, str]) -> list[Node]:
    """The nodes, reading each value under its new name; chains of names are followed."""

    def final(name: str) -> str:
        while name in names:
            name = names[name]
        return name

    if not names:
        return list(nodes)
    return [Node(node.op, tuple(map(final, node.inputs)), node.outputs) for node in nodes]
