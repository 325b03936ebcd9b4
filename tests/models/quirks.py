"""What single keys and tensors of an architecture mean, each in a tiny model of its own, with llama.cpp's logits.

`VARIANTS` in ``tiny.py`` are whole models, compiled on every backend. These are run by the interpreter alone: they
show that a model's definition reads its file as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny import TEXT, Tiny

ROWS = slice(len(TEXT) - 3, len(TEXT))
"""The positions whose logits are stored; they depend on all others."""


@dataclass(frozen=True)
class Quirk:
    """A model, changes of its metadata that the comparison must notice, and what its tensors of one element are."""

    model: Tiny
    mistake: dict[str, Any]
    scales: Mapping[str, float] = field(default_factory=dict)

    def write(self, path: Path, metadata: dict[str, Any] | None = None) -> Path:
        """The file of the model."""
        tensors = {name: np.array([value], np.float32) for name, value in self.scales.items()}
        return self.model.write(path, metadata=metadata, tensors=tensors)


def _tiny(architecture: str, seed: int, metadata: dict[str, Any] | None = None, **sizes: Any) -> Tiny:
    small = {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "seed": seed, **sizes}
    return Tiny(architecture, metadata=metadata or {}, **small)


_GRANITE_4 = {
    "attention.head_count_kv": [2, 2],
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_feed_forward_length": 96,
    "rope.scaling.finetuned": True,
    "ssm.conv_kernel": 4,
    "ssm.group_count": 1,
    "ssm.inner_size": 128,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
}
"""What converters write for Granite 4's dense models besides."""

_EXPERTS = {"experts": 5, "experts_used": 2, "expert_ffn": 96, "bias": True}

QUIRKS = {
    "gemma2 caps scores at 50 and logits at 30": Quirk(
        _tiny("gemma2", 1, {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        {"final_logit_softcapping": 3.0},
    ),
    "gemma2 has windows in even layers": Quirk(
        _tiny("gemma2", 2, window=8), {"attention.sliding_window_pattern": 3}
    ),
    "gemma2 has windows by a pattern": Quirk(
        _tiny("gemma2", 3, {"attention.sliding_window_pattern": 3}, window=8),
        {"attention.sliding_window_pattern": 2},
    ),
    "gemma2 rotates windowed layers by a theta of their own": Quirk(
        _tiny("gemma2", 4, {"rope.freq_base_swa": 500.0}, window=8, rope_scaling="linear"),
        {"rope.freq_base_swa": None},
    ),
    "gemma3 caps logits": Quirk(
        _tiny("gemma3", 5, {"final_logit_softcapping": 2.0}, window=8), {"final_logit_softcapping": None}
    ),
    "gemma3 has windows by a pattern": Quirk(
        _tiny("gemma3", 6, {"attention.sliding_window_pattern": 3}, window=8),
        {"attention.sliding_window_pattern": None},
    ),
    "gemma3 has windows where an array says so": Quirk(
        _tiny("gemma3", 7, {"attention.sliding_window_pattern": [True, False] * 3 + [False]}, window=8),
        {"attention.sliding_window_pattern": 2},
    ),
    "gemma3 multiplies windowed layers' angles, too": Quirk(
        _tiny("gemma3", 8, {"rope.scaling.attn_factor": 1.3}, window=8, rope_scaling="yarn"),
        {"rope.scaling.attn_factor": None},
    ),
    "gemma2 of 46 layers scales scores by its own measure": Quirk(
        _tiny("gemma2", 25, layers=46, heads=2, head_dim=64, window=8), {"attention.sliding_window": 4}
    ),
    "gemma3 of 62 layers scales scores by its own measure": Quirk(
        _tiny("gemma3", 26, layers=62, heads=2, head_dim=64, window=8), {"attention.sliding_window": 4}
    ),
    "gpt-oss has windows by a pattern": Quirk(
        _tiny("gpt-oss", 28, {"attention.sliding_window_pattern": 3}, layers=4, window=8, **_EXPERTS),
        {"attention.sliding_window_pattern": 2},
    ),
    "gpt-oss has windows where an array says so": Quirk(
        _tiny("gpt-oss", 29, {"attention.sliding_window_pattern": [False, True]}, window=8, **_EXPERTS),
        {"attention.sliding_window_pattern": None},
    ),
    "gpt-oss rotates windowed layers by a theta of their own": Quirk(
        _tiny("gpt-oss", 30, {"rope.freq_base_swa": 500.0}, window=8, rope_scaling="yarn", **_EXPERTS),
        {"rope.freq_base_swa": None},
    ),
    "granite has no rope if the key says so": Quirk(
        _tiny("granite", 9, {"rope.scaling.finetuned": False}), {"rope.scaling.finetuned": True}
    ),
    "granite scales scores as usual without the key": Quirk(
        _tiny("granite", 10, {"attention.scale": None}), {"attention.scale": 0.2}
    ),
    "granite scales embedding and residuals by 1 without the keys": Quirk(
        _tiny("granite", 11, {"embedding_scale": None, "residual_scale": None}), {"residual_scale": 0.5}
    ),
    "granite 4 describes layers that it has not": Quirk(
        _tiny("granite", 12, _GRANITE_4, tied=False, head_dim=32), {"logit_scale": 2.0}
    ),
    "granite has factors for long contexts": Quirk(
        _tiny("granite", 13, rope_scaling="longrope"), {"rope.scaling.original_context_length": 4096}
    ),
    "llama multiplies angles that are scaled linearly": Quirk(
        _tiny("llama", 14, {"rope.scaling.attn_factor": 1.3}, rope_scaling="linear"),
        {"rope.scaling.attn_factor": None},
    ),
    "llama ignores a factor where nothing is scaled": Quirk(
        _tiny("llama", 15, {"rope.scaling.type": "none"}, rope_scaling="linear"),
        {"rope.scaling.type": "linear"},
    ),
    "llama has factors for long contexts": Quirk(
        _tiny("llama", 16, rope_scaling="longrope"), {"rope.scaling.original_context_length": 4096}
    ),
    "llama scales products": Quirk(
        _tiny("llama", 27, bias=True),
        {"rope.freq_base": 5e3},
        {
            **{f"blk.0.{name}.scale": 0.5 for name in ("attn_q", "attn_k", "attn_v", "ffn_down")},
            **{f"blk.1.{name}.scale": 2.0 for name in ("attn_output", "ffn_up", "ffn_gate")},
            "blk.0.attn_q.input_scale": 7.0,
        },
    ),
    "llama has experts": Quirk(
        _tiny("llama", 17, experts=5, experts_used=2, expert_ffn=96), {"expert_used_count": 1}
    ),
    "olmo2 has windows where an array says so, and scales the other layers' rope": Quirk(
        _tiny(
            "olmo2",
            18,
            {"attention.sliding_window_pattern": [True, False, True, True], "rope.scaling.attn_factor": 1.3},
            layers=4,
            window=8,
            rope_scaling="yarn",
        ),
        {"attention.sliding_window_pattern": None},
    ),
    "olmo2 has windows in three of four layers": Quirk(
        _tiny("olmo2", 19, layers=5, window=8, rope_scaling="linear"),
        {"attention.sliding_window_pattern": 2},
    ),
    "phi3 has factors for long contexts, and no window": Quirk(
        _tiny("phi3", 20, {"attention.sliding_window": 5}, rope_scaling="longrope"),
        {"rope.scaling.original_context_length": 256},
    ),
    "phi3 has factors for the original context": Quirk(
        _tiny("phi3", 21, context=512, rope_scaling="longrope"),
        {"rope.scaling.original_context_length": 255},
    ),
    "phi3 rotates a part of each head": Quirk(
        _tiny("phi3", 22, rope_scaling="longrope", rope_dim=12, bias=True, tied=False),
        {"rope.scaling.attn_factor": None},
    ),
    "qwen2 has biases, and YaRN": Quirk(
        _tiny("qwen2", 23, rope_scaling="yarn", bias=True), {"rope.scaling.type": "linear"}
    ),
    "qwen3 has heads of a size of their own": Quirk(
        _tiny("qwen3", 24, heads=3, kv_heads=1, head_dim=32), {"rope.freq_base": 1e4}
    ),
    "qwen3moe's experts share the MLP's width where they have no key of their own": Quirk(
        _tiny("qwen3moe", 31, {"expert_feed_forward_length": None}, ffn=192, **{**_EXPERTS, "bias": False}),
        {"expert_used_count": 1, "expert_feed_forward_length": 96},
    ),
    "stablelm is parallel without norms of the MLPs, whatever its key says": Quirk(
        _tiny("stablelm", 32, {"use_parallel_residual": False}, parallel=True, rope_dim=8),
        {"rope.dimension_count": 16},
    ),
    "stablelm is sequential with norms of the MLPs, whatever its key says": Quirk(
        _tiny("stablelm", 33, {"use_parallel_residual": True}, rope_dim=8), {"rope.dimension_count": 16}
    ),
}
