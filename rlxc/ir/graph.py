"""The graph: immutable, in SSA form, with weights that are recipes rather than bytes.

A graph is a list of nodes in execution order. A value is named once, by a graph input or by the one node that
produces it. Weights share the values' namespace; text marks values with ``%`` and weights with ``@``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from rlxc.dtypes import DType
from rlxc.errors import GraphError

if TYPE_CHECKING:
    from rlxc.ir.ops import Op

Dim = int | str
"""A dimension: a number, or the name of a symbolic one (``batch``, ``seq``, ``past``)."""


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; weights are always ``[out, in]``."""

    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Value:
    """A named graph input."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Source:
    """The bytes of one tensor of the model file, as they are."""

    tensor: str


@dataclass(frozen=True)
class Alias:
    """The same matrix as another weight of the graph (tied embeddings)."""

    target: str


@dataclass(frozen=True)
class Concat:
    """Weights stacked along ``out``; a part whose format widens exactly to the whole's keeps its codes."""

    parts: tuple[Weight, ...]


@dataclass(frozen=True)
class Encode:
    """The values of another weight, encoded anew in this weight's format."""

    part: Weight


@dataclass(frozen=True)
class Fold:
    """A LoRA adapter folded in, in f32: ``base + scale * B A``, with ``a`` ``[rank, in]`` and ``b`` ``[out, rank]``.

    With a magnitude ``[out]`` (DoRA, Liu et al. 2024) each row of that is scaled to have this length. A transposed
    fold is an embedding's: ``base + scale * (B A)^T``, with ``a`` ``[rank, vocab]`` and ``b`` ``[N, rank]``.
    """

    base: Weight
    a: Weight
    b: Weight
    scale: float
    magnitude: Weight | None = None
    transposed: bool = False

    @property
    def parts(self) -> tuple[Weight, ...]:
        """The weights that it reads."""
        return (self.base, self.a, self.b, *([self.magnitude] if self.magnitude else []))


@dataclass(frozen=True)
class Balance:
    """A vector in f32 that meets another one half-way in size: ``weight * sqrt(|other| / |weight|)``, both ``[n]``.

    Channel by channel, its product with ``Balance(other, weight)`` is that of ``weight`` with ``other``. Sizes are
    those of the pairs that rope turns, of the first ``dim`` channels, which are ``interleaved`` or not as
    :class:`~rlxc.ir.RopeSpec` says; every other channel is alone. A size of less than `FLOOR` times its vector's mean
    counts as that; next to a vector of zeros, nothing changes. Source: Xiao et al. 2022 (SmoothQuant), alpha = 1/2.
    """

    FLOOR: ClassVar[float] = 0.01

    weight: Weight
    other: Weight
    dim: int
    interleaved: bool = False

    @property
    def parts(self) -> tuple[Weight, ...]:
        """The weights that it reads."""
        return (self.weight, self.other)


Recipe = Source | Alias | Concat | Encode | Fold | Balance


@dataclass(frozen=True)
class WeightLayout:
    """How a backend stores a packed matrix: any layout holds the same numbers.

    Attributes:
        bits: that a code takes.
        block: columns that share a stored scale, or that a kernel takes at a time.
        tile: rows that lie interleaved; 1 if each lies alone.
    """

    bits: int
    block: int
    tile: int

    def __str__(self) -> str:
        rows = f", tiles of {self.tile}" if self.tile > 1 else ""
        return f"{self.bits} bit{'' if self.bits == 1 else 's'}, blocks of {self.block}{rows}"


@dataclass(frozen=True)
class Weight:
    """A weight and how to obtain it; its bytes are read when a backend writes the artifact.

    Without a layout it is stored as the backend stores its format by default.
    """

    name: str
    type: TensorType
    recipe: Recipe
    layout: WeightLayout | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of the model file that the recipe reads; an alias reads none of its own."""
        match self.recipe:
            case Source(tensor):
                return (tensor,)
            case Alias():
                return ()
            case Concat(parts):
                return tuple(tensor for part in parts for tensor in part.tensors)
            case Encode(part):
                return part.tensors
            case Fold() | Balance():
                return tuple(tensor for part in self.recipe.parts for tensor in part.tensors)


@dataclass(frozen=True)
class Node:
    """One application of an op to named inputs, giving named outputs."""

    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A whole model step. ``inputs`` and ``outputs`` are its interface, ``nodes`` are in execution order."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    weights: tuple[Weight, ...]

    @cached_property
    def weight(self) -> Mapping[str, Weight]:
        """Weights by name."""
        return {w.name: w for w in self.weights}

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """The node that produces each value; graph inputs and weights have none."""
        return {name: node for node in self.nodes for name in node.outputs}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each value or weight, in execution order, each once."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in users.items()}

    @cached_property
    def types(self) -> Mapping[str, TensorType]:
        """The type of every input, weight and value, by the ops' shape rules.

        Raises:
            GraphError: a name is unknown or defined twice, or a shape rule refuses its inputs.
        """
        types = {value.name: value.type for value in self.inputs}
        types.update({weight.name: weight.type for weight in self.weights})
        for node in self.nodes:
            unknown = [name for name in node.inputs if name not in types]
            if unknown:
                raise GraphError(f"{node.op.name} reads {unknown[0]!r}, which nothing before it defines")
            results = node.op.infer(tuple(types[name] for name in node.inputs))
            if len(results) != len(node.outputs):
                raise GraphError(
                    f"{node.op.name} has {len(results)} results, its node names {len(node.outputs)}"
                )
            for name, result in zip(node.outputs, results):
                if name in types:
                    raise GraphError(f"{node.op.name} defines {name!r}, which is defined already")
                types[name] = result
        return types

    def only_user(self, name: str) -> Node | None:
        """The one node that reads `name`, or None if several do, none does, or it is a graph output."""
        users = self.users.get(name, ())
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def stored(self, weight: Weight) -> Weight:
        """The weight that has bytes, at the end of this one's chain of aliases.

        Raises:
            GraphError: the chain leads back to itself, or to no weight.
        """
        chain = [weight.name]
        while isinstance(weight.recipe, Alias):
            target = weight.recipe.target
            if target in chain:
                raise GraphError(f"@{' -> @'.join([*chain, target])} is a cycle of aliases")
            if target not in self.weight:
                raise GraphError(f"@{weight.name} is an alias of @{target}, which is not a weight")
            weight = self.weight[target]
            chain.append(target)
        return weight

    def with_nodes(self, nodes: Iterable[Node], weights: Iterable[Weight] | None = None) -> Graph:
        """This graph with other nodes, and with other weights where they are given."""
        kept = self.weights if weights is None else tuple(weights)
        return replace(self, nodes=tuple(nodes), weights=kept)
