"""Folds LoRA adapters into the weights that they change: at run time they cost nothing, and cannot be taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import Alias, Encode, Fold, Graph, Source, TensorType, Weight
from rlxc.ir.ops import Embed
from rlxc.passes.base import Pass, PassResult
from rlxc.passes.quantize_weights import with_op


@dataclass(frozen=True)
class Delta:
    """An adapter adds ``scale * B A`` to a matrix; their tensors are called ``a`` and ``b`` and have this rank.

    ``magnitude`` is DoRA's, if there is one. An ``activated`` one acts only from certain tokens of a text on.
    """

    a: str
    b: str
    rank: int
    scale: float
    magnitude: str | None = None
    activated: bool = False


@dataclass(frozen=True)
class Replacement:
    """An adapter puts a whole matrix, or a norm's vector, in the place of the model's."""

    tensor: str


Change = Delta | Replacement


class FoldLora(Pass):
    """Weights become recipes: decode, add the adapters' products in order, encode in the format ``to`` names.

    The bytes are made when the artifact is written, row by row. A tied table that only the embedding's adapter changes
    is tied no more.

    Args:
        changes: by the matrix's name, those of each adapter.
        to: by the matrix's name, the format of the result; missing ones keep theirs.
    """

    def __init__(self, changes: Mapping[str, Sequence[Change]], to: Mapping[str, DType]) -> None:
        self.changes, self.to = changes, to

    def run(self, graph: Graph) -> PassResult:
        """See the class.

        Raises:
            GraphError: the graph has no such matrix.
        """
        if not self.changes:
            return PassResult(graph, False)
        missing = sorted(set(self.changes) - set(graph.weight))
        if missing:
            raise GraphError(f"there is no matrix {missing[0]!r} to fold an adapter into", source=self.name)
        weights = []
        for weight in graph.weights:
            if isinstance(weight.recipe, Alias) and weight.recipe.target in self.changes:
                weight = replace(weight, recipe=Source(graph.stored(weight).name))
            weights.append(self._folded(graph, weight) if weight.name in self.changes else weight)
        packed = {weight.name: weight.type.dtype.is_packed for weight in weights}
        nodes = [with_op(node, packed) for node in graph.nodes]
        return PassResult(graph.with_nodes(nodes, weights), True)

    def _folded(self, graph: Graph, weight: Weight) -> Weight:
        stored = graph.stored(weight)
        is_table = any(isinstance(user.op, Embed) for user in graph.users[weight.name])
        if is_table and len(graph.users[weight.name]) > 1:
            raise GraphError(f"@{weight.name} is both table and matrix; fold before aliases are resolved")
        type_ = TensorType(DType.F32, weight.type.shape)
        result = replace(stored, name=f"{weight.name}.base")
        for number, change in enumerate(self.changes[weight.name]):
            name = f"{weight.name}.folded.{number}"
            if isinstance(change, Replacement):
                result = Weight(name, type_, Source(change.tensor))
                continue
            rows, columns = weight.type.shape
            out, in_ = (columns, rows) if is_table else (rows, columns)
            a = Weight(f"{name}.a", TensorType(DType.F32, (change.rank, in_)), Source(change.a))
            b = Weight(f"{name}.b", TensorType(DType.F32, (out, change.rank)), Source(change.b))
            magnitude = None
            if change.magnitude is not None:
                vector = TensorType(DType.F32, (rows,))
                magnitude = Weight(f"{name}.magnitude", vector, Source(change.magnitude))
            result = Weight(name, type_, Fold(result, a, b, change.scale, magnitude, is_table))
        dtype = self.to.get(weight.name, weight.type.dtype)
        if dtype is DType.F32:
            return replace(result, name=weight.name)
        return Weight(weight.name, TensorType(dtype, weight.type.shape), Encode(result))
