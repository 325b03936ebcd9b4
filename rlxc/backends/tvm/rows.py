"""Row-wise ops as kernels: those between two matrix products in one, which also rounds what products read in int8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rlxc.backends.tvm.draft import Draft, times
from rlxc.backends.tvm.kernels import rowwise
from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.kernel import Kernel
from rlxc.backends.tvm.kernels.rowwise import Row, RowProgram, Step
from rlxc.backends.tvm.program import Amount, Argument, InWorkspace
from rlxc.errors import UnsupportedError
from rlxc.ir import Node


@dataclass
class RowOps:
    """The row-wise ops of a draft: gathered while they follow each other.

    Attributes:
        numbers: constants that are one number, by their names.
    """

    draft: Draft
    numbers: dict[str, float] = field(default_factory=dict)
    _pending: list[Node] = field(default_factory=list)
    _rounded: dict[tuple[str, QuantisedRow], Argument] = field(default_factory=dict)
    _kernels: dict[RowProgram, Kernel] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        """Take in a node; it joins those before it if it works on the same rows."""
        if self._pending and self._rows_of(node) != self._rows_of(self._pending[0]):
            self.flush()
        self._pending.append(node)

    def flush(self) -> None:
        """Make one kernel of the nodes gathered so far."""
        nodes, self._pending = self._pending, []
        if not nodes:
            return
        made = [name for node in nodes for name in node.outputs]
        read = [name for node in nodes for name in node.inputs if name not in made]
        inputs = [name for name in dict.fromkeys(read) if name not in self.numbers]
        indices = {name: i for i, name in enumerate([*inputs, *made])}
        steps = tuple(
            Step(
                node.op,
                tuple(self.numbers[name] if name in self.numbers else indices[name] for name in node.inputs),
                indices[node.outputs[0]],
            )
            for node in nodes
        )
        inside = set(map(id, nodes))
        stored = [name for name in made if self._is_read_as_f32(name, inside)]
        self._make(nodes[0], inputs, steps, made, stored, indices)

    def _make(
        self,
        first: Node,
        inputs: list[str],
        steps: tuple[Step, ...],
        made: list[str],
        stored: list[str],
        indices: dict[str, int],
    ) -> None:
        draft, (amount, slots) = self.draft, self._rows_of(first)
        rounded = [(name, row) for name in made for row in self._roundings(name)]
        places = [draft.new(name) for name in stored]
        program = RowProgram(
            inputs=tuple(self._row(name, slots) for name in inputs),
            steps=steps,
            widths=tuple(draft.width(name) for name in made),
            stored=tuple((indices[name], place.stride) for name, place in zip(stored, places)),
            rounded=tuple((indices[name], row) for name, row in rounded),
        )
        for name, row in rounded:
            self._rounded[name, row] = draft.buffer(row.stride * slots)
        arguments = (
            *map(draft.argument, inputs),
            *(place.argument for place in places),
            *(self._rounded[key] for key in rounded),
            self._scratch(program),
            times(amount, slots),
        )
        draft.call(self._kernel(program), arguments, amount)

    def round(self, name: str, row: QuantisedRow) -> Argument:
        """A value's rows in int8; made on their own if no row-wise kernel made the value."""
        if (name, row) not in self._rounded:
            place = self.draft.place(name)
            program = RowProgram((Row(place.width, place.stride),), (), (), (), ((0, row),))
            out = self._rounded[name, row] = self.draft.buffer(row.stride * place.slots)
            arguments = (place.argument, out, self._scratch(program), place.rows)
            self.draft.call(self._kernel(program), arguments, place.amount)
        return self._rounded[name, row]

    def _rows_of(self, node: Node) -> tuple[Amount, int]:
        (name, *_) = node.outputs
        return self.draft.amount(name), self.draft.slots(name)

    def _row(self, name: str, slots: int) -> Row:
        """A row of an input, for a kernel that works on so many slots of a token at a time."""
        if name not in self.draft.weights.stored:
            place = self.draft.place(name)
            if place.slots == slots:
                return Row(place.width, place.stride)
            if slots == 1:  # all slots of a token side by side
                return Row(place.slots * place.stride, place.slots * place.stride)
        elif len(self.draft.graph.types[name].shape) == 1:
            return Row(self.draft.width(name), 0)
        raise UnsupportedError(f"{name} has other rows than the tvm backend reads it with")

    def _scratch(self, program: RowProgram) -> Argument:
        self.draft.buffers.append(4 * rowwise.scratch_floats(program))
        return InWorkspace(len(self.draft.buffers) - 1)

    def _kernel(self, program: RowProgram) -> Kernel:
        if program not in self._kernels:
            ops_of = [step.op.name.lower() for step in program.steps]
            name = "_".join([*ops_of, *(["round"] if program.rounded else []), str(len(self._kernels))])
            self._kernels[program] = rowwise.rowwise_kernel(self.draft.vectors, name, program)
        return self._kernels[program]

    def _roundings(self, name: str) -> Iterable[QuantisedRow]:
        """The forms in which products read a value in int8, each once."""
        draft = self.draft
        layouts = [draft.int8_layout(node) for node in draft.graph.users.get(name, ())]
        return dict.fromkeys(QuantisedRow.of(layout, draft.vectors) for layout in layouts if layout)

    def _is_read_as_f32(self, name: str, inside: set[int]) -> bool:
        """Whether anything but the nodes ``inside`` and int8 products reads a value."""
        users = self.draft.graph.users.get(name, ())
        return any(id(node) not in inside and not self.draft.int8_layout(node) for node in users)
