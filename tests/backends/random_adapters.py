"""Random LoRA adapters for any graph that takes them, and the interpreter's inputs for stacks of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.artifact import LoraGroup, LoraPart, LoraPlan
from rlxc.dtypes import DType
from rlxc.ir import Graph
from rlxc.passes.split_lora import SplitLora

Pairs = Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
Stack = Sequence[tuple[Pairs, float]]


def split_graph(graph: Graph, tensors: Collection[str], dtype: DType = DType.F32) -> tuple[Graph, LoraPlan]:
    """The graph with a side path for each of these matrices, and the plan of a manifest."""
    result = SplitLora(tensors).run(graph)
    groups = tuple(
        LoraGroup(fact["kind"], fact["down"], tuple(LoraPart(**part) for part in fact["parts"]))
        for fact in result.facts["lora"]
    )
    return result.graph, LoraPlan(dtype, 64, groups)


def random_pairs(plan: LoraPlan, rank: int, seed: int, tensors: Collection[str] | None = None) -> Pairs:
    """A and B for these matrices of the plan, for all by default; products with them are about half as large as x."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for group in plan.groups:
        for part in group.parts:
            a = rng.standard_normal((rank, part.columns)) / np.sqrt(part.columns * rank)
            b = rng.standard_normal((part.rows, rank)) / 2
            if tensors is None or part.tensor in tensors:
                pairs[part.tensor] = (a.astype(np.float32), b.astype(np.float32))
    return pairs


def stack_feeds(plan: LoraPlan, stacks: Sequence[Stack]) -> dict[str, npt.NDArray[Any]]:
    """The graph's LoRA inputs for these stacks, one for each sequence."""
    ranks = [[max((len(a) for a, _ in pairs.values()), default=0) for pairs, _ in stack] for stack in stacks]
    batch, rank = len(stacks), max(map(sum, ranks), default=0)
    feeds: dict[str, npt.NDArray[Any]] = {"lora_scales": np.zeros((batch, rank), np.float32)}
    for group in plan.groups:
        columns = group.parts[0].columns
        inner = (columns, rank) if group.kind == "embedding" else (len(group.parts), rank, columns)
        feeds[group.down] = np.zeros((batch, *inner), np.float32)
        for part in group.parts:
            feeds.setdefault(part.up, np.zeros((batch, part.up_rows, rank), np.float32))
    for sequence, (stack, sizes) in enumerate(zip(stacks, ranks)):
        start = 0
        for (pairs, scale), size in zip(stack, sizes):
            feeds["lora_scales"][sequence, start : start + size] = scale
            for group in plan.groups:
                for index, part in enumerate(group.parts):
                    if part.tensor not in pairs:
                        continue
                    a, b = pairs[part.tensor]
                    used = slice(start, start + len(a))
                    if group.kind == "embedding":
                        feeds[group.down][sequence, :, used] = a.T
                    else:
                        feeds[group.down][sequence, index, used] = a
                    rows = slice(part.first_row, part.first_row + part.rows)
                    feeds[part.up][sequence, rows, used] = b
            start += size
    return feeds
