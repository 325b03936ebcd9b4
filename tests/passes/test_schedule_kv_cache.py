"""Caches that grow become buffers that are written in place, and a plan."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.artifact import KvLayer, KvPlan
from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import Graph, parse
from rlxc.ir.target import TargetFeatures
from rlxc.passes.schedule_kv_cache import ScheduleKvCache

HEAD = """
graph cached
input %input_ids: i64[batch, seq]
input %past_key_values.0.key: f32[batch, 1, {0}, 4]
input %past_key_values.0.value: f32[batch, 1, {0}, 4]
input %past_key_values.1.key: f32[batch, 1, {1}, 4]
input %past_key_values.1.value: f32[batch, 1, {1}, 4]
{2}
weight @table: f32[16, 8]
weight @wk: f32[4, 8]
%x = Embed(%input_ids, @table)
%k = MatMul(%x, @wk)
"""

ROPE = "RopeSpec(theta=100.0, dim=4)"

BEFORE = (
    HEAD.format("past", "past", "")
    + f"""
%p0 = Positions(%input_ids, %past_key_values.0.key)
%q0 = Rope(%x, %p0; heads=2, spec={ROPE})
%k0 = Rope(%k, %p0; heads=1, spec={ROPE})
%present.0.key = KvAppend(%past_key_values.0.key, %k0)
%present.0.value = KvAppend(%past_key_values.0.value, %k)
%a0 = Attention(%q0, %present.0.key, %present.0.value; heads=2, scale=0.5, window=3)
%p1 = Positions(%input_ids, %past_key_values.1.key)
%q1 = Rope(%a0, %p1; heads=2, spec={ROPE})
%k1 = Rope(%k, %p1; heads=1, spec={ROPE})
%present.1.key = KvAppend(%past_key_values.1.key, %k1)
%present.1.value = KvAppend(%past_key_values.1.value, %k)
%logits = Attention(%q1, %present.1.key, %present.1.value; heads=2, scale=0.5)
output %logits
output %present.0.key
output %present.0.value
output %present.1.key
output %present.1.value
"""
)

# A window of 3 in a context of 20, with steps of 4 at most: a ring of 7.
AFTER = (
    HEAD.format(7, 20, "input %past_length: i32[]")
    + f"""
%p0 = Positions(%input_ids, %past_length)
%q0 = Rope(%x, %p0; heads=2, spec={ROPE})
%k0 = Rope(%k, %p0; heads=1, spec={ROPE})
%present.0.key = KvWrite(%past_key_values.0.key, %k0, %past_length; layout='ring')
%present.0.key.visible = KvRead(%present.0.key, %k0, %past_length; layout='ring', window=3)
%present.0.value = KvWrite(%past_key_values.0.value, %k, %past_length; layout='ring')
%present.0.value.visible = KvRead(%present.0.value, %k, %past_length; layout='ring', window=3)
%a0 = Attention(%q0, %present.0.key.visible, %present.0.value.visible; heads=2, scale=0.5, window=3)
%q1 = Rope(%a0, %p0; heads=2, spec={ROPE})
%k1 = Rope(%k, %p0; heads=1, spec={ROPE})
%present.1.key = KvWrite(%past_key_values.1.key, %k1, %past_length; layout='linear')
%present.1.key.visible = KvRead(%present.1.key, %k1, %past_length; layout='linear')
%present.1.value = KvWrite(%past_key_values.1.value, %k, %past_length; layout='linear')
%present.1.value.visible = KvRead(%present.1.value, %k, %past_length; layout='linear')
%logits = Attention(%q1, %present.1.key.visible, %present.1.value.visible; heads=2, scale=0.5)
output %logits
output %present.0.key
output %present.0.value
output %present.1.key
output %present.1.value
"""
)

STEPS = [(3, 1, 1, 2, 1, 4, 1, 1, 1, 4, 1), (1,) * 20, (4,) * 5, (2, 3, 4, 1, 3, 4, 3)]
"""Sizes of steps that fill a context of 20, over the end of the ring of 7 and around it."""


def schedule(context: int = 20, max_step: int = 4, ring: bool = True) -> ScheduleKvCache:
    return ScheduleKvCache(TargetFeatures(ring_cache=ring), context=context, max_step=max_step)


def without_rope(text: str) -> str:
    for i in (0, 1):
        text = text.replace(f"%k{i})", "%k)")
    lines = [line for line in text.splitlines() if "Rope(" not in line and "Positions(" not in line]
    return "\n".join(lines).replace("(%q0,", "(%x,").replace("(%q1,", "(%a0,")


def test_growing_caches_become_buffers(becomes: Any) -> None:
    becomes(schedule(), BEFORE, AFTER)


def test_second_run_changes_nothing(is_done_in_one_run: Any) -> None:
    is_done_in_one_run(schedule(), BEFORE)


@pytest.mark.parametrize("sizes", STEPS, ids=str)
@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("text", [BEFORE, without_rope(BEFORE)], ids=["rope", "no rope"])
def test_steps_equal_one_pass(
    text: str, ring: bool, sizes: tuple[int, ...], same_logits_in_steps: Any
) -> None:
    graph = parse(text)
    same_logits_in_steps(graph, schedule(ring=ring).run(graph).graph, sizes)


def test_positions_are_computed_once() -> None:
    graph = schedule().run(parse(BEFORE)).graph
    assert [node.outputs for node in graph.nodes if node.op.name == "Positions"] == [("p0",)]


def test_positions_that_are_an_output_keep_their_name() -> None:
    graph = schedule().run(parse(BEFORE + "output %p1")).graph
    assert graph.producer["p1"].inputs == ("input_ids", "past_length")


def test_positions_of_other_ids_are_computed_apart() -> None:
    other = "input %others: i64[batch, seq]\n" + BEFORE.replace(
        "%p1 = Positions(%input_ids", "%p1 = Positions(%others"
    )
    graph = schedule().run(parse(other)).graph
    assert [node.inputs[0] for node in graph.nodes if node.op.name == "Positions"] == ["input_ids", "others"]


def test_plan_says_what_the_runtime_needs() -> None:
    plan = schedule().run(parse(BEFORE)).facts["kv_cache"]
    shared = {"heads": 1, "head_dim": 4, "dtype": "f32", "bytes_per_token": 32}
    assert plan == {
        "context": 20,
        "max_step": 4,
        "bytes_per_token": 64,
        "layers": [
            {"index": 0, "layout": "ring", "capacity": 7, "window": 3, **shared},
            {"index": 1, "layout": "linear", "capacity": 20, "window": None, **shared},
        ],
    }


def test_plan_is_one_that_artifacts_hold() -> None:
    facts = schedule().run(parse(BEFORE)).facts["kv_cache"]
    layers = tuple(KvLayer(**{**layer, "dtype": DType(layer["dtype"])}) for layer in facts["layers"])
    assert KvPlan(**{**facts, "layers": layers}).layers[0].capacity == 7


def layouts(graph: Graph, **options: Any) -> list[tuple[str, int, int | None]]:
    plan = schedule(**options).run(graph).facts["kv_cache"]
    return [(layer["layout"], layer["capacity"], layer["window"]) for layer in plan["layers"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"context": 8}, ("ring", 7, 3)),
        ({"context": 7}, ("linear", 7, 3)),
        ({"context": 2, "max_step": 2}, ("linear", 2, 3)),
        ({"max_step": 1}, ("ring", 4, 3)),
        ({"ring": False}, ("linear", 20, 3)),
    ],
    ids=str,
)
def test_ring_is_taken_where_it_is_smaller_than_the_context(options: Any, expected: Any) -> None:
    assert layouts(parse(BEFORE), **options)[0] == expected


def test_layer_without_window_is_linear() -> None:
    assert layouts(parse(BEFORE))[1] == ("linear", 20, None)


def test_graph_without_caches_is_left_alone(stays: Any) -> None:
    stays(schedule(), "graph g\ninput %x: f32[batch, seq, 8]\n%y = Silu(%x)\noutput %y")


REFUSED = {
    "Split reads the grown cache": (
        BEFORE + "%s, %t = Split(%present.0.key; sizes=(1, 3))\noutput %s",
        "for one attention",
    ),
    "Split reads the past": (
        BEFORE + "%s, %t = Split(%past_key_values.0.key; sizes=(1, 3))\noutput %s",
        "Split reads cache",
    ),
    "two layers share a cache": (
        BEFORE + "%a2 = Attention(%q1, %present.1.key, %present.1.value; heads=2, scale=0.5)\noutput %a2",
        "for one attention, its readers are Attention, Attention",
    ),
    "two layers append to a cache": (
        BEFORE.replace("KvAppend(%past_key_values.1.key", "KvAppend(%past_key_values.0.key"),
        "KvAppend reads cache %past_key_values.0.key",
    ),
    "no attention reads a cache": (
        BEFORE + "input %more: f32[batch, 1, past, 4]\n%grown = KvAppend(%more, %k)\noutput %grown",
        "%more is not a cache that an attention reads",
    ),
    "keys are values": (
        BEFORE.replace("%present.1.key, %present.1.value;", "%present.1.key, %present.1.key;"),
        "%logits does not read two caches of one shape",
    ),
    "keys do not come from a cache": (
        BEFORE.replace("(%q1, %present.1.key, %present.1.value", "(%q1, %f, %f")
        + "input %f: f32[batch, 1, t, 4]",
        "%logits does not read two caches of one shape",
    ),
    "the cache is computed": (
        BEFORE.replace("KvAppend(%past_key_values.1.key", "KvAppend(%c").replace(
            "%p0 =", "%c = Silu(%past_key_values.1.key)\n%p0 =", 1
        ),
        "%c is not a cache",
    ),
    "layers remember different pasts": (
        BEFORE.replace("1.key: f32[batch, 1, past, 4]", "1.key: f32[batch, 1, other, 4]").replace(
            "1.value: f32[batch, 1, past, 4]", "1.value: f32[batch, 1, other, 4]"
        ),
        "the caches differ in length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_where(case: str) -> None:
    text, problem = REFUSED[case]
    graph = parse(text)
    with pytest.raises(GraphError, match=f"^schedule_kv_cache: .*{problem}"):
        schedule().run(graph)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("sizes", STEPS[:1], ids=str)
def test_steps_of_a_whole_model_equal_one_pass(
    architecture: str, sizes: tuple[int, ...], model_graph: Any, same_logits_in_steps: Any
) -> None:
    graph = model_graph(architecture, 6)
    same_logits_in_steps(graph, schedule().run(graph).graph, sizes)
