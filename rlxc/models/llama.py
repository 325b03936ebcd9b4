"""Llama and the many models that share its graph (Mistral, SmolLM, TinyLlama, ...).

Sources: Touvron et al. 2023; Llama 3.1's per-frequency rope factors come as ``rope_freqs.weight``.
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Silu
from rlxc.models.config import Config, Fields, read_config, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step. GGUF stores Llama's q and k permuted, so that rope pairs neighbouring channels."""
    config = read_config(fields, vocab)
    rope = read_rope(fields, config, interleaved=True)
    fields.finish()

    b = Builder("llama", config, registry, fields.source)
    factors = (b.weight("rope_freqs.weight", rope.dim // 2),) if b.has("rope_freqs.weight") else ()
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(i, normed, rope, scale=config.scale, factors=factors)
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", b.gated_mlp(i, normed, Silu()), x)
    return config, b.finish(x)
