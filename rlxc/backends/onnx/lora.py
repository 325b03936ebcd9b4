"""LoRA side paths in ONNX: their nodes, and the inputs that adapters come in.

The graph's inputs come apart, so that each matrix product reads its own and nothing is cut or moved in a step:

    lora_scales            [batch, rank]             of every rank of the stack
    {group.down}           [batch, parts * rank, in] the A's of a group, one below the other
                           [batch, vocab, rank]      the A of an embedding
    {part.up}.{first_row}  [batch, rows, rank]       the B of one matrix

Each has one rank of zeros as its default, with which the model is what it is without adapters (ONNX Runtime splits no
empty tensor, so none at all would not do). Stacks of one step have one rank; shorter ones are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from rlxc.backends.onnx.external import Region
from rlxc.ir import Dim, Node, ops

if TYPE_CHECKING:
    from rlxc.backends.onnx.lower import Lowering

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class AdapterInput:
    """An input of the model: its shape, and that of its default."""

    shape: tuple[Dim, ...]
    default: tuple[int, ...]


class SidePaths:
    """Adds side paths to a model, and collects the inputs that they need."""

    def __init__(self, to: Lowering) -> None:
        self._to = to
        self._inputs: dict[str, dict[str, AdapterInput]] = {}
        self._scales: set[str] = set()

    def inputs_for(self, value: str) -> Mapping[str, AdapterInput]:
        """The inputs that stand in the place of this one of the graph's, by name; none where it stays as it is."""
        return self._inputs.get(value, {})

    def add_defaults(self) -> None:
        """Give each input its zeros; all of them lie in one place in the weights file."""
        defaults = {name: one.default for inputs in self._inputs.values() for name, one in inputs.items()}
        if not defaults:
            return
        zeros = self._to.file.add([np.zeros(max(map(prod, defaults.values())), np.float32)])
        for name, dims in defaults.items():
            self._to.external(name, TensorProto.FLOAT, dims, Region(zeros.offset, 4 * prod(dims)))

    def down(self, node: Node) -> None:
        """``u = scales * (x A^T)``, as one value for each part."""
        (x, a, scales), (u,) = node.inputs, node.outputs
        _, parts, _, columns = self._to.graph.types[a].shape
        assert isinstance(parts, int) and isinstance(columns, int)
        ranks = f"{parts}*rank" if parts > 1 else "rank"
        self._input(a, a, AdapterInput(("batch", ranks, columns), (1, parts, columns)))
        self._to.add("FusedMatMul", [x, a], [f"{u}.plain"], MICROSOFT, transB=1)
        results = [f"{u}.{part}" for part in range(parts)]
        scaled = results[0] if parts == 1 else f"{u}.all"
        self._to.add("Mul", [f"{u}.plain", self._repeated(scales, parts)], [scaled])
        if parts > 1:
            self._to.add("Split", [scaled], results, axis=-1, num_outputs=parts)

    def up(self, op: ops.LoraMatMul, node: Node, base: str) -> None:
        """``base + u B^T``, B's of one product part by part."""
        *_, u, b = node.inputs
        (out,) = node.outputs
        deltas = [f"{out}.delta.{part}" for part in range(len(op.sizes))]
        first_rows = accumulate(op.sizes, initial=0)
        for part, (rows, first_row, delta) in enumerate(zip(op.sizes, first_rows, deltas), op.first):
            name = f"{b}.{first_row}"
            self._input(b, name, AdapterInput(("batch", rows, "rank"), (1, rows, 1)))
            self._to.add("FusedMatMul", [f"{u}.{part}", name], [delta], MICROSOFT, transB=1)
        delta = deltas[0]
        if len(deltas) > 1:
            delta = f"{out}.delta"
            self._to.add("Concat", deltas, [delta], axis=-1)
        self._to.add("Add", [base, delta], [out])

    def embed(self, node: Node) -> None:
        """``x + (scales * A[ids]) B^T``, where all sequences' A's count as one table, one below the other."""
        (x, ids, a, scales, b), (out,) = node.inputs, node.outputs
        vocab, width = self._to.graph.types[a].shape[1], self._to.width(x)
        assert isinstance(vocab, int)
        self._input(a, a, AdapterInput(("batch", vocab, "rank"), (1, vocab, 1)))
        self._input(b, f"{b}.0", AdapterInput(("batch", width, "rank"), (1, width, 1)))
        one = self._to.constant("one", np.array([1]))
        numbers = [self._to.constant(f"index_{i}", np.array(i)) for i in (0, 1, vocab)]
        self._to.add("Shape", [a], [f"{out}.count"], start=0, end=1)
        self._to.add("Squeeze", [f"{out}.count"], [f"{out}.stacks"])
        self._to.add("Range", [numbers[0], f"{out}.stacks", numbers[1]], [f"{out}.stack"])
        self._to.add("Mul", [f"{out}.stack", numbers[2]], [f"{out}.first"])
        self._to.add("Unsqueeze", [f"{out}.first", one], [f"{out}.first_row"])
        self._to.add("Add", [ids, f"{out}.first_row"], [f"{out}.places"])
        self._to.add("Flatten", [a], [f"{out}.table"], axis=2)
        self._to.add("Gather", [f"{out}.table", f"{out}.places"], [f"{out}.gathered"], axis=0)
        self._to.add("Mul", [f"{out}.gathered", self._repeated(scales, 1)], [f"{out}.u"])
        self._to.add("FusedMatMul", [f"{out}.u", f"{b}.0"], [f"{out}.delta"], MICROSOFT, transB=1)
        self._to.add("Add", [x, f"{out}.delta"], [out])

    def _input(self, of: str, name: str, one: AdapterInput) -> None:
        self._inputs.setdefault(of, {})[name] = one

    def _repeated(self, scales: str, parts: int) -> str:
        """The scales ``[batch, 1, parts * rank]``, the same for each part; made once in a step."""
        self._input(scales, scales, AdapterInput(("batch", "rank"), (1, 1)))
        name = f"{scales}.{parts}"
        if name in self._scales:
            return name
        self._scales.add(name)
        if parts == 1:
            self._to.add("Unsqueeze", [scales, self._to.constant("one", np.array([1]))], [name])
        else:
            self._to.add("Concat", [self._repeated(scales, 1)] * parts, [name], axis=-1)
        return name
