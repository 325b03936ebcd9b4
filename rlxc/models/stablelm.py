"""StableLM: layer norms, and rotation of a part of each head.

The norms of queries and keys that StableLM 2 12B has, with weights for every head, are not implemented: its file is
refused for having tensors without a place.

Sources: Tow et al. 2023, "StableLM 3B 4E1T"; Bellagente et al. 2024, "Stable LM 2 1.6B".
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Silu
from rlxc.models.config import Config, Fields, read_config, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step.

    Attention and MLP are parallel, of the same norm, in files that have no norms for MLPs: the key that should say so
    is true in files of sequential models, too, and llama.cpp does not read it either.
    """
    config = read_config(fields, vocab, eps="attention.layer_norm_epsilon")
    rope = read_rope(fields, config, interleaved=False)
    fields.ignore("use_parallel_residual")
    fields.finish()

    b = Builder("stablelm", config, registry, fields)
    parallel = not any(b.has(f"blk.{i}.ffn_norm.weight") for i in range(config.layers))
    x = b.embed()
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.layer_norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(i, normed, rope, scale=config.scale)
        x = b.add(f"{at}.attn_sum", attended, x)
        if not parallel:
            normed = b.layer_norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", b.gated_mlp(i, normed, Silu()), x)
    return config, b.finish(x, layer_norm=True)
