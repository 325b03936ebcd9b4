"""StarCoder 2: layer norms and biases throughout, and an MLP without gate.

Source: Lozhkov et al. 2024. GGUF files say nothing of the sliding window that these models were trained with;
llama.cpp, too, lets every token see all that came before. Hugging Face folders name it.
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Gelu
from rlxc.models.config import Config, Fields, folder_windows, read_config, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab, eps="attention.layer_norm_epsilon")
    rope = read_rope(fields, config, interleaved=False)
    windows = folder_windows(fields, config.layers)
    fields.finish()

    b = Builder("starcoder2", config, registry, fields)
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.layer_norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(i, normed, rope, scale=config.scale, window=windows[i])
        x = b.add(f"{at}.attn_sum", attended, x)
        normed = b.layer_norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", b.mlp(i, normed, Gelu()), x)
    return config, b.finish(x, layer_norm=True)
