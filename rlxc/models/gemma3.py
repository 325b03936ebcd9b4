"""Gemma 3 (text): five sliding-window layers to each full one, norms before and after each block.

Source: Gemma Team 2025, "Gemma 3 Technical Report". GGUF stores the norms' weights with their ``1 +`` added.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rlxc.ir import Graph
from rlxc.ir.ops import Gelu
from rlxc.models.config import Config, Fields, read_config, read_rope, windowed_layers
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry

LAYERS_OF_27B = 62
"""Only the 27B model scales its scores by hidden size / heads instead of the head dim; nothing else tells."""


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab)
    full_rope = read_rope(fields, config, interleaved=False)
    window_theta = fields.number("rope.freq_base_swa", 10000.0)
    window_rope = replace(full_rope, theta=window_theta, factor=1.0, yarn=None)
    window = fields.integer("attention.sliding_window", 0, low=0)
    windowed = windowed_layers(fields, config.layers, period=6)
    cap = "final_logit_softcapping"
    logit_cap = fields.number(cap) if fields.has(cap) else None
    fields.finish()
    score_size = config.hidden // config.heads if config.layers == LAYERS_OF_27B else config.head_dim

    b = Builder("gemma3", config, registry, fields)
    x = b.embed(math.sqrt(config.hidden))
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        local = window > 0 and windowed[i]
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(
            i,
            normed,
            window_rope if local else full_rope,
            scale=score_size**-0.5,
            window=window if local else None,
            qk_norm="head",
        )
        attended = b.norm(f"{at}.attn_post_norm", attended, f"{block}.post_attention_norm", config.hidden)
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        gated = b.gated_mlp(i, normed, Gelu())
        gated = b.norm(f"{at}.ffn_post_norm", gated, f"{block}.post_ffw_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", gated, x)
    return config, b.finish(x, soft_cap=logit_cap)
