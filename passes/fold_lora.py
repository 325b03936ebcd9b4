"""Folds LoRA adapters into the weights that they change: at run time they cost nothing, and cannot be taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import Alias, Encode, Fold, Graph, Source, TensorType, Weight
from rlxc.ir.ops import Embed
from rlxc.passes.base import Pass, PassResult
from rlxc.passes.quantize_weights import with_op


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to a matrix: ``scale * B A``, whose tensors are called ``a`` and ``b``, of this rank.

    ``magnitude`` is DoRA's, if there is one.
    """

    a: str
    b: str
    rank: int
    scale: float
    magnitude: str | None = None


class FoldLora(Pass):
    """Weights become recipes: decode, add the adapters' products in order, encode in the format ``to`` names.

    The bytes are made when the artifact is written, row by row. A tied table that only the embedding's adapter changes
    is tied no more. The fact ``folded`` lists the matrices.

    Args:
        deltas: by the matrix's name, those of each adapter.
        to: by the matrix's name, the format of the result; missing ones keep theirs.
    """

    def __init__(self, deltas: Mapping[str, Sequence[Delta]], to: Mapping[str, DType]) -> None:
        self.deltas, self.to = deltas, to

    def run(self, graph: Graph) -> PassResult:
        """See the class.

        Raises:
            GraphError: the graph has no such matrix.
        """
        if not self.deltas:
            return PassResult(graph, False)
        missing = sorted(set(self.deltas) - set(graph.weight))
        if missing:
            raise GraphError(f"there is no matrix {missing[0]!r} to fold an adapter into", source=self.name)
        weights = []
        for weight in graph.weights:
            if isinstance(weight.recipe, Alias) and weight.recipe.target in self.deltas:
                weight = replace(weight, recipe=Source(graph.stored(weight).name))
            weights.append(self._folded(graph, weight) if weight.name in self.deltas else weight)
        packed = {weight.name: weight.type.dtype.is_packed for weight in weights}
        nodes = [with_op(node, packed) for node in graph.nodes]
        facts: dict[str, Any] = {"folded": sorted(self.deltas)}
        return PassResult(graph.with_nodes(nodes, weights), True, facts)

    def _folded(self, graph: Graph, weight: Weight) -> Weight:
        stored = graph.stored(weight)
        is_table = any(isinstance(user.op, Embed) for user in graph.users[weight.name])
        if is_table and len(graph.users[weight.name]) > 1:
            raise GraphError(f"@{weight.name} is both table and matrix; fold before aliases are resolved")
        rows, columns = weight.type.shape
        out, in_ = (columns, rows) if is_table else (rows, columns)
        type_ = TensorType(DType.F32, weight.type.shape)
        result = replace(stored, name=f"{weight.name}.base")
        for number, delta in enumerate(self.deltas[weight.name]):
            a = Weight(delta.a, TensorType(DType.F32, (delta.rank, in_)), Source(delta.a))
            b = Weight(delta.b, TensorType(DType.F32, (out, delta.rank)), Source(delta.b))
            magnitude = None
            if delta.magnitude is not None:
                magnitude = Weight(delta.magnitude, TensorType(DType.F32, (rows,)), Source(delta.magnitude))
            recipe = Fold(result, a, b, delta.scale, magnitude, is_table)
            result = Weight(f"{weight.name}.folded.{number}", type_, recipe)
        dtype = self.to.get(weight.name, weight.type.dtype)
        if dtype is DType.F32:
            return replace(result, name=weight.name)
        return Weight(weight.name, TensorType(dtype, weight.type.shape), Encode(result))
