"""A model file and adapters for it as the interpreter runs them: what is left when no pass and no kernel has run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlxc.ir import interp
from rlxc.weights.adapters import Adapter, AdapterBase, open_adapter
from rlxc.weights.source import open_model

# What tests share lies in other folders, too.
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
sys.path.insert(0, str(Path(__file__).parent.parent / "backends"))

from oracle import Floats, OpenModel
from random_adapters import split_graph, stack_feeds

Stack = Sequence[tuple[Adapter, float]]


class Interpreted:
    """A GGUF file or a Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        self.model = OpenModel(open_model(path))  # type: ignore[arg-type]
        config = self.model.config
        self.base = AdapterBase(self.model.graph.name, config.layers, config.heads, config.kv_heads)

    def open(self, path: Path) -> Adapter:
        """An adapter for this model."""
        return open_adapter(path, self.base)

    def logits(self, ids: Sequence[int], stack: Stack = ()) -> Floats:
        """The logits ``[len(ids), vocab]`` of one full pass with a stack of adapters."""
        if not stack:
            return self.model.logits(ids)
        targets = {tensor for adapter, _ in stack for tensor in adapter.pairs}
        graph, plan = split_graph(self.model.graph, targets)
        pairs = [
            ({name: (pair.a, pair.b * np.float32(pair.scale)) for name, pair in adapter.pairs.items()}, scale)
            for adapter, scale in stack
        ]
        feeds = {"input_ids": np.array([ids]), "logit_rows": np.arange(len(ids)), **self.model.empty_caches()}
        feeds |= stack_feeds(plan, [pairs])
        found: Floats = interp.run(graph, feeds, self.model.decode)["logits"][0]
        return found
