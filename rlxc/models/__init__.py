"""Model definitions, one file per architecture: ``build(fields, registry, vocab, context) -> (Config, Graph)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlxc.errors import ModelError, UnsupportedError
from rlxc.ir import Graph
from rlxc.models import gemma3, llama
from rlxc.models.config import Config, Fields
from rlxc.weights.registry import WeightRegistry

__all__ = ["ARCHITECTURES", "Config", "build_model"]

ARCHITECTURES: Mapping[str, Callable[[Fields, WeightRegistry, int, int], tuple[Config, Graph]]] = {
    "gemma3": gemma3.build,
    "llama": llama.build,
}
"""``general.architecture`` of a GGUF file, and the function that builds its graph."""


def build_model(
    metadata: Mapping[str, Any], registry: WeightRegistry, source: object, context: int
) -> tuple[Config, Graph]:
    """The graph of one step of a model, in its functional form (caches grow, nothing is fused).

    Args:
        metadata: the GGUF metadata.
        registry: every tensor of the file.
        source: the file, for error messages.
        context: the positions that it will be compiled for; some architectures rotate differently in long contexts.

    Raises:
        UnsupportedError: the architecture, or something it asks for, is not implemented.
        ModelError: metadata or tensors are missing, left over, or contradict each other.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError("metadata general.architecture is missing", source=source)
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {architecture!r} is not implemented",
            source=source,
            remedy=f"known: {', '.join(ARCHITECTURES)}",
        )
    if "token_embd.weight" not in registry:
        raise ModelError(
            "tensor token_embd.weight is missing", source=source, remedy="the file is not a whole model"
        )
    vocab = registry.resolve("token_embd.weight").shape[0]
    return ARCHITECTURES[architecture](Fields(metadata, architecture, source), registry, vocab, context)
