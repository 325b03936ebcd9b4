"""Caches that grow become buffers that are written in place, and a plan."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rlxc.artifact import KvLayer, KvPlan
from rlxc.dtypes import DType
from rlxc.errors import GraphError, OptionError
from rlxc.ir import Graph, parse
from rlxc.ir.target import TargetFeatures
from rlxc.passes.schedule_kv_cache import ScheduleKvCache

HEAD = """
graph cached
input %input_ids: i64[batch, seq]
input %past_key_values.0.key: {0}
input %past_key_values.0.value: {0}
input %past_key_values.1.key: {1}
input %past_key_values.1.value: {1}
{2}
weight @table: f32[16, 8]
weight @wk: f32[4, 8]
%x = Embed(%input_ids, @table)
%k = MatMul(%x, @wk)
"""

ROPE = "RopeSpec(theta=100.0, dim=4)"

GROWING = "f32[batch, 1, past, 4]"
BEFORE = (
    HEAD.format(GROWING, GROWING, "")
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

PAST = "input %past_length: i32[]"
AFTER_BODY = f"""
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

# A window of 3 in a context of 20, with steps of 4 at most and 1 token that can be taken back: a ring of 8.
AFTER = HEAD.format("f32[batch, 1, 8, 4]", "f32[batch, 1, 20, 4]", PAST) + AFTER_BODY

# Pages of 4: 5 of them hold the context. What the window sees and what sees everything have tables of their own.
PAGED = HEAD.format(
    "f32[pages, 1, 4, 4]",
    "f32[pages, 1, 4, 4]",
    f"{PAST}\ninput %block_table.0: i32[batch, 5]\ninput %block_table.1: i32[batch, 5]",
) + "\n".join(
    re.sub(r"layout='(ring|linear)'", "layout='paged'", line).replace(
        "%past_length;", f"%past_length, %block_table.{int('.1.' in line)};"
    )
    for line in AFTER_BODY.splitlines()
)

STEPS = [(3, 1, 1, 2, 1, 4, 1, 1, 1, 4, 1), (1,) * 20, (4,) * 5, (2, 3, 4, 1, 3, 4, 3)]
"""Sizes of steps that fill a context of 20, over the end of the ring of 8 and around it."""

DTYPES = (DType.F32, DType.F16, DType.BF16, DType.INT8)


def schedule(
    context: int = 20,
    max_step: int = 4,
    rollback: int = 1,
    dtype: DType | None = None,
    ring: bool = True,
    page_size: int | None = None,
) -> ScheduleKvCache:
    features = TargetFeatures(ring_cache=ring, page_size=page_size, cache_dtypes=DTYPES)
    return ScheduleKvCache(features, context=context, max_step=max_step, rollback=rollback, dtype=dtype)


def without_rope(text: str) -> str:
    for i in (0, 1):
        text = text.replace(f"%k{i})", "%k)")
    lines = [line for line in text.splitlines() if "Rope(" not in line and "Positions(" not in line]
    return "\n".join(lines).replace("(%q0,", "(%x,").replace("(%q1,", "(%a0,")


def stored_as(text: str, dtype: DType) -> str:
    return re.sub(r"(input %past_key_values.*: )f32", rf"\g<1>{dtype}", text)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page_size", "after"), [(None, AFTER), (4, PAGED)], ids=["buffers", "pages"])
def test_growing_caches_get_a_fixed_size(
    page_size: int | None, after: str, dtype: DType, becomes: Any
) -> None:
    becomes(schedule(page_size=page_size, dtype=dtype), BEFORE, stored_as(after, dtype))


def test_first_type_of_the_target_is_the_default(becomes: Any) -> None:
    features = TargetFeatures(ring_cache=True, cache_dtypes=(DType.F16, DType.F32))
    one = ScheduleKvCache(features, context=20, max_step=4, rollback=1, dtype=None)
    becomes(one, BEFORE, stored_as(AFTER, DType.F16))


def test_type_that_the_target_has_not_is_refused_with_those_that_it_has() -> None:
    features = TargetFeatures(cache_dtypes=(DType.F16, DType.F32))
    one = ScheduleKvCache(features, context=20, max_step=4, rollback=1, dtype=DType.INT8)
    with pytest.raises(OptionError) as refused:
        one.run(parse(BEFORE))
    assert str(refused.value) == (
        "schedule_kv_cache: the target's kernels have no cache of int8; choose one of: f16, f32"
    )


# The third layer has queries only, and reads the keys and values of the first.
SHARED = BEFORE.replace("%logits =", "%a1 =").replace(
    "output %logits",
    f"""%p2 = Positions(%input_ids, %past_key_values.0.key)
%q2 = Rope(%a1, %p2; heads=2, spec={ROPE})
%logits = Attention(%q2, %present.0.key, %present.0.value; heads=2, scale=0.5, window=3)
output %logits""",
)


def shared_after(after: str) -> str:
    visible = "%present.0.key.visible, %present.0.value.visible"
    return after.replace("%logits =", "%a1 =").replace(
        "output %logits",
        f"""%q2 = Rope(%a1, %p0; heads=2, spec={ROPE})
%logits = Attention(%q2, {visible}; heads=2, scale=0.5, window=3)
output %logits""",
    )


@pytest.mark.parametrize(("page_size", "after"), [(None, AFTER), (4, PAGED)], ids=["buffers", "pages"])
def test_shared_caches_are_written_once(page_size: int | None, after: str, becomes: Any) -> None:
    becomes(schedule(page_size=page_size), SHARED, shared_after(after))


@pytest.mark.parametrize("page_size", [None, 4])
def test_plan_says_which_layer_shares(page_size: int | None) -> None:
    plan = schedule(page_size=page_size).run(parse(SHARED)).facts["kv_cache"]
    first, _, third = plan["layers"]
    assert third == {**first, "index": 2, "shares": 0, "bytes_per_token": 0}
    assert plan["bytes_per_token"] == 64


@pytest.mark.parametrize("text", [BEFORE, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("page_size", [None, 4])
def test_second_run_changes_nothing(page_size: int | None, text: str, is_done_in_one_run: Any) -> None:
    is_done_in_one_run(schedule(page_size=page_size), text)


@pytest.mark.parametrize("sizes", STEPS, ids=str)
@pytest.mark.parametrize(
    "layout",
    [{"ring": True}, {"ring": False}, {"page_size": 1}, {"page_size": 4}, {"page_size": 32}],
    ids=str,
)
@pytest.mark.parametrize(
    "text", [BEFORE, without_rope(BEFORE), SHARED], ids=["rope", "no rope", "shared caches"]
)
def test_steps_equal_one_pass(
    text: str, layout: dict[str, Any], sizes: tuple[int, ...], same_logits_in_steps: Any
) -> None:
    graph = parse(text)
    same_logits_in_steps(graph, schedule(**layout).run(graph).graph, sizes)


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
    alike = {"heads": 1, "head_dim": 4, "dtype": "f32", "bytes_per_token": 32, "shares": None, "table": None}
    assert plan == {
        "context": 20,
        "max_step": 4,
        "rollback": 1,
        "page_size": None,
        "bytes_per_token": 64,
        "layers": [
            {"index": 0, "layout": "ring", "capacity": 8, "window": 3, **alike},
            {"index": 1, "layout": "linear", "capacity": 20, "window": None, **alike},
        ],
    }


@pytest.mark.parametrize(
    ("dtype", "size"),
    # Keys and values of 4 channels; a code of 8 bits has its part of a scale of 4 bytes for each.
    [(DType.F32, 2 * 16), (DType.F16, 2 * 8), (DType.BF16, 2 * 8), (DType.INT8, 2 * (4 + 4))],
)
def test_plan_of_pages_numbers_their_tables(dtype: DType, size: int) -> None:
    plan = schedule(page_size=4, dtype=dtype).run(parse(BEFORE)).facts["kv_cache"]
    alike = {"layout": "paged", "heads": 1, "head_dim": 4, "dtype": dtype.value, "bytes_per_token": size}
    assert plan == {
        "context": 20,
        "max_step": 4,
        "rollback": 1,
        "page_size": 4,
        "bytes_per_token": 2 * size,
        "layers": [
            {"index": 0, "capacity": 12, "window": 3, "shares": None, "table": 0, **alike},
            {"index": 1, "capacity": 20, "window": None, "shares": None, "table": 1, **alike},
        ],
    }


def test_layers_that_see_as_much_have_one_table() -> None:
    graph = parse(BEFORE.replace("scale=0.5)", "scale=0.5, window=3)"))
    result = schedule(page_size=4).run(graph)
    assert [layer["table"] for layer in result.facts["kv_cache"]["layers"]] == [0, 0]
    assert [value.name for value in result.graph.inputs][-2:] == ["past_length", "block_table.0"]


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plan_is_one_that_artifacts_hold(dtype: DType, page_size: int | None) -> None:
    facts = schedule(page_size=page_size, dtype=dtype).run(parse(SHARED)).facts["kv_cache"]
    layers = tuple(KvLayer(**{**layer, "dtype": DType(layer["dtype"])}) for layer in facts["layers"])
    plan = KvPlan(**{**facts, "layers": layers})
    assert plan.problem == ""


def layouts(graph: Graph, **options: Any) -> list[tuple[str, int, int | None]]:
    plan = schedule(**options).run(graph).facts["kv_cache"]
    return [(layer["layout"], layer["capacity"], layer["window"]) for layer in plan["layers"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"context": 9}, ("ring", 8, 3)),
        ({"context": 8}, ("linear", 8, 3)),
        ({"context": 9, "rollback": 2}, ("linear", 9, 3)),
        ({"rollback": 0}, ("ring", 7, 3)),
        ({"context": 2, "max_step": 2}, ("linear", 2, 3)),
        ({"max_step": 1}, ("ring", 5, 3)),
        ({"ring": False}, ("linear", 20, 3)),
    ],
    ids=str,
)
def test_ring_is_taken_where_it_is_smaller_than_the_context(options: Any, expected: Any) -> None:
    assert layouts(parse(BEFORE), **options)[0] == expected


@pytest.mark.parametrize(
    ("options", "windowed", "full"),
    [
        ({"page_size": 4}, 12, 20),  # 8 positions can lie in three pages
        ({"page_size": 4, "rollback": 2}, 16, 20),  # and 9 of them in four
        ({"page_size": 4, "rollback": 9}, 20, 20),  # of a context of five
        ({"page_size": 7}, 21, 21),
        ({"page_size": 32}, 32, 32),
        ({"page_size": 1}, 9, 20),
        ({"page_size": 4, "ring": False}, 12, 20),
    ],
    ids=str,
)
def test_pages_hold_what_they_must_and_no_more_than_the_context(
    options: dict[str, Any], windowed: int, full: int
) -> None:
    assert layouts(parse(BEFORE), **options) == [("paged", windowed, 3), ("paged", full, None)]


def test_layer_without_window_is_linear() -> None:
    assert layouts(parse(BEFORE))[1] == ("linear", 20, None)


def test_graph_without_caches_is_left_alone(stays: Any) -> None:
    stays(schedule(), "graph g\ninput %x: f32[batch, seq, 8]\n%y = Silu(%x)\noutput %y")


REFUSED = {
    "Split reads the grown cache": (
        BEFORE + "%s, %t = Split(%present.0.key; sizes=(1, 3))\noutput %s",
        "cache %present.0.key is for attention, Split reads it",
    ),
    "Split reads the past": (
        BEFORE + "%s, %t = Split(%past_key_values.0.key; sizes=(1, 3))\noutput %s",
        "Split reads cache",
    ),
    "layers that share caches have different windows": (
        SHARED.replace(
            "%a0 = Attention(%q0, %present.0.key, %present.0.value; heads=2, scale=0.5, window=3",
            "%a0 = Attention(%q0, %present.0.key, %present.0.value; heads=2, scale=0.5",
        ),
        "%logits has window 3, and shares the caches of layer 0 of None",
    ),
    "a layer shares keys only": (
        BEFORE.replace("(%q1, %present.1.key,", "(%q1, %present.0.key,"),
        "%logits reads a cache of layer 0, but not its keys as keys and its values as values",
    ),
    "a layer shares values only": (
        BEFORE.replace("%present.1.value; heads", "%present.0.value; heads"),
        "%logits reads a cache of layer 0, but",
    ),
    "a layer shares keys as values": (
        SHARED.replace("(%q2, %present.0.key, %present.0.value", "(%q2, %present.0.value, %present.0.key"),
        "%logits reads a cache of layer 0, but",
    ),
    "two layers append to the same caches": (
        BEFORE.replace("KvAppend(%past_key_values.1.", "KvAppend(%past_key_values.0.").replace(
            "scale=0.5)", "scale=0.5, window=3)"
        ),
        "KvAppend reads cache %past_key_values.0.key",
    ),
    "two layers append to one cache": (
        BEFORE.replace("KvAppend(%past_key_values.1.key", "KvAppend(%past_key_values.0.key"),
        "%logits reads a cache of layer 0, but",
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
        re.sub(r"(values.1.*)past, 4", r"\g<1>other, 4", BEFORE),
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
