"""Llama and the many models that share its graph: Mistral, SmolLM, TinyLlama, and Mixtral with its experts.

Sources: Touvron et al. 2023; Jiang et al. 2024 (Mixtral); Llama 3.1's per-frequency rope factors come as
``rope_freqs.weight``.
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Silu
from rlxc.models.config import (
    Config,
    Fields,
    folder_windows,
    original_context,
    read_config,
    read_experts,
    read_rope,
)
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry

LAYOUT = "Meta AI original pth"
"""What old files say of the order of q's and k's channels; it is every file's."""


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step. GGUF stores Llama's q and k permuted, so that rope pairs neighbouring channels."""
    config = read_config(fields, vocab)
    rope = read_rope(fields, config, interleaved=True, tensors=registry)
    experts = read_experts(fields, low=0)
    layout = fields.text("tensor_data_layout", LAYOUT)
    if layout != LAYOUT:
        fields.refuse(f"tensor data layout {layout!r} is not implemented")
    windows = folder_windows(fields, config.layers)
    fields.finish()

    b = Builder("llama", config, registry, fields)
    factors = b.rope_factors(rope, original_context(fields, config), context)
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(i, normed, rope, scale=config.scale, window=windows[i], factors=factors)
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        if experts.count:
            mlp = b.experts(i, normed, experts.count, experts.used, config.ffn, Silu())
        else:
            mlp = b.gated_mlp(i, normed, Silu())
        x = b.add(f"{at}.ffn_sum", mlp, x)
    return config, b.finish(x)
