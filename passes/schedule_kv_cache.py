"""Turns growing caches into memory of fixed size that is written in place, and plans it.

Models describe a cache as a value that grows: past rows, then this step's. Copying it every step would cost more than
the attention itself. This pass decides where rows lie instead: in *pages* that block tables list, where the target has
them; else in a buffer of each layer's own, *linear* (a row for every position) where attention looks at everything, or
a *ring* of a window, one step and the tokens that can be taken back. Caches are written in place, before they are
read, and the past's length becomes one number for the whole graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlxc.dtypes import DType
from rlxc.errors import GraphError, OptionError
from rlxc.ir import Dim, Graph, Node, TensorType, Value
from rlxc.ir.ops import Attention, KvAppend, KvRead, KvWrite, Positions
from rlxc.ir.target import TargetFeatures
from rlxc.passes.base import Pass, PassResult

PAST = "past_length"
_ELEMENT_BYTES = {DType.F32: 4, DType.F16: 2, DType.BF16: 2, DType.INT8: 1}
_SCALE_BYTES = 4


@dataclass(frozen=True)
class _Layer:
    """One attention, and where its keys and values lie.

    Attributes:
        caches: the cache inputs of keys and values.
        batch: the number of sequences.
        type: that of either cache as it is stored.
        layout: linear, ring or paged.
        capacity: the positions that it holds at most.
        window: how many keys the attention sees, None for all.
        table: the number of the block table that lists its pages.
        shares: the earlier layer whose caches it reads, where they are not its own.
    """

    caches: tuple[str, str]
    batch: Dim
    type: TensorType
    layout: str
    capacity: int
    window: int | None
    table: int | None
    shares: int | None

    @property
    def tables(self) -> tuple[str, ...]:
        """The graph input that lists its pages, if it has any."""
        return () if self.table is None else (table_name(self.table),)

    @property
    def read(self) -> KvRead:
        """How its rows are read: by window where what lies behind it may be gone."""
        return KvRead(self.layout, None if self.layout == "linear" else self.window)

    def facts(self, index: int) -> dict[str, Any]:
        """The layer's entry in the plan."""
        _, heads, _, dim = self.type.shape
        assert isinstance(heads, int) and isinstance(dim, int)
        return {
            "index": index,
            "layout": self.layout,
            "capacity": self.capacity,
            "window": self.window,
            "heads": heads,
            "head_dim": dim,
            "dtype": self.type.dtype.value,
            "bytes_per_token": 0 if self.shares is not None else 2 * _row_bytes(self.type.dtype, heads, dim),
            "shares": self.shares,
            "table": self.table,
        }


class ScheduleKvCache(Pass):
    """Schedules every cache of the graph; the fact ``kv_cache`` is the plan that the runtime obeys.

    Layers that read an earlier layer's caches share them: one write, several reads.

    Args:
        context: positions that a sequence can have.
        max_step: tokens that a step adds at most.
        rollback: tokens that can always be taken back.
        dtype: how rows are stored; None leaves it to the target.
        features: which types, pages and rings the target has.
    """

    def __init__(
        self, features: TargetFeatures, *, context: int, max_step: int, rollback: int, dtype: DType | None
    ) -> None:
        self.features, self.context, self.max_step, self.rollback = features, context, max_step, rollback
        self.dtype = features.cache_dtypes[0] if dtype is None else dtype

    def run(self, graph: Graph) -> PassResult:
        """See the class.

        Raises:
            GraphError: an attention does not read two caches of one shape, or shares a layer's keys or values without
                the rest and the window, or something else reads a cache.
            OptionError: the target's kernels cannot store rows as this type.
        """
        if not any(isinstance(node.op, KvAppend) for node in graph.nodes):
            return PassResult(graph, False)
        if self.dtype not in self.features.cache_dtypes:
            raise OptionError(
                f"the target's kernels have no cache of {self.dtype}",
                source=self.name,
                remedy=f"choose one of: {', '.join(map(str, self.features.cache_dtypes))}",
            )
        layers = self._layers(graph)
        owners = {cache: layer for layer in layers for cache in layer.caches if layer.shares is None}
        self._check_uses(graph, owners)
        facts = [layer.facts(index) for index, layer in enumerate(layers)]
        plan = {
            "context": self.context,
            "max_step": self.max_step,
            "rollback": self.rollback,
            "page_size": self.features.page_size,
            "bytes_per_token": sum(layer["bytes_per_token"] for layer in facts),
            "layers": facts,
        }
        nodes = tuple(_scheduled(graph, owners))
        inputs = (*_stored_inputs(graph, owners), *self._new_inputs(layers))
        return PassResult(replace(graph, inputs=inputs, nodes=nodes), True, facts={"kv_cache": plan})

    def _layers(self, graph: Graph) -> list[_Layer]:
        """A layer for every attention, in order."""
        layers: list[_Layer] = []
        owners: dict[str, int] = {}  # by cache input
        tables: dict[int | None, int] = {}  # by window
        for node in graph.nodes:
            if not isinstance(node.op, Attention):
                continue
            caches = self._caches(graph, node)
            if owners.keys().isdisjoint(caches):
                owners.update(dict.fromkeys(caches, len(layers)))
                layers.append(self._own(graph.types[caches[0]], caches, node.op.window, tables))
            else:
                owner = owners.get(caches[0], owners.get(caches[1], 0))
                self._check_shared(node, caches, owner, layers[owner])
                layers.append(replace(layers[owner], shares=owner))
        return layers

    def _own(
        self, old: TensorType, caches: tuple[str, str], window: int | None, tables: dict[int | None, int]
    ) -> _Layer:
        """A layer with caches of its own."""
        batch, heads, _, dim = old.shape
        layout, capacity = self._layout(window)
        if layout == "paged":
            assert self.features.page_size is not None
            shape: tuple[Dim, ...] = ("pages", heads, self.features.page_size, dim)
            table = tables.setdefault(window, len(tables))
        else:
            shape, table = (batch, heads, capacity, dim), None
        type_ = TensorType(self.dtype, shape)
        return _Layer(caches, batch, type_, layout, capacity, window, table, None)

    def _check_shared(self, node: Node, caches: tuple[str, str], owner: int, layer: _Layer) -> None:
        assert isinstance(node.op, Attention)
        if caches != layer.caches:
            problem = f"reads a cache of layer {owner}, but not its keys as keys and its values as values"
        elif node.op.window != layer.window:
            problem = f"has window {node.op.window}, and shares the caches of layer {owner} of {layer.window}"
        else:
            return
        raise GraphError(f"%{node.outputs[0]} {problem}", source=self.name)

    def _layout(self, window: int | None) -> tuple[str, int]:
        """The layout for a window, and the positions that it holds."""
        kept = self.context if window is None else window + self.max_step + self.rollback
        page = self.features.page_size
        if page is not None:
            # What is kept can begin and end anywhere in a page.
            needed = kept if window is None else kept + page
            return "paged", page * min(-(-needed // page), self._entries)
        if window is None or not self.features.ring_cache or kept >= self.context:
            return "linear", self.context
        return "ring", kept

    @property
    def _entries(self) -> int:
        """Entries of a block table: the pages of a whole context."""
        assert self.features.page_size is not None
        return -(-self.context // self.features.page_size)

    def _caches(self, graph: Graph, attention: Node) -> tuple[str, str]:
        """The cache inputs whose grown values an attention reads as keys and as values."""
        grown = [graph.producer.get(name) for name in attention.inputs[1:3]]
        pasts = [node.inputs[0] for node in grown if node is not None and isinstance(node.op, KvAppend)]
        if len(set(pasts)) != 2 or graph.types[pasts[0]] != graph.types[pasts[1]]:
            raise GraphError(
                f"%{attention.outputs[0]} does not read two caches of one shape", source=self.name
            )
        return pasts[0], pasts[1]

    def _check_uses(self, graph: Graph, owners: Mapping[str, _Layer]) -> None:
        inputs = {value.name for value in graph.inputs}
        for node in graph.nodes:
            if not isinstance(node.op, KvAppend):
                continue
            (cache, _), (grown,) = node.inputs, node.outputs
            if cache not in owners or cache not in inputs:
                raise GraphError(f"%{cache} is not a cache that an attention reads", source=self.name)
            users = graph.users.get(grown, ())
            readers = [user.op.name for user in users if not isinstance(user.op, Attention)]
            if readers:
                raise GraphError(f"cache %{grown} is for attention, {readers[0]} reads it", source=self.name)
            others = [
                user for user in graph.users[cache] if user != node and not isinstance(user.op, Positions)
            ]
            if others:
                raise GraphError(f"{others[0].op.name} reads cache %{cache} as it was", source=self.name)
        if len({graph.types[cache].shape[2] for cache in owners}) > 1:
            raise GraphError("the caches differ in length", source=self.name)

    def _new_inputs(self, layers: list[_Layer]) -> list[Value]:
        """The past's length, and the block tables."""
        batches = {name: layer.batch for layer in layers for name in layer.tables}
        tables = [
            Value(name, TensorType(DType.I32, (batch, self._entries))) for name, batch in batches.items()
        ]
        return [Value(PAST, TensorType(DType.I32, ())), *tables]


def table_name(number: int) -> str:
    """The graph input that is block table ``number``: ``i32[batch, entries]``, numbers of pages."""
    return f"block_table.{number}"


def _stored_inputs(graph: Graph, owners: Mapping[str, _Layer]) -> list[Value]:
    """The graph's inputs, caches with the types that they are stored in."""
    return [
        Value(value.name, owners[value.name].type) if value.name in owners else value
        for value in graph.inputs
    ]


def _scheduled(graph: Graph, owners: Mapping[str, _Layer]) -> list[Node]:
    """The nodes with every append as a write and a read, and positions computed once per ids from the past's length."""
    nodes: list[Node] = []
    names: dict[str, str] = {}  # what is read instead
    positions: dict[str, str] = {}  # by ids
    for node in graph.nodes:
        inputs = tuple(names.get(name, name) for name in node.inputs)
        if isinstance(node.op, Positions) and inputs[1] in owners:
            first = positions.setdefault(inputs[0], node.outputs[0])
            if first != node.outputs[0] and node.outputs[0] not in graph.outputs:
                names[node.outputs[0]] = first
            else:
                nodes.append(Node(node.op, (inputs[0], PAST), node.outputs))
        elif isinstance(node.op, KvAppend):
            (cache, new), (grown,) = inputs, node.outputs
            layer = owners[cache]
            names[grown] = f"{grown}.visible"
            rest = (new, PAST, *layer.tables)
            nodes.append(Node(KvWrite(layer.layout), (cache, *rest), (grown,)))
            nodes.append(Node(layer.read, (grown, *rest), (names[grown],)))
        else:
            nodes.append(Node(node.op, inputs, node.outputs))
    return nodes


def _row_bytes(dtype: DType, heads: int, dim: int) -> int:
    """The bytes of one position's keys or values; 8-bit codes have a scale for each head."""
    return heads * (dim * _ELEMENT_BYTES[dtype] + (_SCALE_BYTES if dtype is DType.INT8 else 0))
