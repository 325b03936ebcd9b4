"""From a model's weights to its graph."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlxc.errors import OptionError
from rlxc.ir import Graph
from rlxc.models import Config, build_model
from rlxc.weights.registry import F32, Packed, TiedAlias, WeightRegistry, base_registry
from rlxc.weights.source import ModelFile

DEFAULT_CONTEXT = 4096
"""Positions of an artifact when the user names none and the model was trained for at least as many."""


class Model(NamedTuple):
    """A model's numbers, its weights, and the graph of one step as its definition emits it, for so many positions."""

    config: Config
    registry: WeightRegistry
    graph: Graph
    context: int


def read_model(file: ModelFile, context: int | None = None) -> Model:
    """Read a model.

    Args:
        file: its weights and metadata.
        context: the positions that it is to be compiled for; by default :data:`DEFAULT_CONTEXT`, or as many as it was
            trained for if that is less.

    Raises:
        RlxcError: the model is damaged or not supported.
        OptionError: the context is longer than what the model was trained for.
    """
    registry = base_registry(file)
    tie_output(file, registry)
    context = checked_context(context, file)
    config, graph = build_model(file.metadata, registry, file.path, context)
    return Model(config, registry, graph, context)


def checked_context(context: int | None, file: ModelFile) -> int:
    """The positions that a model is to be compiled for, where ``context`` was asked for.

    Raises:
        OptionError: it is longer than what the model was trained for.
    """
    trained = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    if not isinstance(trained, int) or isinstance(trained, bool) or trained < 1:
        return context or DEFAULT_CONTEXT  # the model's definition says what is wrong
    if context is None:
        return min(DEFAULT_CONTEXT, trained)
    if not 1 <= context <= trained:
        raise OptionError(
            f"context {context} is outside 1..{trained}, what the model was trained for", source=file.path
        )
    return context


def tie_output(file: ModelFile, registry: WeightRegistry) -> None:
    """Declare ``output.weight`` an alias of the embedding where it is absent, or holds the very same bytes.

    Tying two matrices that differ would turn the model's output to gibberish without an error.
    """
    table, output = "token_embd.weight", "output.weight"
    if table not in registry:
        return
    target = registry.resolve(table)
    if output in registry:
        found = registry.resolve(output)
        if (found.dtype, found.shape) != (target.dtype, target.shape):
            return
        if not {table, output} <= file.tensors.keys():  # of a type that nobody can read
            return
        if not _equal_bytes(file.data(output), file.data(table)):
            return
        registry.remove(output)
    alias = (
        F32(output, target.shape) if isinstance(target, F32) else Packed(output, target.scheme, target.shape)
    )
    registry.add(alias, TiedAlias(table))


def _equal_bytes(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    step = 1 << 22  # comparing makes a temporary array as large as what is compared
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))
