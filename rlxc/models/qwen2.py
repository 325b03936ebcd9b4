"""Qwen 2 and 2.5, and what was distilled into them: Llama's graph with biases of q, k and v.

Source: Qwen Team 2024, "Qwen2 Technical Report".
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Silu
from rlxc.models.config import Config, Fields, folder_windows, read_config, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab)
    rope = read_rope(fields, config, interleaved=False)
    windows = folder_windows(fields, config.layers)
    fields.finish()

    b = Builder("qwen2", config, registry, fields)
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        x = b.add(f"{at}.attn_sum", b.attention(i, normed, rope, scale=config.scale, window=windows[i]), x)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", b.gated_mlp(i, normed, Silu()), x)
    return config, b.finish(x)
