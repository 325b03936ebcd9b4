"""Configurations of Hugging Face models: every key is understood or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlxc.errors import ModelError, RlxcError, UnsupportedError
from rlxc.weights.hf_config import read_config
from rlxc.weights.huggingface import open_folder

# What tests share lies in the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_folders import CONTEXT, VARIANTS, HfTiny, write_json

GEMMA = HfTiny("gemma3_text")
ROPE = {"rope_type": "linear", "factor": 2.0}
OSS = VARIANTS["gpt-oss"]
NULL = object()
"""A key whose value is null; None takes it away."""
YARN = dict(VARIANTS["llama-yarn"].config["rope_parameters"])

REFUSED: dict[str, tuple[HfTiny, dict[str, Any], type[RlxcError], str]] = {
    "other model": (HfTiny(), {"model_type": "t5"}, UnsupportedError, "model_type = 't5'.*known: llama"),
    "no model type": (HfTiny(), {"model_type": None}, ModelError, "model_type is missing"),
    "classifier": (
        HfTiny(),
        {"architectures": ["LlamaForSequenceClassification"]},
        UnsupportedError,
        "architectures",
    ),
    "images": (
        GEMMA,
        {"model_type": "gemma3", "vision_config": {"layers": 1}},
        UnsupportedError,
        "text and images",
    ),
    "unknown key": (
        HfTiny(),
        {"embedding_multiplier": 12.0},
        UnsupportedError,
        "embedding_multiplier = 12.0",
    ),
    "unknown key that is false": (HfTiny(), {"use_qk_norm": False}, UnsupportedError, "use_qk_norm"),
    "heads that differ": (HfTiny(), {"per_layer_config": {"0": {}}}, UnsupportedError, "per_layer_config"),
    "no size": (HfTiny(), {"hidden_size": None}, ModelError, "hidden_size is missing"),
    "size as text": (HfTiny(), {"hidden_size": "64"}, ModelError, "hidden_size must be an integer"),
    "size as flag": (HfTiny(), {"num_hidden_layers": True}, ModelError, "must be an integer, not True"),
    "no layers": (HfTiny(), {"num_hidden_layers": 0}, ModelError, "num_hidden_layers is 0"),
    "endless layers": (HfTiny(), {"num_hidden_layers": 10**12}, ModelError, "is outside 1..4096"),
    "odd heads": (HfTiny(), {"head_dim": 15}, ModelError, "head_dim is 15"),
    "eps": (HfTiny(), {"rms_norm_eps": -1.0}, ModelError, "rms_norm_eps must be a positive number"),
    "infinite": (HfTiny(), {"rope_theta": float("inf")}, ModelError, "rope_theta must be a positive"),
    "tied as text": (HfTiny(), {"tie_word_embeddings": "no"}, ModelError, "must be true or false"),
    "activation": (HfTiny(), {"hidden_act": "gelu"}, UnsupportedError, "hidden_act = 'gelu'.*'silu'"),
    "window of llama": (HfTiny(), {"sliding_window": 128}, UnsupportedError, "sliding_window = 128"),
    "window of size 0": (HfTiny("mistral"), {"sliding_window": 0}, ModelError, "sliding_window is 0"),
    "layer types": (
        HfTiny("mistral"),
        {"layer_types": ["full_attention", "sliding_attention"]},
        UnsupportedError,
        "layer_types",
    ),
    "interleaved": (HfTiny(), {"rope_interleaved": True}, UnsupportedError, "rope_interleaved = True"),
    "encoder": (HfTiny(), {"is_encoder_decoder": True}, UnsupportedError, "is_encoder_decoder"),
    "partial rotation": (HfTiny(), {"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
    "partial rotation within": (
        HfTiny(),
        {"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}},
        UnsupportedError,
        r"rope_scaling.partial_rotary_factor = 0.5",
    ),
    "scaling": (
        HfTiny(),
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        UnsupportedError,
        "rope_type = 'dynamic'",
    ),
    "two types": (
        HfTiny(),
        {"rope_scaling": {**ROPE, "type": "yarn"}},
        ModelError,
        "rope_type is 'linear', but type is 'yarn'",
    ),
    "two scalings": (
        HfTiny(),
        {"rope_scaling": ROPE, "rope_parameters": {**ROPE, "factor": 3.0}},
        ModelError,
        "rope_scaling differs",
    ),
    "two thetas": (
        HfTiny(),
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
        ModelError,
        "rope_theta is 6.0, but rope_theta is 5.0",
    ),
    "no factor": (HfTiny(), {"rope_scaling": {"type": "linear"}}, ModelError, "rope_scaling.factor is miss"),
    "small factor": (
        HfTiny(),
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        ModelError,
        "can only be stretched",
    ),
    "scaling's unknown key": (
        HfTiny(),
        {"rope_scaling": {**ROPE, "long_factor": [1.0]}},
        UnsupportedError,
        "rope_scaling.long_factor",
    ),
    "yarn not cut off": (
        HfTiny("qwen3"),
        {"rope_scaling": {**YARN, "truncate": False}},
        UnsupportedError,
        "rope_scaling.truncate = False",
    ),
    "two contexts": (
        HfTiny(),
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        ModelError,
        "is 4096, but outside it is 32",
    ),
    "llama 3's ramp": (
        HfTiny(),
        {"rope_scaling": {**VARIANTS["llama-llama3"].config["rope_scaling"], "high_freq_factor": 1.0}},
        ModelError,
        "high_freq_factor is 1.0",
    ),
    "gemma, llama 3's scaling": (
        GEMMA,
        {"rope_scaling": VARIANTS["llama-llama3"].config["rope_scaling"]},
        UnsupportedError,
        "rope_type = 'llama3' is not implemented for this architecture; implemented: default, linear, yarn",
    ),
    "gemma, scaled windows": (
        GEMMA,
        {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
        UnsupportedError,
        "rope_parameters.sliding_attention.rope_type = 'linear'.*implemented: default",
    ),
    "gemma, flat parameters": (GEMMA, {"rope_parameters": ROPE}, UnsupportedError, "rope_parameters.factor"),
    "gemma, both ways": (
        GEMMA,
        {"rope_scaling": ROPE, "rope_parameters": {"full_attention": ROPE}},
        ModelError,
        "rope_scaling is given besides",
    ),
    "soft-capped scores": (GEMMA, {"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_soft"),
    "scale": (GEMMA, {"query_pre_attn_scalar": 16}, UnsupportedError, "query_pre_attn_scalar = 16.*32 is"),
    "both ways": (GEMMA, {"use_bidirectional_attention": True}, UnsupportedError, "bidirectional"),
    "gemma's activation": (GEMMA, {"hidden_activation": "gelu"}, UnsupportedError, "hidden_activation"),
    "window of no size": (GEMMA, {"sliding_window": NULL}, UnsupportedError, "sliding_window is null"),
    "uncapped": (
        HfTiny("gemma2"),
        {"attn_logit_softcapping": NULL},
        UnsupportedError,
        "attn_logit_softcapping = None",
    ),
    "two windows": (
        HfTiny("gemma2"),
        {"sliding_window_size": 9},
        UnsupportedError,
        "sliding_window_size = 9",
    ),
    "two axes": (HfTiny("qwen2"), {"use_mrope": True}, UnsupportedError, "use_mrope = True"),
    "layer types without windows": (
        HfTiny("qwen2"),
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        UnsupportedError,
        "layer_types",
    ),
    "layer types of a uniform model": (
        HfTiny("starcoder2"),
        {"layer_types": ["full_attention", "sliding_attention"]},
        UnsupportedError,
        "layer_types.*all layers have sliding_window or none",
    ),
    "factors without a use": (
        HfTiny("qwen2"),
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
        UnsupportedError,
        "rope_type = 'longrope' is not implemented for this architecture",
    ),
    "too few factors": (
        HfTiny("phi3"),
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
        ModelError,
        "long_factor must be a list of 8 numbers",
    ),
    "a factor of 0": (
        HfTiny("phi3"),
        {"rope_scaling": {"type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8}},
        ModelError,
        "short_factor must be a positive number, not 0.0",
    ),
    "phi's linear scaling": (
        HfTiny("phi3"),
        {"rope_scaling": ROPE},
        UnsupportedError,
        "rope_type = 'linear'",
    ),
    "phi's contexts": (
        HfTiny("phi3", config={"original_max_position_embeddings": None}),
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16}},
        ModelError,
        "is 16, but outside it is 4096",
    ),
    "bias of the output": (HfTiny("phi3"), {"lm_head_bias": True}, UnsupportedError, "lm_head_bias"),
    "odd part of a head": (
        HfTiny("stablelm"),
        {"partial_rotary_factor": 0.2},
        ModelError,
        "partial_rotary_factor rotates 3 channels of 16",
    ),
    "more than a head": (
        HfTiny("stablelm"),
        {"partial_rotary_factor": 1.5},
        ModelError,
        "rotates 24 channels",
    ),
    "normed heads": (HfTiny("stablelm"), {"qk_layernorm": True}, UnsupportedError, "qk_layernorm = True"),
    "large heads": (HfTiny("stablelm"), {"head_dim": 32}, ModelError, "head_dim is 32, not hidden_size"),
    "other norm": (HfTiny("starcoder2"), {"norm_type": "rms"}, UnsupportedError, "norm_type = 'rms'"),
    "two thetas of layers": (
        HfTiny("olmo3"),
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        UnsupportedError,
        "two values of rope_theta",
    ),
    "theta of 1": (HfTiny(), {"rope_theta": 1.0}, ModelError, "rope_theta is 1.0, not more than 1"),
    "experts' sum": (HfTiny("qwen3_moe"), {"norm_topk_prob": None}, UnsupportedError, "norm_topk_prob"),
    "too many experts used": (
        HfTiny("qwen3_moe"),
        {"num_experts_per_tok": 6},
        ModelError,
        "num_experts_per_tok is 6 of 5 experts",
    ),
    "two numbers of experts": (
        HfTiny("qwen3_moe"),
        {"num_local_experts": 4},
        UnsupportedError,
        "num_local_experts = 4",
    ),
    "layers without experts": (
        HfTiny("qwen3_moe"),
        {"mlp_only_layers": [0]},
        UnsupportedError,
        r"mlp_only_layers = \[0\]",
    ),
    "other gates": (OSS, {"swiglu_limit": 6.0}, UnsupportedError, "swiglu_limit = 6.0"),
    "gpt-oss without scaling": (OSS, {"rope_scaling": None}, ModelError, "rope_scaling is missing"),
    "gpt-oss in another format": (
        OSS,
        {"quantization_config": {"quant_method": "fp8"}},
        UnsupportedError,
        "quant_method = 'fp8'.*'mxfp4'",
    ),
    "mxfp4 elsewhere": (
        HfTiny(),
        {"quantization_config": {"quant_method": "mxfp4"}},
        UnsupportedError,
        "quant_method = 'mxfp4'.*'bitsandbytes'",
    ),
    "too few layer types": (GEMMA, {"layer_types": ["full_attention"]}, ModelError, "layer_types must say"),
    "strange layer types": (GEMMA, {"layer_types": ["linear"] * 5}, ModelError, "layer_types must say"),
    "layer types no list": (GEMMA, {"layer_types": 5}, ModelError, "layer_types must be a list"),
    "other quantisation": (
        HfTiny(),
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        UnsupportedError,
        "quantization_config.quant_method = 'gptq'",
    ),
    "8 bits": (
        HfTiny(),
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        UnsupportedError,
        "load_in_8bit",
    ),
    "4 bits of another kind": (
        HfTiny(),
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}},
        UnsupportedError,
        "bnb_4bit_quant_type = 'af4'",
    ),
    "other storage": (
        HfTiny(),
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}},
        UnsupportedError,
        "bnb_4bit_quant_storage = 'bfloat16'",
    ),
    "quantisation's unknown key": (
        HfTiny(),
        {"quantization_config": {"load_in_4bit": True, "group_size": 32}},
        UnsupportedError,
        "quantization_config.group_size",
    ),
}


@pytest.mark.parametrize(("tiny", "config", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_configurations_are_refused_by_key(
    tmp_path: Path, tiny: HfTiny, config: dict[str, Any], error: type[RlxcError], message: str
) -> None:
    path = tiny.write(tmp_path, config={key: value for key, value in config.items() if value is not NULL})
    if NULL in config.values():
        nulls = {key: None for key, value in config.items() if value is NULL}
        write_json(path / "config.json", {**json.loads((path / "config.json").read_text()), **nulls})
    with pytest.raises(error, match=message) as caught:
        open_folder(path)
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


ACCEPTED: dict[str, tuple[HfTiny, dict[str, Any], dict[str, Any]]] = {
    "as many key heads": (
        HfTiny(config={"num_key_value_heads": 4, "head_dim": 8}),
        {"num_key_value_heads": None},
        {"llama.attention.head_count_kv": 4},
    ),
    "window past the end": (
        HfTiny("mistral"),
        {"sliding_window": CONTEXT},
        {"llama.context_length": CONTEXT},
    ),
    "empty scaling": (HfTiny(), {"rope_scaling": {}}, {"llama.rope.freq_base": 10000.0}),
    "no sliding layers": (
        GEMMA,
        {"layer_types": ["full_attention"] * 5, "sliding_window": None},
        {"gemma3.attention.sliding_window_pattern": [False] * 5, "gemma3.attention.sliding_window": None},
    ),
    "no full layers": (
        GEMMA,
        {"layer_types": ["sliding_attention"] * 5, "sliding_window_pattern": 2},
        {"gemma3.attention.sliding_window_pattern": [True] * 5, "gemma3.attention.sliding_window": 8},
    ),
    "layers without period": (
        GEMMA,
        {"layer_types": ["full_attention", *["sliding_attention"] * 4]},
        {"gemma3.attention.sliding_window_pattern": [False, True, True, True, True]},
    ),
    "pattern of Transformers 4.55": (
        GEMMA,
        {"_sliding_window_pattern": 2},
        {"gemma3.attention.sliding_window_pattern": [True, False, True, False, True]},
    ),
    "gemma 3 with capped logits": (
        GEMMA,
        {"final_logit_softcapping": 30.0},
        {"gemma3.final_logit_softcapping": 30.0},
    ),
    "mistral's own window": (
        HfTiny("mistral", config={"max_position_embeddings": 8192}),
        {"sliding_window": 4096},
        {"llama.attention.sliding_window": 4096, "llama.attention.sliding_window_pattern": [True, True]},
    ),
    "mistral's default window": (
        HfTiny("mistral", config={"max_position_embeddings": 8192, "sliding_window": 4096}),
        {},
        {"llama.attention.sliding_window": 4096},
    ),
    "windows that are off": (
        HfTiny("qwen2"),
        {"sliding_window": 8, "max_window_layers": 0},
        {"qwen2.attention.sliding_window": None, "qwen2.attention.sliding_window_pattern": None},
    ),
    "a window for all of Qwen's experts": (
        HfTiny("qwen3_moe"),
        {"use_sliding_window": True, "sliding_window": 8},
        {"qwen3moe.attention.sliding_window": 8, "qwen3moe.attention.sliding_window_pattern": [True, True]},
    ),
    "su is longrope": (
        HfTiny("phi3"),
        {
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "max_position_embeddings": 1024,
        },
        {"phi3.rope.scaling.type": "longrope", "phi3.rope.scaling.attn_factor": 1.25**0.5},
    ),
    "no layers of gpt-oss with windows": (
        OSS,
        {"layer_types": ["full_attention"] * 3, "sliding_window": None},
        {"gpt-oss.attention.sliding_window_pattern": [False] * 3, "gpt-oss.attention.sliding_window": 16384},
    ),
    "gemma's own thetas": (
        GEMMA,
        {},
        {"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 10000.0},
    ),
    "yarn by its context": (
        HfTiny(),
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}},
        {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 1.0},
    ),
}


@pytest.mark.parametrize(("tiny", "config", "metadata"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_metadata_of_less_common_configurations(
    tmp_path: Path, tiny: HfTiny, config: dict[str, Any], metadata: dict[str, Any]
) -> None:
    values = {**tiny.config_json(), **config}
    folder = tiny.write(tmp_path)
    write_json(folder / "config.json", values)
    found = read_config(values, folder / "config.json").metadata
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}
    assert {key: plain.get(key) for key in metadata} == metadata
