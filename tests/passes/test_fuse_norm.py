"""Norms that are spelled out are recognised, and take in the residual sum before them."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.passes.fuse_norm import FuseNorm

HEAD = """
graph norm
input %x: f32[batch, seq, 8]
input %r: f32[batch, seq, 8]
weight @w: f32[8]
weight @v: f32[8]
weight @half: f32[4]
weight @scale: f32[]
"""

SPELLED = """
%eps = Constant(value=0.25)
%square = Square(%x)
%mean = Mean(%square)
%total = Add({total})
%inverse = Rsqrt(%total)
%scaled = Mul({scaled})
%y = Mul({y})
output %y
"""

RECOGNISED = """
%eps = Constant(value=0.25)
%y = RmsNorm(%x, @w; eps=0.25)
output %y
"""

ORDERS = [
    (total, scaled, y)
    for total in ("%mean, %eps", "%eps, %mean")
    for scaled in ("%x, %inverse", "%inverse, %x")
    for y in ("%scaled, @w", "@w, %scaled")
]


def spelled(
    total: str = "%mean, %eps", scaled: str = "%x, %inverse", y: str = "%scaled, @w", also: str = ""
) -> str:
    return HEAD + SPELLED.format(total=total, scaled=scaled, y=y) + also


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_spelled_out_norm_is_recognised_in_any_order(order: tuple[str, str, str], becomes: Any) -> None:
    becomes(FuseNorm(with_residual=False), spelled(*order), HEAD + RECOGNISED)


def test_numbers_of_a_spelled_out_norm_are_kept(keeps_numbers: Any) -> None:
    keeps_numbers(FuseNorm(with_residual=False), spelled())


def test_second_run_after_a_spelled_out_norm_changes_nothing(is_done_in_one_run: Any) -> None:
    is_done_in_one_run(FuseNorm(with_residual=False), spelled())


@pytest.mark.parametrize("name", ["square", "mean", "total", "inverse", "scaled"])
@pytest.mark.parametrize("also", ["output %{}", "%z = Sqrt(%{})\noutput %z"], ids=["output", "other user"])
def test_norm_with_a_part_used_elsewhere_is_left_alone(name: str, also: str, stays: Any) -> None:
    text = spelled(also=also.format(name))
    stays(FuseNorm(with_residual=False), text, "a part of the norm is also used elsewhere")


LEFT_ALONE = {
    "the mean is of another square": spelled().replace("Square(%x)", "Square(%r)"),
    "there is no square": spelled().replace("Square(%x)", "Silu(%x)"),
    "eps is a vector": spelled().replace("value=0.25", "value=(0.25,)"),
    "eps is a weight": spelled(total="%mean, @scale"),
    "the weight is computed": spelled().replace(
        "%y = Mul(%scaled, @w)", "%c = Silu(%r)\n%y = Mul(%scaled, %c)"
    ),
    "the weight is a number": spelled(y="%scaled, @scale"),
    "the root is not inverted": spelled().replace("Rsqrt", "Sqrt"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_no_norm_where(case: str, stays: Any) -> None:
    stays(FuseNorm(with_residual=False), LEFT_ALONE[case])


# --- with the residual sum ----------------------------------------------------------------------------------------

RESIDUAL = {
    "sum used by the norm alone": (
        "%sum = Add(%x, %r)\n%a = Silu(%x)\n%y = RmsNorm(%sum, @w; eps=0.5)\noutput %y",
        "%y, %sum = AddRmsNorm(%x, %r, @w; eps=0.5)\n%a = Silu(%x)\noutput %y",
    ),
    "sum also used by others": (
        "%sum = Add(%x, %r)\n%a = Silu(%sum)\n%n = RmsNorm(%sum, @w; eps=0.5)\n%y = Add(%n, %a)\noutput %y",
        "%n, %sum = AddRmsNorm(%x, %r, @w; eps=0.5)\n%a = Silu(%sum)\n%y = Add(%n, %a)\noutput %y",
    ),
    "sum is an output": (
        "%sum = Add(%x, %r)\n%y = RmsNorm(%sum, @w; eps=0.5)\noutput %y\noutput %sum",
        "%y, %sum = AddRmsNorm(%x, %r, @w; eps=0.5)\noutput %y\noutput %sum",
    ),
    "second norm of the sum reads it": (
        "%sum = Add(%x, %r)\n%n = RmsNorm(%sum, @w; eps=0.5)\n%m = RmsNorm(%sum, @v; eps=0.5)\noutput %n\noutput %m",
        "%n, %sum = AddRmsNorm(%x, %r, @w; eps=0.5)\n%m = RmsNorm(%sum, @v; eps=0.5)\noutput %n\noutput %m",
    ),
}

APART = {
    "the norm is per head": "%sum = Add(%x, %r)\n%y = RmsNorm(%sum, @half; eps=0.5, heads=2)\noutput %y",
    "the sum is with a weight": "%sum = Add(@w, @v)\n%y = RmsNorm(%sum, @w; eps=0.5)\noutput %y",
    "the sum broadcasts": "%sum = Add(%x, @w)\n%y = RmsNorm(%sum, @w; eps=0.5)\noutput %y",
    "the norm's weight is computed": (
        "%sum = Add(%x, %r)\n%c = Add(@w, @v)\n%y = RmsNorm(%sum, %c; eps=0.5)\noutput %y"
    ),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_norm_takes_in_the_residual(case: str, becomes: Any) -> None:
    before, after = RESIDUAL[case]
    becomes(FuseNorm(with_residual=True), HEAD + before, HEAD + after)


@pytest.mark.parametrize("case", RESIDUAL)
def test_numbers_with_the_residual_are_kept(case: str, keeps_numbers: Any) -> None:
    keeps_numbers(FuseNorm(with_residual=True), HEAD + RESIDUAL[case][0])


@pytest.mark.parametrize("case", RESIDUAL)
def test_second_run_with_the_residual_changes_nothing(case: str, is_done_in_one_run: Any) -> None:
    is_done_in_one_run(FuseNorm(with_residual=True), HEAD + RESIDUAL[case][0])


@pytest.mark.parametrize("reason", APART)
def test_residual_stays_apart_where(reason: str, stays: Any) -> None:
    stays(FuseNorm(with_residual=True), HEAD + APART[reason], reason)


def test_residual_stays_apart_for_a_target_without_the_op(stays: Any) -> None:
    stays(FuseNorm(with_residual=False), HEAD + RESIDUAL["sum is an output"][0])


def test_spelled_out_norm_of_a_sum_becomes_one_op(becomes: Any) -> None:
    before = (
        spelled().replace("%eps =", "%sum = Add(%q, %r)\n%eps =").replace("%x", "%sum").replace("%q", "%x")
    )
    before = before.replace("input %sum", "input %x")
    after = HEAD + "%y, %sum = AddRmsNorm(%x, %r, @w; eps=0.25)\n%eps = Constant(value=0.25)\noutput %y"
    becomes(FuseNorm(with_residual=True), before, after)
