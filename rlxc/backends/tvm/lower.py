"""The IR graph of a model step as a list of kernel calls.

Row-wise ops between two matrix products are gathered into one kernel, which also rounds its result to int8 where a
product reads it; every other op becomes a kernel of its own. Splitting a row costs nothing: its parts are views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import numpy as np
import numpy.typing as npt

from rlxc.artifact import KvPlan
from rlxc.artifact.alignment import align
from rlxc.artifact.lora import LoraPlan
from rlxc.backends.tvm.cache_places import CachePlaces
from rlxc.backends.tvm.families import MEASURED_POSITIONS, attention_workspace
from rlxc.backends.tvm.kernels import embed, lora, rope, rowwise, select, summarise
from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.kernel import Kernel
from rlxc.backends.tvm.kernels.lora import LoraUp
from rlxc.backends.tvm.kernels.rotate_and_write import rotate_and_write_kernel
from rlxc.backends.tvm.kernels.rowwise import Row, RowProgram, Step
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import PackedLayout
from rlxc.backends.tvm.program import (
    Amount,
    Argument,
    Call,
    Counter,
    InWeights,
    InWorkspace,
    Program,
)
from rlxc.backends.tvm.side_paths import SidePaths
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.backends.tvm.tuned import FindKnobs, TunedKernels
from rlxc.backends.tvm.weights import WeightsFile
from rlxc.errors import GraphError, UnsupportedError
from rlxc.ir import Graph, Node, RopeSpec, ops

_PRODUCTS: Final = (ops.MatMul, ops.DequantMatMul, ops.LoraMatMul)

_STACKS: Final[tuple[Argument, ...]] = ("lora_starts", "lora_units")

_STEPS: Final[Mapping[Amount, Counter]] = {"tokens": "step", "rows": "rows_per_sequence"}
"""How many of an amount each sequence has."""

ReadFloats = Callable[[str], npt.NDArray[np.float32]]
"""Gives a small f32 weight's values, by its name."""


def lower(
    graph: Graph,
    weights: WeightsFile,
    target: CpuTarget,
    *,
    int8: bool,
    kv: KvPlan,
    read_floats: ReadFloats,
    find_knobs: FindKnobs,
    lora: LoraPlan | None,
) -> Program:
    """The program of a graph.

    Args:
        graph: the graph after the backend's passes.
        weights: where weights lie; rope frequencies are added to it.
        target: the CPU.
        int8: whether matrix products round their activations.
        kv: where caches will lie, and how many tokens a step may have, of all sequences together.
        read_floats: gives small f32 weights.
        find_knobs: chooses kernels' knobs.
        lora: where adapters will lie; None if the graph takes none.

    Raises:
        UnsupportedError: an op or a cache has no kernel, or something else than a matrix product makes the logits.
        GraphError: a plan does not fit the graph.
    """
    last = graph.producer.get("logits")
    if last is None or not isinstance(last.op, _PRODUCTS):
        made = f"by {last.op.name}" if last else "by nothing"
        raise UnsupportedError(
            f"the tvm backend writes logits as a matrix product makes them, here they are made {made}"
        )
    caches, tuned = CachePlaces(kv), TunedKernels(target, kv.max_step, find_knobs)
    to = _Lowering(graph, weights, target, int8, kv.max_step, caches, read_floats, tuned, lora)
    for node in graph.nodes:
        to.node(node)
    to.flush()
    to.summarise_logits()
    return Program(tuple(to.calls), tuple(to.buffers), kv.max_step, tuned.entries)


@dataclass(frozen=True)
class _Place:
    """Where a value's rows are: ``width`` f32 from ``offset`` (bytes) on, ``stride`` numbers apart."""

    buffer: int
    offset: int
    stride: int
    width: int
    amount: Amount

    @property
    def argument(self) -> Argument:
        return InWorkspace(self.buffer, self.offset)


@dataclass
class _Lowering:
    """The program while it is made."""

    graph: Graph
    weights: WeightsFile
    target: CpuTarget
    int8: bool
    most_tokens: int
    caches: CachePlaces
    read_floats: ReadFloats
    tuned: TunedKernels
    lora: LoraPlan | None
    calls: list[Call] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vectors = Vectors.of(self.target)
        self._places: dict[str, _Place] = {}
        self._rounded: dict[tuple[str, QuantisedRow], Argument] = {}
        self._numbers: dict[str, float] = {}
        self._pending: list[Node] = []
        self._row_kernels: dict[RowProgram, Kernel] = {}
        self._angles: dict[tuple[RopeSpec, str], Argument] = {}
        self._layers = count()

    # --- ops -----------------------------------------------------------------------------------------------------

    def node(self, node: Node) -> None:
        """Lower one node."""
        match node.op:
            case ops.Constant(value=value):
                self._constant(node, value)
            case ops.Positions():
                pass  # kernels count from the past's length
            case ops.Split(sizes=sizes):
                self._split(node, sizes)
            case op if rowwise.supports(op):
                if self._pending and self._amount(node) != self._amount(self._pending[0]):
                    self.flush()
                self._pending.append(node)
            case _:
                self.flush()
                self._other(node)

    def _other(self, node: Node) -> None:
        match node.op:
            case ops.Embed():
                self._embed(node)
            case ops.MatMul() | ops.DequantMatMul():
                self._matmul(node, node.inputs)
            case ops.LoraMatMul() as op:
                *inputs, u, up = node.inputs
                parts = int(self.graph.types[u].shape[2])
                added, places = self._side_paths.up(up, op.first, parts)
                self._matmul(node, inputs, added, (*places, *_STACKS, self._place(u).argument))
            case ops.LoraDown():
                self._lora_down(node)
            case ops.LoraEmbed():
                self._lora_embed(node)
            case ops.SelectRows():
                self._select(node)
            case ops.GroupQueryAttention() as op:
                self._attention(node, op)
            case _:
                raise UnsupportedError(f"the tvm backend has no kernel for {node.op.name}")

    def _constant(self, node: Node, value: float | tuple[float, ...]) -> None:
        (name,) = node.outputs
        if isinstance(value, tuple):
            self.weights.constant(name, np.array(value, np.float32))
        else:
            self._numbers[name] = value

    def _split(self, node: Node, sizes: tuple[int, ...]) -> None:
        if node.inputs[0] not in self._places:
            self.flush()
        whole, offset = self._places[node.inputs[0]], 0
        for name, size in zip(node.outputs, sizes):
            self._places[name] = _Place(
                whole.buffer, whole.offset + 4 * offset, whole.stride, size, whole.amount
            )
            offset += size

    def _embed(self, node: Node) -> None:
        _, table = node.inputs
        stored = self.weights.stored[table]
        assert stored.layout is not None
        out = self._new(node.outputs[0], stride=stored.layout.columns)
        self._call(
            embed.embed_kernel(stored.layout), (InWeights(stored.offset), "ids", out.argument, "tokens")
        )

    def _matmul(
        self,
        node: Node,
        inputs: Sequence[str],
        lora: LoraUp | None = None,
        stacks: tuple[Argument, ...] = (),
    ) -> None:
        x, weight, *bias = inputs
        stored, columns = self.weights.stored[weight], self._width(x)
        layout = stored.layout
        assert layout is not None
        amount: Amount = self._amount(node)
        if node.outputs[0] == "logits":
            out: Argument = "logits"
            output_stride = layout.rows
        else:
            place = self._new(node.outputs[0])
            out, output_stride = place.argument, place.stride
        shape = {"rows": layout.rows, "columns": columns, "stride": output_stride, "bias": bool(bias)}
        rounded = self._int8_layout(node)
        if rounded is not None:
            activations = self._round(x, QuantisedRow.of(rounded, self.vectors))
            kernel = self.tuned.make("matmul", amount, lora=lora, dtype=layout.dtype.value, **shape)
        else:
            place = self._place(x)
            activations = place.argument
            shape["x_stride"] = place.stride
            kernel = self.tuned.make("matmul_exact", amount, lora=lora, dtype=layout.dtype.value, **shape)
        if stacks:
            stacks = (*stacks, "sequences", _STEPS[amount])
        arguments = (InWeights(stored.offset), activations, *map(self._weight, bias), out, amount, *stacks)
        self._call(kernel, arguments, amount, stored.nbytes, layout.rows * columns)

    def _lora_down(self, node: Node) -> None:
        name, a, _ = node.inputs
        x = self._place(name)
        down, places = self._side_paths.down(a)
        u = self._new(node.outputs[0], width=down.width, stride=down.width)
        stacks: tuple[Argument, ...] = (*places, *_STACKS, "lora_scales")
        kernel = lora.lora_down_kernel(self.vectors, down, stride=x.stride)
        self._call(kernel, (x.argument, *stacks, u.argument, "sequences", _STEPS[x.amount]), x.amount)

    def _lora_embed(self, node: Node) -> None:
        name, _, a, _, _ = node.inputs
        x, out = self._place(name), self._new(node.outputs[0])
        distance, places = self._side_paths.embedding(a)
        kernel = lora.lora_embed_kernel(
            self.vectors,
            element=self._side_paths.element,
            columns=x.width,
            stride=x.stride,
            out_stride=out.stride,
            place=distance,
        )
        stacks: tuple[Argument, ...] = (*places, *_STACKS, "lora_scales")
        self._call(kernel, (x.argument, "ids", *stacks, out.argument, "sequences", "step"))

    @property
    def _side_paths(self) -> SidePaths:
        if self.lora is None:
            raise GraphError("adapters are inputs of the graph, but there is no plan where they lie")
        return SidePaths(self.lora)

    def _select(self, node: Node) -> None:
        x, _ = node.inputs
        place = self._place(x)
        out = self._new(node.outputs[0], stride=place.width)
        arguments: tuple[Argument, ...] = (
            place.argument,
            "logit_rows",
            out.argument,
            "sequences",
            "step",
            "rows_per_sequence",
        )
        self._call(select.select_kernel(place.width, place.stride), arguments, "rows")

    def _attention(self, node: Node, op: ops.GroupQueryAttention) -> None:
        q, k, v, key_cache, _, _, *rest = node.inputs
        queries, keys, values = (self._place(name) for name in (q, k, v))
        shape, pages = self.caches.layer(next(self._layers), op, self.graph.types[key_cache])
        factors = rest[1:]  # after the block table
        angles = [self._rope_angles(op.rope, *factors)] if op.rope else []
        rotated = self._new_buffer(4 * op.heads * shape.head_dim)
        write = rotate_and_write_kernel(
            self.vectors,
            heads=op.heads,
            shape=shape,
            rope=op.rope,
            q_stride=queries.stride,
            k_stride=keys.stride,
            v_stride=values.stride,
        )
        rows = (queries.argument, keys.argument, values.argument)
        self._call(write, (*rows, *angles, "past", *pages, rotated, "sequences", "step"))
        out = self._new(node.outputs[0])
        attend = self.tuned.make(
            "attention",
            "tokens",
            heads=op.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            page=shape.page,
            cache_dtype=shape.dtype,
            scale=op.scale,
            window=op.window,
            out_stride=out.stride,
            positions=min(self.caches.plan.context, MEASURED_POSITIONS),
        )
        self.buffers.append(4 * attention_workspace(self.target, shape))
        workspace = InWorkspace(len(self.buffers) - 1)
        self._call(attend, (rotated, *pages, "past", workspace, out.argument, "sequences", "step"))

    def _rope_angles(self, spec: RopeSpec, factors: str = "") -> Argument:
        """Cosines and sines of this step's positions, made once for all layers that rotate alike."""
        if (spec, factors) not in self._angles:
            frequencies = spec.frequencies(self.read_floats(factors) if factors else None)
            stored = self.weights.constant(f"rope.{len(self._angles)}.frequencies", frequencies)
            angles = self._new_buffer(4 * spec.dim)
            kernel = rope.angles_kernel(self.vectors, dim=spec.dim, magnitude=spec.magnitude)
            self._call(kernel, ("past", InWeights(stored.offset), angles, "sequences", "step"))
            self._angles[spec, factors] = angles
        return self._angles[spec, factors]

    def summarise_logits(self) -> None:
        """Spare whoever chooses a token from looking at all of them."""
        kernel = summarise.summarise_kernel(self.vectors, self._width("logits"))
        self._call(kernel, ("logits", "maxima", "sums", "rows"), "rows")

    # --- rows ----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Make one kernel of the row-wise nodes gathered so far."""
        nodes, self._pending = self._pending, []
        if not nodes:
            return
        made = [name for node in nodes for name in node.outputs]
        read = [name for node in nodes for name in node.inputs if name not in made]
        inputs = [name for name in dict.fromkeys(read) if name not in self._numbers]
        slots = {name: i for i, name in enumerate([*inputs, *made])}
        steps = tuple(
            Step(
                node.op,
                tuple(self._numbers[name] if name in self._numbers else slots[name] for name in node.inputs),
                slots[node.outputs[0]],
            )
            for node in nodes
        )
        inside = set(map(id, nodes))
        stored = [name for name in made if self._is_read_as_f32(name, inside)]
        self._rows(nodes[0], inputs, steps, made, stored, slots)

    def _rows(
        self,
        first: Node,
        inputs: list[str],
        steps: tuple[Step, ...],
        made: list[str],
        stored: list[str],
        slots: dict[str, int],
    ) -> None:
        amount = self._amount(first)
        rounded = [(name, row) for name in made for row in self._roundings(name)]
        places = [self._new(name) for name in stored]
        program = RowProgram(
            inputs=tuple(self._row(name) for name in inputs),
            steps=steps,
            widths=tuple(self._width(name) for name in made),
            stored=tuple((slots[name], place.stride) for name, place in zip(stored, places)),
            rounded=tuple((slots[name], row) for name, row in rounded),
        )
        for name, row in rounded:
            self._rounded[name, row] = self._new_buffer(row.stride)
        arguments = (
            *map(self._argument, inputs),
            *(place.argument for place in places),
            *(self._rounded[key] for key in rounded),
            self._scratch(program),
            amount,
        )
        self._call(self._row_kernel(program), arguments, amount)

    def _round(self, name: str, row: QuantisedRow) -> Argument:
        """A value's rows in int8; made on their own if no row-wise kernel made the value."""
        if (name, row) not in self._rounded:
            place = self._place(name)
            program = RowProgram((Row(place.width, place.stride),), (), (), (), ((0, row),))
            out = self._rounded[name, row] = self._new_buffer(row.stride)
            arguments = (place.argument, out, self._scratch(program), place.amount)
            self._call(self._row_kernel(program), arguments, place.amount)
        return self._rounded[name, row]

    def _scratch(self, program: RowProgram) -> Argument:
        self.buffers.append(4 * rowwise.scratch_floats(program))
        return InWorkspace(len(self.buffers) - 1)

    def _row_kernel(self, program: RowProgram) -> Kernel:
        if program not in self._row_kernels:
            ops_of = [step.op.name.lower() for step in program.steps]
            name = "_".join([*ops_of, *(["round"] if program.rounded else []), str(len(self._row_kernels))])
            self._row_kernels[program] = rowwise.rowwise_kernel(self.vectors, name, program)
        return self._row_kernels[program]

    def _roundings(self, name: str) -> Iterable[QuantisedRow]:
        """The forms in which products read a value in int8, each once."""
        users = self.graph.users.get(name, ())
        layouts = [self._int8_layout(node) for node in users]
        return dict.fromkeys(QuantisedRow.of(layout, self.vectors) for layout in layouts if layout)

    def _is_read_as_f32(self, name: str, inside: set[int]) -> bool:
        """Whether anything but the nodes ``inside`` and int8 products reads a value."""
        users = self.graph.users.get(name, ())
        return any(id(node) not in inside and not self._int8_layout(node) for node in users)

    def _int8_layout(self, node: Node) -> PackedLayout | None:
        """The layout of the weight that a node multiplies with in int8, if it does."""
        if not self.int8 or not isinstance(node.op, ops.DequantMatMul | ops.LoraMatMul):
            return None
        layout = self.weights.stored[node.inputs[1]].layout
        return layout if isinstance(layout, PackedLayout) and layout.has_integers else None

    # --- places --------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise UnsupportedError(f"%{name} is read in a way that the tvm backend does not store it")
        return self._places[name]

    def _row(self, name: str) -> Row:
        if name in self.weights.stored:
            return Row(self._width(name), 0)
        place = self._place(name)
        return Row(place.width, place.stride)

    def _argument(self, name: str) -> Argument:
        return self._weight(name) if name in self.weights.stored else self._place(name).argument

    def _weight(self, name: str) -> Argument:
        return InWeights(self.weights.stored[name].offset)

    def _new(self, name: str, *, width: int | None = None, stride: int | None = None) -> _Place:
        """A place for a value's rows, on cache lines unless the kernel that makes them has a stride of its own."""
        width = width or self._width(name)
        stride = stride or align(4 * width) // 4
        buffer = self._new_buffer(4 * stride)
        type_ = self.graph.types[name]
        amount: Amount = "rows" if type_.shape[1] == "rows" else "tokens"
        self._places[name] = _Place(buffer.buffer, 0, stride, width, amount)
        return self._places[name]

    def _new_buffer(self, row_bytes: int) -> InWorkspace:
        """A buffer of that many bytes for each token."""
        self.buffers.append(row_bytes * self.most_tokens)
        return InWorkspace(len(self.buffers) - 1)

    def _width(self, name: str) -> int:
        return int(self.graph.types[name].shape[-1])

    def _amount(self, node: Node) -> Amount:
        return "rows" if self.graph.types[node.outputs[0]].shape[1] == "rows" else "tokens"

    def _call(
        self,
        kernel: Kernel,
        arguments: tuple[Argument, ...],
        amount: Amount = "tokens",
        bytes_read: int = 0,
        multiplications: int = 0,
    ) -> None:
        self.calls.append(Call(kernel, arguments, amount, bytes_read, multiplications))
