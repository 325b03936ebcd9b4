"""Each IR op as ONNX nodes, one function per op, in the ops that ONNX Runtime runs fastest.

What is and is not used, and why, is measured in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from rlxc.backends.onnx.attention import attend
from rlxc.backends.onnx.experts import ExpertRuns, mix, route
from rlxc.backends.onnx.external import Region, WeightsFile
from rlxc.backends.onnx.lora import MICROSOFT, SidePaths
from rlxc.backends.onnx.runtime import Runtime
from rlxc.backends.onnx.weights import Stored, StoredFloat, StoredIndices, StoredPacked
from rlxc.dtypes import DType
from rlxc.errors import UnsupportedError
from rlxc.ir import Graph, Node, RopeSpec, TensorType, ops
from rlxc.weights.formats import FORMATS

_QUANT_TYPES = {DType.FP4: 0, DType.NF4: 1}
"""``MatMulBnb4``'s numbers for the codebooks."""

FLOAT_TYPES = {DType.F32: TensorProto.FLOAT, DType.F16: TensorProto.FLOAT16}
"""The types of activations and caches."""

ReadFloats = Callable[[str], npt.NDArray[np.float32]]
"""Gives a small f32 weight's values, by its name."""


@dataclass
class _Scope:
    """What a graph, or a branch of it, is made of so far; ``known`` are values that are computed once for all users."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)


class Lowering:
    """Collects the nodes and initializers of one graph while its ops are lowered one by one.

    ``types`` and ``stored`` are of the graph's values and weights, and of the parts of them that branches read.
    """

    def __init__(
        self,
        graph: Graph,
        stored: Mapping[str, Stored],
        file: WeightsFile,
        read_floats: ReadFloats,
        *,
        runtime: Runtime,
        int8: bool,
        context: int,
    ) -> None:
        self.runtime = runtime
        self.graph, self.file, self.read_floats = graph, file, read_floats
        self.types: dict[str, TensorType] = dict(graph.types)
        self.stored: dict[str, Stored] = dict(stored)
        self.accuracy_level = 4 if int8 else 1
        self.context = context
        self._whole = self._scope = _Scope()
        self._node_count = 0
        self.side_paths = SidePaths(self)
        self._rope_tables: dict[tuple[RopeSpec, str], tuple[str, str]] = {}

    @property
    def nodes(self) -> list[NodeProto]:
        """The graph's nodes so far."""
        return self._whole.nodes

    @property
    def initializers(self) -> dict[str, TensorProto]:
        """The graph's initializers so far, by name."""
        return self._whole.initializers

    def lower_nodes(self) -> None:
        """Append the ONNX nodes of the whole graph.

        Raises:
            UnsupportedError: an op has no ONNX equivalent.
        """
        runs = ExpertRuns(self, lower)
        for node in self.graph.nodes:
            if not runs.take(node):
                lower(node.op, node, self)
        runs.finish()

    def branch(self, name: str, widths: Mapping[str, int], build: Callable[[], None]) -> GraphProto:
        """A subgraph of what ``build`` adds, which owns the weights that it reads.

        ``widths`` are those of its results, f32 ``[1, rows, width]``.
        """
        outer, self._scope = self._scope, _Scope(known=set(self._scope.known))
        build()
        scope, self._scope = self._scope, outer
        results = [
            helper.make_tensor_value_info(result, TensorProto.FLOAT, (1, None, width))
            for result, width in widths.items()
        ]
        return helper.make_graph(scope.nodes, name, [], results, list(scope.initializers.values()))

    def add(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> None:
        """Append an ONNX node."""
        name = f"{op}_{self._node_count}"
        self._node_count += 1
        self._scope.nodes.append(
            helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes)
        )

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        """A small initializer inside the model file."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def shape(self, *dims: int) -> str:
        """A target of ``Reshape``: batch and tokens as they are, then these (no -1: there may be no tokens)."""
        return self.constant(f"shape.{'x'.join(map(str, dims))}", np.array([0, 0, *dims]))

    def width(self, name: str) -> int:
        """The last dimension of a value or weight, which is always a number."""
        return int(self.types[name].shape[-1])

    def external(self, name: str, data_type: int, dims: tuple[int, ...], region: Region) -> str:
        """An initializer in the weights file."""
        if name not in self._scope.initializers:
            self._scope.initializers[name] = self.file.tensor(name, data_type, dims, region)
        return name

    def float_weight(self, name: str) -> str:
        """A weight in a float format, cast to f32 where it is narrower (ONNX Runtime does that once, at load)."""
        stored = self.stored[name]
        assert isinstance(stored, StoredFloat)
        tensor = self.external(name, stored.data_type, stored.shape, stored.region)
        return tensor if stored.data_type == TensorProto.FLOAT else self.cast(tensor, DType.F32)

    def cast(self, name: str, dtype: DType) -> str:
        """A value as another type of floats."""
        cast = f"{name}.{dtype}"
        if self.is_new(cast):
            self.add("Cast", [name], [cast], to=FLOAT_TYPES[dtype])
        return cast

    def is_new(self, name: str) -> bool:
        """Whether a value that many may use has not been computed yet; the first who asks has to."""
        new = name not in self._scope.known
        self._scope.known.add(name)
        return new

    def packed_inputs(self, name: str, weight: StoredPacked, *, gather: bool) -> list[str]:
        """Codes and scales as ``MatMulNBits`` takes them, or, with zero points, ``GatherBlockQuantized``."""
        s, blocks = weight.storage, weight.blocks
        packed = (weight.columns * s.bits // 8,) if gather else (blocks, s.block * s.bits // 8)
        suffix = "table" if gather else "codes"
        codes = self.external(f"{name}.{suffix}", TensorProto.UINT8, (weight.rows, *packed), weight.codes)
        inputs = [
            codes,
            self.by_block(f"{name}.scales", weight, weight.scales),
        ]
        if gather and weight.zero_points is not None:
            dims = (weight.rows, -(-blocks * s.bits // 8))
            inputs.append(self.external(f"{name}.zero_points", TensorProto.UINT8, dims, weight.zero_points))
        return inputs

    def by_block(self, name: str, weight: StoredPacked, region: Region) -> str:
        """A float for each block of a packed weight, ``[rows, blocks]``."""
        return self.external(name, TensorProto.FLOAT, (weight.rows, weight.blocks), region)

    def block_sums(self, x: str, block: int) -> str:
        """The sums of x over each ``block`` of its last dimension, computed once for all weights that need them."""
        sums = f"{x}.sums.{block}"
        if self.is_new(sums):
            blocks = self.width(x) // block
            self.add("Reshape", [x, self.shape(blocks, block)], [f"{x}.blocks.{block}"])
            last_axis = self.constant("last_axis", np.array([-1]))
            self.add("ReduceSum", [f"{x}.blocks.{block}", last_axis], [f"{sums}.any"], keepdims=0)
            # ONNX Runtime's reductions give an empty result the shape of their input.
            self.add("Reshape", [f"{sums}.any", self.shape(blocks)], [sums])
        return sums

    def rope_tables(self, spec: RopeSpec, factors: str = "") -> list[str]:
        """Cosine and sine tables ``[context, dim / 2]``, shared by all layers that rotate alike."""
        if (spec, factors) not in self._rope_tables:
            values = self.read_floats(factors) if factors else None
            names = [f"rope.{len(self._rope_tables)}.{kind}" for kind in ("cos", "sin")]
            for name, table in zip(names, spec.angles(np.arange(self.context), values)):
                region = self.file.add([table.astype(np.float32)])
                self.external(name, TensorProto.FLOAT, (self.context, spec.dim // 2), region)
            self._rope_tables[spec, factors] = (names[0], names[1])
        return list(self._rope_tables[spec, factors])


@singledispatch
def lower(op: ops.Op, node: Node, to: Lowering) -> None:
    """Append the ONNX nodes of one IR node.

    Raises:
        UnsupportedError: this backend has no way to run the op.
    """
    raise UnsupportedError(f"the ONNX backend cannot run {op.name}", source=f"%{node.outputs[0]}")


@lower.register
def _(op: ops.Constant, node: Node, to: Lowering) -> None:
    to.constant(node.outputs[0], np.asarray(op.value, np.float32))


@lower.register(ops.Add)
@lower.register(ops.Mul)
@lower.register(ops.Sqrt)
def _(op: ops.Op, node: Node, to: Lowering) -> None:
    to.add(op.name, _values(node, to), list(node.outputs))


@lower.register
def _(op: ops.Square, node: Node, to: Lowering) -> None:
    to.add("Mul", [node.inputs[0]] * 2, list(node.outputs))


@lower.register
def _(op: ops.Rsqrt, node: Node, to: Lowering) -> None:
    root = f"{node.outputs[0]}.root"
    to.add("Sqrt", list(node.inputs), [root])
    to.add("Reciprocal", [root], list(node.outputs))


@lower.register
def _(op: ops.Mean, node: Node, to: Lowering) -> None:
    to.add(
        "ReduceMean", [*node.inputs, to.constant("last_axis", np.array([-1]))], list(node.outputs), keepdims=1
    )


@lower.register
def _(op: ops.Silu, node: Node, to: Lowering) -> None:
    to.add("QuickGelu", list(node.inputs), list(node.outputs), MICROSOFT, alpha=1.0)


@lower.register
def _(op: ops.Gelu, node: Node, to: Lowering) -> None:
    to.add("Gelu", list(node.inputs), list(node.outputs), approximate="tanh")


@lower.register
def _(op: ops.SoftCap, node: Node, to: Lowering) -> None:
    (x,), (out,) = node.inputs, node.outputs
    cap = to.constant(f"cap.{op.cap}", np.array(op.cap, np.float32))
    to.add("Div", [x, cap], [f"{out}.of_cap"])
    to.add("Tanh", [f"{out}.of_cap"], [f"{out}.tanh"])
    to.add("Mul", [f"{out}.tanh", cap], [out])


@lower.register
def _(op: ops.ClampedSwiglu, node: Node, to: Lowering) -> None:
    (gate, up), (out,) = node.inputs, node.outputs
    low, high = (
        to.constant(f"limit.{limit}", np.array(limit, np.float32)) for limit in (-op.limit, op.limit)
    )
    to.add("Min", [gate, high], [f"{out}.gate"])
    to.add("Clip", [up, low, high], [f"{out}.up"])
    to.add("QuickGelu", [f"{out}.gate"], [f"{out}.active"], MICROSOFT, alpha=op.alpha)
    to.add("Add", [f"{out}.up", to.constant("one.f32", np.array(1, np.float32))], [f"{out}.up_one"])
    to.add("Mul", [f"{out}.active", f"{out}.up_one"], [out])


@lower.register
def _(op: ops.Glu, node: Node, to: Lowering) -> None:
    (x,), (out,) = node.inputs, node.outputs
    gate, up, active = (f"{out}.{part}" for part in ("gate", "up", "active"))
    to.add("Split", [x], [gate, up], axis=-1, num_outputs=2)
    activation = ops.Silu() if op.activation == "silu" else ops.Gelu()
    lower(activation, Node(activation, (gate,), (active,)), to)
    to.add("Mul", [active, up], [out])


@lower.register
def _(op: ops.RmsNorm, node: Node, to: Lowering) -> None:
    x, out = node.inputs[0], node.outputs[0]
    weight = to.float_weight(node.inputs[1])
    if op.heads == 1:
        to.add("RMSNormalization", [x, weight], [out], epsilon=op.eps)
        return
    size = to.width(x)
    to.add("Reshape", [x, to.shape(op.heads, size // op.heads)], [f"{out}.heads"])
    to.add("RMSNormalization", [f"{out}.heads", weight], [f"{out}.normed"], epsilon=op.eps)
    to.add("Reshape", [f"{out}.normed", to.shape(size)], [out])


@lower.register
def _(op: ops.LayerNorm, node: Node, to: Lowering) -> None:
    to.add("LayerNormalization", _values(node, to), list(node.outputs), epsilon=op.eps)


@lower.register
def _(op: ops.Embed, node: Node, to: Lowering) -> None:
    ids, table = node.inputs
    out = node.outputs[0]
    stored = to.stored[table]
    if isinstance(stored, StoredFloat):
        tensor = to.external(table, stored.data_type, stored.shape, stored.region)
        to.add("Gather", [tensor, ids], [f"{out}.stored"], axis=0)
        to.add("Cast", [f"{out}.stored"], [out], to=TensorProto.FLOAT)
        return
    if isinstance(stored, StoredIndices):
        _gather_indices(ids, table, stored, out, to)
        return
    s = stored.storage
    partial = stored.mins is not None or s.rest != 0
    gathered = f"{out}.gathered" if partial else out
    codes, scales, *rest = to.packed_inputs(table, stored, gather=True)
    attributes = {"bits": s.bits, "block_size": s.block, "gather_axis": 0, "quantize_axis": 1}
    to.add("GatherBlockQuantized", [codes, ids, scales, *rest], [gathered], MICROSOFT, **attributes)
    if not partial:
        return
    if stored.mins is None:
        remainder = to.constant(f"remainder.{s.remainder}", np.array(s.remainder, np.float32))
        to.add("Gather", [scales, ids], [f"{out}.scales"], axis=0)
        to.add("Mul", [f"{out}.scales", remainder], [f"{out}.missing"])
    else:
        mins = to.by_block(f"{table}.mins", stored, stored.mins)
        to.add("Gather", [mins, ids], [f"{out}.mins"], axis=0)
        to.add("Neg", [f"{out}.mins"], [f"{out}.missing"])
    to.add("Unsqueeze", [f"{out}.missing", to.constant("last_axis", np.array([-1]))], [f"{out}.by_block"])
    to.add("Reshape", [gathered, to.shape(stored.blocks, s.block)], [f"{out}.blocks"])
    to.add("Add", [f"{out}.blocks", f"{out}.by_block"], [f"{out}.decoded"])
    to.add("Reshape", [f"{out}.decoded", to.shape(stored.columns)], [out])


def _gather_indices(ids: str, table: str, stored: StoredIndices, out: str, to: Lowering) -> None:
    """Rows of a table of indices, two to a byte: a byte stands for two values of the codebook."""
    codes = to.external(f"{table}.table", TensorProto.UINT8, (stored.rows, stored.columns // 2), stored.codes)
    dims = (stored.rows, stored.blocks, 1)
    scales = to.external(f"{table}.table_scales", TensorProto.FLOAT, dims, stored.scales)
    codebook = np.array(FORMATS[stored.dtype].codebook, np.float32)
    pairs = np.stack([np.repeat(codebook, 16), np.tile(codebook, 16)], axis=1)
    to.add("Gather", [codes, ids], [f"{out}.bytes"], axis=0)
    to.add("Cast", [f"{out}.bytes"], [f"{out}.indices"], to=TensorProto.INT32)
    to.add(
        "Gather", [to.constant(f"{stored.dtype}.pairs", pairs), f"{out}.indices"], [f"{out}.pairs"], axis=0
    )
    to.add("Reshape", [f"{out}.pairs", to.shape(stored.blocks, stored.block)], [f"{out}.blocks"])
    to.add("Gather", [scales, ids], [f"{out}.scales"], axis=0)
    to.add("Mul", [f"{out}.blocks", f"{out}.scales"], [f"{out}.scaled"])
    to.add("Reshape", [f"{out}.scaled", to.shape(stored.columns)], [out])


@lower.register
def _(op: ops.MatMul, node: Node, to: Lowering) -> None:
    x, weight, *bias = node.inputs
    out = node.outputs[0]
    product = f"{out}.product" if bias else out
    to.add("FusedMatMul", [x, to.float_weight(weight)], [product], MICROSOFT, transB=1)
    if bias:
        to.add("Add", [product, to.float_weight(bias[0])], [out])


@lower.register
def _(op: ops.DequantMatMul, node: Node, to: Lowering) -> None:
    x, name, *bias = node.inputs
    out = node.outputs[0]
    weight = to.stored[name]
    if isinstance(weight, StoredIndices):
        _multiply_indices(node, weight, to)
        return
    assert isinstance(weight, StoredPacked)
    s = weight.storage
    product = f"{out}.product" if s.centre or s.has_mins else out
    inputs = [x, *to.packed_inputs(name, weight, gather=False)]
    if bias:
        inputs += ["", "", to.float_weight(bias[0])]
    to.add(
        "MatMulNBits",
        inputs,
        [product],
        MICROSOFT,
        K=weight.columns,
        N=weight.rows,
        bits=s.bits,
        block_size=s.block,
        accuracy_level=to.accuracy_level,
    )
    if product == out:
        return
    offsets, factor = _offsets(inputs[2], node, weight, to)
    sums = to.block_sums(x, s.block)
    to.add("FusedMatMul", [sums, offsets], [f"{out}.offset"], MICROSOFT, transB=1, alpha=factor)
    to.add("Add", [product, f"{out}.offset"], [out])


def _offsets(scales: str, node: Node, weight: StoredPacked, to: Lowering) -> tuple[str, float]:
    """What a product leaves out of each block, as a matrix and a factor of it."""
    name, out, centre = node.inputs[1], node.outputs[0], weight.storage.centre
    if weight.offsets is not None:
        return to.by_block(f"{name}.offsets", weight, weight.offsets), 1.0
    if weight.mins is None:
        return scales, centre
    # ONNX Runtime computes these once, at load.
    by_block = to.constant(f"centre.{centre}", np.array(centre, np.float32))
    to.add("Mul", [scales, by_block], [f"{out}.centres"])
    mins = to.by_block(f"{name}.mins", weight, weight.mins)
    to.add("Sub", [f"{out}.centres", mins], [f"{out}.offsets"])
    return f"{out}.offsets", 1.0


def _multiply_indices(node: Node, weight: StoredIndices, to: Lowering) -> None:
    x, name, *bias = node.inputs
    (out,) = node.outputs
    product = f"{out}.product" if bias else out
    size = (weight.rows * weight.columns // 2,)
    codes = to.external(f"{name}.codes", TensorProto.UINT8, size, weight.codes)
    scales = to.external(f"{name}.scales", TensorProto.FLOAT, (weight.rows * weight.blocks,), weight.scales)
    to.add(
        "MatMulBnb4",
        [x, codes, scales],
        [product],
        MICROSOFT,
        K=weight.columns,
        N=weight.rows,
        block_size=weight.block,
        quant_type=_QUANT_TYPES[weight.dtype],
    )
    if bias:
        to.add("Add", [product, to.float_weight(bias[0])], [out])


@lower.register
def _(op: ops.LoraDown, node: Node, to: Lowering) -> None:
    to.side_paths.down(node)


@lower.register
def _(op: ops.LoraMatMul, node: Node, to: Lowering) -> None:
    product = ops.DequantMatMul() if to.graph.weight[node.inputs[1]].type.dtype.is_packed else ops.MatMul()
    base = f"{node.outputs[0]}.base"
    lower(product, Node(product, node.inputs[:-2], (base,)), to)
    to.side_paths.up(op, node, base)


@lower.register
def _(op: ops.LoraEmbed, node: Node, to: Lowering) -> None:
    to.side_paths.embed(node)


@lower.register
def _(op: ops.Split, node: Node, to: Lowering) -> None:
    sizes = to.constant(f"sizes.{'.'.join(map(str, op.sizes))}", np.array(op.sizes))
    to.add("Split", [*node.inputs, sizes], list(node.outputs), axis=-1)


@lower.register
def _(op: ops.SelectRows, node: Node, to: Lowering) -> None:
    to.add("Gather", list(node.inputs), list(node.outputs), axis=1)


@lower.register
def _(op: ops.GroupQueryAttention, node: Node, to: Lowering) -> None:
    attend(op, node, to)


@lower.register
def _(op: ops.Route, node: Node, to: Lowering) -> None:
    route(op, node, to)


@lower.register
def _(op: ops.MixExperts, node: Node, to: Lowering) -> None:
    mix(node, to)


def _values(node: Node, to: Lowering) -> list[str]:
    return [to.float_weight(name) if name in to.stored else name for name in node.inputs]
