"""A Hugging Face ``config.json``, translated to the metadata that a GGUF file of the same model has.

Every key is either translated, or known not to change the arithmetic, or refused by name: those that all models have
here, those of one kind of model in `rlxc.weights.hf_families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.errors import UnsupportedError
from rlxc.weights.gguf_header import MetaValue
from rlxc.weights.hf_bnb import read_quantization
from rlxc.weights.hf_families import FAMILIES, Family
from rlxc.weights.hf_keys import Keys
from rlxc.weights.hf_parts import Shapes, Sizes, Traits

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
class HfConfig:
    """A model as its ``config.json`` describes it.

    Attributes:
        architecture: GGUF's name for it.
        metadata: GGUF's keys and values.
        heads: number of query heads; ``kv_heads`` of those that they share.
        tied: the embedding is the output matrix as well.
        rope_factors: tensors of factors that frequencies are divided by, f32 ``[n]``, by GGUF name.
        packing: NF4 or FP4 if bitsandbytes packed the linear layers; MXFP4 if that is what experts are in.
        shapes: the shape of each tensor that the folder must hold, by GGUF name.
    """

    architecture: str
    metadata: dict[str, MetaValue]
    heads: int
    kv_heads: int
    tied: bool
    rope_factors: Mapping[str, npt.NDArray[np.float32]]
    packing: DType | None
    shapes: Shapes


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
    traits = family.read(config, sizes)
    eps_key, eps, eps_name = family.eps
    metadata = {eps_name: config.number(eps_key, eps), **traits.rope.metadata, **traits.metadata}
    tied = config.flag("tie_word_embeddings", family.tied)
    packing = read_quantization(config.group("quantization_config"), family.architecture)
    for key in (
        "add_cross_attention",
        "is_encoder_decoder",
        "rope_interleaved",
        "use_bidirectional_attention",
    ):
        config.only(key, False)
    config.only("pruned_heads", {})
    config.finish(_HARMLESS | family.harmless)
    return HfConfig(
        architecture=family.architecture,
        metadata=_metadata(family.architecture, sizes, metadata),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        tied=tied,
        rope_factors=traits.rope.factors,
        packing=packing,
        shapes=_shapes(sizes, traits, tied),
    )


def _family(config: Keys) -> Family:
    if config.has("vision_config") or config.has("text_config"):
        raise UnsupportedError(
            "a model of text and images is not supported",
            source=config.source,
            remedy="save its language model alone, or use its GGUF file, which holds only that",
        )
    kind = config.text("model_type")
    family = FAMILIES.get(kind)
    if family is None:
        raise config.unsupported("model_type", f"known: {', '.join(FAMILIES)}")
    classes = config.texts("architectures")
    if classes not in (None, [family.causal_lm]):
        raise config.unsupported("architectures", f"known for {kind}: {family.causal_lm}")
    return family


def _sizes(config: Keys, family: Family) -> Sizes:
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    # A key that is null, unlike one that is absent, means as many as there are heads.
    kv_heads = heads if "num_key_value_heads" in config.values else family.kv_heads or heads
    sizes = Sizes(
        layers=config.integer("num_hidden_layers", high=4096),
        hidden=hidden,
        ffn=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", kv_heads),
        head_dim=config.integer("head_dim", family.head_dim or max(1, hidden // heads)),
        vocab=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings", family.context),
    )
    if sizes.head_dim % 2:
        raise config.error("head_dim", f"is {sizes.head_dim}; rotary embedding needs an even one")
    return sizes


def _metadata(architecture: str, sizes: Sizes, own: Mapping[str, MetaValue]) -> dict[str, MetaValue]:
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
        **own,
    }
    return {"general.architecture": architecture} | {f"{architecture}.{key}": keys[key] for key in keys}


def _shapes(sizes: Sizes, traits: Traits, tied: bool) -> Shapes:
    """Every tensor."""
    shapes: Shapes = {"token_embd.weight": (sizes.vocab, sizes.hidden)}
    for i in range(sizes.layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in traits.layer.items()}
    shapes["output_norm.weight"] = (sizes.hidden,)
    if traits.norm_bias:
        shapes["output_norm.bias"] = (sizes.hidden,)
    if not tied:
        shapes["output.weight"] = (sizes.vocab, sizes.hidden)
    return shapes
