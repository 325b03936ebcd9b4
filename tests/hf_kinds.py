"""What kinds of tiny models `hf_folders` writes: their tensors, and what ``config.json`` says of each kind alone.

Names, shapes and keys are those of Transformers' ``modeling_*.py`` and ``configuration_*.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Named = tuple[str, tuple[int, ...]]

EXPERTS, USED = 5, 2
EXPERT_FFN = 64
"""Of Qwen's experts, which are smaller than its configuration's ``intermediate_size``."""


@dataclass(frozen=True)
class Kind:
    """A ``model_type``.

    Attributes:
        causal_lm: its class.
        keys: of ``config.json``, besides those of all kinds; None takes one of those away.
        layers: how many the tiny models have.
        head_dim: of their heads; where it differs from hidden size / heads, only the key of this name tells.
        tied: whether the embedding is the output where the configuration does not say.
    """

    causal_lm: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 2
    head_dim: int = 16
    tied: bool = False


_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32}
_NO_BIAS_KEY = {"attention_bias": None}
_QWEN = {**_SILU, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "llama": Kind("LlamaForCausalLM", {**_SILU, "pretraining_tp": 1}),
        "mistral": Kind("MistralForCausalLM", {**_SILU, **_NO_BIAS_KEY, "sliding_window": None}, head_dim=32),
        "mixtral": Kind(
            "MixtralForCausalLM",
            {
                **_SILU,
                **_NO_BIAS_KEY,
                "num_local_experts": EXPERTS,
                "num_experts_per_tok": USED,
                "router_aux_loss_coef": 0.02,
                "sliding_window": None,
            },
        ),
        "gemma2": Kind(
            "Gemma2ForCausalLM", {**_GELU, **_CAPS, "sliding_window": 8}, layers=3, head_dim=32, tied=True
        ),
        "gemma3_text": Kind(
            "Gemma3ForCausalLM",
            {**_GELU, **dict.fromkeys(_CAPS), "sliding_window": 8},
            layers=5,
            head_dim=32,
            tied=True,
        ),
        "qwen2": Kind("Qwen2ForCausalLM", {**_QWEN, **_NO_BIAS_KEY, "use_mrope": False}, layers=3),
        "qwen3": Kind("Qwen3ForCausalLM", _QWEN, head_dim=32),
        "qwen3_moe": Kind(
            "Qwen3MoeForCausalLM",
            {
                **_QWEN,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "moe_intermediate_size": EXPERT_FFN,
                "norm_topk_prob": True,
                "num_experts": EXPERTS,
                "num_experts_per_tok": USED,
                "output_router_logits": False,
                "router_aux_loss_coef": 0.001,
            },
            head_dim=32,
        ),
        "phi3": Kind(
            "Phi3ForCausalLM",
            {**_SILU, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 256},
        ),
        "granite": Kind(
            "GraniteForCausalLM",
            {
                **_SILU,
                "attention_multiplier": 0.3,
                "embedding_multiplier": 1.5,
                "logits_scaling": 0.7,
                "residual_multiplier": 0.6,
            },
        ),
        "olmo2": Kind("Olmo2ForCausalLM", _SILU, head_dim=32),
        "olmo3": Kind("Olmo3ForCausalLM", {**_SILU, "sliding_window": 8}, layers=4),
        "starcoder2": Kind(
            "Starcoder2ForCausalLM",
            {
                **_NO_BIAS_KEY,
                "rms_norm_eps": None,
                "hidden_act": "gelu_pytorch_tanh",
                "norm_epsilon": 1e-5,
                "norm_type": "layer_norm",
                "mlp_type": "default",
                "residual_dropout": 0.1,
                "embedding_dropout": 0.1,
                "sliding_window": 9,
            },
            tied=True,
        ),
        "stablelm": Kind(
            "StableLmForCausalLM",
            {
                **_SILU,
                **_NO_BIAS_KEY,
                "rms_norm_eps": None,
                "layer_norm_eps": 1e-5,
                "qk_layernorm": False,
                "hidden_dropout": 0.0,
            },
        ),
        "gpt_oss": Kind(
            "GptOssForCausalLM",
            {
                **_SILU,
                "experts_per_token": USED,
                "num_experts_per_tok": USED,
                "num_local_experts": EXPERTS,
                "sliding_window": 8,
                "swiglu_limit": 7.0,
            },
            layers=3,
            head_dim=32,
        ),
    }
)
BIAS_KEYS = {
    "starcoder2": ("use_bias",),
    "stablelm": ("use_qkv_bias",),
    "llama": ("attention_bias", "mlp_bias"),
}
BIAS_KEYS["granite"] = BIAS_KEYS["llama"]
"""What says whether there are biases, where it is another key than ``attention_bias`` alone."""

_LAYER_NORMS = ("starcoder2", "stablelm")


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a layer depend on; ``queries`` and ``keys`` are those of all heads."""

    hidden: int
    ffn: int
    heads: int
    head_dim: int
    queries: int
    keys: int


def norm_shapes(model_type: str, name: str, size: int) -> Iterator[Named]:
    """A norm: with a bias in some kinds of models."""
    yield f"{name}.weight", (size,)
    if model_type in _LAYER_NORMS:
        yield f"{name}.bias", (size,)


def layer_shapes(model_type: str, sizes: Sizes, bias: bool, parallel: bool) -> Iterator[Named]:
    """The names within a layer, and the shapes, of all its tensors; ``parallel`` layers of StableLM have one norm."""
    hidden, queries, keys = sizes.hidden, sizes.queries, sizes.keys
    linear: dict[str, tuple[tuple[int, int], bool]]
    if model_type == "phi3":
        linear = {"qkv_proj": ((queries + 2 * keys, hidden), False), "o_proj": ((hidden, queries), False)}
    else:
        inner = bias or model_type == "qwen2"
        outer = bias and model_type not in ("qwen2", "stablelm")
        linear = {f"{name}_proj": ((rows, hidden), inner) for name, rows in zip("qkv", (queries, keys, keys))}
        linear["o_proj"] = ((hidden, queries), outer)
    for name, (shape, biased) in linear.items():
        yield f"self_attn.{name}.weight", shape
        if biased:
            yield f"self_attn.{name}.bias", shape[:1]
    if model_type == "gpt_oss":
        yield "self_attn.sinks", (sizes.heads,)
    yield from _mlp_shapes(model_type, sizes, bias)
    norms = {} if model_type.startswith("olmo") else {"input_layernorm": hidden}
    if not parallel:
        norms["post_attention_layernorm"] = hidden
    if model_type.startswith("gemma"):
        norms["pre_feedforward_layernorm"] = hidden
    if model_type.startswith(("gemma", "olmo")):
        norms["post_feedforward_layernorm"] = hidden
    if model_type.startswith(("gemma3", "qwen3")):
        norms |= {"self_attn.q_norm": sizes.head_dim, "self_attn.k_norm": sizes.head_dim}
    if model_type.startswith("olmo"):
        norms |= {"self_attn.q_norm": queries, "self_attn.k_norm": keys}
    for name, size in norms.items():
        yield from norm_shapes(model_type, name, size)


def _mlp_shapes(model_type: str, sizes: Sizes, bias: bool) -> Iterator[Named]:
    hidden, ffn = sizes.hidden, sizes.ffn
    linear = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    biased = bias and model_type in ("llama", "granite", "starcoder2")
    if model_type == "phi3":
        linear = {"gate_up_proj": (2 * ffn, hidden), "down_proj": (hidden, ffn)}
    elif model_type == "starcoder2":
        linear = {"c_fc": (ffn, hidden), "c_proj": (hidden, ffn)}
    elif model_type == "mixtral":
        yield "block_sparse_moe.gate.weight", (EXPERTS, hidden)
        for i in range(EXPERTS):
            for name, shape in {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}.items():
                yield f"block_sparse_moe.experts.{i}.{name}.weight", shape
        return
    elif model_type == "qwen3_moe":
        yield "mlp.gate.weight", (EXPERTS, hidden)
        for i in range(EXPERTS):
            yield f"mlp.experts.{i}.gate_proj.weight", (EXPERT_FFN, hidden)
            yield f"mlp.experts.{i}.up_proj.weight", (EXPERT_FFN, hidden)
            yield f"mlp.experts.{i}.down_proj.weight", (hidden, EXPERT_FFN)
        return
    elif model_type == "gpt_oss":
        yield "mlp.router.weight", (EXPERTS, hidden)
        yield "mlp.router.bias", (EXPERTS,)
        yield "mlp.experts.gate_up_proj", (EXPERTS, hidden, 2 * ffn)
        yield "mlp.experts.gate_up_proj_bias", (EXPERTS, 2 * ffn)
        yield "mlp.experts.down_proj", (EXPERTS, ffn, hidden)
        yield "mlp.experts.down_proj_bias", (EXPERTS, hidden)
        return
    for name, shape in linear.items():
        yield f"mlp.{name}.weight", shape
        if biased:
            yield f"mlp.{name}.bias", shape[:1]
