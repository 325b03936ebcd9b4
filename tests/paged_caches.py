"""Paged caches without an engine. A few lines of numpy stand for the kernels: they see what those see, addresses."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.artifact.kv import KvLayer, KvPlan, row_bytes
from rlxc.dtypes import DType
from rlxc.runtime.engines.memory import private_memory
from rlxc.runtime.engines.pages import PagedCache, PagePool

PAGE, ROLLBACK, MAX_STEP, CONTEXT = 16, 7, 40, 200
WINDOWS = (None, 5, 33)
"""Of the block tables; page ends, windows and rollback fall on each other in every way."""

STORED = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: np.uint16, DType.INT8: np.int8}


def make_plan(dtype: DType = DType.F32, heads: int = 1, head_dim: int = 1, layers: int = 3) -> KvPlan:
    """Layers take turns at the windows."""
    size = row_bytes(dtype, heads, head_dim)
    plan = []
    for index in range(layers):
        table = index % len(WINDOWS)
        window = WINDOWS[table]
        plan.append(KvLayer(index, "paged", CONTEXT, window, heads, head_dim, dtype, 2 * size, None, table))
    return KvPlan(CONTEXT, MAX_STEP, ROLLBACK, PAGE, 2 * layers * size, tuple(plan))


PLAN = make_plan()


def array(address: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
    """What lies there."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_int8 * size).from_address(address), dtype).reshape(shape)


@dataclass(repr=False)
class Allocator:
    """Stands for the system; `kept` memory stays readable, whoever let go of it."""

    is_full: bool = False
    kept: list[Any] | None = None
    pieces: list[weakref.ref[Any]] = field(default_factory=list)
    asked: Callable[[], None] = lambda: None

    def __call__(self, size: int, *, large_pages: bool) -> npt.NDArray[np.int8]:
        self.asked()
        if self.is_full:
            raise MemoryError
        memory = private_memory(size)
        self.pieces.append(weakref.ref(memory))
        if self.kept is not None:
            self.kept.append(memory)
        return memory

    @property
    def in_use(self) -> int:
        return sum(piece() is not None for piece in self.pieces)


def make_cache(plan: KvPlan = PLAN, pages_per_slab: int = 3) -> PagedCache:
    """An empty cache with pools of its own. Addresses count from 64: from anywhere."""
    pools = [PagePool(layout, pages_per_slab * layout.nbytes) for layout in plan.pages]
    return PagedCache(plan, pools, 64)


def page_address(plan: KvPlan, cache: PagedCache, table: int, position: int) -> int:
    """Where the page of a position begins, as a kernel finds it."""
    entries = array(cache.tables, np.int64, len(plan.pages), plan.table_width)
    return 64 + int(entries[table, position // PAGE])


def step(cache: PagedCache, tokens: list[int]) -> None:
    """Append tokens: every layer's keys and values are the token."""
    cache.reserve(len(tokens))
    start, end = cache.position, cache.position + len(tokens)
    for begin in range(start // PAGE * PAGE, end, PAGE):
        first, last = max(start, begin), min(end, begin + PAGE)
        for table, layout in enumerate(PLAN.pages):
            memory = page_address(PLAN, cache, table, begin)
            for place in layout.layers.values():
                for offset in (place.keys, place.values):
                    rows = array(memory + offset, np.float32, PAGE)[first - begin : last - begin]
                    rows[:] = tokens[first - start : last - start]
    cache.advance(len(tokens))


def seen(cache: PagedCache, table: int) -> list[int]:
    """The tokens that a layer may look back to, now or after it was cut back as far as can be."""
    layout = PLAN.pages[table]
    first = 0 if layout.window is None else max(0, cache.oldest - layout.window + 1)
    (place,) = layout.layers.values()
    tokens: list[int] = []
    for begin in range(first // PAGE * PAGE, cache.position, PAGE):
        memory = page_address(PLAN, cache, table, begin)
        rows = slice(max(first - begin, 0), min(cache.position - begin, PAGE))
        keys = array(memory + place.keys, np.float32, PAGE)[rows].tolist()
        assert keys == array(memory + place.values, np.float32, PAGE)[rows].tolist()
        tokens += keys
    return tokens


def addresses(cache: PagedCache) -> set[int]:
    """Of the pages that a cache has."""
    return set(cache.memory) - {cache.tables}
