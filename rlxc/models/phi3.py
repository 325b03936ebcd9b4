"""Phi 3, 3.5 and 4: q, k and v in one matrix, gate and up in another, LongRoPE for long contexts.

Sources: Abdin et al. 2024, "Phi-3 Technical Report"; Ding et al. 2024 (LongRoPE).
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Silu
from rlxc.models.config import Config, Fields, folder_windows, original_context, read_config, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step.

    All layers of GGUF files see the whole context, as in llama.cpp, whatever window they name: converters write the
    window of the published configuration, which is a shorter one than the context in two of the models only.
    """
    config = read_config(fields, vocab)
    rope = read_rope(fields, config, interleaved=False, tensors=registry)
    fields.ignore("attention.sliding_window")
    windows = folder_windows(fields, config.layers)
    fields.finish()

    b = Builder("phi3", config, registry, fields)
    factors = b.rope_factors(rope, original_context(fields, config), context)
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(i, normed, rope, scale=config.scale, window=windows[i], factors=factors)
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", b.gated_mlp(i, normed, Silu(), fused=True), x)
    return config, b.finish(x)
