"""A model step as a list of kernel calls over numbered buffers, and where those buffers lie in one workspace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlxc.artifact.alignment import align
from rlxc.backends.tvm.families import Entry
from rlxc.backends.tvm.kernels.kernel import Kernel

Amount = Literal["tokens", "rows"]
"""How many there are of something: tokens of all sequences, or rows whose logits are wanted."""

Counter = Literal["sequences", "step", "tokens", "rows", "rows_per_sequence"]
"""A number that a call is given."""


@dataclass(frozen=True)
class Times:
    """A number that a call is given: so many for each of a counter, as slots for experts."""

    counter: Counter
    factor: int


Count = Counter | Times

Tensor = Literal[
    "ids",
    "past",
    "tables",
    "lora_starts",
    "lora_units",
    "lora_scales",
    "logit_rows",
    "logits",
    "maxima",
    "sums",
]
"""A tensor that the caller passes."""


@dataclass(frozen=True)
class InWeights:
    """An argument: what lies at this byte of the weights file's data."""

    offset: int


@dataclass(frozen=True)
class InWorkspace:
    """An argument: a buffer of the workspace, from this byte on."""

    buffer: int
    offset: int = 0


@dataclass(frozen=True)
class InTable:
    """An argument: what lies at this byte of a sequence's block tables, relative to the anchor."""

    offset: int


@dataclass(frozen=True)
class InPage:
    """An argument: what lies at this byte of a page of a cache, relative to the anchor."""

    offset: int


@dataclass(frozen=True)
class InUnit:
    """An argument: what lies at this byte of a unit of an adapter, relative to the anchor."""

    offset: int


Argument = InWeights | InWorkspace | InTable | InPage | InUnit | Tensor | Count


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        kernel: what is called.
        arguments: one for each of its parameters.
        amount: what it works on; a step may want no rows.
        bytes_read: weights that it reads, without adapters, of which each step may have others; of a mixture those of
            one token's experts.
        multiplications: by these weights, for each of the amount.
    """

    kernel: Kernel
    arguments: tuple[Argument, ...]
    amount: Amount
    bytes_read: int = 0
    multiplications: int = 0


@dataclass(frozen=True)
class Program:
    """All calls of a step, in order; the size of each buffer in bytes; and what of it can be tuned."""

    calls: tuple[Call, ...]
    buffers: tuple[int, ...]
    most_tokens: int
    entries: tuple[Entry, ...] = ()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel once, in order of first use."""
        return tuple({call.kernel.name: call.kernel for call in self.calls}.values())

    def facts(self) -> list[dict[str, str | int]]:
        """What a profiler wants to know of each call, in order: plain data, with :class:`Call`'s names."""
        return [
            {
                "kernel": call.kernel.name,
                "amount": call.amount,
                "bytes_read": call.bytes_read,
                "multiplications": call.multiplications,
            }
            for call in self.calls
        ]


@dataclass(frozen=True)
class Workspace:
    """Where each buffer lies, and how large the whole is, in bytes."""

    offsets: tuple[int, ...]
    nbytes: int


def plan_workspace(program: Program) -> Workspace:
    """Give buffers that are never in use at the same time the same bytes; the largest choose first."""
    spans = _spans(program.calls, len(program.buffers))
    offsets = [0] * len(program.buffers)
    placed: list[int] = []
    for buffer in sorted(range(len(program.buffers)), key=lambda i: -program.buffers[i]):
        size = align(program.buffers[buffer])
        overlapping = sorted(
            (offsets[other], offsets[other] + align(program.buffers[other]))
            for other in placed
            if spans[other][0] <= spans[buffer][1] and spans[buffer][0] <= spans[other][1]
        )
        offsets[buffer] = _first_gap(overlapping, size)
        placed.append(buffer)
    ends = (offset + align(size) for offset, size in zip(offsets, program.buffers))
    return Workspace(tuple(offsets), max(ends, default=0))


def _spans(calls: Sequence[Call], buffers: int) -> list[tuple[int, int]]:
    """The first and last call that uses each buffer."""
    spans = [(len(calls), -1)] * buffers
    for index, call in enumerate(calls):
        for argument in call.arguments:
            if isinstance(argument, InWorkspace):
                first, last = spans[argument.buffer]
                spans[argument.buffer] = (min(first, index), max(last, index))
    return spans


def _first_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """The lowest offset where ``size`` bytes are free; ``taken`` is sorted."""
    offset = 0
    for start, end in taken:
        if start - offset >= size:
            break
        offset = max(offset, end)
    return offset
