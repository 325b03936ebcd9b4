"""The plan of caches: what pages hold, what sequences take, and plans that cannot be."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from rlxc.artifact import KvLayer, KvPlan
from rlxc.dtypes import DType

BUFFERS = KvPlan(
    context=64,
    max_step=16,
    rollback=5,
    page_size=None,
    bytes_per_token=64,
    layers=(
        KvLayer(0, "linear", 64, None, 1, 4, DType.F32, 32),
        KvLayer(1, "ring", 29, 8, 1, 4, DType.F32, 32),
    ),
)
# 8 + 16 + 5 positions are two pages of 16, and one more as they begin anywhere; the context takes seven pages.
PAGES = KvPlan(
    context=100,
    max_step=16,
    rollback=5,
    page_size=16,
    bytes_per_token=192,
    layers=(
        KvLayer(0, "paged", 48, 8, 2, 20, DType.INT8, 96, table=0),
        KvLayer(1, "paged", 112, None, 1, 24, DType.F16, 96, table=1),
        KvLayer(2, "paged", 48, 8, 2, 20, DType.INT8, 0, shares=0, table=0),
    ),
)


@pytest.mark.parametrize("plan", [BUFFERS, PAGES], ids=["buffers", "pages"])
def test_sound_plan_has_no_problem(plan: KvPlan) -> None:
    assert plan.problem == ""


def test_plan_that_keeps_more_than_it_must_has_no_problem() -> None:
    wide = replace(PAGES.layers[0], capacity=64)
    third = replace(PAGES.layers[2], capacity=64)
    assert replace(PAGES, layers=(wide, PAGES.layers[1], third)).problem == ""


def test_window_as_long_as_the_context_takes_no_more_pages_than_that() -> None:
    layer = replace(PAGES.layers[0], window=99, capacity=112)
    assert replace(PAGES, layers=(layer,), bytes_per_token=96).problem == ""


CASES: list[tuple[KvPlan, int | None, dict[str, Any], str]] = [
    (BUFFERS, None, {"max_step": 65}, "max_step is 65, more than its context 64"),
    (BUFFERS, None, {"bytes_per_token": 65}, "bytes_per_token is 65, its layers take 64"),
    (BUFFERS, None, {"page_size": 16}, r"layers\[0\].layout is linear, and page_size is 16"),
    (PAGES, None, {"page_size": None}, r"layers\[0\].layout is paged, and page_size is None"),
    (PAGES, None, {"page_size": 24}, "page_size is 24, which is no multiple of 16"),
    (PAGES, None, {"rollback": 21}, r"layers\[0\].capacity is 48, it needs 64"),
    (BUFFERS, 0, {"capacity": 63}, r"layers\[0\].capacity is 63, it needs 64"),
    (BUFFERS, 0, {"capacity": 65}, r"layers\[0\].capacity is 65, it needs 64"),
    (BUFFERS, 1, {"capacity": 28}, r"layers\[1\].capacity is 28, it needs 29"),
    (BUFFERS, 1, {"window": 9}, r"layers\[1\].capacity is 29, it needs 30"),
    (BUFFERS, 1, {"window": 60}, r"layers\[1\].capacity is 29, it needs 81"),
    (BUFFERS, 1, {"window": None}, r"layers\[1\].window is missing from a ring"),
    (BUFFERS, 0, {"table": 0}, r"layers\[0\].table is 0, and layout is linear"),
    (BUFFERS, 0, {"dtype": DType.I64}, r"layers\[0\].dtype must be one of f32, f16, bf16, int8, got i64"),
    (BUFFERS, 0, {"dtype": DType.F16}, r"layers\[0\].bytes_per_token is 32, keys and values take 16"),
    (BUFFERS, 1, {"shares": 1}, r"layers\[1\].shares is 1, which is no earlier layer"),
    (BUFFERS, 0, {"shares": 1}, r"layers\[0\].shares is 1, which is no earlier layer"),
    (BUFFERS, 1, {"shares": 0}, r"layers\[1\].shares is 0, a layer with another cache"),
    (PAGES, 1, {"capacity": 96}, r"layers\[1\].capacity is 96, it needs 112"),
    (PAGES, 1, {"capacity": 128}, r"layers\[1\].capacity is 128, it needs 112"),
    (PAGES, 0, {"capacity": 32}, r"layers\[0\].capacity is 32, it needs 48"),
    (PAGES, 0, {"capacity": 50}, r"layers\[0\].capacity is 50, it needs 48"),
    (PAGES, 1, {"table": None}, r"layers\[1\].table is None, and layout is paged"),
    (PAGES, 1, {"table": 2}, r"layers have tables \[0, 2\], which should be numbered from 0"),
    (PAGES, 1, {"table": 0}, r"layers\[1\].window is None, others of its table have 8"),
    (PAGES, 2, {"bytes_per_token": 96}, r"layers\[2\].shares is 0, a layer with another cache"),
    (PAGES, 2, {"heads": 1}, r"layers\[2\].shares is 0, a layer with another cache"),
    (PAGES, 2, {"dtype": DType.F32}, r"layers\[2\].shares is 0, a layer with another cache"),
    (PAGES, 2, {"shares": None}, r"layers\[2\].bytes_per_token is 0, keys and values take 96"),
]


@pytest.mark.parametrize(("plan", "layer", "changes", "problem"), CASES)
def test_contradiction_is_named(
    plan: KvPlan, layer: int | None, changes: dict[str, Any], problem: str
) -> None:
    if layer is None:
        broken = replace(plan, **changes)
    else:
        layers = list(plan.layers)
        layers[layer] = replace(layers[layer], **changes)
        broken = replace(plan, layers=tuple(layers))
    assert re.match(problem, broken.problem), broken.problem


def test_layer_that_shares_what_another_shares_is_named() -> None:
    layers = (*PAGES.layers, replace(PAGES.layers[2], index=3, shares=2))
    assert replace(PAGES, layers=layers).problem.startswith("layers[3].shares is 2, a layer with another")


def test_pages_of_a_table_hold_its_layers_one_after_the_other() -> None:
    windowed, full = PAGES.pages
    # Two heads of 16 positions and 20 channels in 8 bits are 640 bytes; their scales 128. All begin at multiples of 64.
    assert (windowed.nbytes, windowed.window) == (2 * (640 + 128), 8)
    (layer,) = windowed.layers.values()
    assert (layer.keys, layer.values, layer.key_scales, layer.value_scales) == (0, 640, 1280, 1408)
    assert (full.nbytes, full.window, list(full.layers)) == (2 * 768, None, [1])
    assert full.layers[1].key_scales is full.layers[1].value_scales is None


def test_bytes_of_sequences_are_no_more_than_layers_keep() -> None:
    assert BUFFERS.nbytes(1) == 64
    assert BUFFERS.nbytes(29, sequences=3) == 3 * 29 * 64
    assert BUFFERS.nbytes(64) == 64 * 32 + 29 * 32
    assert PAGES.nbytes(1) == 16 * (96 + 96)
    assert PAGES.nbytes(100) == 48 * 96 + 112 * 96
