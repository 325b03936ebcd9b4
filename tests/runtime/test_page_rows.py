"""What a paged cache holds, as rows: what kernels wrote is read, and what is loaded lies where they look."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from paged_caches import (
    MAX_STEP,
    PAGE,
    ROLLBACK,
    STORED,
    Allocator,
    addresses,
    array,
    make_cache,
    make_plan,
    page_address,
    step,
)

from rlxc.artifact.kv import KvLayer, KvPlan
from rlxc.dtypes import DType
from rlxc.runtime.engines import KvRows, pages
from rlxc.runtime.engines.pages import PagedCache


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    monkeypatch.setattr(pages, "private_memory", allocator)
    return allocator


@dataclass
class Layer:
    """What a layer should hold, positions first."""

    plan: KvLayer
    parts: list[npt.NDArray[Any]]

    @classmethod
    def random(cls, plan: KvLayer, count: int) -> Layer:
        rng = np.random.default_rng(plan.index)
        rows = (count, plan.heads, plan.head_dim)
        parts = [rng.integers(-127, 128, rows).astype(STORED[plan.dtype]) for _ in range(2)]
        if plan.dtype is DType.INT8:
            parts += [rng.random((count, plan.heads)).astype(np.float32) for _ in range(2)]
        return cls(plan, parts)

    def in_page(self, plan: KvPlan, cache: PagedCache, position: int) -> list[npt.NDArray[Any]]:
        """The same of one position, as the kernels' layout has it."""
        assert self.plan.table is not None
        begin = page_address(plan, cache, self.plan.table, position)
        place = plan.pages[self.plan.table].layers[self.plan.index]
        heads, dim, dtype, row = self.plan.heads, self.plan.head_dim, STORED[self.plan.dtype], position % PAGE
        found = [
            array(begin + place.keys, dtype, heads, PAGE // 16, dim, 16)[:, row // 16, :, row % 16],
            array(begin + place.values, dtype, heads, PAGE, dim)[:, row],
        ]
        for at in (place.key_scales, place.value_scales):
            if at is not None:
                found.append(array(begin + at, np.float32, heads, PAGE)[:, row])
        return found


def filled(plan: KvPlan, count: int) -> tuple[PagedCache, list[Layer]]:
    """A cache whose layers hold random numbers."""
    cache = make_cache(plan)
    layers = [Layer.random(layer, count) for layer in plan.layers if layer.shares is None]
    while cache.position < count:
        size = min(MAX_STEP, count - cache.position)
        cache.reserve(size)
        for position in range(cache.position, cache.position + size):
            for layer in layers:
                for part, place in zip(layer.parts, layer.in_page(plan, cache, position)):
                    place[:] = part[position]
        cache.advance(size)
    return cache, layers


def parts_of(rows: KvRows) -> list[npt.NDArray[Any]]:
    parts = [rows.keys, rows.values, rows.key_scales, rows.value_scales]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("count", [0, 32, 110])
def test_rows_are_what_kernels_wrote(dtype: DType, count: int) -> None:
    plan = make_plan(dtype, heads=2, head_dim=3, layers=4)
    cache, layers = filled(plan, count)
    for layer, rows in zip(layers, cache.rows(), strict=True):
        window = layer.plan.window
        assert rows.first == (0 if window is None else max(0, count - ROLLBACK - window + 1))
        for part, expected in zip(parts_of(rows), layer.parts, strict=True):
            width = math.prod(expected.shape[1:])
            assert part.dtype == expected.dtype
            np.testing.assert_array_equal(part, expected[rows.first :].reshape(count - rows.first, width))


@pytest.mark.parametrize("dtype", STORED)
def test_loaded_rows_lie_where_kernels_look(dtype: DType) -> None:
    plan = make_plan(dtype, heads=2, head_dim=3, layers=4)
    cache, layers = filled(plan, 110)
    saved = cache.rows()
    loaded = make_cache(plan, pages_per_slab=2)
    loaded.load(110, saved)
    for layer, rows in zip(layers, saved):
        for position in range(rows.first, 110):
            for part, place in zip(layer.parts, layer.in_page(plan, loaded, position), strict=True):
                np.testing.assert_array_equal(place, part[position])
    for rows, again in zip(saved, loaded.rows(), strict=True):
        assert rows.first == again.first
        for part, expected in zip(parts_of(again), parts_of(rows), strict=True):
            np.testing.assert_array_equal(part, expected)


def test_rows_before_the_first_loaded_one_are_finite() -> None:
    # Kernels read keys in tiles, and leave out what lies before the window.
    plan = make_plan()
    cache, _ = filled(plan, 60)
    saved = cache.rows()
    other = make_cache(plan)
    other.reserve(60)
    for number in range(len(plan.pages)):
        for position in range(0, 60, PAGE):
            array(page_address(plan, other, number, position), np.float32, PAGE)[:] = np.nan
    other.truncate(0)
    other.load(60, saved)
    assert saved[2].first % PAGE
    assert np.isfinite(array(page_address(plan, other, 2, saved[2].first), np.float32, PAGE)).all()


def test_layer_that_shares_another_s_cache_has_no_rows() -> None:
    plan = make_plan(DType.INT8)
    sharing = replace(plan.layers[0], index=3, shares=0)
    plan = replace(plan, layers=(*plan.layers, sharing))
    cache, _ = filled(plan, 20)
    saved = cache.rows()
    assert saved[3].first == 20
    assert [part.shape for part in parts_of(saved[3])] == [(0, 1)] * 4
    loaded = make_cache(plan)
    loaded.load(20, saved)
    np.testing.assert_array_equal(loaded.rows()[0].keys, saved[0].keys)


def test_without_memory_nothing_is_loaded(allocator: Allocator) -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    saved, loaded = cache.rows(), make_cache()
    allocator.is_full = True
    with pytest.raises(MemoryError):
        loaded.load(30, saved)
    assert loaded.position == 0
    assert not addresses(loaded)
