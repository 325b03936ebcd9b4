"""Rope, cache write and read, and attention become one op."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rlxc.ir import Graph, parse
from rlxc.ir.target import TargetFeatures
from rlxc.passes.fuse_rope_attention import FuseRopeAttention

HEAD = """
graph attention
input %input_ids: i64[batch, seq]
input %past_key_values.0.key: f32[batch, 1, {capacity}, 4]
input %past_key_values.0.value: f32[batch, 1, {capacity}, 4]
{past}
weight @table: f32[16, 8]
weight @wk: f32[4, 8]
weight @wv: f32[4, 8]
weight @factors: f32[2]
%x = Embed(%input_ids, @table)
%k = MatMul(%x, @wk)
%v = MatMul(%x, @wv)
"""

OUTPUTS = """
output %logits
output %present.0.key
output %present.0.value
"""

SPEC = "spec=RopeSpec(theta=100.0, dim=4)"


def rotated(past: str, factors: str = "") -> str:
    return f"""
%p = Positions(%input_ids, {past})
%qr = Rope(%x, %p{factors}; heads=2, {SPEC})
%kr = Rope(%k, %p{factors}; heads=1, {SPEC})
"""


def head(capacity: int = 20) -> str:
    return HEAD.format(capacity=capacity, past="input %past_length: i32[]")


def cached(q: str, k: str, layout: str = "layout='linear'", window: str = "", read_window: str = "") -> str:
    return f"""
%present.0.key = KvWrite(%past_key_values.0.key, {k}, %past_length; {layout})
%keys = KvRead(%present.0.key, {k}, %past_length; {layout}{read_window})
%present.0.value = KvWrite(%past_key_values.0.value, %v, %past_length; {layout})
%values = KvRead(%present.0.value, %v, %past_length; {layout}{read_window})
%logits = Attention({q}, %keys, %values; heads=2, scale=0.5{window})
"""


def fused(q: str, k: str, attributes: str = "layout='linear'", factors: str = "") -> str:
    inputs = f"{q}, {k}, %v, %past_key_values.0.key, %past_key_values.0.value, %past_length{factors}"
    return (
        "%logits, %present.0.key, %present.0.value = "
        f"GroupQueryAttention({inputs}; heads=2, scale=0.5, {attributes})\n"
    )


POSITIONS = "%p = Positions(%input_ids, %past_length)\n"
LINEAR = head() + rotated("%past_length") + cached("%qr", "%kr") + OUTPUTS

CASES = {
    "linear": (LINEAR, head() + POSITIONS + fused("%x", "%k", f"layout='linear', rope={SPEC[5:]}") + OUTPUTS),
    "linear with a window": (
        head() + rotated("%past_length") + cached("%qr", "%kr", window=", window=3") + OUTPUTS,
        head() + POSITIONS + fused("%x", "%k", f"layout='linear', window=3, rope={SPEC[5:]}") + OUTPUTS,
    ),
    "ring": (
        head(7)
        + rotated("%past_length")
        + cached("%qr", "%kr", "layout='ring'", ", window=3", ", window=3")
        + OUTPUTS,
        head(7) + POSITIONS + fused("%x", "%k", f"layout='ring', window=3, rope={SPEC[5:]}") + OUTPUTS,
    ),
    "rope factors": (
        head() + rotated("%past_length", ", @factors") + cached("%qr", "%kr") + OUTPUTS,
        head() + POSITIONS + fused("%x", "%k", f"layout='linear', rope={SPEC[5:]}", ", @factors") + OUTPUTS,
    ),
    "no rope": (head() + cached("%x", "%k") + OUTPUTS, head() + fused("%x", "%k") + OUTPUTS),
}


def paged(text: str) -> str:
    """The same with caches in pages of 4, and a table of 5 of them."""
    text = re.sub(r"f32\[batch, 1, \d+, 4\]", "f32[pages, 1, 4, 4]", text)
    text = re.sub(r"%past_length(?=[;,])", "%past_length, %block_table.0", text)
    text = re.sub(r"layout='(linear|ring)'", "layout='paged'", text)
    return text.replace(
        "input %past_length: i32[]", "input %past_length: i32[]\ninput %block_table.0: i32[batch, 5]"
    )


CASES |= {f"{name}, in pages": (paged(before), paged(after)) for name, (before, after) in CASES.items()}

STEPS = (3, 1, 1, 2, 4, 1, 1, 1, 4, 1, 1)
"""Sizes of steps that fill a context of 20, over the end of a ring of 7 and around it."""


def outside(text: str) -> tuple[str, str]:
    """The text before, and after with the ropes where they were."""
    before = head() + text + cached("%qr", "%kr") + OUTPUTS
    return before, head() + text + fused("%qr", "%kr") + OUTPUTS


ROPE = rotated("%past_length")
ROPE_OUTSIDE = {
    "q and k rotate differently": outside(
        ROPE.replace("heads=1, spec=RopeSpec(theta=100.0", "heads=1, spec=RopeSpec(theta=200.0")
    ),
    "rope stays outside: q and k rotate differently": outside(ROPE.replace("(%k, %p;", "(%k, %p, @factors;")),
    "its positions are not those after the past": outside(
        ROPE.replace("%past_length)", "%other)") + "input %other: i32[]\n"
    ),
    "what it rotates is also read elsewhere": outside(ROPE + "%more = Silu(%kr)\noutput %more\n"),
    "also read elsewhere": outside(ROPE + "%more = Silu(%qr)\noutput %more\n"),
    "read elsewhere": outside(ROPE + "output %kr\n"),
}

LEFT_ALONE = {
    "keys and values do not come from caches": head()
    + "input %f: f32[batch, 1, t, 4]\n%logits = Attention(%x, %f, %f; heads=2, scale=0.5)\noutput %logits",
    "what it reads is also read elsewhere": LINEAR + "%more = Silu(%keys)\noutput %more",
    "also read elsewhere": LINEAR + "output %values",
    "its caches are also read elsewhere": LINEAR + "%more = Silu(%present.0.value)\noutput %more",
    "laid out differently": head(20).replace("0.key: f32[batch, 1, 20, 4]", "0.key: f32[batch, 1, 20, 4]")
    + ROPE
    + cached("%qr", "%kr", window=", window=3").replace(
        "%values = KvRead(%present.0.value, %v, %past_length; layout='linear')",
        "%values = KvRead(%present.0.value, %v, %past_length; layout='ring', window=3)",
    )
    + OUTPUTS,
    "caches are laid out differently": paged(LINEAR).replace(
        "%v, %past_length, %block_table.0", "%v, %past_length, %block_table.1"
    )
    + "input %block_table.1: i32[batch, 5]",
    "it reads is also read elsewhere": LINEAR
    + "%more = Attention(%x, %keys, %values; heads=2, scale=0.5)\noutput %more",
    "are laid out differently": LINEAR.replace("%v, %past_length", "%v, %other") + "input %other: i32[]",
    "differently": head(7)
    + ROPE
    + cached("%qr", "%kr", "layout='ring'", ", window=2", ", window=3")
    + OUTPUTS,
}


def functional(text: str) -> Graph:
    """The same attention over caches that grow."""
    text = (
        text.replace("input %past_length: i32[]\n", "")
        .replace("input %block_table.0: i32[batch, 5]\n", "")
        .replace("f32[pages, 1, 4, 4]", "f32[batch, 1, past, 4]")
        .replace(", 20, 4]", ", past, 4]")
        .replace(", 7, 4]", ", past, 4]")
    )
    text = text.replace(
        "Positions(%input_ids, %past_length)", "Positions(%input_ids, %past_key_values.0.key)"
    )
    lines = []
    for line in text.splitlines():
        if "KvWrite" in line:
            line = line.split(", %past_length")[0].replace("KvWrite", "KvAppend") + ")"
        if "KvRead" not in line:
            lines.append(line)
    text = "\n".join(lines)
    return parse(text.replace("%keys,", "%present.0.key,").replace("%values;", "%present.0.value;"))


@pytest.mark.parametrize("case", CASES)
def test_text_before_and_after(case: str, becomes: Any, features: TargetFeatures) -> None:
    becomes(FuseRopeAttention(features), *CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_one_pass_of_the_functional_graph(
    case: str, features: TargetFeatures, same_logits_in_steps: Any
) -> None:
    before = CASES[case][0]
    same_logits_in_steps(functional(before), FuseRopeAttention(features).run(parse(before)).graph, STEPS)


@pytest.mark.parametrize("case", CASES)
def test_second_run_changes_nothing(case: str, is_done_in_one_run: Any, features: TargetFeatures) -> None:
    is_done_in_one_run(FuseRopeAttention(features), CASES[case][0])


@pytest.mark.parametrize("reason", ROPE_OUTSIDE)
def test_rope_stays_outside_with_the_reason(reason: str, becomes: Any, features: TargetFeatures) -> None:
    result = becomes(FuseRopeAttention(features), *ROPE_OUTSIDE[reason])
    assert [miss for miss in result.missed if reason in miss.reason]


def test_steps_with_rope_outside_equal_one_pass(features: TargetFeatures, same_logits_in_steps: Any) -> None:
    before = ROPE_OUTSIDE["q and k rotate differently"][0]
    same_logits_in_steps(functional(before), FuseRopeAttention(features).run(parse(before)).graph, STEPS)


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone_with_the_reason(reason: str, stays: Any, features: TargetFeatures) -> None:
    stays(FuseRopeAttention(features), LEFT_ALONE[reason], reason)


def test_target_without_the_op_is_left_alone(stays: Any) -> None:
    stays(FuseRopeAttention(TargetFeatures()), LINEAR)
