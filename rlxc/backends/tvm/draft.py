"""A program while it is made: its calls, its buffers, and where the values of the graph lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlxc.artifact.alignment import align
from rlxc.backends.tvm.kernels.kernel import Kernel
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import PackedLayout
from rlxc.backends.tvm.program import Amount, Argument, Call, Count, InWeights, InWorkspace, Times
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.backends.tvm.weights import WeightsFile
from rlxc.errors import UnsupportedError
from rlxc.ir import Graph, Node, ops


@dataclass(frozen=True)
class Place:
    """Where a value's rows are: ``width`` f32 from ``offset`` (bytes) on, ``stride`` numbers apart.

    There are ``slots`` rows, one after the other, for each of the ``amount``.
    """

    buffer: int
    offset: int
    stride: int
    width: int
    amount: Amount
    slots: int = 1

    @property
    def argument(self) -> Argument:
        """What a kernel is given."""
        return InWorkspace(self.buffer, self.offset)

    @property
    def rows(self) -> Count:
        """How many there are."""
        return times(self.amount, self.slots)


def times(amount: Amount, slots: int) -> Count:
    """So many rows for each of an amount."""
    return amount if slots == 1 else Times(amount, slots)


@dataclass
class Draft:
    """The program so far.

    Attributes:
        graph: what is lowered.
        weights: where weights lie.
        target: the CPU.
        int8: whether matrix products round their activations.
        most_tokens: how many tokens a step may have, of all sequences together.
        places: of the values that are stored, by their names.
    """

    graph: Graph
    weights: WeightsFile
    target: CpuTarget
    int8: bool
    most_tokens: int
    calls: list[Call] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vectors = Vectors.of(self.target)

    def call(
        self,
        kernel: Kernel,
        arguments: Sequence[Argument],
        amount: Amount = "tokens",
        bytes_read: int = 0,
        multiplications: int = 0,
    ) -> None:
        """Add a call; see :class:`Call`."""
        self.calls.append(Call(kernel, tuple(arguments), amount, bytes_read, multiplications))

    def place(self, name: str) -> Place:
        """Where a value lies.

        Raises:
            UnsupportedError: it is not stored.
        """
        if name not in self.places:
            raise UnsupportedError(f"%{name} is read in a way that the tvm backend does not store it")
        return self.places[name]

    def argument(self, name: str) -> Argument:
        """A value's rows, or a weight's bytes."""
        return self.weight(name) if name in self.weights.stored else self.place(name).argument

    def weight(self, name: str) -> Argument:
        """A weight's bytes."""
        return InWeights(self.weights.stored[name].offset)

    def new(self, name: str, *, width: int | None = None, stride: int | None = None) -> Place:
        """A place for a value's rows, on cache lines unless the kernel that makes them has a stride of its own."""
        width = width or self.width(name)
        stride = stride or align(4 * width) // 4
        amount, slots = self.amount(name), self.slots(name)
        buffer = self.buffer(4 * stride * slots)
        self.places[name] = Place(buffer.buffer, 0, stride, width, amount, slots)
        return self.places[name]

    def buffer(self, row_bytes: int, more: int = 0) -> InWorkspace:
        """A buffer of that many bytes for each token, and ``more``."""
        self.buffers.append(row_bytes * self.most_tokens + more)
        return InWorkspace(len(self.buffers) - 1)

    def width(self, name: str) -> int:
        """The numbers in a value's row."""
        return int(self.graph.types[name].shape[-1])

    def amount(self, name: str) -> Amount:
        """What a value has rows for."""
        return "rows" if self.graph.types[name].shape[1] == "rows" else "tokens"

    def slots(self, name: str) -> int:
        """How many rows for each: those of ``[B, S, U, N]`` are the slots that a token has for experts."""
        shape = self.graph.types[name].shape
        return int(shape[2]) if len(shape) == 4 else 1

    def int8_layout(self, node: Node) -> PackedLayout | None:
        """The layout of the weight that a node multiplies with in int8, if it does."""
        if not self.int8 or not isinstance(node.op, ops.DequantMatMul | ops.LoraMatMul | ops.ExpertMatMul):
            return None
        layout = self.weights.stored[node.inputs[1]].layout
        return layout if isinstance(layout, PackedLayout) and layout.has_integers else None
