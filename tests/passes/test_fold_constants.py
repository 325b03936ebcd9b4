"""Arithmetic that needs no input is done by the compiler."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.passes.fold_constants import FoldConstants

HEAD = """
graph folded
input %x: f32[batch, 4]
weight @w: f32[4]
"""

CASES = {
    "constants": (
        """
        %a = Constant(value=4.0)
        %b = Constant(value=(1.0, 2.0, 3.0, 4.0))
        %c = Mul(%a, %b)
        %d = Rsqrt(%a)
        %e = Add(%c, %d)
        %y = Mul(%x, %e)
        """,
        """
        %a = Constant(value=4.0)
        %b = Constant(value=(1.0, 2.0, 3.0, 4.0))
        %c = Constant(value=(4.0, 8.0, 12.0, 16.0))
        %d = Constant(value=0.5)
        %e = Constant(value=(4.5, 8.5, 12.5, 16.5))
        %y = Mul(%x, %e)
        """,
    ),
    "times one and plus zero": (
        """
        %one = Constant(value=1.0)
        %zero = Constant(value=0.0)
        %a = Mul(%one, %x)
        %b = Add(%a, %zero)
        %y = Silu(%b)
        """,
        """
        %one = Constant(value=1.0)
        %zero = Constant(value=0.0)
        %y = Silu(%x)
        """,
    ),
    "constants around a value": (
        """
        %two = Constant(value=2.0)
        %three = Constant(value=3.0)
        %five = Constant(value=5.0)
        %a = Mul(%x, %two)
        %b = Mul(%three, %a)
        %y = Mul(%b, %five)
        """,
        """
        %two = Constant(value=2.0)
        %three = Constant(value=3.0)
        %five = Constant(value=5.0)
        %a = Mul(%x, %two)
        %b.factor = Constant(value=6.0)
        %b = Mul(%x, %b.factor)
        %y.factor = Constant(value=30.0)
        %y = Mul(%x, %y.factor)
        """,
    ),
}

LEFT_ALONE = {
    "a weight is not a constant": "%y = Mul(%x, @w)",
    "an output keeps its name": "%one = Constant(value=1.0)\n%y = Mul(%x, %one)",
    "the product with one constant is also used": """
        %two = Constant(value=2.0)
        %a = Mul(%x, %two)
        %b = Mul(%a, %two)
        %y = Add(%a, %b)
        """,
    "the result is infinite": "%a = Constant(value=0.0)\n%b = Rsqrt(%a)\n%y = Mul(%x, %b)",
    "the product would overflow f32": """
        %a = Constant(value=1e+30)
        %b = Mul(%x, %a)
        %y = Mul(%b, %a)
        """,
    "the product would vanish in f32": """
        %a = Constant(value=1e-30)
        %b = Mul(%x, %a)
        %y = Mul(%b, %a)
        """,
}


def whole(nodes: str) -> str:
    return f"{HEAD}{nodes}\noutput %y"


@pytest.mark.parametrize("case", CASES)
def test_text_before_and_after(case: str, becomes: Any) -> None:
    before, after = CASES[case]
    becomes(FoldConstants(), whole(before), whole(after))


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_kept(case: str, keeps_numbers: Any) -> None:
    keeps_numbers(FoldConstants(), whole(CASES[case][0]))


@pytest.mark.parametrize("case", CASES)
def test_second_run_changes_nothing(case: str, is_done_in_one_run: Any) -> None:
    is_done_in_one_run(FoldConstants(), whole(CASES[case][0]))


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_where(case: str, stays: Any) -> None:
    stays(FoldConstants(), whole(LEFT_ALONE[case]))
