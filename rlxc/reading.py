"""From a model's weights to its graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rlxc.ir import Graph
from rlxc.models import Config, build_model
from rlxc.weights.registry import F32, Packed, TiedAlias, WeightRegistry, base_registry
from rlxc.weights.source import ModelFile


def read_model(file: ModelFile) -> tuple[Config, WeightRegistry, Graph]:
    """A model's numbers, its weights, and the graph of one step as its definition emits it.

    Raises:
        RlxcError: the model is damaged or not supported.
    """
    registry = base_registry(file)
    _tie_output(file, registry)
    config, graph = build_model(file.metadata, registry, file.path)
    return config, registry, graph


def _tie_output(file: ModelFile, registry: WeightRegistry) -> None:
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
