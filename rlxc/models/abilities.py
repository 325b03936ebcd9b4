"""What the definition of an architecture can do, found out by having it build graphs of files that ask for everything.

A definition reads its metadata and says what it has no use for, so nothing needs to be written down a second time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from rlxc.errors import ModelError, UnsupportedError
from rlxc.ir import Graph
from rlxc.ir.ops import Attention, LayerNorm, MixExperts, Rope, SoftCap
from rlxc.models import ARCHITECTURES
from rlxc.models.config import Fields
from rlxc.weights.registry import F32, WeightRegistry

_LAYERS, _HEAD_DIM, _CONTEXT = 8, 16, 64

_FILE: Mapping[str, Any] = MappingProxyType(
    {
        "attention.head_count": 4,
        "attention.key_length": _HEAD_DIM,
        "attention.layer_norm_epsilon": 1e-6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 8,
        "block_count": _LAYERS,
        "context_length": _CONTEXT,
        "embedding_length": 64,
        "expert_count": 4,
        "expert_feed_forward_length": 64,
        "expert_used_count": 2,
        "feed_forward_length": 64,
        "final_logit_softcapping": 30.0,
        "logit_scale": 2.0,
    }
)
"""Whatever any architecture asks for."""

_FACTORS = tuple(f"rope_factors_{kind}.weight" for kind in ("long", "short"))
_ROPES: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = MappingProxyType(
    {
        "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, ()),
        "YaRN": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, ()),
        "Llama 3": ({}, ("rope_freqs.weight",)),
        "LongRoPE": ({"rope.scaling.type": "longrope"}, _FACTORS),
        "partial": ({"rope.dimension_count": _HEAD_DIM // 2}, ()),
    }
)
"""Metadata and tensors that ask for each way to rotate."""

_FOLDER_WINDOWS = {"attention.sliding_window_pattern": np.array([True] * _LAYERS)}


@dataclass(frozen=True)
class Abilities:
    """What is supported of an architecture.

    Attributes:
        about: the first line of its definition: which models it covers.
        features: what its layers can have.
        ropes: the scalings of its rotary embedding, and ``partial`` if a part of each head can be rotated.
    """

    about: str
    features: tuple[str, ...]
    ropes: tuple[str, ...]


def abilities(architecture: str) -> Abilities:
    """What the definition of one of `ARCHITECTURES` can do."""
    about = sys.modules[ARCHITECTURES[architecture].__module__].__doc__ or ""  # none with python -OO
    plain, refused = _build(architecture, {})
    features = features_of(plain)
    ropes = []
    for name, (metadata, tensors) in _ROPES.items():
        try:
            graph, problems = _build(architecture, metadata, tensors)
        except ModelError:
            continue
        if problems <= refused and name in ropes_of(graph):
            ropes.append(name)
    if "windows" not in features:
        graph, problems = _build(architecture, _FOLDER_WINDOWS)
        if problems <= refused and "windows" in features_of(graph):
            features = ("windows of folders", *features)
    return Abilities(about.partition("\n")[0], features, tuple(ropes))


def features_of(graph: Graph) -> tuple[str, ...]:
    """What is special about the layers of a model's graph."""
    ops = [node.op for node in graph.nodes]
    attentions = [node for node in graph.nodes if isinstance(node.op, Attention)]
    found = {
        "windows": any(node.op.window for node in attentions if isinstance(node.op, Attention)),
        "capped scores": any(node.op.soft_cap for node in attentions if isinstance(node.op, Attention)),
        "capped logits": any(isinstance(op, SoftCap) for op in ops),
        "norms of q and k": any(".attn_q_norm." in weight.name for weight in graph.weights),
        "sinks": any(len(node.inputs) > 3 for node in attentions),
        "layer norms": any(isinstance(op, LayerNorm) for op in ops),
        "experts": any(isinstance(op, MixExperts) for op in ops),
    }
    return tuple(name for name, is_there in found.items() if is_there)


def ropes_of(graph: Graph) -> set[str]:
    """How the queries and keys of a model's graph are rotated, beyond plainly."""
    # Caches are f32[batch, kv_heads, past, head_dim].
    head_dim = next(value.type.shape[-1] for value in graph.inputs if len(value.type.shape) == 4)
    found: set[str] = set()
    for node in graph.nodes:
        if isinstance(node.op, Rope):
            found.update(_of_rope(node.op, node.inputs[2:]))
            if node.op.spec.dim != head_dim:
                found.add("partial")
    return found


def _of_rope(op: Rope, factors: tuple[str, ...]) -> Iterator[str]:
    if op.spec.yarn is not None:
        yield "YaRN"
    elif op.spec.factor != 1:
        yield "linear"
    if factors:
        yield "LongRoPE" if factors[0] in _FACTORS else "Llama 3"


def _build(
    architecture: str, metadata: Mapping[str, Any], tensors: tuple[str, ...] = ()
) -> tuple[Graph, set[str]]:
    """The graph of a file that lacks all other tensors, and what it asks for that is not implemented.

    Raises:
        ModelError: no model of this architecture can have such metadata.
    """
    values = {f"{architecture}.{key}": value for key, value in {**_FILE, **metadata}.items()}
    fields = Fields(values, architecture, None)
    registry = WeightRegistry()
    for name in tensors:
        registry.add(F32(name, (_HEAD_DIM // 2,)))
    _, graph = ARCHITECTURES[architecture](fields, registry, 1, _CONTEXT)
    return graph, {
        problem.problem for problem in fields.problems.found if isinstance(problem, UnsupportedError)
    }
