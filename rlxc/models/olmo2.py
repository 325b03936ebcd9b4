"""OLMo 2 and 3: norms after each block instead of before, and of all queries and all keys as a whole.

Sources: OLMo Team 2024, "2 OLMo 2 Furious"; OLMo 3 (2025) adds windows in three of four layers, whose rope stays
unscaled.
"""

from __future__ import annotations

from rlxc.ir import Graph, RopeSpec
from rlxc.ir.ops import Silu
from rlxc.models.config import Config, Fields, read_config, read_rope, windowed_layers
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab)
    full_rope = read_rope(fields, config, interleaved=False)
    window_rope = RopeSpec(full_rope.theta, full_rope.dim)
    window = fields.integer("attention.sliding_window", 0, low=0)
    windowed = windowed_layers(fields, config.layers, period=4)
    fields.finish()

    b = Builder("olmo2", config, registry, fields)
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        local = window > 0 and windowed[i]
        attended = b.attention(
            i,
            x,
            window_rope if local else full_rope,
            scale=config.scale,
            window=window if local else None,
            qk_norm="whole",
        )
        attended = b.norm(f"{at}.attn_post_norm", attended, f"{block}.post_attention_norm", config.hidden)
        x = b.add(f"{at}.attn_sum", attended, x)
        gated = b.gated_mlp(i, x, Silu())
        gated = b.norm(f"{at}.ffn_post_norm", gated, f"{block}.post_ffw_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", gated, x)
    return config, b.finish(x)
