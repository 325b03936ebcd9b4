"""What kernels a graph becomes, and what they are given."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from layer_graph import layer
from random_adapters import split_graph

from rlxc.artifact import KvLayer, KvPlan, LoraPlan
from rlxc.artifact.kv import row_bytes
from rlxc.backends.tvm.kernels.route import Groups
from rlxc.backends.tvm.lower import lower
from rlxc.backends.tvm.program import InPage, InTable, InUnit, InWeights, InWorkspace, Program, Times
from rlxc.backends.tvm.targets import find_target
from rlxc.backends.tvm.weights import WeightsFile
from rlxc.dtypes import DType
from rlxc.errors import GraphError, UnsupportedError
from rlxc.ir import Graph, parse

TOKENS = 16


def paged_layer(dtype: str = "f16") -> str:
    """The layer with its cache in pages of 64 positions, as it is scheduled for this backend."""
    text = (
        layer().replace("f32[batch, 2, 64, 16]", f"{dtype}[pages, 2, 64, 16]").replace("'linear'", "'paged'")
    )
    text = text.replace("%past_length, @factors", "%past_length, %block_table.0, @factors")
    return text.replace(
        "input %past_length: i32[]", "input %past_length: i32[]\ninput %block_table.0: i32[batch, 2]"
    )


def plan(*layers: KvLayer) -> KvPlan:
    return KvPlan(100, TOKENS, 0, 64, sum(layer.bytes_per_token for layer in layers), layers)


def planned(index: int = 0, dtype: DType = DType.F16, **changes: Any) -> KvLayer:
    """What a plan says of `paged_layer`."""
    size = 2 * row_bytes(dtype, 2, 16)
    return replace(KvLayer(index, "paged", 128, None, 2, 16, dtype, size, None, 0), **changes)


def lowered(
    model: str | Graph,
    *,
    int8: bool = True,
    find_knobs: Any = lambda problem: None,
    kv: KvPlan | None = None,
    lora: LoraPlan | None = None,
) -> tuple[Program, WeightsFile]:
    graph = parse(model) if isinstance(model, str) else model
    weights = WeightsFile(graph)
    program = lower(
        graph,
        weights,
        find_target("x86-64-v3"),
        int8=int8,
        kv=kv or plan(planned()),
        read_floats=lambda name: np.ones(8, np.float32),
        find_knobs=find_knobs,
        lora=lora,
    )
    return program, weights


def listing(program: Program) -> list[str]:
    """Each call's kernel, up to its format or to the first number in its name, and what it works on."""
    kind = re.compile(r"[a-z_]+_(q\d_[0-9k]|bf16)(?=_)|[a-z_]+(?=_\d)")
    found = [(kind.match(call.kernel.name), call.amount) for call in program.calls]
    return [f"{name[0] if name else None}: {amount}" for name, amount in found]


def test_int8_layer_rounds_where_rows_are_made_anyway() -> None:
    program, _ = lowered(paged_layer())
    assert listing(program) == [
        "embed_q8_0: tokens",
        "mul_rmsnorm_round: tokens",
        "matmul_q4_k: tokens",
        "rmsnorm_rmsnorm: tokens",
        "angles: tokens",
        "rotate_and_write: tokens",
        "attention: tokens",
        "round: tokens",
        "matmul_q5_0: tokens",
        "add: tokens",
        "select: rows",
        "round: rows",
        "matmul_q5_k: rows",
        "glu: rows",
        "matmul_exact_bf16: rows",
        "round: rows",
        "matmul_q8_0: rows",
        "summarise: rows",
    ]


def test_codebooks_are_multiplied_with_what_was_not_rounded() -> None:
    """A codebook's values are no integers: x is stored in f32 for it, and in int8 for its neighbour."""
    weights = "weight @a: nf4[64, 64]\nweight @b: int4[64, 64]\n"
    nodes = "%z = Square(%x)\n%ay = DequantMatMul(%z, @a)\n%by = DequantMatMul(%z, @b)\n%y = Add(%ay, %by)\n"
    program, _ = lowered(MODEL + weights + nodes + LOGITS)
    square, codebook, integers = program.calls[1:4]
    assert [call.kernel.name.split("_64x64")[0] for call in (square, codebook, integers)] == [
        "square_round_0",
        "matmul_exact_nf4",
        "matmul_int4",
    ]
    assert list(square.arguments[1:3]) == [codebook.arguments[1], integers.arguments[1]]


def test_float32_layer_rounds_nothing() -> None:
    program, _ = lowered(paged_layer(), int8=False)
    assert listing(program) == [
        "embed_q8_0: tokens",
        "mul_rmsnorm: tokens",
        "matmul_exact_q4_k: tokens",
        "rmsnorm_rmsnorm: tokens",
        "angles: tokens",
        "rotate_and_write: tokens",
        "attention: tokens",
        "matmul_exact_q5_0: tokens",
        "add: tokens",
        "select: rows",
        "matmul_exact_q5_k: rows",
        "glu: rows",
        "matmul_exact_bf16: rows",
        "matmul_exact_q8_0: rows",
        "summarise: rows",
    ]


def test_parts_of_a_row_are_read_where_they_are() -> None:
    """q, k and v are 64, 32 and 32 numbers of the product's rows: nothing copies them."""
    program, _ = lowered(paged_layer())
    product, norms, _, write = program.calls[2:6]
    rows = product.arguments[2]
    assert isinstance(rows, InWorkspace)
    assert norms.arguments[0] == rows
    assert norms.arguments[2] == InWorkspace(rows.buffer, 4 * 64)
    assert write.arguments[2] == InWorkspace(rows.buffer, 4 * 96)


def test_tied_table_is_read_by_lookup_and_logits() -> None:
    program, weights = lowered(paged_layer())
    table = InWeights(weights.stored["table"].offset)
    assert program.calls[0].arguments[0] == program.calls[-2].arguments[0] == table
    assert program.calls[-2].bytes_read == weights.stored["table"].nbytes
    assert program.calls[-2].multiplications == 96 * 256


def test_every_call_gives_its_kernel_what_it_takes() -> None:
    for int8 in (True, False):
        program, _ = lowered(paged_layer(), int8=int8)
        assert [len(call.arguments) - len(call.kernel.params) for call in program.calls] == [0] * len(
            program.calls
        )
        used = {a.buffer for call in program.calls for a in call.arguments if isinstance(a, InWorkspace)}
        assert used == set(range(len(program.buffers)))


MODEL = """
graph small
input %input_ids: i64[batch, seq]
input %logit_rows: i64[rows]
weight @table: q4_0[96, 64]
%x = Embed(%input_ids, @table)
"""
LOGITS = "%last = SelectRows(%y, %logit_rows)\n%logits = DequantMatMul(%last, @table)\noutput %logits"


def test_row_that_two_products_read_in_one_form_is_rounded_once() -> None:
    weights = "weight @a: q4_0[64, 64]\nweight @b: q4_0[64, 64]\nweight @c: q5_1[64, 64]\n"
    products = "".join(f"%{name}y = DequantMatMul(%z, @{name})\n" for name in "abc")
    sums = "%ab = Add(%ay, %by)\n%y = Add(%ab, %cy)\n"
    program, _ = lowered(MODEL + weights + "%z = Square(%x)\n" + products + sums + LOGITS)
    square = program.calls[1]
    assert square.kernel.name.startswith("square_round")
    read = [call.arguments[1] for call in program.calls[2:5]]
    # Nobody reads the square itself. Q4_0 and Q5_1 have other centres, and Q5_1 reads sums too.
    assert list(square.arguments[1:3]) == [read[0], read[2]]
    assert read[0] == read[1] != read[2]


def test_equal_row_programs_share_a_kernel() -> None:
    chain = "%a = Square(%x)\n%b = MatMul(%a, @w)\n%c = Square(%b)\n%d = MatMul(%c, @w)\n%y = Sqrt(%d)\n"
    program, _ = lowered(MODEL + "weight @w: f32[64, 64]\n" + chain + LOGITS)
    squares = [call.kernel for call in program.calls if call.kernel.name.startswith("square")]
    assert len(squares) == 2
    assert squares[0] is squares[1]


def test_rows_of_other_tokens_are_another_kernel_s() -> None:
    """Row-wise ops before and after the choice of rows work on different numbers of rows."""
    before_and_after = "%s = Square(%x)\n%y = SelectRows(%s, %logit_rows)\n%z = Sqrt(%y)\n"
    program, _ = lowered(MODEL + before_and_after + "%logits = DequantMatMul(%z, @table)\noutput %logits")
    assert listing(program)[1:4] == ["square: tokens", "select: rows", "sqrt_round: rows"]


def test_known_knobs_are_used() -> None:
    problems = []

    def find(problem: Any) -> dict[str, int]:
        problems.append(problem.name)
        return dict(problem.space[-1])

    text = MODEL + "weight @w: q8_0[64, 64]\n%y = DequantMatMul(%x, @w)\n" + LOGITS
    tuned, default = lowered(text, find_knobs=find)[0], lowered(text)[0]
    assert [name.split(",")[0] for name in problems] == [
        *("matmul_q8_0_64x64_64", "matmul_q8_0_64x64_64"),  # for many tokens, and for one
        "matmul_q4_0_96x64_96",
    ]
    assert [call.kernel.name for call in tuned.calls] == [call.kernel.name for call in default.calls]
    products = [next(k for k in program.kernels if "matmul_q8_0" in k.name) for program in (tuned, default)]
    code = [str(product.function(private=False)) for product in products]
    assert code[0] != code[1]


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        (
            "%p = Positions(%input_ids, %past)\n%y = Rope(%x, %p; heads=1, spec=RopeSpec(theta=10.0, dim=64))\n",
            "Rope",
        ),
        ("weight @n: f32[64]\n%y, %s = AddRmsNorm(%x, %x, @n; eps=1e-06)\n", "AddRmsNorm"),
    ],
)
def test_op_without_a_kernel_is_refused(nodes: str, problem: str) -> None:
    text = MODEL.replace("weight", "input %past: i32[]\nweight") + nodes + LOGITS
    with pytest.raises(UnsupportedError, match=f"the tvm backend has no kernel for {problem}$"):
        lowered(text)


@pytest.mark.parametrize(
    ("nodes", "made"),
    [
        ("%l = DequantMatMul(%x, @table)\n%logits = Silu(%l)\noutput %logits", "by Silu"),
        ("%y = Silu(%x)\noutput %y", "by nothing"),
        ("%logits = SoftCap(%x; cap=1.0)\noutput %logits", "by SoftCap"),
        (
            "%l = DequantMatMul(%x, @table)\n%logits = SoftCap(%l; cap=1.0)\noutput %logits\noutput %l",
            "by SoftCap",
        ),
        (
            "%l = DequantMatMul(%x, @table)\n%a = SoftCap(%l; cap=1.0)\n%logits = Add(%l, %a)\noutput %logits",
            "by Add",
        ),
    ],
)
def test_logits_that_no_product_makes_are_refused(nodes: str, made: str) -> None:
    with pytest.raises(UnsupportedError, match=f"here they are made {made}"):
        lowered(MODEL + nodes)


@pytest.mark.parametrize("int8", [True, False])
def test_a_cap_on_logits_costs_no_call(int8: bool) -> None:
    plain, _ = lowered(MODEL + "%y = Silu(%x)\n" + LOGITS, int8=int8)
    text = LOGITS.replace("%logits =", "%l =").replace("output", "%logits = SoftCap(%l; cap=30.0)\noutput")
    capped, _ = lowered(MODEL + "%y = Silu(%x)\n" + text, int8=int8)
    assert listing(capped) == listing(plain)
    assert [call.arguments for call in capped.calls] == [call.arguments for call in plain.calls]
    product, other = capped.calls[-2].kernel, plain.calls[-2].kernel
    assert product.name.startswith(f"{other.name}_cap_")
    assert [entry.parameters.get("cap") for entry in capped.entries] == [30.0]


MIXTURE = """
weight @router: f32[3, 64]
weight @gate: q4_0[3, 96, 64]
weight @up: q4_0[3, 96, 64]
weight @down: bf16[3, 64, 96]
weight @bias: f32[3, 64]
%a = Silu(%x)
%scores = MatMul(%a, @router)
%chosen, %weights = Route(%scores; used=2)
%g = ExpertMatMul(%a, @gate, %chosen)
%u = ExpertMatMul(%a, @up, %chosen)
%h = ClampedSwiglu(%g, %u; alpha=1.7, limit=7.0)
%d = ExpertMatMul(%h, @down, %chosen, @bias)
%mixed = MixExperts(%d, %weights)
%y = Add(%mixed, %x)
"""


def test_experts_share_what_is_chosen_and_what_is_rounded() -> None:
    program, weights = lowered(MODEL + MIXTURE + LOGITS)
    names = [call.kernel.name for call in program.calls]
    assert [re.sub(r"_\d.*", "", name) for name in names] == [
        "embed_q4",
        "silu_round",
        "matmul_exact_f32",
        "route",
        "expert_matmul_q4",
        "expert_matmul_q4",
        "clampedswiglu",
        "expert_matmul_exact_bf16",
        "mixexperts_add",
        "select",
        "round",
        "matmul_q4",
        "summarise",
    ]
    silu, route, gate, up, gated, down, mix = (program.calls[i] for i in (1, 3, 4, 5, 6, 7, 8))
    assert gate.kernel is up.kernel
    assert gate.arguments[1] == up.arguments[1] == silu.arguments[2]
    groups = route.arguments[3]
    assert [call.arguments[2] for call in (gate, up, down)] == [groups] * 3
    assert down.arguments[3] == InWeights(weights.stored["bias"].offset)
    # One row for each slot between the experts' products, one for each token everywhere else.
    assert gated.arguments[-1] == Times("tokens", 2)
    assert {call.arguments[-1] for call in (silu, route, gate, down, mix)} == {"tokens"}
    assert isinstance(groups, InWorkspace)
    assert program.buffers[groups.buffer] == 4 * (Groups(3).order + 2 * TOKENS)
    assert (gate.bytes_read * 3, gate.multiplications) == (2 * weights.stored["gate"].nbytes, 2 * 96 * 64)


def test_experts_of_wanted_rows_only_are_grouped_by_themselves() -> None:
    text = MIXTURE.replace("%x", "%r")
    program, _ = lowered(
        MODEL
        + "%r = SelectRows(%x, %logit_rows)\n"
        + text
        + "%logits = DequantMatMul(%y, @table)\noutput %logits"
    )
    assert {call.amount for call in program.calls[1:]} == {"rows"}
    assert Times("rows", 2) in [call.arguments[-1] for call in program.calls]


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        (
            "input %given: i64[batch, seq, 2]\nweight @w: q4_0[3, 64, 64]\n%d = ExpertMatMul(%x, @w, %given)\n"
            "weight @v: f32[2, 64]\n%p = MatMul(%x, @v)\n%y = MixExperts(%d, %p)\n",
            "%given is not chosen among the 3 experts of @w",
        ),
        (
            "weight @w: q4_0[64, 64, 64]\nweight @v: f32[2, 64]\n%c, %p = Route(%x; used=2)\n"
            "%d = ExpertMatMul(%x, @w, %c)\n%e = Mul(%d, @v)\n%y = MixExperts(%e, %p)\n",
            "v has other rows than the tvm backend reads it with",
        ),
    ],
)
def test_experts_that_are_used_in_another_way_are_refused(nodes: str, problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        lowered(MODEL + nodes + LOGITS)


SIDE_PATHS = ("qkv", "o", "gate_up", "down", "table", "output.weight")


def test_side_paths_read_what_the_plan_says() -> None:
    graph, plan = split_graph(parse(paged_layer()), SIDE_PATHS, DType.F16)
    program, _ = lowered(graph, lora=plan)
    names = [call.kernel.name for call in program.calls]
    downs = [call for call in program.calls if call.kernel.name.startswith("lora_down")]
    ups = [call for call in program.calls if "_lora_f" in call.kernel.name]
    assert sum(name.startswith("lora_embed") for name in names) == 1
    assert len(downs) == len(ups) == 5
    tensors = [part.tensor for part in plan.parts]
    for down, up, tensor in zip(downs, ups, ("qkv", "o", "gate_up", "down", "output.weight")):
        index = tensors.index(tensor)
        place = plan.unit[index]
        assert list(down.arguments[1:3]) == [InUnit(index), InUnit(place.down)]
        # After the weight, x, the result and the number of tokens; u is what the narrow side wrote.
        assert list(up.arguments[4:6]) == [InUnit(index), InUnit(place.up)]
        assert up.arguments[8] == down.arguments[6]
        assert (down.amount, down.arguments[-1]) == (up.amount, up.arguments[-1])
    assert [down.arguments[-1] for down in downs] == ["step", "step", *["rows_per_sequence"] * 3]


def test_side_paths_leave_other_calls_as_they_are() -> None:
    graph, plan = split_graph(parse(paged_layer()), ["o"], DType.F16)
    program, base = lowered(graph, lora=plan)[0], lowered(paged_layer())[0]
    kernels = [call.kernel.name for call in program.calls if "lora" not in call.kernel.name]
    expected = [call.kernel.name for call in base.calls]
    expected.remove("matmul_q5_0_256x64_256")
    assert kernels == expected
    assert [entry.key for entry in program.entries] == [entry.key for entry in base.entries]


def test_adapters_without_a_plan_are_refused() -> None:
    graph, _ = split_graph(parse(paged_layer()), ["o"])
    with pytest.raises(GraphError, match="there is no plan where they lie"):
        lowered(graph)


def test_attention_reads_what_it_was_given_and_where_the_plan_says() -> None:
    program, _ = lowered(paged_layer())
    write, attend = program.calls[5:7]
    pages = write.arguments[5:9]
    assert pages == attend.arguments[1:5] == ("tables", InTable(0), InPage(0), InPage(2 * 64 * 16 * 2))
    assert write.arguments[9] == attend.arguments[0]


TWO_LAYERS = """
graph two_layers
input %input_ids: i64[batch, seq]
input %logit_rows: i64[rows]
{inputs}
input %past_length: i32[]
input %block_table.0: i32[batch, 2]
input %block_table.1: i32[batch, 2]
weight @table: q8_0[96, 32]
%x = Embed(%input_ids, @table)
%a, %k0, %v0 = GroupQueryAttention(%x, %x, %x, %c0, %c1, %past_length, %block_table.0; {first})
%b, %k1, %v1 = GroupQueryAttention(%a, %a, %a, %c2, %c3, %past_length, %block_table.1; {second})
%last = SelectRows(%b, %logit_rows)
%logits = DequantMatMul(%last, @table)
output %logits
"""


def two_layers(dtype: str = "f16", layout: str = "paged") -> str:
    inputs = "\n".join(f"input %c{i}: {dtype}[pages, 2, 64, 16]" for i in range(4))
    rope = "rope=RopeSpec(theta=10000.0, dim=16)"
    first = f"heads=2, scale=0.25, layout='{layout}', {rope}"
    second = f"heads=2, scale=0.25, layout='{layout}', window=20, {rope}"
    return TWO_LAYERS.format(inputs=inputs, first=first, second=second)


WINDOWED = planned(1, window=20, capacity=128, table=1)


def test_each_layer_has_the_pages_of_its_own_table_and_int8_has_scales() -> None:
    layers = [replace(layer, dtype=DType.INT8) for layer in (planned(), WINDOWED)]
    program, _ = lowered(two_layers("int8"), kv=plan(*layers))
    first, second = (call for call in program.calls if call.kernel.name.startswith("attention"))
    size = 2 * 64 * 16
    places = [InPage(offset) for offset in (0, size, 2 * size, 2 * size + 4 * 2 * 64)]
    assert list(first.arguments[1:7]) == ["tables", InTable(0), *places]
    assert list(second.arguments[1:7]) == ["tables", InTable(2 * 8), *places]
    assert "_20_" in second.kernel.name and "_all_" in first.kernel.name


def test_layers_of_one_table_lie_one_after_the_other_in_its_pages() -> None:
    text = two_layers().replace("window=20, ", "").replace("%block_table.1;", "%block_table.0;")
    program, _ = lowered(text, kv=plan(planned(), planned(1)))
    first, second = (call for call in program.calls if call.kernel.name.startswith("attention"))
    size = 2 * 2 * 64 * 16
    assert first.arguments[3:5] == (InPage(0), InPage(size))
    assert second.arguments[2:5] == (InTable(0), InPage(2 * size), InPage(3 * size))
    assert first.kernel is second.kernel


def test_attention_is_tuned_for_the_pages_that_the_plan_has() -> None:
    program, _ = lowered(
        two_layers("bf16"), kv=plan(planned(dtype=DType.BF16), replace(WINDOWED, dtype=DType.BF16))
    )
    problems = [
        entry.problem(find_target("x86-64-v3")) for entry in program.entries if entry.family == "attention"
    ]
    assert [problem.name for problem in problems] == [
        "attention 2x16 over 2, bfloat16 pages of 64, window None, 100 positions, 16 tokens",
        "attention 2x16 over 2, bfloat16 pages of 64, window None, 100 positions, 1 token",
        "attention 2x16 over 2, bfloat16 pages of 64, window 20, 20 positions, 16 tokens",
        "attention 2x16 over 2, bfloat16 pages of 64, window 20, 20 positions, 1 token",
    ]


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (planned(layout="linear", table=None), "layer 0 has a cache whose layout is linear, not pages"),
        (
            planned(layout="ring", window=20, table=None),
            "layer 0 has a cache whose layout is ring, not pages",
        ),
        (replace(WINDOWED, shares=0), "layer 1 reads the cache of layer 0"),
        (replace(planned(), dtype=DType.I32), "layer 0 has a cache of i32"),
    ],
)
def test_cache_that_kernels_do_not_know_is_refused(layer: KvLayer, problem: str) -> None:
    with pytest.raises(UnsupportedError, match=f"the tvm backend has no kernel for it: {problem}$"):
        lowered(paged_layer(), kv=plan(layer))


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ((), "attention 1, the plan of its cache has no such layer"),
        ((replace(WINDOWED, window=21),), "window 20; its plan says paged, .* window 21"),
        ((replace(WINDOWED, heads=4),), r"its plan says paged, f16\[pages, 4, 64, 16\]"),
        ((replace(WINDOWED, dtype=DType.F32),), r"attention 1 has a paged cache f16\[pages, 2, 64, 16\]"),
    ],
)
def test_plan_of_another_graph_is_refused(second: tuple[KvLayer, ...], problem: str) -> None:
    with pytest.raises(GraphError, match=problem):
        lowered(two_layers(), kv=plan(planned(), *second))


def test_rope_tables_of_the_same_kind_are_made_once() -> None:
    program, weights = lowered(two_layers(), kv=plan(planned(), WINDOWED))
    assert listing(program).count("angles: tokens") == 1
    assert listing(program).count("attention: tokens") == 2
    assert list(weights.constants) == ["rope.0.frequencies"]
