"""Equal things are computed once."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.passes.share_common import ShareCommon

HEAD = """
graph shared
input %x: f32[batch, 4]
weight @w: f32[4]
"""

CASES = {
    "equal chains": (
        """
        %a = Silu(%x)
        %b = RmsNorm(%a, @w; eps=1.0)
        %c = Silu(%x)
        %d = RmsNorm(%c, @w; eps=1.0)
        %y = Add(%b, %d)
        output %y
        """,
        """
        %a = Silu(%x)
        %b = RmsNorm(%a, @w; eps=1.0)
        %y = Add(%b, %b)
        output %y
        """,
    ),
    "ops of several results": (
        """
        %a, %b = Split(%x; sizes=(2, 2))
        %c, %d = Split(%x; sizes=(2, 2))
        %y = Add(%a, %d)
        output %y
        """,
        """
        %a, %b = Split(%x; sizes=(2, 2))
        %y = Add(%a, %b)
        output %y
        """,
    ),
    "an output that repeats a value keeps its name": (
        """
        %a = Silu(%x)
        %y = Silu(%x)
        %b = Silu(%x)
        %z = Mul(%b, %y)
        output %y
        output %z
        """,
        """
        %a = Silu(%x)
        %y = Silu(%x)
        %z = Mul(%a, %y)
        output %y
        output %z
        """,
    ),
}

LEFT_ALONE = {
    "attributes differ": "%a = RmsNorm(%x, @w; eps=1.0)\n%b = RmsNorm(%x, @w; eps=2.0)\n%y = Add(%a, %b)\noutput %y",
    "ops differ": "%a = Silu(%x)\n%b = Gelu(%x)\n%y = Add(%a, %b)\noutput %y",
    "operands are in another order": "%a = Add(%x, @w)\n%b = Add(@w, %x)\n%y = Mul(%a, %b)\noutput %y",
    "both are outputs": "%y = Silu(%x)\n%z = Silu(%x)\noutput %y\noutput %z",
}


@pytest.mark.parametrize("case", CASES)
def test_text_before_and_after(case: str, becomes: Any) -> None:
    before, after = CASES[case]
    becomes(ShareCommon(), HEAD + before, HEAD + after)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_kept(case: str, keeps_numbers: Any) -> None:
    keeps_numbers(ShareCommon(), HEAD + CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_second_run_changes_nothing(case: str, is_done_in_one_run: Any) -> None:
    is_done_in_one_run(ShareCommon(), HEAD + CASES[case][0])


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_where(case: str, stays: Any) -> None:
    stays(ShareCommon(), HEAD + LEFT_ALONE[case])
