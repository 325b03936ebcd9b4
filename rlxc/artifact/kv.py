"""Where a sequence's keys and values lie: the plan that the compiler makes and the runtime obeys.

A *linear* cache has a row for every position, a *ring* the last ones. A *paged* cache is made of pages of
``page_size`` positions, which sequences share until one of them writes; a page holds all layers that keep as much, and
a block table says which page holds positions ``page_size * i`` and following. Pages behind a layer's window go back to
where they came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rlxc.artifact.fields import Bytes, Count, Index
from rlxc.dtypes import DType

KvLayout = Literal["linear", "ring", "paged"]
KvCacheType = Literal["auto", "f32", "f16", "bf16", "int8"]

DEFAULT_ROLLBACK = 64
"""Positions that a sliding-window layer keeps beyond its window, so that the newest tokens can be taken back."""

KEY_TILE = 16
"""Positions whose keys lie side by side in a page, channel by channel."""

_ALIGNMENT = 64


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
        """The bytes that sequences of so many tokens take, when nothing is shared."""
        each = sum(layer.bytes_per_token * min(tokens, layer.capacity) for layer in self.layers)
        return sequences * each

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
            size = _align(rows * layer.head_dim * _ELEMENT_BYTES[layer.dtype])
            scales = _align(rows * 4) if layer.dtype is DType.INT8 else None
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


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
