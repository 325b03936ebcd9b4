"""Turns growing caches into fixed buffers that are written in place, and plans them.

Models describe a cache as a value that grows: past rows, then this step's. Copying it every step would cost more than
the attention itself. This pass decides, layer by layer, on a buffer: *linear* (a row for every position) where
attention looks at everything, or a *ring* of a window and one step where it looks at a window only. It is written
in place, before it is read, and the past's length becomes one number for the whole graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import Graph, Node, TensorType, Value
from rlxc.ir.ops import Attention, KvAppend, KvRead, KvWrite, Positions
from rlxc.passes.base import Pass, PassResult

PAST = "past_length"
_BYTES = {DType.F32: 4, DType.F16: 2, DType.BF16: 2}


class ScheduleKvCache(Pass):
    """Schedules every cache of the graph; the fact ``kv_cache`` is the plan that the runtime obeys.

    Args:
        context: positions that a linear cache holds.
        max_step: tokens that a step adds at most.
        ring: whether the target can keep a window in a ring.
    """

    def __init__(self, *, context: int, max_step: int, ring: bool) -> None:
        self.context, self.max_step, self.ring = context, max_step, ring

    def run(self, graph: Graph) -> PassResult:
        """See the class.

        Raises:
            GraphError: a cache is not read by attention alone, or a layer's two caches differ.
        """
        appends = [node for node in graph.nodes if isinstance(node.op, KvAppend)]
        if not appends:
            return PassResult(graph, False)
        caches: dict[str, TensorType] = {}
        layers: list[dict[str, Any]] = []
        reads: dict[str, str] = {}  # what attention reads instead of the grown cache
        windows: dict[str, int | None] = {}
        for node in graph.nodes:
            if isinstance(node.op, Attention):
                self._plan_layer(graph, node, len(layers), caches, layers, windows)
        self._check_uses(graph, appends, caches)

        nodes: list[Node] = []
        positions: dict[str, str] = {}
        first_position: dict[str, str] = {}  # by ids
        for node in graph.nodes:
            match node.op:
                case Positions() if node.inputs[1] in caches:
                    ids = node.inputs[0]
                    if ids in first_position:
                        positions[node.outputs[0]] = first_position[ids]
                        continue
                    first_position[ids] = node.outputs[0]
                    nodes.append(Node(node.op, (ids, PAST), node.outputs))
                case KvAppend():
                    (cache, new), (grown,) = node.inputs, node.outputs
                    window = windows[cache]
                    layout = "linear" if window is None else "ring"
                    reads[grown] = f"{grown}.visible"
                    nodes.append(Node(KvWrite(layout), (cache, new, PAST), (grown,)))
                    nodes.append(Node(KvRead(layout, window), (grown, new, PAST), (reads[grown],)))
                case _:
                    inputs = tuple(reads.get(name, positions.get(name, name)) for name in node.inputs)
                    nodes.append(Node(node.op, inputs, node.outputs))
        interface = [Value(value.name, caches.get(value.name, value.type)) for value in graph.inputs]
        interface.append(Value(PAST, TensorType(DType.I32, ())))
        plan = {
            "context": self.context,
            "max_step": self.max_step,
            "bytes_per_token": sum(layer["bytes_per_token"] for layer in layers),
            "layers": layers,
        }
        scheduled = replace(graph, inputs=tuple(interface), nodes=tuple(nodes))
        return PassResult(scheduled, True, facts={"kv_cache": plan})

    def _plan_layer(
        self,
        graph: Graph,
        attention: Node,
        index: int,
        caches: dict[str, TensorType],
        layers: list[dict[str, Any]],
        windows: dict[str, int | None],
    ) -> None:
        assert isinstance(attention.op, Attention)
        writers = [graph.producer.get(name) for name in attention.inputs[1:]]
        pasts = [node.inputs[0] for node in writers if node is not None and isinstance(node.op, KvAppend)]
        if len(pasts) != 2 or graph.types[pasts[0]] != graph.types[pasts[1]]:
            raise GraphError(
                f"%{attention.outputs[0]} does not read two caches of one shape", source=self.name
            )
        window = attention.op.window
        if not self.ring or window is None or window + self.max_step >= self.context:
            window = None
        capacity = self.context if window is None else window + self.max_step
        cache = graph.types[pasts[0]]
        batch, heads, _, dim = cache.shape
        for past in pasts:
            caches[past] = TensorType(cache.dtype, (batch, heads, capacity, dim))
            windows[past] = window
        layers.append(
            {
                "index": index,
                "layout": "linear" if window is None else "ring",
                "capacity": capacity,
                "window": attention.op.window,
                "heads": heads,
                "head_dim": dim,
                "dtype": cache.dtype.value,
                "bytes_per_token": 2 * int(heads) * int(dim) * _BYTES[cache.dtype],
            }
        )

    def _check_uses(self, graph: Graph, appends: list[Node], caches: dict[str, TensorType]) -> None:
        for node in appends:
            grown = node.outputs[0]
            if node.inputs[0] not in caches:
                raise GraphError(f"no attention reads cache %{grown}", source=self.name)
            others = [user for user in graph.users[grown] if not isinstance(user.op, Attention)]
            if others:
                raise GraphError(
                    f"{others[0].op.name} reads cache %{grown}, only attention can", source=self.name
                )
