"""Each choice that there is, made by a table of costs that is made up for it; and what real targets are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from rlxc.dtypes import DType
from rlxc.ir import WeightLayout, parse, show
from rlxc.ir.target import LayoutCost, Machine, TargetFeatures
from rlxc.passes import ChooseWeightLayout, WeightChanges, default_passes, run_passes

GRAPH = """
    graph one
    input %x: f32[batch, seq, 256]
    weight @w: q3_k[1024, 256]
    %y = DequantMatMul(%x, @w)
    output %y
    """

NARROW, WIDE = WeightLayout(3, 32, 16), WeightLayout(4, 32, 16)
SMALL = WeightLayout(3, 32, 8)
COARSE = WeightLayout(3, 256, 16)


def machine(
    costs: Sequence[LayoutCost], *, threads: int = 8, bandwidth: float = 40.0, name: str = "made-up"
) -> Machine:
    return Machine(name, threads, bandwidth, {DType.Q3_K: tuple(costs)})


def cost(layout: WeightLayout, decode: float = 1.0, prompt: float = 1.0, **more: float) -> LayoutCost:
    return LayoutCost(layout, more.pop("bits", layout.bits + 0.5), decode, prompt, **more)


def choose(*machines: Machine, text: str = GRAPH) -> tuple[WeightLayout | None, str]:
    """The layout of @w, and the pass's first note."""
    result = ChooseWeightLayout(TargetFeatures(machines=machines)).run(parse(text))
    return result.graph.weight["w"].layout, result.notes[0] if result.notes else ""


def test_text_before_and_after(becomes: Callable[..., Any]) -> None:
    costs = [cost(NARROW, decode=100), cost(WIDE, decode=10)]
    one = ChooseWeightLayout(TargetFeatures(machines=(machine(costs, bandwidth=1000),)))
    after = GRAPH.replace("q3_k[1024, 256]", "q3_k[1024, 256] layout(4, 32, 16)")
    becomes(one, GRAPH, after)
    result = one.run(parse(after))
    assert not result.modified and show(result.graph) == show(parse(after))


def test_vectors_floats_and_formats_without_layouts_are_left_alone(stays: Callable[..., None]) -> None:
    text = """
        graph others
        input %x: f32[batch, seq, 256]
        weight @n: f32[256]
        weight @f: f16[64, 256]
        weight @w: q8_0[64, 256]
        %h = RmsNorm(%x, @n; eps=1e-06)
        %a = MatMul(%h, @f)
        %b = DequantMatMul(%h, @w)
        output %a
        output %b
        """
    stays(ChooseWeightLayout(TargetFeatures(machines=(machine([cost(NARROW)]),))), text)
    stays(ChooseWeightLayout(TargetFeatures()), GRAPH)


def test_only_layout_needs_no_reason() -> None:
    assert choose(machine([cost(NARROW)])) == (
        NARROW,
        "q3_k in 3 bits, blocks of 32, tiles of 16: all that the target can run (@w)",
    )


def test_narrow_codes_win_where_reading_takes_longer() -> None:
    layout, why = choose(machine([cost(WIDE, decode=1), cost(NARROW, decode=2)], bandwidth=4))
    assert layout == NARROW
    assert "0.78 of the time of 4 bits, blocks of 32, tiles of 16 on made-up: fewer bytes to read" in why


def test_wide_codes_win_where_unpacking_takes_longer() -> None:
    layout, why = choose(machine([cost(NARROW, decode=40), cost(WIDE, decode=20)], bandwidth=1000))
    assert layout == WIDE
    assert "less work while decoding" in why


def test_wide_codes_must_save_more_than_the_model_is_wrong_by() -> None:
    layout, why = choose(machine([cost(NARROW, decode=21), cost(WIDE, decode=20)], bandwidth=1000))
    assert layout == NARROW
    assert "4 bits, blocks of 32, tiles of 16 would save less than 10% of the time" in why


def test_prompts_decide_where_decoding_does_not() -> None:
    layout, why = choose(machine([cost(NARROW, prompt=9), cost(WIDE, prompt=1)]))
    assert layout == WIDE
    assert "less work in prompts" in why


def test_logits_are_made_once_in_a_prompt() -> None:
    rows = "%x: f32[batch, rows, 256]"
    costs = [cost(NARROW, prompt=9), cost(WIDE, prompt=1)]
    layout, why = choose(machine(costs), text=GRAPH.replace("%x: f32[batch, seq, 256]", rows))
    assert layout == NARROW
    assert "fewer bytes to read while decoding" in why


def test_small_tiles_win_where_threads_would_be_idle() -> None:
    costs = [cost(NARROW), cost(SMALL, decode=1.1, prompt=1.1)]
    assert choose(machine(costs))[0] == NARROW
    layout, why = choose(machine(costs), text=GRAPH.replace("1024", "64"))
    assert layout == SMALL
    assert "fewer idle threads" in why


def test_experts_that_a_token_uses_keep_threads_busy_together() -> None:
    text = """
        graph experts
        input %x: f32[batch, seq, 256]
        weight @r: f32[4, 256]
        weight @w: q3_k[4, 64, 256]
        %s = MatMul(%x, @r)
        %c, %p = Route(%s; used=2)
        %y = ExpertMatMul(%x, @w, %c)
        output %y
        """
    costs = [cost(NARROW), cost(SMALL, decode=1.1, prompt=1.1)]
    # Four tiles of 16 rows for each of two experts: eight tasks.
    assert choose(machine(costs), text=text)[0] == NARROW
    assert choose(machine(costs, threads=16), text=text)[0] == SMALL


def test_tile_that_reads_at_full_bandwidth_wins() -> None:
    costs = [cost(NARROW, bandwidth=0.5), cost(SMALL)]
    layout, why = choose(machine(costs, bandwidth=10))
    assert layout == SMALL
    assert "fewer bytes to read" in why


def test_table_that_is_only_looked_up_gets_the_fewest_bits() -> None:
    text = """
        graph table
        input %ids: i64[batch, seq]
        weight @w: q3_k[1024, 256]
        %y = Embed(%ids, @w)
        output %y
        """
    layout, why = choose(machine([cost(WIDE), cost(NARROW, decode=99)], bandwidth=1000), text=text)
    assert layout == NARROW
    assert why == "q3_k in 3 bits, blocks of 32, tiles of 16: only looked up, so the fewest bits (@w)"


def test_tied_table_is_chosen_for_the_product() -> None:
    text = """
        graph tied
        input %ids: i64[batch, seq]
        weight @w: q3_k[256, 256]
        %x = Embed(%ids, @w)
        %y = DequantMatMul(%x, @w)
        output %y
        """
    assert choose(machine([cost(NARROW, decode=99), cost(WIDE)], bandwidth=1000), text=text)[0] == WIDE


def test_blocks_that_round_activations_too_coarsely_are_left_out() -> None:
    costs = [cost(COARSE, decode=1, rounding=0.009), cost(WIDE, decode=40, rounding=0.006)]
    layout, why = choose(machine(costs, bandwidth=1000))
    assert layout == WIDE
    assert "3 bits, blocks of 256, tiles of 16 would round activations by 0.90%, more than 0.70%" in why
    coarser = [replace(one, rounding=one.rounding + 0.01) for one in costs]
    assert choose(machine(coarser, bandwidth=1000))[0] == WIDE


def test_blocks_that_are_no_part_of_a_row_are_left_out() -> None:
    costs = [cost(COARSE, decode=1), cost(WIDE, decode=40)]
    text = GRAPH.replace("256", "128")
    assert choose(machine(costs, bandwidth=1000))[0] == COARSE
    assert choose(machine(costs, bandwidth=1000), text=text)[0] == WIDE


def test_several_machines_get_what_the_worst_off_minds_least() -> None:
    """Alone, each would choose otherwise."""
    middle = WeightLayout(5, 32, 16)
    one = machine([cost(NARROW, 10), cost(WIDE, 30), cost(middle, 14)], bandwidth=1000, name="one")
    two = machine([cost(NARROW, 60), cost(WIDE, 10), cost(middle, 18)], bandwidth=1000, name="two")
    assert choose(one)[0] == NARROW
    assert choose(two)[0] == WIDE
    assert choose(one, two)[0] == middle


def test_several_machines_get_what_all_can_run() -> None:
    one = machine([cost(NARROW, 10), cost(SMALL, 1)], bandwidth=1000)
    two = machine([cost(NARROW, 10)], bandwidth=1000)
    assert choose(one)[0] == SMALL
    assert choose(one, two)[0] == NARROW
    assert choose(machine([cost(SMALL)]), two)[0] is None


def test_trace_says_why_once_for_all_that_are_alike() -> None:
    text = GRAPH.replace(
        "    %y =", "    weight @v: q3_k[1024, 256]\n    %z = DequantMatMul(%x, @v)\n    %y ="
    )
    features = TargetFeatures(machines=(machine([cost(NARROW)]),))
    lines: list[str] = []
    run_passes(parse(text), [ChooseWeightLayout(features)], trace=lines.append)
    assert lines == [
        "choose_weight_layout: 2 -> 2 nodes\n"
        "  q3_k in 3 bits, blocks of 32, tiles of 16: all that the target can run (@w and 1 more)"
    ]


def test_layouts_are_chosen_last(features: TargetFeatures) -> None:
    """Of weights as they will be stored: stacked, folded, and without those that nobody reads."""
    passes = default_passes(
        features, context=64, max_step=16, rollback=0, cache_dtype=None, changes=WeightChanges()
    )
    assert passes[-1].name == "choose_weight_layout"


# --- real targets -------------------------------------------------------------------------------------------------


def of_tvm(target: str, dtype: DType, activations: str = "int8") -> WeightLayout | None:
    pytest.importorskip("tvm")
    from rlxc.backends.tvm import TvmBackend

    features = TvmBackend().features_for(target, activations)
    graph = parse(GRAPH.replace("q3_k", dtype.value))
    return ChooseWeightLayout(features).run(graph).graph.weight["w"].layout


@pytest.mark.parametrize(
    ("target", "dtype", "bits", "tile"),
    [
        *(("x86-64-v4-vnni", DType.IQ2_XS, 3, 16), ("x86-64-v4-vnni", DType.Q6_K, 6, 16)),
        *(("x86-64-v3", DType.Q4_0, 4, 8), ("x86-64-v3-vnni", DType.Q8_0, 8, 8)),
        # No instruction looks codes up: the numbers themselves are stored.
        *(("x86-64", DType.IQ2_XS, 8, 16), ("x86-64", DType.MXFP4, 8, 16), ("x86-64", DType.Q4_0, 4, 16)),
        # One file for both.
        *(("x86-64-v3,x86-64-v4", DType.Q4_0, 4, 16), ("x86-64,x86-64-v4-vnni", DType.IQ2_XS, 3, 16)),
    ],
)
def test_targets_of_tvm(target: str, dtype: DType, bits: int, tile: int) -> None:
    assert of_tvm(target, dtype) == WeightLayout(bits, 32, tile)


@pytest.mark.parametrize(
    ("dtype", "activations", "bits", "block"),
    [
        *((DType.TQ2_0, "int8", 2, 128), (DType.TQ2_0, "float32", 4, 256), (DType.Q1_0, "int8", 2, 128)),
        *((DType.Q4_0, "int8", 4, 32), (DType.Q2_K, "int8", 4, 16), (DType.INT4, "int8", 4, 64)),
    ],
)
def test_onnx_runtime(dtype: DType, activations: str, bits: int, block: int) -> None:
    from rlxc.backends.onnx.layout_costs import machine as onnx_machine
    from rlxc.backends.onnx.runtime import CURRENT

    one = onnx_machine(CURRENT, int8=activations == "int8")
    graph = parse(GRAPH.replace("q3_k", dtype.value))
    result = ChooseWeightLayout(TargetFeatures(machines=(one,))).run(graph)
    assert result.graph.weight["w"].layout == WeightLayout(bits, block, 1)
