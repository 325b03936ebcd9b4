"""The text of a whole decoder layer, with every op that models need."""

from __future__ import annotations

LAYER = """
graph layer
input %input_ids: i64[batch, seq]
input %logit_rows: i64[rows]
input %past_key_values.0.key: f32[batch, 2, {capacity}, 16]
input %past_key_values.0.value: f32[batch, 2, {capacity}, 16]
input %past_length: i32[]
weight @table: q8_0[96, 256]
weight @norm: f32[256]
weight @head_norm: f32[16]
weight @factors: f32[8]
weight @qkv: q4_k[128, 256]
weight @o: q5_0[256, 64]
weight @gate_up: q5_k[512, 256]
weight @down: bf16[256, 256]
%embedded = Embed(%input_ids, @table)
%scale = Constant(; value=16.0)
%x = Mul(%embedded, %scale)
%normed = RmsNorm(%x, @norm; eps=1e-06)
%projected = DequantMatMul(%normed, @qkv)
%q, %k, %v = Split(%projected; sizes=(64, 32, 32))
%qn = RmsNorm(%q, @head_norm; eps=1e-06, heads=4)
%kn = RmsNorm(%k, @head_norm; eps=1e-06, heads=2)
%heads, %present.0.key, %present.0.value = GroupQueryAttention({cached}; {attention})
%attended = DequantMatMul(%heads, @o)
%sum = Add(%attended, %x)
%last = SelectRows(%sum, %logit_rows)
%both = DequantMatMul(%last, @gate_up)
%gated = Glu(%both; activation='{activation}')
%out = MatMul(%gated, @down)
%logits = DequantMatMul(%out, @table)
output %logits
output %present.0.key
output %present.0.value
"""
CAPACITY = 64


def layer(activation: str = "gelu") -> str:
    """The layer on a cache of 64 positions; its gate is ``gelu`` or ``silu``."""
    cached = "%qn, %kn, %v, %past_key_values.0.key, %past_key_values.0.value, %past_length, @factors"
    attention = "heads=4, scale=0.25, layout='linear', rope=RopeSpec(theta=10000.0, dim=16)"
    return LAYER.format(capacity=CAPACITY, activation=activation, cached=cached, attention=attention)
