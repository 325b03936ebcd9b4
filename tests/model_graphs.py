"""Functional graphs of both architectures with small dimensions, from metadata alone: no file, no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlxc.dtypes import DType
from rlxc.ir import Graph
from rlxc.models import build_model
from rlxc.weights.registry import F32, Packed, TiedAlias, WeightRegistry

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 48, 32, 64, 4, 2, 16
WINDOW = 6


def model_graph(architecture: str, layers: int, *, bias: bool = False, factors: bool = False) -> Graph:
    """A tied model whose matrices are Q8_0 and, as mixtures do, Q5_0."""
    registry = WeightRegistry()
    for name, shape, dtype in _tensors(architecture, layers, bias, factors):
        registry.add(F32(name, shape) if dtype is DType.F32 else Packed(name, dtype, shape))
    registry.add(Packed("output.weight", DType.Q8_0, (VOCAB, HIDDEN)), TiedAlias("token_embd.weight"))
    return build_model(_metadata(architecture, layers), registry, "small model", 256)[1]


def _metadata(architecture: str, layers: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": HIDDEN,
        "block_count": layers,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    }
    if architecture == "gemma3":
        numbers["attention.sliding_window"] = WINDOW
    named = {f"{architecture}.{key}": value for key, value in numbers.items()}
    return {"general.architecture": architecture, **named}


def _tensors(
    architecture: str, layers: int, bias: bool, factors: bool
) -> Iterator[tuple[str, tuple[int, ...], DType]]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "token_embd.weight", (VOCAB, HIDDEN), DType.Q8_0
    yield "output_norm.weight", (HIDDEN,), DType.F32
    if factors:
        yield "rope_freqs.weight", (HEAD_DIM // 2,), DType.F32
    norms = ["attn_norm", "ffn_norm"]
    if architecture == "gemma3":
        norms += ["post_attention_norm", "post_ffw_norm"]
    for i in range(layers):
        for name in norms:
            yield f"blk.{i}.{name}.weight", (HIDDEN,), DType.F32
        if architecture == "gemma3":
            yield f"blk.{i}.attn_q_norm.weight", (HEAD_DIM,), DType.F32
            yield f"blk.{i}.attn_k_norm.weight", (HEAD_DIM,), DType.F32
        for name, out in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            yield f"blk.{i}.{name}.weight", (out, HIDDEN), DType.Q8_0 if name == "attn_v" else DType.Q5_0
            if bias:
                yield f"blk.{i}.{name}.bias", (out,), DType.F32
        yield f"blk.{i}.attn_output.weight", (HIDDEN, q), DType.Q5_0
        yield f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN), DType.Q5_0
        yield f"blk.{i}.ffn_up.weight", (FFN, HIDDEN), DType.Q5_0
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, FFN), DType.Q8_0
