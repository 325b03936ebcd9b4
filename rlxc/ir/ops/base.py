"""What an op is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir.graph import Dim, TensorType

Types = tuple[TensorType, ...]


@dataclass(frozen=True)
class Op(ABC):
    """What a node computes. Subclasses are frozen dataclasses whose fields are the op's attributes."""

    arity: ClassVar[tuple[int, int]] = (1, 1)
    """Smallest and largest number of inputs."""

    @property
    def name(self) -> str:
        """The op's name in IR text."""
        return type(self).__name__

    def infer(self, inputs: Types) -> Types:
        """The types of the results for these input types.

        Raises:
            GraphError: the op does not accept them.
        """
        low, high = self.arity
        self.require(low <= len(inputs) <= high, f"takes {low} to {high} inputs, got {len(inputs)}")
        return self.shape_rule(inputs)

    @abstractmethod
    def shape_rule(self, inputs: Types) -> Types:
        """The types of the results, given the right number of inputs."""

    def require(self, condition: bool, problem: str) -> None:
        """Raise a GraphError naming this op unless the condition holds."""
        if not condition:
            raise GraphError(problem, source=self.name)


def add_dims(a: Dim, b: Dim) -> Dim:
    """The sum of two dimensions, symbolic where either is."""
    return a + b if isinstance(a, int) and isinstance(b, int) else f"{a}+{b}"


def f32(*shape: Dim) -> TensorType:
    """An f32 tensor's type."""
    return TensorType(DType.F32, shape)


def part_size(op: Op, x: TensorType, parts: int) -> int:
    """The size of each of ``parts`` equal parts of the last dimension of ``x``, which must be f32."""
    op.require(x.dtype is DType.F32, f"needs f32, got {x}")
    size = x.shape[-1] if x.shape else None
    op.require(
        isinstance(size, int) and parts > 0 and size % parts == 0,
        f"the last dimension of {x} must be a multiple of {parts}",
    )
    assert isinstance(size, int)
    return size // parts
