"""What decides the keys and values that a compiled model makes, so that those of another one are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlxc.artifact import VERSION, KvLayer, Manifest


@dataclass(frozen=True)
class Mismatch:
    """How a snapshot is not one of a model, to follow the name of what it is, and what to do about it."""

    problem: str
    remedy: str


_ALIKE = "compile the model as it was when the snapshot was made, or make the snapshot again"

_MISMATCHES = {
    "version": Mismatch(
        "is of an artifact whose format has another version",
        "make the snapshot again with an artifact of this rlxc",
    ),
    "model": Mismatch("is of another model", "use an artifact of the model that the snapshot was made with"),
    "arithmetic": Mismatch(
        "is of a compilation with another backend, other activations or another type of adapters", _ALIKE
    ),
    "weights": Mismatch("is of a compilation with other weights", _ALIKE),
    "adapters": Mismatch("is of a compilation with other adapters in the weights", _ALIKE),
    "kv_cache": Mismatch(
        "is of a compilation with another plan of the KV cache: kv_cache.layers or kv_cache.rollback differ",
        _ALIKE,
    ),
}


def identity(manifest: Manifest) -> str:
    """A sha256 of everything that decides what keys and values are, and which of them are kept.

    That is: the model file and what was made of its weights; the adapters folded into them; backend, activations and
    the type of the adapters' numbers, which decide the arithmetic; and of the cache's plan what its rows look like
    (heads, types, windows, shared layers) and how many are kept (layouts, sizes of rings, rollback).

    It does not depend on what changes neither: the context's length, the size of pages and how much a step takes at
    most, threads, the CPU that machine code is for, names, the tokenizer. Adapters that come and go are no part of it
    either: a snapshot says itself what it was read with.
    """
    return _digest(parts(manifest))


def parts(manifest: Manifest) -> dict[str, str]:
    """A sha256 of each kind of thing that :func:`identity` is made of, to say what differs."""
    plan, lora = manifest.kv_cache, manifest.lora
    facts: dict[str, Any] = {
        "version": VERSION,
        "model": manifest.model.fingerprint,
        "arithmetic": [
            manifest.target.backend,
            manifest.options.activations,
            None if lora is None else lora.dtype,
        ],
        "weights": [[w.name, w.dtype, w.shape, w.recipe] for w in manifest.weights],
        "adapters": [[a.fingerprint, a.scale, a.folded] for a in manifest.adapters if a.folded],
        "kv_cache": [plan.rollback, [_layer(layer) for layer in plan.layers]],
    }
    return {name: _digest(fact) for name, fact in facts.items()}


def difference(snapshot: Manifest, model: Manifest) -> Mismatch | None:
    """How a snapshot of one artifact is not one of another; None if it is."""
    if identity(snapshot) == identity(model):
        return None
    return mismatch(parts(snapshot), model)


def mismatch(theirs: Mapping[str, str], model: Manifest) -> Mismatch:
    """What differs first, when an identity made of these parts is not the model's."""
    differing = (name for name, digest in parts(model).items() if theirs.get(name) != digest)
    return _MISMATCHES[next(differing, "version")]


def _layer(layer: KvLayer) -> list[Any]:
    # How a ring's rows lie depends on its capacity; other layouts have theirs from the context.
    capacity = layer.capacity if layer.layout == "ring" else None
    shape = [layer.heads, layer.head_dim, layer.dtype]
    return [layer.index, layer.layout, capacity, layer.window, *shape, layer.shares]


def _digest(fact: Any) -> str:
    return hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()
