"""Where a sequence's keys and values lie: the plan that the compiler makes and the runtime obeys.

A *linear* cache has a row for every position, a *ring* the last ones. A *paged* cache is made of pages of
``page_size`` positions, which sequences share until one of them writes; a page holds all layers that keep as much, and
a block table says which page holds positions ``page_size * i`` and following. Pages behind a layer's window go back to
where they came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from rlxc.artifact.alignment import align
from rlxc.artifact.fields import Bytes, Count, Index
from rlxc.dtypes import DType

KvLayout = Literal["linear", "ring", "paged"]
KvCacheType = Literal["auto", "f32", "f16", "bf16", "int8"]

DEFAULT_ROLLBACK = 64
"""Positions that a sliding-window layer keeps beyond its window, so that the newest tokens can be taken back."""

KEY_TILE = 16
"""Positions whose keys lie side by side in a page, channel by channel."""


@dataclass(frozen=True)
class KvLayer:
    """The cache of one layer: ``heads`` x ``head_dim`` keys, and as many values, for at most ``capacity`` positions.

    Attention sees the last ``window`` of them, or all. A layer that ``shares`` reads the cache of that earlier layer
    and has none of its own. A paged layer's pages are found in block table number ``table``.
    """

    index: Index
    layout: KvLayout
    capacity: Count
    window: Count | None
    heads: Count
    head_dim: Count
    dtype: DType
    bytes_per_token: Bytes
    shares: Index | None = None
    table: Index | None = None


@dataclass(frozen=True)
class PagedLayer:
    """Where one layer's share of a page lies, in bytes from the page's start.

    Keys are ``[heads, page_size / 16, head_dim, 16]``, values ``[heads, page_size, head_dim]``. The scales of 8-bit
    codes are f32 ``[heads, page_size]`` each.
    """

    keys: int
    values: int
    key_scales: int | None
    value_scales: int | None


@dataclass(frozen=True)
class PageLayout:
    """The pages of one block table: their size in bytes, what lies where, and how far back their layers look.

    With a ``window``, pages that it has left behind by the plan's ``rollback`` are let go.
    """

    nbytes: int
    window: int | None
    layers: Mapping[int, PagedLayer]


@dataclass(frozen=True)
class KvPlan:
    """How the runtime keeps keys and values: ``context`` tokens, added at most ``max_step`` at a time.

    The newest ``rollback`` tokens can be taken back again whatever the layouts.
    """

    context: Count
    max_step: Count
    rollback: Index
    page_size: Count | None
    bytes_per_token: Bytes
    layers: tuple[KvLayer, ...]

    def nbytes(self, tokens: int, sequences: int = 1) -> int:
        """The most bytes that sequences of so many tokens take, in whole pages, when they share nothing."""
        rows = self._in_pages(tokens)
        each = sum(layer.bytes_per_token * min(rows, layer.capacity) for layer in self.layers)
        return sequences * each

    @property
    def problem(self) -> str:
        """What the fields say that cannot be so together, beginning with one's name; "" if all is well."""
        return next(self._problems(), "")

    def _problems(self) -> Iterator[str]:
        if self.max_step > self.context:
            yield f"max_step is {self.max_step}, more than its context {self.context}"
        if self.page_size is not None and self.page_size % KEY_TILE:
            yield f"page_size is {self.page_size}, which is no multiple of {KEY_TILE}"
        for i, layer in enumerate(self.layers):
            yield from (f"layers[{i}].{problem}" for problem in self._layer_problems(layer))
        tables = {layer.table: layer.window for layer in self.layers if layer.table is not None}
        if tables.keys() != set(range(len(tables))):
            yield f"layers have tables {sorted(tables)}, which should be numbered from 0"
        for i, layer in enumerate(self.layers):
            if layer.table is not None and layer.window != tables[layer.table]:
                yield f"layers[{i}].window is {layer.window}, others of its table have {tables[layer.table]}"
        total = sum(layer.bytes_per_token for layer in self.layers)
        if self.bytes_per_token != total:
            yield f"bytes_per_token is {self.bytes_per_token}, its layers take {total}"

    def _layer_problems(self, layer: KvLayer) -> Iterator[str]:
        paged = layer.layout == "paged"
        if paged is not (self.page_size is not None):
            yield f"layout is {layer.layout}, and page_size is {self.page_size}"
            return
        if paged is not (layer.table is not None):
            yield f"table is {layer.table}, and layout is {layer.layout}"
        if layer.dtype not in _ELEMENT_BYTES:
            yield f"dtype must be one of {', '.join(_ELEMENT_BYTES)}, got {layer.dtype}"
            return
        if layer.layout == "ring" and layer.window is None:
            yield "window is missing from a ring"
            return
        most = self._in_pages(self.context)
        kept = most if layer.window is None else layer.window + self.max_step + self.rollback
        if paged and layer.window is not None:
            kept = min(self._in_pages(kept) + (self.page_size or 0), most)
        needed = most if layer.layout == "linear" else kept
        if not needed <= layer.capacity <= most or layer.capacity != self._in_pages(layer.capacity):
            yield f"capacity is {layer.capacity}, it needs {needed}"
        if layer.shares is None:
            size = 2 * row_bytes(layer.dtype, layer.heads, layer.head_dim)
            if layer.bytes_per_token != size:
                yield f"bytes_per_token is {layer.bytes_per_token}, keys and values take {size}"
        elif layer.shares >= layer.index:
            yield f"shares is {layer.shares}, which is no earlier layer"
        else:
            owner = self.layers[layer.shares]
            expected = replace(owner, index=layer.index, shares=owner.index, bytes_per_token=0)
            if owner.shares is not None or layer != expected:
                yield f"shares is {layer.shares}, a layer with another cache or with none of its own"

    def _in_pages(self, positions: int) -> int:
        """So many positions, rounded up to whole pages where there are any."""
        size = self.page_size or 1
        return -(-positions // size) * size

    @property
    def table_width(self) -> int:
        """The entries of a block table."""
        assert self.page_size is not None
        return -(-self.context // self.page_size)

    @cached_property
    def pages(self) -> tuple[PageLayout, ...]:
        """The pages of each block table."""
        tables = sorted({layer.table for layer in self.layers if layer.table is not None})
        return tuple(self._page_layout(table) for table in tables)

    def _page_layout(self, table: int) -> PageLayout:
        assert self.page_size is not None
        offset, layers, window = 0, {}, None
        for layer in self.layers:
            if layer.table != table or layer.shares is not None:
                continue
            window = layer.window
            rows = layer.heads * self.page_size
            size = align(rows * layer.head_dim * _ELEMENT_BYTES[layer.dtype])
            scales = align(rows * 4) if layer.dtype is DType.INT8 else None
            keys, values, end = offset, offset + size, offset + 2 * size
            if scales is None:
                layers[layer.index] = PagedLayer(keys, values, None, None)
                offset = end
            else:
                layers[layer.index] = PagedLayer(keys, values, end, end + scales)
                offset = end + 2 * scales
        return PageLayout(offset, window, layers)


_ELEMENT_BYTES = {DType.F32: 4, DType.F16: 2, DType.BF16: 2, DType.INT8: 1}


def row_bytes(dtype: DType, heads: int, head_dim: int) -> int:
    """The bytes of one position's keys or values as they are stored.

    8-bit codes have one f32 scale for each head.
    """
    return heads * (head_dim * _ELEMENT_BYTES[dtype] + (4 if dtype is DType.INT8 else 0))
