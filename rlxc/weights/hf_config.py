"""A Hugging Face ``config.json``, translated to the metadata that a GGUF file of the same model has.

Every key is either translated, or known not to change the arithmetic, or refused by name. Meanings and defaults:
Transformers' ``configuration_*.py`` of each model type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.errors import UnsupportedError
from rlxc.weights.gguf_header import MetaValue
from rlxc.weights.hf_bnb import read_quantization
from rlxc.weights.hf_keys import Keys
from rlxc.weights.hf_rope import Rope, gemma3_rope, llama_rope

_HARMLESS = frozenset(
    """
    _attn_implementation_autoset _name_or_path attention_dropout attn_implementation auto_map bos_token_id
    cache_implementation chunk_size_feed_forward dtype eos_token_id finetuning_task gradient_checkpointing id2label
    initializer_range is_decoder is_llama_config label2id max_sequence_length output_attentions output_hidden_states
    pad_token_id prefix pretraining_tp problem_type return_dict sep_token_id task_specific_params tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    use_cache

    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    tf_legacy_loss top_k top_p typical_p
    """.split()
)
"""Bookkeeping, training, and how text is generated: none changes a logit. ``pretraining_tp`` cuts the same product
into pieces; ``auto_map`` names code for a class that Transformers has of its own."""


@dataclass(frozen=True)
class _Family:
    """What a ``model_type`` stands for, and the defaults of its class in Transformers."""

    architecture: str
    causal_lm: str
    context: int
    kv_heads: int | None  # None: as many as there are heads
    tied: bool


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", 2048, None, False),
    "mistral": _Family("llama", "MistralForCausalLM", 131072, 8, False),
    "gemma3_text": _Family("gemma3", "Gemma3ForCausalLM", 131072, 4, True),
}
_GEMMA3_27B_LAYERS = 62
"""The GGUF of no other Gemma 3 scales scores by other than the head dim; see `rlxc.models.gemma3`."""


@dataclass(frozen=True)
class HfConfig:
    """A model as its ``config.json`` describes it.

    Attributes:
        architecture: GGUF's name for it.
        metadata: GGUF's keys and values.
        heads: number of query heads; ``kv_heads`` of those that they share.
        tied: the embedding is the output matrix as well.
        rope_factors: what ``rope_freqs.weight`` holds, f32 ``[head_dim / 2]``, if frequencies are scaled one by one.
        four_bit: NF4 or FP4 if bitsandbytes packed the linear layers.
        shapes: the shape of each tensor that the folder must hold, by GGUF name.
    """

    architecture: str
    metadata: dict[str, MetaValue]
    heads: int
    kv_heads: int
    tied: bool
    rope_factors: npt.NDArray[np.float32] | None
    four_bit: DType | None
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Sizes:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int


def read_config(values: dict[str, object], source: Path) -> HfConfig:
    """Translate a configuration.

    Args:
        values: the object that ``config.json`` holds.
        source: the file, for error messages.

    Raises:
        UnsupportedError: the model, or something it asks for, is not implemented.
        ModelError: keys are missing, of the wrong type, or contradict each other.
    """
    config = Keys(values, source)
    family = _family(config)
    sizes = _sizes(config, family)
    gemma = family.architecture == "gemma3"
    rope = (gemma3_rope if gemma else llama_rope)(config, sizes.head_dim, sizes.context)
    own = _gemma3(config, sizes) if gemma else _llama(config, sizes)
    tied = config.flag("tie_word_embeddings", family.tied)
    attention_bias = config.flag("attention_bias", False)
    mlp_bias = not gemma and config.flag("mlp_bias", False)
    four_bit = read_quantization(config.group("quantization_config"))
    for key in (
        "add_cross_attention",
        "is_encoder_decoder",
        "rope_interleaved",
        "use_bidirectional_attention",
    ):
        config.only(key, False)
    config.only("pruned_heads", {})
    config.finish(_HARMLESS)
    shapes = dict(_linear(sizes, attention_bias, mlp_bias))
    shapes |= dict(_others(sizes, gemma, tied))
    return HfConfig(
        architecture=family.architecture,
        metadata=_metadata(family.architecture, sizes, rope, own),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        tied=tied,
        rope_factors=rope.factors,
        four_bit=four_bit,
        shapes=shapes,
    )


def _family(config: Keys) -> _Family:
    if config.has("vision_config") or config.has("text_config"):
        raise UnsupportedError(
            "a model of text and images is not supported",
            source=config.source,
            remedy="save its language model alone, or use its GGUF file, which holds only that",
        )
    kind = config.text("model_type")
    family = _FAMILIES.get(kind)
    if family is None:
        raise config.unsupported("model_type", f"known: {', '.join(_FAMILIES)}")
    classes = config.texts("architectures")
    if classes not in (None, [family.causal_lm]):
        raise config.unsupported("architectures", f"known for {kind}: {family.causal_lm}")
    return family


def _sizes(config: Keys, family: _Family) -> _Sizes:
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    # A key that is null, unlike one that is absent, means as many as there are heads.
    kv_heads = heads if "num_key_value_heads" in config.values else family.kv_heads or heads
    usual_dim = 256 if family.architecture == "gemma3" else max(1, hidden // heads)
    sizes = _Sizes(
        layers=config.integer("num_hidden_layers", high=4096),
        hidden=hidden,
        ffn=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", kv_heads),
        head_dim=config.integer("head_dim", usual_dim),
        vocab=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings", family.context),
    )
    if sizes.head_dim % 2:
        raise config.error("head_dim", f"is {sizes.head_dim}; rotary embedding needs an even one")
    return sizes


def _llama(config: Keys, sizes: _Sizes) -> dict[str, MetaValue]:
    config.only("hidden_act", "silu", "swish")
    default = 4096 if config.values["model_type"] == "mistral" else None
    window = config.values.get("sliding_window", default)
    if window is not None and config.integer("sliding_window", default) < sizes.context:
        raise UnsupportedError(
            f"sliding_window = {window} is not implemented for this architecture",
            source=config.source,
            remedy=f"only models that see all of their {sizes.context} positions are",
        )
    if set(config.texts("layer_types") or ()) - {"full_attention"}:
        raise config.unsupported("layer_types", "only full_attention is, for this architecture")
    return {"attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6)}


def _gemma3(config: Keys, sizes: _Sizes) -> dict[str, MetaValue]:
    config.only("hidden_activation", "gelu_pytorch_tanh")
    config.only("hidden_act", "gelu_pytorch_tanh")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.has(key):
            raise config.unsupported(key, "models without soft-capping are")
    scaled_by = config.number("query_pre_attn_scalar", 256.0)
    score_size = sizes.hidden // sizes.heads if sizes.layers == _GEMMA3_27B_LAYERS else sizes.head_dim
    if scaled_by != score_size:
        raise config.unsupported("query_pre_attn_scalar", f"for a model of these sizes, {score_size} is")
    return {
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        **_sliding_window(config, sizes.layers),
    }


def _sliding_window(config: Keys, layers: int) -> dict[str, MetaValue]:
    """The window, and of how many layers the last is a full one; an empty pattern is written as no window."""
    # Transformers 4.5x wrote the second.
    pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    kinds = config.texts("layer_types")
    if kinds is None:
        full = [(i + 1) % pattern == 0 for i in range(layers)]
    else:
        if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise config.error("layer_types", f"must say full_attention or sliding_attention {layers} times")
        full = [kind == "full_attention" for kind in kinds]
    window = config.values.get("sliding_window", 4096)
    if window is not None:
        window = config.integer("sliding_window", 4096)
    if all(full):
        return {"attention.sliding_window": 0}
    if window is None:
        raise config.unsupported("sliding_window", "a number is, for a model with sliding-window layers")
    for period in (pattern, *range(2, layers + 2)):
        if full == [(i + 1) % period == 0 for i in range(layers)]:
            return {"attention.sliding_window": window, "attention.sliding_window_pattern": period}
    raise config.unsupported("layer_types", "one full layer after every so many others is")


def _metadata(
    architecture: str, sizes: _Sizes, rope: Rope, own: dict[str, MetaValue]
) -> dict[str, MetaValue]:
    keys: dict[str, MetaValue] = {
        "vocab_size": sizes.vocab,
        "context_length": sizes.context,
        "embedding_length": sizes.hidden,
        "block_count": sizes.layers,
        "feed_forward_length": sizes.ffn,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "rope.dimension_count": sizes.head_dim,
        **rope.metadata,
        **own,
    }
    return {"general.architecture": architecture} | {f"{architecture}.{key}": keys[key] for key in keys}


def _linear(sizes: _Sizes, attention_bias: bool, mlp_bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The linear layers of every block, and their biases."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layers = (
        ("attn_q", queries, sizes.hidden, attention_bias),
        ("attn_k", keys, sizes.hidden, attention_bias),
        ("attn_v", keys, sizes.hidden, attention_bias),
        ("attn_output", sizes.hidden, queries, attention_bias),
        ("ffn_gate", sizes.ffn, sizes.hidden, mlp_bias),
        ("ffn_up", sizes.ffn, sizes.hidden, mlp_bias),
        ("ffn_down", sizes.hidden, sizes.ffn, mlp_bias),
    )
    for i in range(sizes.layers):
        for name, out, in_, bias in layers:
            yield f"blk.{i}.{name}.weight", (out, in_)
            if bias:
                yield f"blk.{i}.{name}.bias", (out,)


def _others(sizes: _Sizes, gemma: bool, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The embedding, the output, and the norms."""
    yield "token_embd.weight", (sizes.vocab, sizes.hidden)
    if not tied:
        yield "output.weight", (sizes.vocab, sizes.hidden)
    yield "output_norm.weight", (sizes.hidden,)
    norms = {"attn_norm": sizes.hidden, "ffn_norm": sizes.hidden}
    if gemma:
        norms |= {"attn_q_norm": sizes.head_dim, "attn_k_norm": sizes.head_dim}
        norms |= {"post_attention_norm": sizes.hidden, "post_ffw_norm": sizes.hidden}
    for i in range(sizes.layers):
        for name, size in norms.items():
            yield f"blk.{i}.{name}.weight", (size,)
