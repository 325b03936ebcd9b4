"""Granite 3 and the dense ones of Granite 4: Llama's graph with scales of embedding, scores, residuals and logits.

Sources: Granite Team 2024, "Granite 3.0 Language Models"; Yang et al. 2022 (muP) for why the scales are there.
"""

from __future__ import annotations

from rlxc.ir import Graph
from rlxc.ir.ops import Silu
from rlxc.models.config import Config, Fields, original_context, read_config, read_experts, read_rope
from rlxc.models.layers import Builder
from rlxc.weights.registry import WeightRegistry

OF_OTHER_LAYERS = (
    "expert_shared_feed_forward_length",
    "ssm.conv_kernel",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
)
"""What files of Granite 4's dense models say of the layers of its other models; no tensor of theirs is used."""


def build(fields: Fields, registry: WeightRegistry, vocab: int, context: int) -> tuple[Config, Graph]:
    """The graph of one step."""
    config = read_config(fields, vocab)
    rope = read_rope(fields, config, interleaved=True, tensors=registry)
    # Elsewhere this key says how a model came about; here, that it has no rope.
    is_rotated = fields.truth("rope.scaling.finetuned", True)
    embedding_scale = fields.number("embedding_scale", 1.0)
    residual_scale = fields.number("residual_scale", 1.0)
    score_scale = fields.number("attention.scale", config.scale)
    logit_scale = 1 / fields.number("logit_scale")
    if read_experts(fields, low=0).count:
        fields.refuse("experts are not implemented for granite")
    fields.ignore(*OF_OTHER_LAYERS)
    fields.finish()

    b = Builder("granite", config, registry, fields)
    factors = b.rope_factors(rope, original_context(fields, config), context) if is_rotated else ()
    x = b.embed(embedding_scale)
    for i in range(config.layers):
        at, block = f"layers.{i}", f"blk.{i}"
        normed = b.norm(f"{at}.attn_norm", x, f"{block}.attn_norm", config.hidden)
        attended = b.attention(i, normed, rope if is_rotated else None, scale=score_scale, factors=factors)
        x = b.add(f"{at}.attn_sum", attended, x, residual_scale)
        normed = b.norm(f"{at}.ffn_norm", x, f"{block}.ffn_norm", config.hidden)
        x = b.add(f"{at}.ffn_sum", b.gated_mlp(i, normed, Silu()), x, residual_scale)
    return config, b.finish(x, scale=logit_scale)
