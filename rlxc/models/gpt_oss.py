"""gpt-oss: a mixture of experts with clamped gates, attention sinks, and a window in every other layer.

Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", and its reference implementation. Of GGUF
files YaRN's ramp begins and ends at whole channels, as in llama.cpp; of Hugging Face folders it does not, as in the
reference implementation, and comes as factors of single frequencies.
"""

from __future__ import annotations

from dataclasses import replace

from rlxc.ir import Graph
from rlxc.ir.ops import ClampedSwiglu
from rlxc.models.config import (
    Config,
    Fields,
    original_context,
    read_config,
    read_experts,
    read_rope,
    windowed_layers,
)
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry

ACTIVATION = ClampedSwiglu(alpha=1.702, limit=7.0)
"""The same in all models; no metadata key tells."""


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab)
    full_rope = read_rope(fields, config, interleaved=False)
    fields.require(
        full_rope.dim == config.head_dim,
        f"metadata {fields.prefix}rope.dimension_count = {full_rope.dim} is not a head of {config.head_dim}",
    )
    window_rope = replace(full_rope, theta=fields.number("rope.freq_base_swa", full_rope.theta))
    window = fields.integer("attention.sliding_window")
    windowed = windowed_layers(fields, config.layers, 2)
    experts = read_experts(fields)
    original = original_context(fields, config)
    ffn = fields.integer("expert_feed_forward_length")
    fields.finish()

    b = Builder("gpt-oss", config, registry, fields)
    factors = b.rope_factors(full_rope, original, context)
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(
            i,
            normed,
            window_rope if windowed[i] else full_rope,
            scale=config.scale,
            window=window if windowed[i] else None,
            sinks=True,
            factors=factors,
        )
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.post_attention_norm", config.hidden)
        mixed = b.experts(i, normed, experts.count, experts.used, ffn, ACTIVATION)
        x = b.add(f"{at}.ffn_sum", mixed, x)
    return config, b.finish(x)
