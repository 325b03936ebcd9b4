"""A side path for adapters next to matrix products and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlxc.ir import Graph, interp, parse
from rlxc.passes import Pass, PassResult
from rlxc.passes.split_lora import SplitLora

Becomes = Callable[[Pass, str, str], PassResult]

STACKED = """
    graph attention
    input %x: f32[batch, seq, 32]
    weight @blk.0.attn_v.weight: q6_k[8, 32]
    weight @qk.weight: q8_0[24, 32] = concat(@blk.0.attn_q.weight: q8_0[16, 32], @blk.0.attn_k.weight: q8_0[8, 32])
    %v = DequantMatMul(%x, @blk.0.attn_v.weight)
    %qk = DequantMatMul(%x, @qk.weight)
    output %v
    output %qk
    """.replace("q6_k", "q5_0")

TIED = """
    graph tied
    input %ids: i64[batch, seq]
    weight @token_embd.weight: q8_0[16, 32]
    %x = Embed(%ids, @token_embd.weight)
    %logits = DequantMatMul(%x, @token_embd.weight)
    output %logits
    """


def test_products_of_one_input_share_one_narrow_side(becomes: Becomes) -> None:
    after = """
    graph attention
    input %x: f32[batch, seq, 32]
    input %lora_scales: f32[batch, rank]
    input %lora.blk.0.attn_v.down: f32[batch, 3, rank, 32]
    input %lora.blk.0.attn_v.up: f32[batch, 8, rank]
    input %lora.blk.0.attn_q.up: f32[batch, 24, rank]
    weight @blk.0.attn_v.weight: q5_0[8, 32]
    weight @qk.weight: q8_0[24, 32] = concat(@blk.0.attn_q.weight: q8_0[16, 32], @blk.0.attn_k.weight: q8_0[8, 32])
    %lora.blk.0.attn_v.down.u = LoraDown(%x, %lora.blk.0.attn_v.down, %lora_scales)
    %v = LoraMatMul(%x, @blk.0.attn_v.weight, %lora.blk.0.attn_v.down.u, %lora.blk.0.attn_v.up; sizes=(8,))
    %qk = LoraMatMul(%x, @qk.weight, %lora.blk.0.attn_v.down.u, %lora.blk.0.attn_q.up; sizes=(16, 8), first=1)
    output %v
    output %qk
    """
    result = becomes(SplitLora({"blk.0.attn_k.weight", "blk.0.attn_v.weight"}), STACKED, after)
    (group,) = result.facts["lora"]
    assert [part["tensor"] for part in group["parts"]] == [
        "blk.0.attn_v.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
    ]
    assert group["parts"][2] == {
        "tensor": "blk.0.attn_k.weight",
        "rows": 8,
        "columns": 32,
        "up": "lora.blk.0.attn_q.up",
        "first_row": 16,
        "up_rows": 24,
    }


def test_product_that_no_adapter_may_change_stays(becomes: Becomes) -> None:
    becomes(SplitLora({"blk.7.attn_q.weight"}), STACKED, STACKED)


def test_matrix_that_is_also_the_table_is_the_output(becomes: Becomes) -> None:
    after = """
    graph tied
    input %ids: i64[batch, seq]
    input %lora_scales: f32[batch, rank]
    input %lora.token_embd.down: f32[batch, 16, rank]
    input %lora.token_embd.up: f32[batch, 32, rank]
    input %lora.output.down: f32[batch, 1, rank, 32]
    input %lora.output.up: f32[batch, 16, rank]
    weight @token_embd.weight: q8_0[16, 32]
    %x.base = Embed(%ids, @token_embd.weight)
    %x = LoraEmbed(%x.base, %ids, %lora.token_embd.down, %lora_scales, %lora.token_embd.up)
    %lora.output.down.u = LoraDown(%x, %lora.output.down, %lora_scales)
    %logits = LoraMatMul(%x, @token_embd.weight, %lora.output.down.u, %lora.output.up; sizes=(16,))
    output %logits
    """
    becomes(SplitLora({"token_embd.weight", "output.weight"}), TIED, after)


def test_embedding_alone_leaves_the_output_as_it_is(becomes: Becomes) -> None:
    result = SplitLora({"token_embd.weight"}).run(parse(TIED))
    assert [node.op.name for node in result.graph.nodes] == ["Embed", "LoraEmbed", "DequantMatMul"]


def test_result_is_the_base_plus_what_the_adapters_add() -> None:
    graph = parse(STACKED)
    split = SplitLora({"blk.0.attn_q.weight"}).run(graph).graph
    rng = np.random.default_rng(0)
    weights = {f"blk.0.attn_{n}.weight": rng.normal(size=(r, 32)) for n, r in (("q", 16), ("k", 8), ("v", 8))}
    x, a, b = rng.normal(size=(2, 3, 32)), rng.normal(size=(2, 2, 5, 32)), rng.normal(size=(2, 24, 5))
    scales = rng.normal(size=(2, 5))
    feeds = {"x": x, "lora.blk.0.attn_q.down": a, "lora.blk.0.attn_q.up": b, "lora_scales": scales}
    found = _run(split, feeds, weights)["qk"]
    expected = _run(graph, {"x": x}, weights)["qk"]
    for sequence in range(2):
        for part, rows in enumerate((slice(0, 16), slice(16, 24))):
            delta = b[sequence, rows] @ np.diag(scales[sequence]) @ a[sequence, part]
            expected[sequence, :, rows] += x[sequence] @ delta.T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # float64


def _run(graph: Graph, feeds: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    return interp.run(graph, feeds, weights.__getitem__)
