"""The caches of a graph, as kernels see them: where block tables and pages have what each attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rlxc.artifact import KvPlan
from rlxc.backends.tvm.kernels.cache import CacheShape, CacheType
from rlxc.backends.tvm.program import Argument, InPage, InTable
from rlxc.dtypes import DType
from rlxc.errors import GraphError, UnsupportedError
from rlxc.ir import TensorType, ops

_TYPES: Final[dict[DType, CacheType]] = {
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.INT8: "int8",
}

_ENTRY_BYTES = 8


@dataclass(frozen=True)
class CachePlaces:
    """What a plan says about the caches of a graph.

    Raises:
        UnsupportedError: the kernels do not know such caches.
    """

    plan: KvPlan

    def __post_init__(self) -> None:
        for layer in self.plan.layers:
            if layer.shares is not None:
                problem = f"layer {layer.index} reads the cache of layer {layer.shares}"
            elif layer.layout != "paged":
                problem = f"layer {layer.index} has a cache whose layout is {layer.layout}, not pages"
            elif layer.dtype not in _TYPES:
                problem = f"layer {layer.index} has a cache of {layer.dtype}"
            else:
                continue
            raise UnsupportedError(f"the tvm backend has no kernel for it: {problem}")

    def layer(
        self, index: int, op: ops.GroupQueryAttention, cache: TensorType
    ) -> tuple[CacheShape, tuple[Argument, ...]]:
        """A layer's share of a page, and the arguments of a kernel for ``CacheShape.params``.

        Args:
            index: the number of the attention in the graph, from 0.
            op: the attention.
            cache: the type of its two caches.

        Raises:
            GraphError: the plan does not have this layer, or another kind of it.
        """
        if index >= len(self.plan.layers):
            raise GraphError(f"the graph has an attention {index}, the plan of its cache has no such layer")
        layer, page = self.plan.layers[index], self.plan.page_size
        assert page is not None and layer.table is not None  # in a plan with pages
        planned = TensorType(layer.dtype, (cache.shape[0], layer.heads, page, layer.head_dim))
        if (op.layout, op.window, cache) != (layer.layout, layer.window, planned):
            raise GraphError(
                f"attention {index} has a {op.layout} cache {cache}, window {op.window}; "
                f"its plan says {layer.layout}, {planned}, window {layer.window}"
            )
        place = self.plan.pages[layer.table].layers[layer.index]
        offsets = (place.keys, place.values, place.key_scales, place.value_scales)
        table = InTable(_ENTRY_BYTES * self.plan.table_width * layer.table)
        places = (InPage(offset) for offset in offsets if offset is not None)
        return CacheShape(layer.heads, layer.head_dim, page, _TYPES[layer.dtype]), ("tables", table, *places)
