"""Gemma 2: every other layer looks through a window; scores and logits are soft-capped; norms around each block.

Source: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size". GGUF stores the norms' weights
with their ``1 +`` added.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rlxc.ir import Graph
from rlxc.ir.ops import Gelu
from rlxc.models.config import Config, Fields, read_config, read_rope, windowed_layers
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry

LAYERS_OF_27B = 46
"""Only the 27B model scales its scores by hidden size / heads instead of the head dim; nothing else tells."""


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab)
    rope = read_rope(fields, config, interleaved=False)
    window_rope = replace(rope, theta=fields.number("rope.freq_base_swa", rope.theta))
    window = fields.integer("attention.sliding_window", 4096)
    windowed = windowed_layers(fields, config.layers, period=2)
    score_cap = fields.number("attn_logit_softcapping", 50.0)
    logit_cap = fields.number("final_logit_softcapping", 30.0)
    fields.finish()
    score_size = config.hidden // config.heads if config.layers == LAYERS_OF_27B else config.head_dim

    b = Builder("gemma2", config, registry, fields)
    x = b.embed(math.sqrt(config.hidden))
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(
            i,
            normed,
            window_rope if windowed[i] else rope,
            scale=score_size**-0.5,
            window=window if windowed[i] else None,
            soft_cap=score_cap,
        )
        attended = b.norm(f"{at}.attn_post_norm", attended, f"{block}.post_attention_norm", config.hidden)
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        gated = b.gated_mlp(i, normed, Gelu())
        gated = b.norm(f"{at}.ffn_post_norm", gated, f"{block}.post_ffw_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", gated, x)
    return config, b.finish(x, soft_cap=logit_cap)
