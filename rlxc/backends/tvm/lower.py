"""The IR graph of a model step as a list of kernel calls.

Row-wise ops between two matrix products are gathered into one kernel, which also rounds its result to int8 where a
product reads it; every other op becomes a kernel of its own. Splitting a row costs nothing: its parts are views. A cap
on the logits is part of the product that makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from rlxc.artifact import KvPlan
from rlxc.artifact.lora import LoraPlan
from rlxc.backends.tvm.cache_places import CachePlaces
from rlxc.backends.tvm.draft import Draft
from rlxc.backends.tvm.experts import ExpertOps
from rlxc.backends.tvm.families import MEASURED_POSITIONS, attention_workspace
from rlxc.backends.tvm.kernels import embed, lora, rope, rowwise, select, summarise
from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.lora import LoraUp
from rlxc.backends.tvm.kernels.rotate_and_write import rotate_and_write_kernel
from rlxc.backends.tvm.program import Amount, Argument, Counter, InWeights, Program
from rlxc.backends.tvm.rows import RowOps
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
        UnsupportedError: an op or a cache has no kernel, or something else than a matrix product, which may be
            capped, makes the logits.
        GraphError: a plan does not fit the graph.
    """
    logits, caches = _Logits.of(graph), CachePlaces(kv)
    draft, tuned = (
        Draft(graph, weights, target, int8, kv.max_step),
        TunedKernels(target, kv.max_step, find_knobs),
    )
    to = _Lowering(draft, caches, read_floats, tuned, lora, logits)
    for node in graph.nodes:
        to.node(node)
    to.finish()
    return Program(tuple(draft.calls), tuple(draft.buffers), kv.max_step, tuned.entries)


@dataclass(frozen=True)
class _Logits:
    """The product that makes the logits; and the node that caps them afterwards, and where, if there is one."""

    product: Node
    capping: Node | None = None
    cap: float | None = None

    @classmethod
    def of(cls, graph: Graph) -> _Logits:
        """Those of a graph; see :func:`lower`."""
        last = graph.producer.get("logits")
        if last is not None and isinstance(last.op, _PRODUCTS):
            return cls(last)
        if last is not None and isinstance(last.op, ops.SoftCap):
            (name,) = last.inputs
            product = graph.producer.get(name)
            alone = len(graph.users[name]) == 1 and name not in graph.outputs
            if product is not None and isinstance(product.op, _PRODUCTS) and alone:
                return cls(product, last, last.op.cap)
        made = f"by {last.op.name}" if last else "by nothing"
        raise UnsupportedError(
            f"the tvm backend writes logits as a matrix product makes them, here they are made {made}"
        )


@dataclass
class _Lowering:
    """What goes through the nodes of a graph."""

    draft: Draft
    caches: CachePlaces
    read_floats: ReadFloats
    tuned: TunedKernels
    lora: LoraPlan | None
    logits: _Logits
    _angles: dict[tuple[RopeSpec, str], Argument] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows = RowOps(self.draft)
        self._experts = ExpertOps(self.draft, self._rows, self.tuned)
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
            case _ if node is self.logits.capping:
                pass  # the product does it
            case op if rowwise.supports(op):
                self._rows.add(node)
            case _:
                self._rows.flush()
                self._other(node)

    def _other(self, node: Node) -> None:
        match node.op:
            case ops.Embed():
                self._embed(node)
            case ops.MatMul() | ops.DequantMatMul():
                self._matmul(node, node.inputs)
            case ops.LoraMatMul() as op:
                *inputs, u, up = node.inputs
                parts = int(self.draft.graph.types[u].shape[2])
                added, places = self._side_paths.up(up, op.first, parts)
                self._matmul(node, inputs, added, (*places, *_STACKS, self.draft.place(u).argument))
            case ops.Route(used=used):
                self._experts.route(node, used)
            case ops.ExpertMatMul():
                self._experts.matmul(node)
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
            self.draft.weights.constant(name, np.array(value, np.float32))
        else:
            self._rows.numbers[name] = value

    def _split(self, node: Node, sizes: tuple[int, ...]) -> None:
        if node.inputs[0] not in self.draft.places:
            self._rows.flush()
        whole, offset = self.draft.places[node.inputs[0]], 0
        for name, size in zip(node.outputs, sizes):
            self.draft.places[name] = replace(whole, offset=whole.offset + 4 * offset, width=size)
            offset += size

    def _embed(self, node: Node) -> None:
        _, table = node.inputs
        stored = self.draft.weights.stored[table]
        assert stored.layout is not None
        out = self.draft.new(node.outputs[0], stride=stored.layout.columns)
        self.draft.call(
            embed.embed_kernel(stored.layout), (InWeights(stored.offset), "ids", out.argument, "tokens")
        )

    def _matmul(
        self,
        node: Node,
        inputs: Sequence[str],
        lora: LoraUp | None = None,
        stacks: tuple[Argument, ...] = (),
    ) -> None:
        draft, (x, weight, *bias) = self.draft, inputs
        stored, columns = draft.weights.stored[weight], draft.width(x)
        layout = stored.layout
        assert layout is not None
        amount: Amount = draft.amount(node.outputs[0])
        shape: dict[str, Any] = {
            "dtype": layout.dtype.value,
            "layout": stored.chosen,
            "rows": layout.rows,
            "columns": columns,
            "bias": bool(bias),
        }
        if node is self.logits.product:
            out: Argument = "logits"
            shape["stride"] = layout.rows
            if self.logits.cap is not None:
                shape["cap"] = self.logits.cap
        else:
            place = draft.new(node.outputs[0])
            out, shape["stride"] = place.argument, place.stride
        rounded = draft.int8_layout(node)
        if rounded is not None:
            activations = self._rows.round(x, QuantisedRow.of(rounded, draft.vectors))
            kernel = self.tuned.make("matmul", amount, lora=lora, **shape)
        else:
            place = draft.place(x)
            activations = place.argument
            shape["x_stride"] = place.stride
            kernel = self.tuned.make("matmul_exact", amount, lora=lora, **shape)
        if stacks:
            stacks = (*stacks, "sequences", _STEPS[amount])
        arguments = (InWeights(stored.offset), activations, *map(draft.weight, bias), out, amount, *stacks)
        draft.call(kernel, arguments, amount, stored.nbytes, layout.rows * columns)

    def _lora_down(self, node: Node) -> None:
        name, a, _ = node.inputs
        x = self.draft.place(name)
        down, places = self._side_paths.down(a)
        u = self.draft.new(node.outputs[0], width=down.width, stride=down.width)
        stacks: tuple[Argument, ...] = (*places, *_STACKS, "lora_scales")
        kernel = lora.lora_down_kernel(self.draft.vectors, down, stride=x.stride)
        self.draft.call(kernel, (x.argument, *stacks, u.argument, "sequences", _STEPS[x.amount]), x.amount)

    def _lora_embed(self, node: Node) -> None:
        name, _, a, _, _ = node.inputs
        x, out = self.draft.place(name), self.draft.new(node.outputs[0])
        distance, places = self._side_paths.embedding(a)
        kernel = lora.lora_embed_kernel(
            self.draft.vectors,
            element=self._side_paths.element,
            columns=x.width,
            stride=x.stride,
            out_stride=out.stride,
            place=distance,
        )
        stacks: tuple[Argument, ...] = (*places, *_STACKS, "lora_scales")
        self.draft.call(kernel, (x.argument, "ids", *stacks, out.argument, "sequences", "step"))

    @property
    def _side_paths(self) -> SidePaths:
        if self.lora is None:
            raise GraphError("adapters are inputs of the graph, but there is no plan where they lie")
        return SidePaths(self.lora)

    def _select(self, node: Node) -> None:
        x, _ = node.inputs
        place = self.draft.place(x)
        out = self.draft.new(node.outputs[0], stride=place.width)
        arguments: tuple[Argument, ...] = (
            place.argument,
            "logit_rows",
            out.argument,
            "sequences",
            "step",
            "rows_per_sequence",
        )
        self.draft.call(select.select_kernel(place.width, place.stride), arguments, "rows")

    def _attention(self, node: Node, op: ops.GroupQueryAttention) -> None:
        draft, (q, k, v, key_cache, *_) = self.draft, node.inputs
        queries, keys, values = (draft.place(name) for name in (q, k, v))
        shape, pages = self.caches.layer(next(self._layers), op, draft.graph.types[key_cache])
        _, factors, sinks = op.optional(node.inputs)
        angles = [self._rope_angles(op.rope, *factors)] if op.rope else []
        rotated = self.draft.buffer(4 * op.heads * shape.head_dim)
        write = rotate_and_write_kernel(
            draft.vectors,
            heads=op.heads,
            shape=shape,
            rope=op.rope,
            q_stride=queries.stride,
            k_stride=keys.stride,
            v_stride=values.stride,
        )
        rows = (queries.argument, keys.argument, values.argument)
        self.draft.call(write, (*rows, *angles, "past", *pages, rotated, "sequences", "step"))
        out = draft.new(node.outputs[0])
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
            soft_cap=op.soft_cap,
            sinks=op.sinks,
            out_stride=out.stride,
            positions=min(self.caches.plan.context, MEASURED_POSITIONS),
        )
        workspace = draft.buffer(0, 4 * attention_workspace(draft.target, shape))
        given = (rotated, *pages, "past", *map(draft.weight, sinks), workspace, out.argument)
        draft.call(attend, (*given, "sequences", "step"))

    def _rope_angles(self, spec: RopeSpec, factors: str = "") -> Argument:
        """Cosines and sines of this step's positions, made once for all layers that rotate alike."""
        if (spec, factors) not in self._angles:
            frequencies = spec.frequencies(self.read_floats(factors) if factors else None)
            stored = self.draft.weights.constant(f"rope.{len(self._angles)}.frequencies", frequencies)
            angles = self.draft.buffer(4 * spec.dim)
            kernel = rope.angles_kernel(self.draft.vectors, dim=spec.dim, magnitude=spec.magnitude)
            self.draft.call(kernel, ("past", InWeights(stored.offset), angles, "sequences", "step"))
            self._angles[spec, factors] = angles
        return self._angles[spec, factors]

    def finish(self) -> None:
        """Spare whoever chooses a token from looking at all logits."""
        self._rows.flush()
        kernel = summarise.summarise_kernel(self.draft.vectors, self.draft.width("logits"))
        self.draft.call(kernel, ("logits", "maxima", "sums", "rows"), "rows")
