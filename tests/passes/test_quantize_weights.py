"""Weights encoded anew, as recipes."""

from __future__ import annotations

from collections.abc import Callable

from rlxc.dtypes import DType
from rlxc.ir import parse
from rlxc.passes import Pass, PassResult
from rlxc.passes.quantize_weights import QuantizeWeights

BEFORE = """
    graph tied
    input %ids: i64[batch, seq]
    weight @table: bf16[16, 256]
    weight @output: bf16[16, 256] = alias(@table)
    weight @w: f32[256, 256]
    weight @norm: f32[256]
    %x = Embed(%ids, @table)
    %y = MatMul(%x, @w)
    %n = RmsNorm(%y, @norm; eps=1e-06)
    %logits = MatMul(%n, @output)
    output %logits
    """


def test_weights_are_encoded_and_read_packed(becomes: Callable[[Pass, str, str], PassResult]) -> None:
    after = """
    graph tied
    input %ids: i64[batch, seq]
    weight @table: q6_k[16, 256] = encode(@table.given: bf16[16, 256] = source("table"))
    weight @output: q6_k[16, 256] = alias(@table)
    weight @w: q4_k[256, 256] = encode(@w.given: f32[256, 256] = source("w"))
    weight @norm: f32[256]
    %x = Embed(%ids, @table)
    %y = DequantMatMul(%x, @w)
    %n = RmsNorm(%y, @norm; eps=1e-06)
    %logits = DequantMatMul(%n, @output)
    output %logits
    """
    becomes(QuantizeWeights({"table": DType.Q6_K, "w": DType.Q4_K}), BEFORE, after)


def test_weight_that_has_the_format_stays() -> None:
    result = QuantizeWeights({"table": DType.BF16}).run(parse(BEFORE))
    assert not result.modified
    assert result.graph == parse(BEFORE)


def test_packed_weight_can_become_a_float_one(becomes: Callable[[Pass, str, str], PassResult]) -> None:
    before = """
    graph linear
    input %x: f32[batch, seq, 32]
    weight @w: q8_0[6, 32]
    %y = DequantMatMul(%x, @w)
    output %y
    """
    after = """
    graph linear
    input %x: f32[batch, seq, 32]
    weight @w: f16[6, 32] = encode(@w.given: q8_0[6, 32] = source("w"))
    %y = MatMul(%x, @w)
    output %y
    """
    becomes(QuantizeWeights({"w": DType.F16}), before, after)
