"""A model file as the interpreter runs it: the oracle for what is compiled from the same file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny import VARIANTS

from rlxc.ir import Graph, interp, verify
from rlxc.models import Config, build_model
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import GgufFile
from rlxc.weights.registry import F32, Packed, TiedAlias, WeightRegistry, base_registry

CONTEXT = 256
"""What the interpreter's models are built for."""

Floats = npt.NDArray[np.floating[Any]]


class OpenModel:
    """A model's functional graph, run by the interpreter on the file's decoded weights."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.config, self.graph = build(file)
        self.decode = cache(self._decode)

    def _decode(self, name: str) -> npt.NDArray[np.float32]:
        info = self.file.tensors[name]
        rows = self.file.data(name).reshape(-1, FORMATS[info.dtype].row_bytes(info.shape[-1]))
        return FORMATS[info.dtype].decode(rows, info.shape[-1]).reshape(info.shape)

    def empty_caches(self) -> dict[str, Floats]:
        empty = np.zeros((1, self.config.kv_heads, 0, self.config.head_dim))
        return {v.name: empty for v in self.graph.inputs if v.name.startswith("past_key_values.")}

    def step(self, ids: Sequence[int], caches: dict[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """The logits ``[len(ids), vocab]`` after each id, and the caches with their rows."""
        feeds = {"input_ids": np.array([ids]), "logit_rows": np.arange(len(ids)), **caches}
        results = interp.run(self.graph, feeds, self.decode)
        grown = {name: results[name.replace("past_key_values", "present")] for name in caches}
        return results["logits"][0], grown

    def logits(self, ids: Sequence[int]) -> Floats:
        """The logits ``[len(ids), vocab]`` of one full pass."""
        return self.step(ids, self.empty_caches())[0]


def tied_registry(file: GgufFile) -> WeightRegistry:
    """The file's weights, with the logits tied to the embedding unless the file says otherwise."""
    registry = base_registry(file)
    if "output.weight" not in registry:
        table = registry.resolve("token_embd.weight")
        packed = isinstance(table, Packed)
        alias = (
            Packed("output.weight", table.scheme, table.shape)
            if packed
            else F32("output.weight", table.shape)
        )
        registry.add(alias, TiedAlias("token_embd.weight"))
    return registry


def build(file: GgufFile, **metadata: Any) -> tuple[Config, Graph]:
    config, graph = build_model({**file.metadata, **metadata}, tied_registry(file), file.path, CONTEXT)
    verify(graph)
    return config, graph


_GELU = ("gemma2", "gemma3", "starcoder2")


def tolerance(variant: str, reference: Floats) -> float:
    """How far the logits of one of `VARIANTS` may lie from llama.cpp's.

    What is left of two f32 computations in different order is 1e-6 of the logits' range, for each of a few layers.
    llama.cpp looks GELU up in a table with f16 arguments and values, 5e-4 off each. If the best logit leads the
    second one by twice this, both have the same best token.
    """
    return float((1e-3 if VARIANTS[variant].architecture in _GELU else 1e-5) * np.ptp(reference))
