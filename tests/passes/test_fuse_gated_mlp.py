"""One matrix product for the gate and the input of a gated MLP."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.ir.target import TargetFeatures
from rlxc.passes.fuse_gated_mlp import FuseGatedMlp

HEAD = """
graph mlp
input %x: f32[batch, seq, 32]
input %z: f32[batch, seq, 32]
"""


def before(
    gate: str = "q8_0",
    up: str = "q8_0",
    activation: str = "Silu",
    operands: str = "%act, %up",
    product: str = "DequantMatMul",
) -> str:
    return f"""{HEAD}
        weight @wg: {gate}[6, 32]
        weight @wu: {up}[6, 32]
        %gate = {product}(%x, @wg)
        %up = {product}(%x, @wu)
        %act = {activation}(%gate)
        %y = Mul({operands})
        output %y
        """


def after(
    gate: str = "q8_0",
    up: str = "q8_0",
    whole: str = "q8_0",
    activation: str = "silu",
    product: str = "DequantMatMul",
) -> str:
    return f"""{HEAD}
        weight @wg: {gate}[6, 32]
        weight @wu: {up}[6, 32]
        weight @gate_up.weight: {whole}[12, 32] = concat(@wg: {gate}[6, 32], @wu: {up}[6, 32])
        %gate_up = {product}(%x, @gate_up.weight)
        %y = Glu(%gate_up; activation='{activation}')
        output %y
        """


BIASED = """
weight @bg: f32[6]
weight @bu: f32[6]
"""


def halves(activation: str = "Silu", gate: int = 6, up: int = 6, operands: str = "%act, %up") -> str:
    return f"""{HEAD}
        weight @w: q8_0[{gate + up}, 32]
        %both = DequantMatMul(%x, @w)
        %gate, %up = Split(%both; sizes=({gate}, {up}))
        %act = {activation}(%gate)
        %y = Mul({operands})
        output %y
        """


CASES = {
    "silu": (before(), after()),
    "halves of one product": (
        halves("Gelu"),
        f"""{HEAD}
        weight @w: q8_0[12, 32]
        %both = DequantMatMul(%x, @w)
        %y = Glu(%both; activation='gelu')
        output %y
        """,
    ),
    "gelu": (before(activation="Gelu"), after(activation="gelu")),
    "the other order": (before(operands="%up, %act"), after()),
    "formats of one storage": (before("q5_0"), after("q5_0")),
    "floats": (
        before("bf16", "bf16", product="MatMul"),
        after("bf16", "bf16", "bf16", product="MatMul"),
    ),
    "biases": (
        before().replace("@wg)", "@wg, @bg)").replace("@wu)", "@wu, @bu)") + BIASED,
        after()
        .replace("weight @gate_up", f"{BIASED}weight @gate_up", 1)
        .replace(
            "%gate_up = ", "weight @gate_up.bias: f32[12] = concat(@bg: f32[6], @bu: f32[6])\n%gate_up = "
        )
        .replace("@gate_up.weight)", "@gate_up.weight, @gate_up.bias)"),
    ),
}

LEFT_ALONE = {
    "their formats differ: q4_0, q8_0": before("q4_0"),
    "they read different inputs": before().replace("(%x, @wu)", "(%z, @wu)"),
    "only some have a bias": before().replace("@wu)", "@wu, @bu)") + BIASED,
    "a weight is also used elsewhere": before() + "%more = DequantMatMul(%z, @wu)\noutput %more",
    "a part is also used elsewhere": before() + "%more = Sqrt(%gate)\noutput %more",
    "stay apart: a part is also used elsewhere": before() + "output %act",
    "their sizes differ": before().replace("@wu: q8_0[6, 32]", "@wu: q8_0[1, 32]"),
    "stay split: their sizes differ": halves(up=1),
    "stay split: the gate is not the first of two halves": halves()
    .replace("Silu(%gate)", "Silu(%up)")
    .replace("Mul(%act, %up)", "Mul(%act, %gate)"),
    "stay split: a part is also used elsewhere": halves() + "%more = Sqrt(%up)\noutput %more",
}

NO_MATCH = {
    "the activation is another": before(activation="Sqrt"),
    "the input is no product": before()
    .replace("%up = DequantMatMul(%x, @wu)", "%up = Split(%z; sizes=(32,))")
    .replace("[6, 32]", "[32, 32]"),
    "gate and input are added": before().replace("Mul(%act", "Add(%act"),
    "they are products with experts": f"{HEAD}weight @router: f32[3, 32]\n%s = MatMul(%x, @router)\n"
    "%chosen, %weights = Route(%s; used=2)\n"
    + before()
    .removeprefix(HEAD)
    .replace("q8_0[6, 32]", "q8_0[3, 6, 32]")
    .replace("DequantMatMul(%x, @wg)", "ExpertMatMul(%x, @wg, %chosen)")
    .replace("DequantMatMul(%x, @wu)", "ExpertMatMul(%x, @wu, %chosen)"),
}


@pytest.mark.parametrize("case", CASES)
def test_text_before_and_after(case: str, becomes: Any, features: TargetFeatures) -> None:
    becomes(FuseGatedMlp(features), *CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_kept(case: str, keeps_numbers: Any, features: TargetFeatures) -> None:
    keeps_numbers(FuseGatedMlp(features), CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_second_run_changes_nothing(case: str, is_done_in_one_run: Any, features: TargetFeatures) -> None:
    is_done_in_one_run(FuseGatedMlp(features), CASES[case][0])


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone_with_the_reason(reason: str, stays: Any, features: TargetFeatures) -> None:
    stays(FuseGatedMlp(features), LEFT_ALONE[reason], reason)


@pytest.mark.parametrize("case", NO_MATCH)
def test_left_alone_where(case: str, stays: Any, features: TargetFeatures) -> None:
    stays(FuseGatedMlp(features), NO_MATCH[case])


def test_target_without_the_op_is_left_alone(stays: Any) -> None:
    stays(FuseGatedMlp(TargetFeatures()), before())
