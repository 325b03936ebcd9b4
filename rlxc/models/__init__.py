"""Model definitions, one file per architecture: ``build(fields, registry, vocab, context) -> (Config, Graph)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlxc.errors import ModelError, RlxcError, UnsupportedError
from rlxc.ir import Graph
from rlxc.models import (
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3moe,
    stablelm,
    starcoder2,
)
from rlxc.models.config import Config, Fields
from rlxc.weights.registry import WeightRegistry

__all__ = ["ARCHITECTURES", "Config", "build_model"]

ARCHITECTURES: Mapping[str, Callable[[Fields, WeightRegistry, int, int], tuple[Config, Graph]]] = {
    "gemma2": gemma2.build,
    "gemma3": gemma3.build,
    "gpt-oss": gpt_oss.build,
    "granite": granite.build,
    "llama": llama.build,
    "olmo2": olmo2.build,
    "phi3": phi3.build,
    "qwen2": qwen2.build,
    "qwen3": qwen3.build,
    "qwen3moe": qwen3moe.build,
    "stablelm": stablelm.build,
    "starcoder2": starcoder2.build,
}
"""``general.architecture`` of a GGUF file, and the function that builds its graph."""

_TABLE = "token_embd.weight"


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

    Where there are several problems the error is of the first one's kind, and has them all in its ``parts``.
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
    fields = Fields(metadata, architecture, source)
    # The builder says so if there is no table.
    vocab = registry.resolve(_TABLE).shape[0] if _TABLE in registry else 1
    try:
        built = ARCHITECTURES[architecture](fields, registry, vocab, context)
    except RlxcError as error:
        fields.problems.add(error)
    if fields.problems.found:
        raise fields.problems.error()
    return built
