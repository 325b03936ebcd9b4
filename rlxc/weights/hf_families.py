"""Each ``model_type`` of Hugging Face that is implemented: defaults of its class, its own keys, its layers' tensors.

Meanings and defaults: Transformers' ``configuration_*.py`` and ``modeling_*.py`` of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from rlxc.weights.gguf_header import MetaValue
from rlxc.weights.hf_keys import Keys
from rlxc.weights.hf_parts import (
    FULL,
    Sizes,
    Traits,
    experts,
    gated_mlp,
    linear,
    norms,
    one_window,
    projections,
    window_size,
    windows,
)
from rlxc.weights.hf_rope import FACTOR_SCALINGS, Rope, RopeClass, gemma3_rope, olmo3_rope, one_rope

RMS_EPS, LAYER_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
"""The GGUF of no other Gemma scales scores by other than the head dim; see `rlxc.models.gemma3`."""
_GELU = "gelu_pytorch_tanh"
_FACTORS = RopeClass(scalings=FACTOR_SCALINGS)


@dataclass(frozen=True)
class Family:
    """What a ``model_type`` stands for.

    Attributes:
        architecture: GGUF's name for it.
        causal_lm: Transformers' class.
        context: the default of ``max_position_embeddings``.
        read: reads the keys that are its own.
        kv_heads: the default of ``num_key_value_heads``; None for as many as there are heads.
        head_dim: that of ``head_dim``; None for hidden size / heads.
        tied: that of ``tie_word_embeddings``.
        eps: of the norms: the key in ``config.json``, its default, and GGUF's key.
        harmless: keys that do not change a logit, beyond those of all models.
    """

    architecture: str
    causal_lm: str
    context: int
    read: Callable[[Keys, Sizes], Traits]
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    eps: tuple[str, float, str] = ("rms_norm_eps", 1e-6, RMS_EPS)
    harmless: frozenset[str] = frozenset()


def _silu(config: Keys) -> None:
    config.only("hidden_act", "silu", "swish")


def _llama(config: Keys, sizes: Sizes) -> Traits:
    window = window_size(config, None)
    if one_window(config, sizes, window):  # which Transformers would not heed
        raise config.unsupported("sliding_window", "in this kind of model, every layer sees all positions")
    return _llama_like(config, sizes)


def _llama_like(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    bias = config.flag("attention_bias", False)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, _FACTORS),
        {
            **norms(sizes.hidden, "attn_norm", "ffn_norm"),
            **projections(sizes, bias, bias),
            **gated_mlp(sizes, config.flag("mlp_bias", False)),
        },
    )


def _mistral(config: Keys, sizes: Sizes) -> Traits:
    traits = _llama_like(config, sizes)
    return replace(traits, metadata=one_window(config, sizes, window_size(config, 4096)))


def _mixtral(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    count = config.integer("num_local_experts", 8, high=4096)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass(1e6, FACTOR_SCALINGS)),
        {
            **norms(sizes.hidden, "attn_norm", "ffn_norm"),
            **projections(sizes, False, False),
            **experts(sizes, count, sizes.ffn),
        },
        {
            **one_window(config, sizes, window_size(config, None)),
            "expert_count": count,
            "expert_used_count": _used(config, "num_experts_per_tok", 2, count),
        },
    )


def _qwen2(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    config.only("use_mrope", False)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass()),
        {
            **norms(sizes.hidden, "attn_norm", "ffn_norm"),
            **projections(sizes, True, False),
            **gated_mlp(sizes),
        },
        _upper_windows(config, sizes),
    )


def _qwen3(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    bias = config.flag("attention_bias", False)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass()),
        {
            **norms(sizes.hidden, "attn_norm", "ffn_norm"),
            **norms(sizes.head_dim, "attn_q_norm", "attn_k_norm"),
            **projections(sizes, bias, bias),
            **gated_mlp(sizes),
        },
        _upper_windows(config, sizes),
    )


def _qwen3_moe(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    bias = config.flag("attention_bias", False)
    count = config.integer("num_experts", config.integer("num_local_experts", 128), high=4096)
    config.only("num_local_experts", count)
    ffn = config.integer("moe_intermediate_size", 768)
    if not config.flag("norm_topk_prob", False):
        raise config.unsupported("norm_topk_prob", "weights of experts that sum to 1 are: true")
    config.only("decoder_sparse_step", 1)
    config.only("mlp_only_layers", [])
    window = window_size(config, 4096)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass()),
        {
            **norms(sizes.hidden, "attn_norm", "ffn_norm"),
            **norms(sizes.head_dim, "attn_q_norm", "attn_k_norm"),
            **projections(sizes, bias, bias),
            **experts(sizes, count, ffn),
        },
        {
            **one_window(config, sizes, window if config.flag("use_sliding_window", False) else None),
            "expert_count": count,
            "expert_used_count": _used(config, "num_experts_per_tok", 8, count),
            "expert_feed_forward_length": ffn,
        },
    )


def _upper_windows(config: Keys, sizes: Sizes) -> dict[str, MetaValue]:
    """Qwen's windows, which the layers from ``max_window_layers`` on have, if any has."""
    window, first = window_size(config, 4096), config.integer("max_window_layers", 28, low=0)
    if not config.flag("use_sliding_window", False):
        config.only("layer_types", [FULL] * sizes.layers)
        return {}
    is_windowed = [window is not None and i >= first for i in range(sizes.layers)]
    return windows(config, sizes, window, is_windowed)


def _gemma2(config: Keys, sizes: Sizes) -> Traits:
    metadata, window = _gemma(config, sizes, _GEMMA2_27B_LAYERS), window_size(config, 4096)
    config.only("sliding_window_size", window)
    for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if key in config.values and not config.has(key):
            raise config.unsupported(key, "soft-capping, which Gemma 2 is known for, is")
        metadata[key] = config.number(key, default)
    bias = config.flag("attention_bias", False)
    every_other = [i % 2 == 0 for i in range(sizes.layers)]
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass()),
        {
            **norms(sizes.hidden, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
            **projections(sizes, bias, bias),
            **gated_mlp(sizes),
        },
        {**metadata, **windows(config, sizes, window, every_other)},
    )


def _gemma3(config: Keys, sizes: Sizes) -> Traits:
    metadata = _gemma(config, sizes, _GEMMA3_27B_LAYERS)
    if config.has("attn_logit_softcapping"):
        raise config.unsupported("attn_logit_softcapping", "scores without soft-capping are")
    if config.has("final_logit_softcapping"):
        metadata["final_logit_softcapping"] = config.number("final_logit_softcapping")
    # Transformers 4.5x wrote the second.
    period = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    sliding = [(i + 1) % period != 0 for i in range(sizes.layers)]
    bias = config.flag("attention_bias", False)
    return Traits(
        gemma3_rope(config, sizes.head_dim, sizes.context),
        {
            **norms(sizes.hidden, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
            **norms(sizes.head_dim, "attn_q_norm", "attn_k_norm"),
            **projections(sizes, bias, bias),
            **gated_mlp(sizes),
        },
        {**metadata, **windows(config, sizes, window_size(config, 4096), sliding)},
    )


def _gemma(config: Keys, sizes: Sizes, layers_of_27b: int) -> dict[str, MetaValue]:
    """What both have: an activation, and a scale of scores that GGUF has no key for."""
    config.only("hidden_activation", _GELU)
    config.only("hidden_act", _GELU)
    scaled_by = config.number("query_pre_attn_scalar", 256.0)
    score_size = sizes.hidden // sizes.heads if sizes.layers == layers_of_27b else sizes.head_dim
    if scaled_by != score_size:
        raise config.unsupported("query_pre_attn_scalar", f"for a model of these sizes, {score_size} is")
    return {}


def _phi3(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    # Keys of Phi 4's own code that the published models leave off, and Transformers does not read.
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.only(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        config.only(key, 1)
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    kind = RopeClass(scalings=("default", "longrope"), share=1.0, original=4096)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, kind),
        {
            **norms(sizes.hidden, "attn_norm", "ffn_norm"),
            **linear("attn_qkv", queries + 2 * keys, sizes.hidden),
            **linear("attn_output", sizes.hidden, queries),
            **linear("ffn_up", 2 * sizes.ffn, sizes.hidden),
            **linear("ffn_down", sizes.hidden, sizes.ffn),
        },
        one_window(config, sizes, window_size(config, None)),
    )


def _granite(config: Keys, sizes: Sizes) -> Traits:
    traits = _llama(config, sizes)
    scales: dict[str, MetaValue] = {
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "attention.scale": config.number("attention_multiplier", 1.0),
        "logit_scale": config.number("logits_scaling", 1.0),
    }
    return replace(traits, metadata=scales)


def _olmo2(config: Keys, sizes: Sizes) -> Traits:
    return _olmo(config, sizes, one_rope(config, sizes.head_dim, sizes.context, RopeClass()))


def _olmo3(config: Keys, sizes: Sizes) -> Traits:
    three_of_four = [(i + 1) % 4 != 0 for i in range(sizes.layers)]
    metadata = windows(config, sizes, window_size(config, 4096), three_of_four)
    return replace(_olmo(config, sizes, olmo3_rope(config, sizes.head_dim, sizes.context)), metadata=metadata)


def _olmo(config: Keys, sizes: Sizes, rope: Rope) -> Traits:
    _silu(config)
    bias = config.flag("attention_bias", False)
    layer = {
        **projections(sizes, bias, bias),
        **norms(sizes.heads * sizes.head_dim, "attn_q_norm"),
        **norms(sizes.kv_heads * sizes.head_dim, "attn_k_norm"),
        **norms(sizes.hidden, "post_attention_norm", "post_ffw_norm"),
        **gated_mlp(sizes),
    }
    return Traits(rope, layer)


def _starcoder2(config: Keys, sizes: Sizes) -> Traits:
    config.only("hidden_act", _GELU)
    config.only("norm_type", "layer_norm")
    config.only("mlp_type", "default")
    bias = config.flag("use_bias", True)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass()),
        {
            **norms(sizes.hidden, "attn_norm", "ffn_norm", bias=True),
            **projections(sizes, bias, bias),
            **linear("ffn_up", sizes.ffn, sizes.hidden, bias),
            **linear("ffn_down", sizes.hidden, sizes.ffn, bias),
        },
        one_window(config, sizes, window_size(config, None)),
        norm_bias=True,
    )


def _stablelm(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    config.only("qk_layernorm", False)
    if sizes.head_dim * sizes.heads != sizes.hidden:
        raise config.error("head_dim", f"is {sizes.head_dim}, not hidden_size / num_attention_heads")
    names = ("attn_norm",) if config.flag("use_parallel_residual", False) else ("attn_norm", "ffn_norm")
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass(share=0.25)),
        {
            **norms(sizes.hidden, *names, bias=True),
            **projections(sizes, config.flag("use_qkv_bias", False), False),
            **gated_mlp(sizes),
        },
        norm_bias=True,
    )


def _gpt_oss(config: Keys, sizes: Sizes) -> Traits:
    _silu(config)
    config.only("swiglu_alpha", 1.702)
    config.only("swiglu_limit", 7.0)
    bias = config.flag("attention_bias", True)
    count = config.integer("num_local_experts", config.integer("num_experts", 128), high=4096)
    config.only("num_experts", count)
    if not config.has("rope_parameters") and not config.has("rope_scaling"):
        raise config.error("rope_scaling", "is missing")
    every_other = [i % 2 == 0 for i in range(sizes.layers)]
    metadata = windows(config, sizes, window_size(config, 128), every_other)
    return Traits(
        one_rope(config, sizes.head_dim, sizes.context, RopeClass(150000.0, FACTOR_SCALINGS)),
        {
            **norms(sizes.hidden, "attn_norm", "post_attention_norm"),
            **projections(sizes, bias, bias),
            "attn_sinks.weight": (sizes.heads,),
            **experts(sizes, count, sizes.ffn, bias=True),
        },
        {
            # What no layer has may be null here, and must be a number there.
            "attention.sliding_window": sizes.context,
            **metadata,
            "expert_count": count,
            "expert_used_count": _used(config, "num_experts_per_tok", 4, count),
            "expert_feed_forward_length": sizes.ffn,
        },
    )


def _used(config: Keys, key: str, default: int, count: int) -> int:
    """How many experts a token uses."""
    used = config.integer(key, default)
    if used > count:
        raise config.error(key, f"is {used} of {count} experts")
    return used


_OF_TRAINING = frozenset(
    """
    embd_pdrop embedding_dropout hidden_dropout output_router_logits resid_pdrop residual_dropout
    router_aux_loss_coef router_jitter_noise
    """.split()
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("llama", "LlamaForCausalLM", 2048, _llama),
        "mistral": Family("llama", "MistralForCausalLM", 131072, _mistral, kv_heads=8),
        "mixtral": Family(
            "llama",
            "MixtralForCausalLM",
            131072,
            _mixtral,
            kv_heads=8,
            eps=("rms_norm_eps", 1e-5, RMS_EPS),
            harmless=_OF_TRAINING,
        ),
        "qwen2": Family("qwen2", "Qwen2ForCausalLM", 32768, _qwen2, kv_heads=32),
        "qwen3": Family("qwen3", "Qwen3ForCausalLM", 32768, _qwen3, kv_heads=32, head_dim=128),
        "qwen3_moe": Family(
            "qwen3moe",
            "Qwen3MoeForCausalLM",
            32768,
            _qwen3_moe,
            kv_heads=4,
            harmless=_OF_TRAINING | {"max_window_layers"},
        ),
        "gemma2": Family("gemma2", "Gemma2ForCausalLM", 8192, _gemma2, kv_heads=4, head_dim=256, tied=True),
        "gemma3_text": Family(
            "gemma3", "Gemma3ForCausalLM", 131072, _gemma3, kv_heads=4, head_dim=256, tied=True
        ),
        "phi3": Family(
            "phi3",
            "Phi3ForCausalLM",
            4096,
            _phi3,
            eps=("rms_norm_eps", 1e-5, RMS_EPS),
            harmless=_OF_TRAINING,
        ),
        "granite": Family("granite", "GraniteForCausalLM", 2048, _granite),
        "olmo2": Family("olmo2", "Olmo2ForCausalLM", 2048, _olmo2, eps=("rms_norm_eps", 1e-5, RMS_EPS)),
        "olmo3": Family("olmo2", "Olmo3ForCausalLM", 2048, _olmo3, eps=("rms_norm_eps", 1e-5, RMS_EPS)),
        "starcoder2": Family(
            "starcoder2",
            "Starcoder2ForCausalLM",
            4096,
            _starcoder2,
            kv_heads=2,
            tied=True,
            eps=("norm_epsilon", 1e-5, LAYER_EPS),
            harmless=_OF_TRAINING,
        ),
        "stablelm": Family(
            "stablelm",
            "StableLmForCausalLM",
            4096,
            _stablelm,
            kv_heads=32,
            eps=("layer_norm_eps", 1e-5, LAYER_EPS),
            harmless=_OF_TRAINING,
        ),
        "gpt_oss": Family(
            "gpt-oss",
            "GptOssForCausalLM",
            131072,
            _gpt_oss,
            kv_heads=8,
            head_dim=64,
            eps=("rms_norm_eps", 1e-5, RMS_EPS),
            # The last two say once more what other keys say; Transformers reads those.
            harmless=_OF_TRAINING | {"experts_per_token", "initial_context_length"},
        ),
    }
)
