"""Only the wanted tokens go through what treats every token alike."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.passes.select_rows_early import SelectRowsEarly

HEAD = """
graph rows
input %x: f32[batch, seq, 8]
input %z: f32[batch, seq, 8]
input %rows: i64[rows]
weight @n: f32[8]
weight @w: q8_0[4, 8]
weight @v: f32[8, 8]
weight @b: f32[8]
"""

EXPERTS = """
        weight @wr: f32[3, 8]
        weight @wu: q8_0[3, 32, 8]
        weight @wd: q8_0[3, 8, 32]
        weight @wb: f32[3, 8]
        %a = LayerNorm(%x, @n; eps=1.0)
        %scores = MatMul(%a, @wr)
        %experts, %weights = Route(%scores; used=2)
        %up = ExpertMatMul(%a, @wu, %experts)
        %act = Silu(%up)
        %down = ExpertMatMul(%act, @wd, %experts, @wb)
        %mixed = MixExperts(%down, %weights)
        """

CASES = {
    "through a block, with the residual it adds": (
        """
        %a = Gelu(%x)
        %h = MatMul(%a, @v, @b)
        %r = Add(%h, %z)
        %norm = RmsNorm(%r, @n; eps=1.0)
        %act = Silu(%norm)
        %sum = Add(%act, %r)
        %last = SelectRows(%sum, %rows)
        %y = DequantMatMul(%last, @w)
        output %y
        """,
        """
        %x.rows = SelectRows(%x, %rows)
        %a.rows = Gelu(%x.rows)
        %h.rows = MatMul(%a.rows, @v, @b)
        %z.rows = SelectRows(%z, %rows)
        %r.rows = Add(%h.rows, %z.rows)
        %norm.rows = RmsNorm(%r.rows, @n; eps=1.0)
        %act.rows = Silu(%norm.rows)
        %last = Add(%act.rows, %r.rows)
        %y = DequantMatMul(%last, @w)
        output %y
        """,
    ),
    "a residual that is also used elsewhere is computed for all": (
        """
        %r = Silu(%x)
        %a = Gelu(%r)
        %sum = Add(%a, %r)
        %last = SelectRows(%sum, %rows)
        %y = Silu(%r)
        output %y
        output %last
        """,
        """
        %r = Silu(%x)
        %r.rows = SelectRows(%r, %rows)
        %a.rows = Gelu(%r.rows)
        %last = Add(%a.rows, %r.rows)
        %y = Silu(%r)
        output %y
        output %last
        """,
    ),
    "through ops of several results": (
        """
        %norm, %sum = AddRmsNorm(%x, %z, @n; eps=1.0)
        %gate, %up = Split(%norm; sizes=(4, 4))
        %act = Silu(%gate)
        %g = Mul(%act, %up)
        %h = MatMul(%g, @v4)
        %out = Add(%h, %sum)
        %last = SelectRows(%out, %rows)
        output %last
        """,
        """
        %x.rows = SelectRows(%x, %rows)
        %z.rows = SelectRows(%z, %rows)
        %norm.rows, %sum.rows = AddRmsNorm(%x.rows, %z.rows, @n; eps=1.0)
        %gate.rows, %up.rows = Split(%norm.rows; sizes=(4, 4))
        %act.rows = Silu(%gate.rows)
        %g.rows = Mul(%act.rows, %up.rows)
        %h.rows = MatMul(%g.rows, @v4)
        %last = Add(%h.rows, %sum.rows)
        output %last
        """,
    ),
    "vectors and constants are the same for every token": (
        """
        %two = Constant(value=2.0)
        %a = Mul(%two, %x)
        %c = Add(%a, @b)
        %last = SelectRows(%c, %rows)
        output %last
        """,
        """
        %two = Constant(value=2.0)
        %x.rows = SelectRows(%x, %rows)
        %a.rows = Mul(%two, %x.rows)
        %last = Add(%a.rows, @b)
        output %last
        """,
    ),
    "a mixture of experts": (
        f"""
        {EXPERTS}
        %last = SelectRows(%mixed, %rows)
        output %last
        """,
        """
        weight @wr: f32[3, 8]
        weight @wu: q8_0[3, 32, 8]
        weight @wd: q8_0[3, 8, 32]
        weight @wb: f32[3, 8]
        %x.rows = SelectRows(%x, %rows)
        %a.rows = LayerNorm(%x.rows, @n; eps=1.0)
        %scores.rows = MatMul(%a.rows, @wr)
        %experts.rows, %weights.rows = Route(%scores.rows; used=2)
        %up.rows = ExpertMatMul(%a.rows, @wu, %experts.rows)
        %act.rows = Silu(%up.rows)
        %down.rows = ExpertMatMul(%act.rows, @wd, %experts.rows, @wb)
        %last = MixExperts(%down.rows, %weights.rows)
        output %last
        """,
    ),
    "experts that are also read elsewhere": (
        f"""
        {EXPERTS}
        %c = SoftCap(%mixed; cap=2.0)
        %last = SelectRows(%c, %rows)
        output %last
        output %experts
        """,
        f"""
        {EXPERTS}
        %mixed.rows = SelectRows(%mixed, %rows)
        %last = SoftCap(%mixed.rows; cap=2.0)
        output %last
        output %experts
        """,
    ),
}

ROPE = "spec=RopeSpec(theta=10000.0, dim=4)"

LEFT_ALONE = {
    "rows are picked at once": "%last = SelectRows(%x, %rows)\noutput %last",
    "there is nothing to pick": "%last = Silu(%x)\noutput %last",
    "tokens are not treated alike": f"""
        input %p: i64[batch, seq]
        %a = Rope(%x, %p; heads=2, {ROPE})
        %last = SelectRows(%a, %rows)
        output %last
        """,
    "all tokens are an output": "%a = Silu(%x)\n%last = SelectRows(%a, %rows)\noutput %last\noutput %a",
    "other tokens are used too": "%a = Silu(%x)\n%last = SelectRows(%a, %rows)\n%y = Gelu(%a)\noutput %last\noutput %y",
    "rows are picked twice": """
        %a = Silu(%x)
        %last = SelectRows(%a, %rows)
        %c = Silu(%z)
        %more = SelectRows(%c, %rows)
        output %last
        output %more
        """,
    "a vector per token is added": """
        input %table: f32[seq, 8]
        %a = Add(%x, %table)
        %last = SelectRows(%a, %rows)
        output %last
        """,
    "one token's vector is added to all": """
        input %one: f32[batch, 1, 8]
        %a = Add(%x, %one)
        %last = SelectRows(%a, %rows)
        output %last
        """,
}


def whole(nodes: str) -> str:
    return f"{HEAD}weight @v4: f32[8, 4]\n{nodes}"


@pytest.mark.parametrize("case", CASES)
def test_text_before_and_after(case: str, becomes: Any) -> None:
    before, after = CASES[case]
    becomes(SelectRowsEarly(), whole(before), whole(after))


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_kept(case: str, keeps_numbers: Any) -> None:
    keeps_numbers(SelectRowsEarly(), whole(CASES[case][0]))


@pytest.mark.parametrize("case", CASES)
def test_second_run_changes_nothing(case: str, is_done_in_one_run: Any) -> None:
    is_done_in_one_run(SelectRowsEarly(), whole(CASES[case][0]))


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_where(case: str, stays: Any) -> None:
    stays(SelectRowsEarly(), whole(LEFT_ALONE[case]))
