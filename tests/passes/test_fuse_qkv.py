"""One matrix product for queries, keys and values."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.ir.target import TargetFeatures
from rlxc.passes.fuse_qkv import FuseQkv

HEAD = """
graph qkv
input %x: f32[batch, seq, 32]
input %z: f32[batch, seq, 32]
input %past.k: f32[batch, 1, past, 4]
input %past.v: f32[batch, 1, past, 4]
"""

WEIGHTS = """
weight @wq: {0}[8, 32]
weight @wk: {1}[4, 32]
weight @wv: {2}[4, 32]
"""

PRODUCTS = """
%l.q = DequantMatMul(%x, @wq)
%l.k = DequantMatMul(%x, @wk)
%l.v = DequantMatMul(%x, @wv)
"""

ATTENTION = """
%keys = KvAppend(%past.k, %l.k)
%values = KvAppend(%past.v, %l.v)
%y = Attention(%l.q, %keys, %values; heads=2, scale=0.5)
output %y
output %keys
output %values
"""

ROTATED = """
%p = Positions(%ids, %past.k)
%qn = RmsNorm(%l.q, @norm; eps=1.0, heads=2)
%kn = RmsNorm(%l.k, @norm; eps=1.0)
%qr = Rope(%qn, %p; heads=2, spec=RopeSpec(theta=10000.0, dim=4))
%kr = Rope(%kn, %p; heads=1, spec=RopeSpec(theta=10000.0, dim=4))
%keys = KvAppend(%past.k, %kr)
%values = KvAppend(%past.v, %l.v)
%y = Attention(%qr, %keys, %values; heads=2, scale=0.5)
output %y
"""

SPLIT = "%l.q, %l.k, %l.v = Split(%l.qkv; sizes=(8, 4, 4))"


def weights(q: str, k: str, v: str) -> str:
    return HEAD + WEIGHTS.format(q, k, v)


def stacked(q: str, k: str, v: str, whole: str) -> str:
    parts = f"@wq: {q}[8, 32], @wk: {k}[4, 32], @wv: {v}[4, 32]"
    return f"weight @l.qkv.weight: {whole}[16, 32] = concat({parts})\n"


BIASES = "weight @bq: f32[8]\nweight @bk: f32[4]\nweight @bv: f32[4]\n"
FLOATS = PRODUCTS.replace("Dequant", "")
BIASED = "".join(
    PRODUCTS.replace(f"@w{one})", f"@w{one}, @b{one})").splitlines(True)[i]
    for i, one in ((1, "q"), (2, "k"), (3, "v"))
)
EXTRA = "input %ids: i64[batch, seq]\nweight @norm: f32[4]\n"
PRODUCT = "%l.qkv = DequantMatMul(%x, @l.qkv.weight)\n"

CASES = {
    "one format": (
        weights("q4_k", "q4_k", "q4_k") + PRODUCTS + ATTENTION,
        weights("q4_k", "q4_k", "q4_k")
        + stacked("q4_k", "q4_k", "q4_k", "q4_k")
        + PRODUCT
        + SPLIT
        + ATTENTION,
    ),
    "formats of one storage widen": (
        weights("q5_0", "q5_0", "q8_0") + PRODUCTS + ATTENTION,
        weights("q5_0", "q5_0", "q8_0")
        + stacked("q5_0", "q5_0", "q8_0", "q8_0")
        + PRODUCT
        + SPLIT
        + ATTENTION,
    ),
    "floats": (
        weights("f16", "f16", "f16") + FLOATS + ATTENTION,
        weights("f16", "f16", "f16")
        + stacked("f16", "f16", "f16", "f16")
        + "%l.qkv = MatMul(%x, @l.qkv.weight)\n"
        + SPLIT
        + ATTENTION,
    ),
    "biases": (
        weights("q8_0", "q8_0", "q8_0") + BIASES + BIASED + ATTENTION,
        weights("q8_0", "q8_0", "q8_0")
        + BIASES
        + stacked("q8_0", "q8_0", "q8_0", "q8_0")
        + "weight @l.qkv.bias: f32[16] = concat(@bq: f32[8], @bk: f32[4], @bv: f32[4])\n"
        + "%l.qkv = DequantMatMul(%x, @l.qkv.weight, @l.qkv.bias)\n"
        + SPLIT
        + ATTENTION,
    ),
    "norm per head and rope in between": (
        weights("q8_0", "q8_0", "q8_0") + EXTRA + PRODUCTS + ROTATED,
        weights("q8_0", "q8_0", "q8_0")
        + EXTRA
        + stacked("q8_0", "q8_0", "q8_0", "q8_0")
        + PRODUCT
        + SPLIT
        + ROTATED,
    ),
    "what reads a product stands before the next": (
        weights("q8_0", "q8_0", "q8_0")
        + PRODUCTS.replace("%l.k =", "%more = Silu(%l.q)\n%l.k =")
        + ATTENTION,
        weights("q8_0", "q8_0", "q8_0")
        + stacked("q8_0", "q8_0", "q8_0", "q8_0")
        + PRODUCT
        + SPLIT
        + "\n%more = Silu(%l.q)\n"
        + ATTENTION,
    ),
    "values of another storage stay apart": (
        weights("q5_0", "q8_0", "q6_k") + PRODUCTS + ATTENTION,
        weights("q5_0", "q8_0", "q6_k")
        + "weight @l.qk.weight: q8_0[12, 32] = concat(@wq: q5_0[8, 32], @wk: q8_0[4, 32])\n"
        + """
        %l.qk = DequantMatMul(%x, @l.qk.weight)
        %l.q, %l.k = Split(%l.qk; sizes=(8, 4))
        %l.v = DequantMatMul(%x, @wv)
        """
        + ATTENTION,
    ),
    "keys are values too": (
        weights("q8_0", "q8_0", "q8_0") + PRODUCTS + ATTENTION.replace("%l.v", "%l.k"),
        weights("q8_0", "q8_0", "q8_0")
        + "weight @l.qk.weight: q8_0[12, 32] = concat(@wq: q8_0[8, 32], @wk: q8_0[4, 32])\n"
        + """
        %l.qk = DequantMatMul(%x, @l.qk.weight)
        %l.q, %l.k = Split(%l.qk; sizes=(8, 4))
        %l.v = DequantMatMul(%x, @wv)
        """
        + ATTENTION.replace("%l.v", "%l.k"),
    ),
}

ALIKE = weights("q8_0", "q8_0", "q8_0")
LEFT_ALONE = {
    "their formats differ: q4_k, q6_k, q8_0": weights("q4_k", "q6_k", "q8_0") + PRODUCTS + ATTENTION,
    # One storage, but no format whose name could stand for both.
    "their formats differ: q4_k, q4_1": weights("q4_k", "q4_1", "q6_k") + PRODUCTS + ATTENTION,
    "they read different inputs": ALIKE
    + PRODUCTS.replace("(%x, @wk)", "(%z, @wk)").replace("(%x, @wv)", "(%past.x, @wv)")
    + "input %past.x: f32[batch, seq, 32]\n"
    + ATTENTION,
    "a weight is also used elsewhere": ALIKE
    + PRODUCTS
    + "%more = DequantMatMul(%z, @wq)\n%other = DequantMatMul(%z, @wk)\noutput %more\noutput %other\n"
    + ATTENTION,
    "stay apart: a weight is also used elsewhere": ALIKE
    + PRODUCTS
    + "".join(f"%more{i} = DequantMatMul(%z, @w{i})\noutput %more{i}\n" for i in "qkv")
    + ATTENTION,
    "or not stored": HEAD
    + "input %wq: f32[8, 32]\ninput %wk: f32[4, 32]\nweight @wv: f32[4, 32]\n"
    + FLOATS.replace("@wq", "%wq").replace("@wk", "%wk")
    + ATTENTION,
}


@pytest.mark.parametrize("case", CASES)
def test_text_before_and_after(case: str, becomes: Any, features: TargetFeatures) -> None:
    before, after = CASES[case]
    becomes(FuseQkv(features), before, after)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_kept(case: str, keeps_numbers: Any, features: TargetFeatures) -> None:
    keeps_numbers(FuseQkv(features), CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_second_run_changes_nothing(case: str, is_done_in_one_run: Any, features: TargetFeatures) -> None:
    is_done_in_one_run(FuseQkv(features), CASES[case][0])


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone_with_the_reason(reason: str, stays: Any, features: TargetFeatures) -> None:
    stays(FuseQkv(features), LEFT_ALONE[reason], reason)


def test_mixed_formats_are_left_alone_by_a_target_that_stores_them_apart(stays: Any) -> None:
    text = weights("q5_0", "q8_0", "q4_0") + PRODUCTS + ATTENTION
    stays(FuseQkv(TargetFeatures()), text, "their formats differ: q5_0, q8_0, q4_0")


def test_a_product_without_the_bias_of_the_others_stays_apart(becomes: Any, features: TargetFeatures) -> None:
    text = ALIKE + BIASES + BIASED.replace(", @bv", "") + ATTENTION
    after = (
        ALIKE
        + BIASES
        + (
            "weight @l.qk.weight: q8_0[12, 32] = concat(@wq: q8_0[8, 32], @wk: q8_0[4, 32])\n"
            "weight @l.qk.bias: f32[12] = concat(@bq: f32[8], @bk: f32[4])\n"
            "%l.qk = DequantMatMul(%x, @l.qk.weight, @l.qk.bias)\n"
            "%l.q, %l.k = Split(%l.qk; sizes=(8, 4))\n"
            "%l.v = DequantMatMul(%x, @wv)\n"
        )
    )
    result = becomes(FuseQkv(features), text, after + ATTENTION)
    assert [miss.reason for miss in result.missed] == ["q, k and v stay apart: only some have a bias"]


def test_part_that_stays_apart_is_reported(becomes: Any, features: TargetFeatures) -> None:
    result = becomes(FuseQkv(features), *CASES["values of another storage stay apart"])
    assert [str(miss) for miss in result.missed] == [
        "%y = Attention: q, k and v stay apart: their formats differ: q5_0, q8_0, q6_k"
    ]


def test_attention_without_projections_is_left_alone(stays: Any, features: TargetFeatures) -> None:
    text = (
        HEAD
        + "input %q: f32[batch, seq, 8]\n%y = Attention(%q, %past.k, %past.v; heads=2, scale=0.5)\noutput %y"
    )
    stays(FuseQkv(features), text)
