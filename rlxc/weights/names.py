"""Tensors as Hugging Face's files and as GGUF files name and order them, and the way from one to the other.

Facts from llama.cpp's ``convert_hf_to_gguf.py`` and ``gguf``'s ``TensorNameMap``.  GGUF differs in three ways: it
stores q and k of Llama and Granite with the rows of each head permuted, so that rope pairs neighbouring rows; Gemma's
norm weights with the ``1 +`` of their formula added; and the matrices of all experts in one tensor. Where folders have
those one by one, their names here have a ``*`` in place of the expert's number; where they have them as parameters of
no module, as gpt-oss does, they are in `rlxc.weights.hf_gpt_oss`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rlxc.errors import UnsupportedError, WeightError

Scalar = TypeVar("Scalar", bound=np.generic)

_PERMUTED = ("llama", "granite")
_ADDING_ONE = ("gemma2", "gemma3")
_MODEL = {"token_embd": "embed_tokens", "output_norm": "norm"}
_HEAD = ("output", "lm_head")
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA = {**_NORMS, **_PROJECTIONS, **_GATED_MLP}
_GEMMA2 = {**_LLAMA, **_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_BLOCKS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gemma2": _GEMMA2,
        "gemma3": {**_GEMMA2, **_HEAD_NORMS},
        "gpt-oss": {
            "attn_norm": "input_layernorm",
            **_PROJECTIONS,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        "granite": _LLAMA,
        "llama": {**_LLAMA, **_MIXTRAL_EXPERTS},
        "olmo2": {**_PROJECTIONS, **_HEAD_NORMS, **_GATED_MLP, **_POST_NORMS},
        "phi3": {
            **_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        "qwen2": _LLAMA,
        "qwen3": {**_LLAMA, **_HEAD_NORMS},
        "qwen3moe": {**_NORMS, **_HEAD_NORMS, **_PROJECTIONS, **_QWEN_EXPERTS},
        "stablelm": _LLAMA,
        "starcoder2": {**_NORMS, **_PROJECTIONS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    }
)
_FROM_HF = {architecture: {hf: name for name, hf in table.items()} for architecture, table in _BLOCKS.items()}
_MODEL_FROM_HF = {hf: name for name, hf in _MODEL.items()}

# Text models have the first prefix; within a model of text and images, Transformers wrote the second before
# 4.52 and writes the third since.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_HEAD_PREFIXES = ("", "language_model.")
_PART = re.compile(r"(?P<part>.+)\.(?P<suffix>weight|bias)", re.DOTALL)
_EXPERT = re.compile(r"(?<=\.experts\.)(0|[1-9][0-9]{0,3})(?=\.)")
_LAYER = r"(?P<layer>0|[1-9][0-9]{0,4})"
_HF_LAYER = re.compile(rf"layers\.{_LAYER}\.(?P<part>.+)", re.DOTALL)
_GGUF_LAYER = re.compile(rf"blk\.{_LAYER}\.(?P<part>.+)", re.DOTALL)


def to_gguf(architecture: str, name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor, or None if the architecture has no such tensor.

    Args:
        architecture: as GGUF spells it, such as ``llama``.
        name: such as ``model.layers.0.self_attn.q_proj.weight``, which is ``blk.0.attn_q.weight``. That of one expert's
            matrix gives the name of the tensor that it is a part of.

    Raises:
        UnsupportedError: nothing is known about the architecture.
    """
    table = _from_hf(architecture)
    found = _PART.fullmatch(name)
    if found is None:
        return None
    part, suffix = found["part"], found["suffix"]
    if part in (prefix + _HEAD[1] for prefix in _HEAD_PREFIXES):
        return f"{_HEAD[0]}.{suffix}"
    # The longest prefix first: one begins like another.
    prefix = next((p for p in sorted(_PREFIXES, key=len, reverse=True) if part.startswith(p)), None)
    if prefix is None:
        return None
    part = part[len(prefix) :]
    layer = _HF_LAYER.fullmatch(part)
    if layer is None:
        return f"{_MODEL_FROM_HF[part]}.{suffix}" if part in _MODEL_FROM_HF else None
    place = table.get(_EXPERT.sub("*", layer["part"]))
    return f"blk.{layer['layer']}.{place}.{suffix}" if place else None


def to_huggingface(architecture: str, name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor in a text model, or None if the architecture has no such tensor.

    Raises:
        UnsupportedError: nothing is known about the architecture.
    """
    _from_hf(architecture)
    found = _PART.fullmatch(name)
    if found is None:
        return None
    part, suffix = found["part"], found["suffix"]
    if part == _HEAD[0]:
        return f"{_HEAD[1]}.{suffix}"
    if part in _MODEL:
        return f"model.{_MODEL[part]}.{suffix}"
    layer = _GGUF_LAYER.fullmatch(part)
    table = _BLOCKS[architecture]
    if layer is None or layer["part"] not in table:
        return None
    return f"model.layers.{layer['layer']}.{table[layer['part']]}.{suffix}"


def layer_of(name: str) -> int | None:
    """The layer that a GGUF tensor belongs to; None for one of the whole model."""
    found = _GGUF_LAYER.fullmatch(name)
    return int(found["layer"]) if found else None


def is_permuted(architecture: str, name: str) -> bool:
    """Whether GGUF stores the rows of this tensor (GGUF name) permuted: q's and k's, weights and biases."""
    found = _PART.fullmatch(name)
    return architecture in _PERMUTED and found is not None and found["part"].endswith((".attn_q", ".attn_k"))


def adds_one(architecture: str, name: str) -> bool:
    """Whether GGUF stores this tensor (GGUF name) with 1 added: all of Gemma's norms."""
    return architecture in _ADDING_ONE and name.endswith("norm.weight")


def is_of_experts(name: str) -> bool:
    """Whether a GGUF tensor holds something of each expert, one after the other."""
    found = _PART.fullmatch(name)
    return found is not None and found["part"].endswith("_exps")


def permute(rows: npt.NDArray[Scalar], heads: int) -> npt.NDArray[Scalar]:
    """Rows from Hugging Face's order to GGUF's: in each head, the two halves take turns.

    Args:
        rows: ``[out, ...]``, of any element type: weights, packed rows, a bias, or LoRA's b.
        heads: how many heads share the rows; those of the keys for k.

    Raises:
        WeightError: the rows are not ``heads`` heads of an even size.
    """
    half = _half(rows, heads)
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: npt.NDArray[Scalar], heads: int) -> npt.NDArray[Scalar]:
    """Rows from GGUF's order to Hugging Face's: what `permute` undoes.

    Raises:
        WeightError: as `permute`.
    """
    half = _half(rows, heads)
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_rows(
    architecture: str, name: str, rows: npt.NDArray[Scalar], heads: int, kv_heads: int
) -> npt.NDArray[Scalar]:
    """The rows ``[out, ...]`` of a Hugging Face tensor, given by its GGUF name, in GGUF's order.

    Raises:
        WeightError: as `permute`.
    """
    if not is_permuted(architecture, name):
        return rows
    return permute(rows, kv_heads if ".attn_k." in name else heads)


def huggingface_rows(
    architecture: str, name: str, rows: npt.NDArray[Scalar], heads: int, kv_heads: int
) -> npt.NDArray[Scalar]:
    """The rows ``[out, ...]`` of a GGUF tensor in Hugging Face's order: what `gguf_rows` undoes.

    Raises:
        WeightError: as `permute`.
    """
    if not is_permuted(architecture, name):
        return rows
    return unpermute(rows, kv_heads if ".attn_k." in name else heads)


def _from_hf(architecture: str) -> Mapping[str, str]:
    table = _FROM_HF.get(architecture)
    if table is None:
        raise UnsupportedError(
            f"the Hugging Face names of architecture {architecture!r} are not known",
            remedy=f"known: {', '.join(_BLOCKS)}",
        )
    return table


def _half(rows: npt.NDArray[Scalar], heads: int) -> int:
    if rows.ndim < 1 or heads < 1 or not len(rows) or len(rows) % (2 * heads):
        raise WeightError(
            f"rows of shape {list(rows.shape)} are not {heads} heads of an even size",
            remedy="pass [out, ...] and the number of heads that share the rows",
        )
    return len(rows) // heads // 2
