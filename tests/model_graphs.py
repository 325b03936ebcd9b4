"""Functional graphs of all architectures with small dimensions, from metadata alone: no file, no bytes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlxc.dtypes import DType
from rlxc.ir import Graph
from rlxc.models import build_model
from rlxc.weights.registry import F32, Packed, TiedAlias, WeightRegistry

# What the architectures hold lies beside the tests of models.
sys.path.insert(0, str(Path(__file__).parent / "models"))

from tiny_shapes import ARCHITECTURES, Sizes, settings, shapes

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 48, 32, 64, 4, 2, 16
WINDOW, TRAINED = 6, 512

LARGER = ("attn_v", "ffn_down", "token_embd", "output")
"""Kinds of matrices that are Q8_0 where all others are Q5_0, as in mixtures of formats."""

WINDOWED = ("gemma2", "gemma3", "gpt-oss")
"""Architectures that have a window whatever the file says."""


def model_graph(
    architecture: str,
    layers: int,
    *,
    bias: bool = False,
    factors: bool = False,
    metadata: Mapping[str, Any] | None = None,
    without: str = "",
    context: int = 256,
    **sizes: Any,
) -> Graph:
    """A tied model whose matrices are Q8_0 and, as mixtures do, Q5_0.

    Args:
        architecture: the name that metadata give it.
        layers: how many.
        bias: with biases.
        factors: with those of Llama 3.
        metadata: keys to add or change, without the architecture's prefix.
        without: the tensor that the file lacks.
        context: what the graph is built for.
        sizes: fields of `Sizes`.
    """
    numbers = {
        "hidden": HIDDEN,
        "ffn": FFN,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab": VOCAB,
        "context": TRAINED,
        "bias": bias,
        "rope_scaling": "llama3" if factors else None,
        "window": WINDOW if architecture in WINDOWED else 0,
        **sizes,
    }
    whole = Sizes(architecture, layers=layers, **numbers)
    registry = WeightRegistry()
    for name, shape in shapes(whole):
        kind = name.split(".")[-2]
        if name in (
            without,
            "output.weight",
        ):  # the latter is a copy of the embedding, where llama.cpp wants one
            continue
        if len(shape) == 1 or name.endswith(".bias") or kind == "ffn_gate_inp":
            registry.add(F32(name, shape))
        else:
            registry.add(Packed(name, DType.Q8_0 if kind in LARGER else DType.Q5_0, shape))
    registry.add(Packed("output.weight", DType.Q8_0, (VOCAB, HIDDEN)), TiedAlias("token_embd.weight"))
    given = settings(whole) | dict(metadata or {})
    named = {f"{architecture}.{key}": value for key, value in given.items() if value is not None}
    return build_model({"general.architecture": architecture, **named}, registry, "small model", context)[1]


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases and factors": ("llama", {"bias": True, "factors": True}),
    "llama with experts": ("llama", {"experts": 4, "expert_ffn": FFN}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gpt-oss": ("gpt-oss", {"experts": 4, "expert_ffn": HIDDEN, "bias": True}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "olmo2 with windows": ("olmo2", {"window": WINDOW, "rope_scaling": "yarn"}),
    "phi3": ("phi3", {"rope_scaling": "longrope", "rope_dim": 12}),
    "qwen2": ("qwen2", {"bias": True}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3moe", {"experts": 4, "expert_ffn": HIDDEN}),
    "stablelm": ("stablelm", {"rope_dim": 4}),
    "stablelm in parallel": ("stablelm", {"parallel": True, "rope_dim": 4}),
    "starcoder2": ("starcoder2", {"bias": True}),
}
"""Every architecture, with options of `model_graph`."""

assert {architecture for architecture, _ in MODELS.values()} == set(ARCHITECTURES)
