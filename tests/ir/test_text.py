"""IR text: it says everything about a graph, and what cannot be read is refused with its line."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_graphs import model_graph

from rlxc.dtypes import DType
from rlxc.errors import GraphError, ParseError
from rlxc.ir import (
    Alias,
    Concat,
    Graph,
    Node,
    RopeSpec,
    Source,
    TensorType,
    Value,
    Weight,
    Yarn,
    ops,
    parse,
    show,
    verify,
)

EXAMPLE = """\
graph tiny
input %ids: i64[batch, seq]
weight @table: q8_0[256, 64]
weight @output: q8_0[256, 64] = alias(@table)
weight @norm: f32[64] = source("output_norm.weight")
weight @wqk: q8_0[96, 64] = concat(@wq: q5_0[64, 64], @wk: q8_0[32, 64] = source("k"))
%h = Embed(%ids, @table) : f32[batch, seq, 64]
%n = RmsNorm(%h, @norm; eps=1e-06) : f32[batch, seq, 64]
%qk = DequantMatMul(%n, @wqk) : f32[batch, seq, 96]
%q, %k = Split(%qk; sizes=(64, 32)) : f32[batch, seq, 64], f32[batch, seq, 32]
%logits = DequantMatMul(%q, @output) : f32[batch, seq, 256]
output %logits
output %k
"""


def test_text_of_a_graph_is_stable() -> None:
    assert show(parse(EXAMPLE)) == EXAMPLE


def test_parsing_gives_the_graph() -> None:
    text = (
        "graph g\ninput %x: f32[n]\nweight @w: f32[2] = alias(@v)\n%y = Glu(%x; activation='silu')\noutput %y"
    )
    assert parse(text) == Graph(
        "g",
        (Value("x", TensorType(DType.F32, ("n",))),),
        ("y",),
        (Node(ops.Glu("silu"), ("x",), ("y",)),),
        (Weight("w", TensorType(DType.F32, (2,)), Alias("v")),),
    )


def test_types_comments_blank_lines_and_indentation_may_be_left_to_the_writer() -> None:
    lines = [line.split(" : ")[0] for line in EXAMPLE.splitlines()]
    assert parse("# a comment\n\n" + "\n\n".join(f"    {line}" for line in lines)) == parse(EXAMPLE)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("llama", {"bias": True, "factors": True}), ("gemma3", {})],
)
def test_whole_models_come_back(architecture: str, options: dict[str, Any]) -> None:
    graph = model_graph(architecture, 7, **options)
    verify(graph)
    assert parse(show(graph)) == graph


@pytest.mark.parametrize(
    "op",
    [
        ops.Rope(2, RopeSpec(10000.0, 4)),
        ops.Rope(2, RopeSpec(1e6, 4, interleaved=True, factor=8.0)),
        ops.Rope(2, RopeSpec(1e6, 4, False, 4.0, Yarn(4096, 0.5, 1.25, 16.0, 2.0))),
    ],
)
def test_nested_attributes_come_back(op: ops.Op) -> None:
    graph = parse("graph g\ninput %x: f32[B, S, 8]\ninput %p: i64[B, S]\noutput %x")
    graph = graph.with_nodes([Node(op, ("x", "p"), ("y",))])
    assert parse(show(graph)) == graph


def test_attributes_at_their_default_are_left_out() -> None:
    shown = show(
        parse("graph g\ninput %x: f32[4]\nweight @w: f32[4]\n%y = RmsNorm(%x, @w; eps=0.5, heads=1)")
    )
    assert "RmsNorm(%x, @w; eps=0.5) :" in shown


# --- random graphs ------------------------------------------------------------------------------------------------

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,8}", fullmatch=True)
floats = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def recipes(draw: st.DrawFn, name: str) -> Source | Concat:
    if draw(st.booleans()):
        return Source(draw(st.just(name) | st.text("abc ._-(),:;=%@[]0123", min_size=1)))
    parts = draw(st.lists(names, min_size=1, max_size=3))
    return Concat(tuple(Weight(part, TensorType(DType.Q4_0, (1, 32)), Source(part)) for part in parts))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Chains of elementwise ops, splits, norms and constants over one size, with any names."""
    free = iter(draw(st.lists(names, min_size=30, max_size=30, unique=True)))
    size = draw(st.sampled_from([2, 4, 64]))
    tokens = draw(st.lists(st.sampled_from(["batch", "seq", "past+seq", 3, "3+seq"]), max_size=2))
    x = TensorType(DType.F32, (*tokens, size))
    inputs = tuple(Value(next(free), x) for _ in range(draw(st.integers(1, 3))))
    values = [value.name for value in inputs]
    norm = Weight(next(free), TensorType(DType.F32, (size,)), Source("norm"))
    weights = [norm, Weight(next(free), norm.type, Alias(norm.name))]
    for _ in range(draw(st.integers(0, 2))):
        name = next(free)
        recipe = draw(recipes(name))
        rows = len(recipe.parts) if isinstance(recipe, Concat) else 5
        weights.append(Weight(name, TensorType(DType.Q4_0, (rows, 32)), recipe))
    nodes = []
    for _ in range(draw(st.integers(0, 6))):
        of = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["unary", "binary", "norm", "constant", "split"]))
        if kind == "split":
            op: ops.Op = ops.Split((1, size - 1))
            nodes.append(Node(op, (of,), (next(free), next(free))))
            continue
        name = next(free)
        if kind == "unary":
            nodes.append(Node(draw(st.sampled_from([ops.Silu(), ops.Gelu(), ops.Square()])), (of,), (name,)))
        elif kind == "binary":
            nodes.append(Node(ops.Add(), (of, draw(st.sampled_from(values))), (name,)))
        elif kind == "norm":
            nodes.append(
                Node(ops.RmsNorm(draw(floats)), (of, draw(st.sampled_from(weights[:2])).name), (name,))
            )
        else:
            value = draw(floats | st.lists(floats, min_size=1, max_size=3).map(tuple))
            nodes.append(Node(ops.Constant(value), (), (name,)))
            continue
        values.append(name)
    outputs = tuple(draw(st.lists(st.sampled_from(values), unique=True)))
    return Graph(draw(names), inputs, outputs, tuple(nodes), tuple(weights))


@given(graphs())
def test_random_graphs_come_back(graph: Graph) -> None:
    verify(graph)
    assert parse(show(graph)) == graph


@given(st.text("graphinputweo%@abcMatMul(),;:=[]1. \n\"'"))
def test_any_other_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(GraphError):
        parse(text)


# --- refused ------------------------------------------------------------------------------------------------------

HEAD = "graph g\ninput %x: f32[batch, 8]\nweight @w: f32[8]\n"

UNREADABLE = {
    "unknown op": ("%y = Tanh(%x)", "an op instead of 'Tanh'"),
    "a family of ops": ("%y = Binary(%x, %x)", "an op instead of 'Binary'"),
    "unknown attribute": ("%y = RmsNorm(%x, @w; epsilon=1.0)", "epsilon"),
    "missing attribute": ("%y = RmsNorm(%x, @w)", "eps"),
    "attribute by position": ("%y = RmsNorm(%x, @w; 1.0)", "cannot read"),
    "attribute that is no literal": ("%y = Constant(value=open)", "attributes of Constant"),
    "attribute that calls": ("%y = Constant(value=open('x'))", "cannot read"),
    "attribute of an unknown record": ("%y = Rope(%x; heads=1, spec=Spec(theta=1.0))", "cannot read"),
    "unclosed attributes": ("%y = Constant(value=(1.0", "closing parenthesis"),
    "unclosed inputs": ("%y = Silu(%x", "closing parenthesis"),
    "unknown element type": ("input %z: f64[2]", "an element type instead of 'f64'"),
    "no shape": ("input %z: f32", "a shape in brackets"),
    "unclosed shape": ("input %z: f32[2", "a shape in brackets"),
    "empty dimension": ("input %z: f32[2,,3]", "dimensions instead of '2,,3'"),
    "negative dimension": ("input %z: f32[-1]", "dimensions instead of '-1'"),
    "input without mark": ("input z: f32[2]", "a name after %"),
    "input with a weight's mark": ("input @z: f32[2]", "a name after %"),
    "input without type": ("input %z", "':'"),
    "unknown recipe": ("weight @z: f32[2] = zeros()", "source, alias or concat instead of 'zeros'"),
    "alias without mark": ("weight @z: f32[2] = alias(w)", "a name after @"),
    "more than a line holds": ("output %x %y", "the end of the line"),
    "a line of nothing known": ("hello", "a name after %"),
    "results without op": ("%y", "'='"),
    "fewer types than results": ("%y, %z = Split(%x; sizes=(4, 4)) : f32[batch, 4]", "2 types instead of 1"),
    "more types than results": ("%y = Silu(%x) : f32[batch, 8], f32[]", "1 types instead of 2"),
    "another type than the op's": (
        "%y = Silu(%x) : f32[batch, 9]",
        "%y is f32[batch, 8], the text says f32[batch, 9]",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_line_is_named(case: str) -> None:
    line, expected = UNREADABLE[case]
    with pytest.raises(ParseError) as caught:
        parse(f"{HEAD}{line}\n%last = Silu(%x)")
    assert caught.value.source == "line 4"
    assert expected in caught.value.problem


def test_stated_types_of_a_malformed_graph_are_refused() -> None:
    with pytest.raises(GraphError, match="Add: cannot broadcast"):
        parse("graph g\ninput %x: f32[3]\ninput %y: f32[4]\n%z = Add(%x, %y) : f32[4]")
