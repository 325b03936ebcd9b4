"""The invariants of a graph, and how precisely the verifier says which one is broken where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlxc.dtypes import DType
from rlxc.errors import VerifyError
from rlxc.ir import (
    Alias,
    Balance,
    Concat,
    Encode,
    Fold,
    Graph,
    Node,
    Recipe,
    Source,
    TensorType,
    Weight,
    WeightLayout,
    ops,
    parse,
    verify,
)

SOUND = """
graph sound
input %x: f32[batch, seq, 4]
weight @w: f32[2, 4]
weight @tied: f32[2, 4] = alias(@w)
weight @both: f32[4, 4] = concat(@w.part: f32[2, 4], @v.part: f32[2, 4])
%a = Silu(%x)
%b = MatMul(%a, @both)
%c, %d = Split(%b; sizes=(1, 3))
%e = Add(%x, %b)
output %e
output %x
"""


def weight(name: str, *shape: int, recipe: Recipe | None = None) -> Weight:
    return Weight(name, TensorType(DType.F32, shape), recipe or Source(name))


def problem(graph: Graph) -> str:
    """What the verifier says about the graph after a pass called ``some_pass``."""
    with pytest.raises(VerifyError) as caught:
        verify(graph, after="some_pass")
    assert caught.value.source == "some_pass"
    return caught.value.problem


def with_weights(*weights: Weight) -> Graph:
    return Graph("weights", (), (), (), weights)


def test_sound_graph_passes() -> None:
    verify(parse(SOUND))


def test_graph_is_blamed_by_its_name_unless_a_pass_made_it() -> None:
    with pytest.raises(VerifyError, match=r"^sound: output %y"):
        verify(replace(parse(SOUND), outputs=("y",)))


def test_refusal_names_pass_node_types_and_feeders() -> None:
    text = "%a = Silu(%x)\n%b = Mean(%a)\n%m = Mul(%x, %x)\n%c = AddRmsNorm(%a, %b, @w; eps=1.0)"
    graph = parse(f"graph g\ninput %x: f32[4]\nweight @w: f32[4]\n{text}\n%n = Silu(%x)\noutput %c")
    graph = replace(
        graph, nodes=(*graph.nodes[:3], replace(graph.nodes[3], outputs=("c", "s")), graph.nodes[4])
    )
    with pytest.raises(VerifyError) as caught:
        verify(graph, after="fuse_norm")
    assert str(caught.value) == (
        "fuse_norm: AddRmsNorm: residual f32[1] for f32[4] "
        "(node %c, %s = AddRmsNorm, with %a from Silu, %b from Mean)"
    )


def test_the_first_refused_node_is_named() -> None:
    chain = "\n".join(f"%v{i + 1} = Silu(%v{i})" for i in range(20))
    graph = parse(f"graph g\ninput %v0: f32[4]\n{chain}\noutput %v20")
    bad = Node(ops.Glu("relu"), ("v6",), ("v7",))
    worse = Node(ops.Split((1,)), ("v12",), ("v13",))
    nodes = (*graph.nodes[:6], bad, *graph.nodes[7:12], worse, *graph.nodes[13:])
    assert "(node %v7 = Glu, with %v6 from Silu)" in problem(graph.with_nodes(nodes))


def test_unknown_input_is_refused() -> None:
    graph = parse("graph g\ninput %x: f32[4]\n%a = Add(%x, %y)\noutput %a")
    assert problem(graph) == "Add reads 'y', which nothing before it defines (node %a = Add)"


def test_use_before_definition_is_refused() -> None:
    graph = parse("graph g\ninput %x: f32[4]\n%a = Silu(%b)\n%b = Silu(%x)\noutput %a")
    assert "Silu reads 'b', which nothing before it defines" in problem(graph)


def test_wrong_number_of_results_is_refused() -> None:
    graph = parse("graph g\ninput %x: f32[4]\n%a, %b = Silu(%x)\noutput %a")
    assert "Silu has 1 results, its node names 2 (node %a, %b = Silu)" in problem(graph)


@pytest.mark.parametrize("name", ["x", "w", "a"], ids=["an input", "a weight", "a value"])
def test_node_that_defines_a_name_again_is_refused(name: str) -> None:
    lines = f"input %x: f32[4]\nweight @w: f32[4]\n%a = Silu(%x)\n%{name} = Silu(%a)"
    assert f"Silu defines '{name}', which is defined already" in problem(
        parse(f"graph g\n{lines}\noutput %{name}")
    )


@pytest.mark.parametrize(
    "lines",
    [
        "input %x: f32[4]\ninput %x: f32[4]",
        "weight @x: f32[4]\nweight @x: f32[4]",
        "input %x: f32[4]\nweight @x: f32[4]",
    ],
    ids=["inputs", "weights", "input and weight"],
)
def test_interface_that_uses_a_name_twice_is_refused(lines: str) -> None:
    assert problem(parse(f"graph g\n{lines}")) == "'x' is defined twice"


@pytest.mark.parametrize("name", ["nothing", "w"], ids=["unknown", "a weight"])
def test_output_must_be_a_value(name: str) -> None:
    graph = replace(parse(SOUND), outputs=("e", name))
    assert problem(graph) == f"output %{name} is not a value of the graph"


def test_output_listed_twice_is_refused() -> None:
    assert problem(replace(parse(SOUND), outputs=("e", "x", "e"))) == "output %e is listed twice"


def test_dangling_alias_is_refused() -> None:
    graph = with_weights(weight("a", 2, 4, recipe=Alias("b")))
    assert problem(graph) == "@a is an alias of @b, which is not a weight"


def test_alias_cycle_is_refused() -> None:
    graph = with_weights(weight("a", 2, 4, recipe=Alias("b")), weight("b", 2, 4, recipe=Alias("a")))
    assert problem(graph) == "@a -> @b -> @a is a cycle of aliases"


def test_alias_of_another_type_is_refused() -> None:
    graph = with_weights(weight("a", 2, 4, recipe=Alias("b")), weight("b", 4, 4))
    assert problem(graph) == "@a is f32[2, 4], its target @b is f32[4, 4]"


PACKED = Weight("w", TensorType(DType.Q4_K, (8, 512)), Source("w"))


def test_packed_matrix_can_have_a_layout() -> None:
    verify(with_weights(replace(PACKED, layout=WeightLayout(4, 256, 16))))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": TensorType(DType.F16, (8, 512))}, "f16[8, 512], only packed matrices with bytes"),
        (
            {"layout": WeightLayout(4, 96, 16)},
            "q4_k[8, 512], it cannot have a layout of 4 bits, blocks of 96, tiles",
        ),
        ({"layout": WeightLayout(0, 32, 16)}, "it cannot have a layout of 0 bits"),
        ({"layout": WeightLayout(4, 32, 0)}, "it cannot have a layout of 4 bits, blocks of 32"),
    ],
)
def test_layout_that_a_weight_cannot_have_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in problem(
        with_weights(replace(PACKED, **{"layout": WeightLayout(4, 32, 16), **changes}))
    )


def test_alias_has_no_layout_of_its_own() -> None:
    alias = replace(PACKED, name="a", recipe=Alias("w"), layout=WeightLayout(4, 32, 16))
    assert "only packed matrices with bytes have a layout" in problem(with_weights(PACKED, alias))


def test_alias_that_is_part_of_a_whole_is_checked() -> None:
    part = weight("part", 2, 4, recipe=Alias("nowhere"))
    assert "@part is an alias of @nowhere" in problem(with_weights(weight("a", 2, 4, recipe=Concat((part,)))))


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (weight("b", 2, 4),),
        (weight("b", 2, 4), weight("c", 1, 5)),
        (weight("b", 2, 5), weight("c", 1, 5)),
    ],
    ids=["no parts", "too few rows", "different columns", "other columns"],
)
def test_parts_that_do_not_make_the_whole_are_refused(parts: tuple[Weight, ...]) -> None:
    assert problem(with_weights(weight("a", 3, 4, recipe=Concat(parts)))).startswith(
        "@a is f32[3, 4], its parts have"
    )


def test_encoding_another_shape_is_refused() -> None:
    graph = with_weights(weight("a", 3, 4, recipe=Encode(weight("b", 4, 3))))
    assert problem(graph) == "@a is f32[3, 4], it encodes f32[4, 3]"


def test_what_is_encoded_is_checked() -> None:
    part = weight("part", 2, 4, recipe=Alias("nowhere"))
    assert "@part is an alias of @nowhere" in problem(with_weights(weight("a", 2, 4, recipe=Encode(part))))


BASE, A, B = weight("base", 3, 4), weight("A", 2, 4), weight("B", 3, 2)


@pytest.mark.parametrize(
    "fold",
    [
        Fold(BASE, A, B, 1.0),
        Fold(BASE, A, B, 1.0, weight("m", 3)),
        Fold(BASE, weight("A", 2, 3), weight("B", 4, 2), 1.0, transposed=True),
        Fold(BASE, weight("A", 2, 3), weight("B", 4, 2), 1.0, weight("m", 3), transposed=True),
        Fold(Weight("base", TensorType(DType.Q4_K, (3, 4)), Source("base")), A, B, 1.0),
    ],
    ids=["plain", "with magnitudes", "transposed", "both", "into a packed weight"],
)
def test_adapter_that_fits_can_be_folded(fold: Fold) -> None:
    verify(with_weights(weight("w", 3, 4, recipe=fold)))


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        (Fold(weight("base", 4, 4), A, B, 1.0), "it folds into f32[4, 4] in f32"),
        (Fold(BASE, weight("A", 2, 3), B, 1.0), "it cannot fold @A: f32[2, 3]"),
        (Fold(BASE, A, weight("B", 4, 2), 1.0), "it cannot fold @B: f32[4, 2]"),
        (Fold(BASE, A, weight("B", 3, 5), 1.0), "it cannot fold @B: f32[3, 5]"),
        (Fold(BASE, A, B, 1.0, transposed=True), "it cannot fold @A: f32[2, 4]"),
        (Fold(BASE, A, B, 1.0, weight("m", 4)), "it cannot fold @m: f32[4]"),
        (
            Fold(BASE, A, B, 1.0, Weight("m", TensorType(DType.F16, (3,)), Source("m"))),
            "it cannot fold @m: f16[3]",
        ),
    ],
)
def test_adapter_that_does_not_fit_is_refused(fold: Fold, expected: str) -> None:
    assert problem(with_weights(weight("w", 3, 4, recipe=fold))) == f"@w is f32[3, 4], {expected}"


def test_folding_into_another_type_than_f32_is_refused() -> None:
    whole = Weight("w", TensorType(DType.F16, (3, 4)), Fold(BASE, A, B, 1.0))
    assert problem(with_weights(whole)) == "@w is f16[3, 4], it folds into f32[3, 4] in f32"


def test_what_is_folded_is_checked() -> None:
    for number, name in enumerate(("base", "A", "B")):
        parts = [BASE, A, B]
        parts[number] = replace(parts[number], recipe=Alias("nowhere"))
        graph = with_weights(weight("w", 3, 4, recipe=Fold(*parts, 1.0)))
        assert f"@{name} is an alias of @nowhere" in problem(graph)


VECTOR, OTHER = weight("v", 6), weight("o", 6)


@pytest.mark.parametrize("dim", [0, 4, 6])
@pytest.mark.parametrize("interleaved", [True, False])
def test_vectors_of_one_length_can_be_balanced(dim: int, interleaved: bool) -> None:
    verify(with_weights(weight("w", 6, recipe=Balance(VECTOR, OTHER, dim, interleaved))))


@pytest.mark.parametrize(
    ("whole", "balance", "expected"),
    [
        (VECTOR.type, Balance(weight("v", 4), OTHER, 4), "f32[6], it cannot balance @v: f32[4]"),
        (VECTOR.type, Balance(VECTOR, weight("o", 6, 1), 4), "f32[6], it cannot balance @o: f32[6, 1]"),
        (
            VECTOR.type,
            Balance(VECTOR, Weight("o", TensorType(DType.F16, (6,)), Source("o")), 4),
            "f32[6], it cannot balance @o: f16[6]",
        ),
        (VECTOR.type, Balance(VECTOR, OTHER, 3), "f32[6], 3 of its channels cannot be rotated"),
        (VECTOR.type, Balance(VECTOR, OTHER, 8), "f32[6], 8 of its channels cannot be rotated"),
        (VECTOR.type, Balance(VECTOR, OTHER, -2), "f32[6], -2 of its channels cannot be rotated"),
        (
            TensorType(DType.F16, (6,)),
            Balance(VECTOR, OTHER, 4),
            "f16[6], only vectors in f32 can be balanced",
        ),
        (
            TensorType(DType.F32, (6, 1)),
            Balance(weight("v", 6, 1), weight("o", 6, 1), 4),
            "f32[6, 1], only vectors in f32 can be balanced",
        ),
    ],
)
def test_what_cannot_be_balanced_is_refused(whole: TensorType, balance: Balance, expected: str) -> None:
    assert problem(with_weights(Weight("w", whole, balance))) == f"@w is {expected}"


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_balanced_is_checked(number: int) -> None:
    parts = [VECTOR, OTHER]
    parts[number] = replace(parts[number], recipe=Alias("nowhere"))
    graph = with_weights(weight("w", 6, recipe=Balance(*parts, 6)))
    assert f"@{parts[number].name} is an alias of @nowhere" in problem(graph)
