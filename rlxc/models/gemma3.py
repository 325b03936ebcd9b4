"""Gemma 3 (text): five sliding-window layers to each full one, norms before and after each block.

Source: Gemma Team 2025, "Gemma 3 Technical Report". GGUF stores the norms' weights with their ``1 +`` added.
"""

from __future__ import annotations

import math

from rlxc.errors import UnsupportedError
from rlxc.ir import Graph, RopeSpec
from rlxc.ir.ops import Constant, Gelu, Mul
from rlxc.models.config import Config, Fields, read_config, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry

LAYERS_OF_27B = 62
"""Only the 27B model scales its scores by hidden size / heads instead of the head dim; nothing else tells."""


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab)
    full_rope = read_rope(fields, config, interleaved=False)
    window_rope = RopeSpec(fields.number("rope.freq_base_swa", 10000.0), full_rope.dim)
    window = fields.integer("attention.sliding_window", 0, low=0)
    period = fields.integer("attention.sliding_window_pattern", 6)
    if fields.has("final_logit_softcapping"):
        raise UnsupportedError("soft-capped logits are not implemented for gemma3", source=fields.source)
    fields.finish()
    score_size = config.hidden // config.heads if config.layers == LAYERS_OF_27B else config.head_dim

    b = Builder("gemma3", config, registry, fields.source)
    scale = b.emit("embedding_scale", Constant(math.sqrt(config.hidden)))
    x = b.emit("scaled_embedding", Mul(), b.embed(), scale)
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        local = window > 0 and (i + 1) % period != 0
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
    return config, b.finish(x)
