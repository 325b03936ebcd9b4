"""Qwen 3 with a mixture of experts in every layer; all else is as in Qwen 3.

Source: Qwen Team 2025, "Qwen3 Technical Report".
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Silu
from rlxc.models.config import Config, Fields, folder_windows, read_config, read_experts, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step. The weights of a token's experts sum to one, as in all models of this architecture."""
    config = read_config(fields, vocab)
    rope = read_rope(fields, config, interleaved=False)
    experts = read_experts(fields)
    ffn = fields.integer("expert_feed_forward_length", max(1, config.ffn // experts.used))
    windows = folder_windows(fields, config.layers)
    fields.finish()

    b = Builder("qwen3moe", config, registry, fields)
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(i, normed, rope, scale=config.scale, window=windows[i], qk_norm="head")
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        mixed = b.experts(i, normed, experts.count, experts.used, ffn, Silu())
        x = b.add(f"{at}.ffn_sum", mixed, x)
    return config, b.finish(x)
