"""IR text: it says everything about a graph, and what cannot be read is refused with its line."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_graphs import MODELS, model_graph

from rlxc.dtypes import DType
from rlxc.errors import GraphError, ParseError
from rlxc.ir import (
    Alias,
    Balance,
    Concat,
    Encode,
    Fold,
    Graph,
    Node,
    RopeSpec,
    Source,
    TensorType,
    Value,
    Weight,
    WeightLayout,
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


FOLDED = """\
graph folded
weight @w: q8_0[64, 32] = encode(@w.folded: f32[64, 32] = fold(@w: q4_0[64, 32], @a: f32[4, 32], @b: f32[64, 4], 0.5))
weight @d: f32[64, 32] = fold(@w: q4_0[64, 32], @a: f32[4, 32], @b: f32[64, 4], @m: f32[64], -1e-05)
weight @t: f32[9, 32] = fold_transposed(@x: f16[9, 32] = encode(@t: bf16[9, 32]), @ta: f32[4, 9], @tb: f32[32, 4], 2.0)
weight @both: q8_0[128, 32] = concat(@w: q8_0[64, 32] = encode(@v: f16[64, 32]), @u: q8_0[64, 32])
"""

ADAPTED = """\
graph adapted
input %ids: i64[batch, seq]
input %lora_scales: f32[batch, rank]
input %table.down: f32[batch, 96, rank]
input %table.up: f32[batch, 64, rank]
input %down: f32[batch, 2, rank, 64]
input %up: f32[batch, 96, rank]
weight @table: q8_0[96, 64]
weight @w: q8_0[96, 64]
%base = Embed(%ids, @table) : f32[batch, seq, 64]
%h = LoraEmbed(%base, %ids, %table.down, %lora_scales, %table.up) : f32[batch, seq, 64]
%u = LoraDown(%h, %down, %lora_scales) : f32[batch, seq, 2, rank]
%y = LoraMatMul(%h, @w, %u, %up; sizes=(64, 32)) : f32[batch, seq, 96]
%z = LoraMatMul(%h, @w, %u, %up; sizes=(96,), first=1) : f32[batch, seq, 96]
output %y
output %z
"""


BALANCED = """\
graph balanced
weight @q: f32[8] = balance(@q.given: f32[8] = source("q"), @k: f32[8], 6)
weight @k: f32[8] = balance_interleaved(@k: f32[8], @both: f32[8] = concat(@a: f32[3], @b: f32[5]), 0)
"""


@pytest.mark.parametrize("text", [FOLDED, ADAPTED, BALANCED], ids=["folds", "side paths", "norms"])
def test_text_of_recipes_and_side_paths_is_stable_and_sound(text: str) -> None:
    graph = parse(text)
    assert show(graph) == text
    verify(graph)


def test_parsing_gives_the_recipes() -> None:
    weights = parse(FOLDED).weight

    def given(name: str, *shape: int, dtype: DType = DType.F32) -> Weight:
        return Weight(name, TensorType(dtype, shape), Source(name))

    base = given("w", 64, 32, dtype=DType.Q4_0)
    assert weights["d"].recipe == Fold(base, given("a", 4, 32), given("b", 64, 4), -1e-05, given("m", 64))
    folded = Weight(
        "w.folded", TensorType(DType.F32, (64, 32)), Fold(base, given("a", 4, 32), given("b", 64, 4), 0.5)
    )
    assert weights["w"].recipe == Encode(folded)
    assert isinstance(weights["t"].recipe, Fold)
    assert weights["t"].recipe.transposed
    assert weights["t"].tensors == ("t", "ta", "tb")
    assert weights["both"].tensors == ("v", "u")


def test_parsing_gives_balanced_vectors() -> None:
    weights = parse(BALANCED).weight
    q, k = (Weight(name, TensorType(DType.F32, (8,)), Source(name[0])) for name in ("q.given", "k"))
    assert weights["q"].recipe == Balance(q, k, 6)
    assert isinstance(weights["k"].recipe, Balance)
    assert (weights["k"].recipe.dim, weights["k"].recipe.interleaved) == (0, True)
    assert weights["q"].tensors == ("q", "k")
    assert weights["k"].tensors == ("k", "a", "b")


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


@pytest.mark.parametrize(("architecture", "options"), MODELS.values(), ids=MODELS)
def test_whole_models_come_back(architecture: str, options: dict[str, Any]) -> None:
    graph = model_graph(architecture, 7, **options)
    verify(graph)
    assert parse(show(graph)) == graph


@pytest.mark.parametrize(
    "op",
    [
        ops.Rope(2, RopeSpec(10000.0, 4)),
        ops.Rope(2, RopeSpec(1e6, 4, interleaved=True, factor=8.0)),
        ops.Rope(2, RopeSpec(1e6, 4, False, 4.0, Yarn(4096, 0.5, 16.0, 2.0), 1.25)),
    ],
)
def test_nested_attributes_come_back(op: ops.Op) -> None:
    graph = parse("graph g\ninput %x: f32[B, S, 8]\ninput %p: i64[B, S]\noutput %x")
    graph = graph.with_nodes([Node(op, ("x", "p"), ("y",))])
    assert parse(show(graph)) == graph


EXPERTS = """\
graph experts
input %ids: i64[batch, seq]
input %x: f32[batch, seq, 64]
input %keys: f32[batch, 2, past, 16]
weight @scale: f32[64]
weight @shift: f32[64]
weight @sinks: f32[4]
weight @router: f32[6, 64]
weight @gate: mxfp4[6, 32, 64]
weight @up: iq2_xxs[6, 32, 64]
weight @down: nvfp4[6, 64, 32]
weight @bias: f32[6, 32]
%n = LayerNorm(%x, @scale, @shift; eps=1e-05) : f32[batch, seq, 64]
%a = Attention(%n, %keys, %keys, @sinks; heads=4, scale=0.25, window=8, soft_cap=50.0) : f32[batch, seq, 64]
%s = MatMul(%a, @router) : f32[batch, seq, 6]
%e, %w = Route(%s; used=2) : i64[batch, seq, 2], f32[batch, seq, 2]
%g = ExpertMatMul(%a, @gate, %e, @bias) : f32[batch, seq, 2, 32]
%u = ExpertMatMul(%a, @up, %e) : f32[batch, seq, 2, 32]
%c = ClampedSwiglu(%g, %u; alpha=1.702, limit=7.0) : f32[batch, seq, 2, 32]
%d = ExpertMatMul(%c, @down, %e) : f32[batch, seq, 2, 64]
%m = MixExperts(%d, %w) : f32[batch, seq, 64]
%y = SoftCap(%m; cap=30.0) : f32[batch, seq, 64]
output %y
"""


def test_text_of_experts_is_stable_and_sound() -> None:
    graph = parse(EXPERTS)
    assert show(graph) == EXPERTS
    verify(graph)


def test_attributes_at_their_default_are_left_out() -> None:
    shown = show(
        parse("graph g\ninput %x: f32[4]\nweight @w: f32[4]\n%y = RmsNorm(%x, @w; eps=0.5, heads=1)")
    )
    assert "RmsNorm(%x, @w; eps=0.5) :" in shown


# --- random graphs ------------------------------------------------------------------------------------------------

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,8}", fullmatch=True)
floats = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def folds(draw: st.DrawFn, base: Weight) -> Weight:
    """One or several adapters folded into a matrix of f32, with any scales and names."""
    rank = draw(st.sampled_from([1, 16]))
    transposed = draw(st.booleans())
    rows, columns = base.type.shape
    out, in_ = (columns, rows) if transposed else (rows, columns)
    a = Weight(draw(names), TensorType(DType.F32, (rank, in_)), Source("a"))
    b = Weight(draw(names), TensorType(DType.F32, (out, rank)), Source("b"))
    magnitude = Weight(draw(names), TensorType(DType.F32, (rows,)), Source("m"))
    recipe = Fold(base, a, b, draw(floats), magnitude if draw(st.booleans()) else None, transposed)
    folded = Weight(draw(names), TensorType(DType.F32, base.type.shape), recipe)
    return draw(folds(folded)) if draw(st.booleans()) else folded


@st.composite
def recipes(draw: st.DrawFn, name: str) -> Source | Concat | Encode:
    kind = draw(st.sampled_from(["source", "encode", "concat"]))
    if kind == "source":
        return Source(draw(st.just(name) | st.text("abc ._-(),:;=%@[]0123", min_size=1)))
    if kind == "encode":
        base = Weight(name, TensorType(draw(st.sampled_from(DType)), (5, 32)), Source(name))
        return Encode(draw(st.just(base) | folds(base)))
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
    parts = (Weight(draw(names), norm.type, Source(draw(names))) for _ in range(2))
    balance = Balance(*parts, draw(st.sampled_from([0, 2, size])), draw(st.booleans()))
    weights = [norm, Weight(next(free), norm.type, Alias(norm.name)), Weight(next(free), norm.type, balance)]
    for _ in range(draw(st.integers(0, 2))):
        name = next(free)
        recipe = draw(recipes(name))
        rows = len(recipe.parts) if isinstance(recipe, Concat) else 5
        numbers = st.integers(1, 64)
        blocks = st.sampled_from([1, 2, 4, 8, 16, 32])  # parts of a row
        layout = draw(st.none() | st.builds(WeightLayout, numbers, blocks, numbers))
        weights.append(Weight(name, TensorType(DType.Q4_0, (rows, 32)), recipe, layout))
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
                Node(ops.RmsNorm(draw(floats)), (of, draw(st.sampled_from(weights[:3])).name), (name,))
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
    "unknown recipe": (
        "weight @z: f32[2] = zeros()",
        "source, alias, concat, encode, fold or balance instead of 'zeros'",
    ),
    "layout of two numbers": ("weight @z: q4_0[2, 32] layout(4, 32)", "','"),
    "layout of a fraction": ("weight @z: q4_0[2, 32] layout(4.5, 32, 16)", "','"),
    "layout of words": ("weight @z: q4_0[2, 32] layout(wide, 32, 16)", "an integer"),
    "layout after the recipe": (
        'weight @z: q4_0[2, 32] = source("y") layout(4, 32, 16)',
        "the end of the line",
    ),
    "encoding nothing": ("weight @z: f32[2] = encode()", "a name after @"),
    "encoding two weights": ("weight @z: f32[2] = encode(@a: f32[2], @b: f32[2])", "')'"),
    "fold without scale": ("weight @z: f32[2] = fold(@a: f32[2], @b: f32[2], @c: f32[2])", "a number"),
    "fold of two weights": (
        "weight @z: f32[2] = fold(@a: f32[2], @b: f32[2], 1.0)",
        "3 or 4 weights instead of 2",
    ),
    "scale that is no number": (
        "weight @z: f32[2] = fold(@a: f32[2], @b: f32[2], @c: f32[2], big)",
        "a number",
    ),
    "balance of one weight": ("weight @z: f32[2] = balance(@a: f32[2], 2)", "2 weights instead of 1"),
    "balance without a number": ("weight @z: f32[2] = balance(@a: f32[2], @b: f32[2])", "an integer"),
    "balance of half a channel": ("weight @z: f32[2] = balance(@a: f32[2], @b: f32[2], 0.5)", "')'"),
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
