"""How rewrites are applied: where new nodes stand, who comes first, what is reported."""

from __future__ import annotations

import pytest

from rlxc.ir import Graph, Node, Source, TensorType, Weight, ops, parse, verify
from rlxc.passes.base import NoMatch
from rlxc.passes.rewrite import Replacement, rename, rewrite

CHAIN = """
graph chain
input %x: f32[4]
%a = Silu(%x)
%b = Gelu(%a)
%between = Sqrt(%a)
%c = Silu(%b)
%y = Add(%c, %between)
output %y
"""


def ops_of(graph: Graph) -> list[str]:
    return [node.op.name for node in graph.nodes]


def square_for_gelu(graph: Graph, node: Node) -> Replacement | None:
    if not isinstance(node.op, ops.Gelu):
        return None
    return Replacement((node,), (Node(ops.Square(), node.inputs, node.outputs),))


def gelu_and_silu(graph: Graph, node: Node, *, early: bool) -> Replacement | None:
    """``silu(gelu(x))`` as one Sqrt."""
    gelu = graph.producer.get(node.inputs[0])
    if not isinstance(node.op, ops.Silu) or gelu is None or not isinstance(gelu.op, ops.Gelu):
        return None
    return Replacement((gelu, node), (Node(ops.Rsqrt(), gelu.inputs, node.outputs),), early=early)


def test_node_is_replaced_where_it_stood() -> None:
    result = rewrite(parse(CHAIN), square_for_gelu)
    assert result.modified
    assert ops_of(result.graph) == ["Silu", "Square", "Sqrt", "Silu", "Add"]


def test_group_stands_where_its_last_node_stood() -> None:
    result = rewrite(parse(CHAIN), lambda graph, node: gelu_and_silu(graph, node, early=False))
    assert ops_of(result.graph) == ["Silu", "Sqrt", "Rsqrt", "Add"]


def test_early_group_stands_where_its_first_node_stood() -> None:
    result = rewrite(parse(CHAIN), lambda graph, node: gelu_and_silu(graph, node, early=True))
    assert ops_of(result.graph) == ["Silu", "Rsqrt", "Sqrt", "Add"]


def test_rule_that_never_applies_leaves_the_very_graph() -> None:
    graph = parse(CHAIN)
    result = rewrite(graph, lambda graph, node: None)
    assert not result.modified
    assert result.graph is graph


def test_near_matches_are_reported_with_their_nodes() -> None:
    result = rewrite(
        parse(CHAIN), lambda graph, node: NoMatch("why not", node) if node.op == ops.Gelu() else None
    )
    assert not result.modified
    assert [str(miss) for miss in result.missed] == ["%b = Gelu: why not"]


def test_replacement_may_report_what_it_left_out() -> None:
    def rule(graph: Graph, node: Node) -> Replacement | None:
        found = square_for_gelu(graph, node)
        return found and Replacement(found.old, found.new, missed=(NoMatch("only half", node),))

    result = rewrite(parse(CHAIN), rule)
    assert result.modified
    assert [miss.reason for miss in result.missed] == ["only half"]


def test_node_is_replaced_once_and_the_first_match_wins() -> None:
    text = "graph g\ninput %x: f32[4]\n%a = Gelu(%x)\n%y = Silu(%a)\n%z = Silu(%a)\noutput %y\noutput %z"

    def rule(graph: Graph, node: Node) -> Replacement | None:
        found = gelu_and_silu(graph, node, early=True)
        kept = Node(ops.Gelu(), ("x",), ("a",))
        return found and Replacement(found.old, (kept, *found.new), early=True)

    result = rewrite(parse(text), rule)
    verify(result.graph)
    assert ops_of(result.graph) == ["Gelu", "Rsqrt", "Silu"]
    assert [str(miss) for miss in result.missed] == ["%z = Silu: another match took a part of it"]


def test_rule_sees_the_graph_as_it_was() -> None:
    text = "graph g\ninput %x: f32[4]\n%a = Gelu(%x)\n%b = Gelu(%a)\noutput %b"
    seen = []

    def rule(graph: Graph, node: Node) -> Replacement | None:
        seen.append(graph)
        return square_for_gelu(graph, node)

    graph = parse(text)
    assert ops_of(rewrite(graph, rule).graph) == ["Square", "Square"]
    assert all(one is graph for one in seen)


def test_weights_of_a_replacement_are_added() -> None:
    weight = Weight("w", TensorType(parse(CHAIN).inputs[0].type.dtype, (4,)), Source("w"))

    def rule(graph: Graph, node: Node) -> Replacement | None:
        if not isinstance(node.op, ops.Gelu):
            return None
        return Replacement((node,), (Node(ops.Mul(), (*node.inputs, "w"), node.outputs),), weights=(weight,))

    graph = rewrite(parse(CHAIN), rule).graph
    verify(graph)
    assert graph.weights == (weight,)


@pytest.mark.parametrize("names", [{"b": "a"}, {"b": "other", "other": "a"}], ids=["name", "chain of names"])
def test_renaming_changes_what_nodes_read_and_not_what_they_define(names: dict[str, str]) -> None:
    nodes = parse(CHAIN).nodes
    renamed = rename(nodes, names)
    assert renamed[3] == Node(ops.Silu(), ("a",), ("c",))
    assert [node.outputs for node in renamed] == [node.outputs for node in nodes]
