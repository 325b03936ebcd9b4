"""Turns growing caches into fixed buffers that are written in place, and plans them.

Models describe a cache as a value that grows: past rows, then this step's. Copying it every step would cost more than
the attention itself. This pass decides, layer by layer, on a buffer: *linear* (a row for every position) where
attention looks at everything, or a *ring* of a window and one step where it looks at a window only. It is written
in place, before it is read, and the past's length becomes one number for the whole graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import Graph, Node, TensorType, Value
from rlxc.ir.ops import Attention, KvAppend, KvRead, KvWrite, Positions
from rlxc.ir.target import TargetFeatures
from rlxc.passes.base import Pass, PassResult

PAST = "past_length"
_ELEMENT_BYTES = {DType.F32: 4, DType.F16: 2}


@dataclass(frozen=True)
class _Buffer:
    """One layer's buffers: the type of each, and the window of a ring (None for a linear layout)."""

    type: TensorType
    ring_window: int | None

    @property
    def layout(self) -> str:
        return "linear" if self.ring_window is None else "ring"


class ScheduleKvCache(Pass):
    """Schedules every cache of the graph; the fact ``kv_cache`` is the plan that the runtime obeys.

    Args:
        context: positions that a linear cache holds.
        max_step: tokens that a step adds at most.
        features: whether the target can keep a window in a ring, and the type and number of a cache's rows.
    """

    def __init__(self, features: TargetFeatures, *, context: int, max_step: int) -> None:
        self.features, self.context, self.max_step = features, context, max_step

    def run(self, graph: Graph) -> PassResult:
        """See the class.

        Raises:
            GraphError: a cache is used by more than one attention, or a layer's two caches differ.
        """
        if not any(isinstance(node.op, KvAppend) for node in graph.nodes):
            return PassResult(graph, False)
        buffers: dict[str, _Buffer] = {}  # by cache input
        layers: list[dict[str, Any]] = []
        for node in graph.nodes:
            if isinstance(node.op, Attention):
                buffer, pasts = self._buffer(graph, node.op.window, node)
                buffers.update(dict.fromkeys(pasts, buffer))
                layers.append(_layer_facts(len(layers), buffer.layout, buffer.type, node.op.window))
        self._check_uses(graph, buffers)
        inputs = [
            Value(value.name, buffers[value.name].type) if value.name in buffers else value
            for value in graph.inputs
        ]
        inputs.append(Value(PAST, TensorType(DType.I32, ())))
        plan = {
            "context": self.context,
            "max_step": self.max_step,
            "bytes_per_token": sum(layer["bytes_per_token"] for layer in layers),
            "layers": layers,
        }
        nodes = tuple(_scheduled(graph, buffers))
        return PassResult(replace(graph, inputs=tuple(inputs), nodes=nodes), True, facts={"kv_cache": plan})

    def _buffer(self, graph: Graph, window: int | None, attention: Node) -> tuple[_Buffer, list[str]]:
        """The buffers of one attention's keys and values, and the cache inputs that they replace."""
        grown = [graph.producer.get(name) for name in attention.inputs[1:]]
        pasts = [node.inputs[0] for node in grown if node is not None and isinstance(node.op, KvAppend)]
        if len(set(pasts)) != 2 or graph.types[pasts[0]] != graph.types[pasts[1]]:
            raise GraphError(
                f"%{attention.outputs[0]} does not read two caches of one shape", source=self.name
            )
        old = graph.types[pasts[0]]
        batch, heads, _, dim = old.shape
        in_ring = self.features.ring_cache and window is not None and window + self.max_step < self.context
        ring_window = window if in_ring else None
        needed = self.context if ring_window is None else ring_window + self.max_step
        capacity = -(-needed // self.features.cache_rows) * self.features.cache_rows
        type_ = TensorType(self.features.cache_dtype, (batch, heads, capacity, dim))
        return _Buffer(type_, ring_window), pasts

    def _check_uses(self, graph: Graph, buffers: Mapping[str, _Buffer]) -> None:
        inputs = {value.name for value in graph.inputs}
        for node in graph.nodes:
            if not isinstance(node.op, KvAppend):
                continue
            (cache, _), (grown,) = node.inputs, node.outputs
            if cache not in buffers or cache not in inputs:
                raise GraphError(f"%{cache} is not a cache that an attention reads", source=self.name)
            users = graph.users.get(grown, ())
            if len(users) != 1 or not isinstance(users[0].op, Attention):
                readers = ", ".join(user.op.name for user in users)
                raise GraphError(
                    f"cache %{grown} is for one attention, its readers are {readers}", source=self.name
                )
            others = [
                user for user in graph.users[cache] if user != node and not isinstance(user.op, Positions)
            ]
            if others:
                raise GraphError(f"{others[0].op.name} reads cache %{cache} as it was", source=self.name)
        if len({graph.types[cache].shape[2] for cache in buffers}) > 1:
            raise GraphError("the caches differ in length", source=self.name)


def _scheduled(graph: Graph, buffers: Mapping[str, _Buffer]) -> list[Node]:
    """The nodes with every append as a write and a read, and positions computed once per ids from the past's length."""
    nodes: list[Node] = []
    names: dict[str, str] = {}  # what is read instead
    positions: dict[str, str] = {}  # by ids
    for node in graph.nodes:
        inputs = tuple(names.get(name, name) for name in node.inputs)
        if isinstance(node.op, Positions) and inputs[1] in buffers:
            first = positions.setdefault(inputs[0], node.outputs[0])
            if first != node.outputs[0] and node.outputs[0] not in graph.outputs:
                names[node.outputs[0]] = first
            else:
                nodes.append(Node(node.op, (inputs[0], PAST), node.outputs))
        elif isinstance(node.op, KvAppend):
            (cache, new), (grown,) = inputs, node.outputs
            buffer = buffers[cache]
            names[grown] = f"{grown}.visible"
            read = KvRead(buffer.layout, buffer.ring_window)
            nodes.append(Node(KvWrite(buffer.layout), (cache, new, PAST), (grown,)))
            nodes.append(Node(read, (grown, new, PAST), (names[grown],)))
        else:
            nodes.append(Node(node.op, inputs, node.outputs))
    return nodes


def _layer_facts(index: int, layout: str, cache: TensorType, window: int | None) -> dict[str, Any]:
    heads, capacity, dim = map(int, cache.shape[1:])
    return {
        "index": index,
        "layout": layout,
        "capacity": capacity,
        "window": window,
        "heads": heads,
        "head_dim": dim,
        "dtype": cache.dtype.value,
        "bytes_per_token": 2 * heads * dim * _ELEMENT_BYTES[cache.dtype],
    }
