"""Attention over caches of every layout against numpy in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rlxc.backends.tvm.kernels.attention import AttentionKnobs, attention_kernel, workspace_floats
from rlxc.backends.tvm.kernels.cache import CacheShape
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import OptionError

Array = npt.NDArray[Any]

KNOBS = {4: AttentionKnobs(6, 64, 32), 8: AttentionKnobs(6, 64, 16), 16: AttentionKnobs(12, 64, 32)}


@dataclass(frozen=True)
class Case:
    """A kernel and calls of it: pasts and steps."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    capacity: int = 128
    window: int | None = None
    ring: bool = False
    soft_cap: float | None = None
    sinks: bool = False
    dtype: str = "float16"
    steps: tuple[tuple[tuple[int, ...], int], ...] = (((0,), 1), ((5, 63, 17), 1), ((0,), 40), ((3, 80), 13))


CASES = {
    "grouped": Case(),
    "float32": Case(dtype="float32"),
    "multi-head": Case(heads=3, kv_heads=3, dim=80),
    "one kv head": Case(heads=4, kv_heads=1, dim=256),
    "many heads of a group": Case(heads=16, kv_heads=1, dim=16),
    "odd group": Case(heads=5, kv_heads=1, dim=96, dtype="float32"),
    "smallest cache": Case(capacity=16, dim=128, steps=(((0,), 16), ((15,), 1), ((3, 9), 5))),
    "window": Case(window=24, steps=(((0,), 1), ((100, 7, 23), 1), ((0,), 40), ((70, 3), 37))),
    "window of one": Case(window=1, steps=(((0, 50), 3),)),
    "soft cap": Case(soft_cap=5.0),
    "sinks": Case(sinks=True, heads=8, dim=16),
    "ring": Case(window=24, ring=True, capacity=64, steps=(((0, 1000), 1), ((63, 64, 65), 1), ((0, 87), 40))),
    "tight ring": Case(window=32, ring=True, capacity=32, steps=(((0, 31, 32), 1), ((33, 77), 1))),
    "full ring": Case(window=40, ring=True, capacity=48, steps=(((0, 41), 9), ((1000, 4), 9)), sinks=True),
    "split": Case(capacity=2304, steps=(((511, 2100), 1), ((2299, 3), 5)), dim=16),
    "split sinks": Case(capacity=1104, steps=(((1023,), 1), ((1050,), 30)), dim=16, kv_heads=1, sinks=True),
    "split ring": Case(capacity=1040, window=1024, ring=True, steps=(((5000, 600), 1), ((5000,), 7)), dim=16),
}


def reference(
    case: Case, q: Array, keys: Array, values: Array, past: int, sinks: Array | None, scale: float
) -> Array:
    """``q [S, H, D]``, and by position ``keys`` and ``values [T, K, D]``, to ``[S, H, D]``; all float64."""
    group = case.heads // case.kv_heads
    keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
    scores = np.einsum("shd,thd->hst", q, keys) * scale
    if case.soft_cap is not None:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    age = (past + np.arange(len(q)))[:, None] - np.arange(len(keys))
    hidden = (age < 0) | (age >= (case.window or len(keys)))
    scores = np.where(hidden, -np.inf, scores)
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, column], 2)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares = powers / powers.sum(-1, keepdims=True)
    return np.einsum("hst,thd->shd", shares[:, :, : len(values)], values)


def check(
    run_kernel: Any, case: Case, knobs: AttentionKnobs, lanes: int, past: tuple[int, ...], step: int
) -> None:
    rng = np.random.default_rng(step)
    sequences, dim, heads, kv_heads = len(past), case.dim, case.heads, case.kv_heads
    shape = CacheShape(kv_heads, dim, case.capacity, case.ring, case.dtype)  # type: ignore[arg-type]
    # Large scores, of which few count: a wrong maximum or a key too many shows.
    scale = 3 / dim**0.5
    q = rng.standard_normal((sequences, step, heads, dim)).astype(np.float32)
    sinks = 2 * rng.standard_normal(heads).astype(np.float32) if case.sinks else None
    size = kv_heads * case.capacity * dim
    gap = 48
    # What nobody wrote is NaN, as fresh memory may be.
    keys, values = (np.full(sequences * (size + gap), np.nan, case.dtype) for _ in range(2))
    places = (np.arange(sequences)[::-1] * (size + gap)).astype(np.int64)
    expected = []
    for b, start in enumerate(places):
        total = past[b] + step
        new = rng.standard_normal((2, total, kv_heads, dim)).astype(case.dtype)
        key = keys[start : start + size].reshape(kv_heads, case.capacity // 16, dim, 16)
        value = values[start : start + size].reshape(kv_heads, case.capacity, dim)
        for position in range(max(0, total - case.capacity), total):
            row = position % case.capacity if case.ring else position
            key[:, row // 16, :, row % 16] = new[0, position]
            value[:, row] = new[1, position]
        exact = reference(case, q[b].astype(np.float64), *new.astype(np.float64), past[b], sinks, scale)
        expected.append(exact.reshape(step, -1))
    stride = heads * dim + 4
    out = np.full((sequences * step, stride), 7, np.float32)
    workspace = np.full(workspace_floats(knobs, dim), np.nan, np.float32)
    kernel = attention_kernel(
        Vectors(lanes, "multiply"),
        knobs,
        heads=heads,
        shape=shape,
        scale=scale,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=case.sinks,
        out_stride=stride,
    )
    memory = (keys, values, places * keys.itemsize, np.array(past, np.int32))
    given = [] if sinks is None else [sinks]
    run_kernel(kernel, q, *memory, *given, workspace, out, sequences, step)
    # f32 throughout: scores of about 10 are right to 1e-6 or so, and powers and values relatively to that.
    np.testing.assert_allclose(out[:, : heads * dim], np.concatenate(expected), rtol=0, atol=1e-5)
    assert (out[:, heads * dim :] == 7).all()


# Lanes change the tiles and tails of the loops, not what is masked, wrapped or split.
NARROW = ("grouped", "float32", "multi-head", "soft cap", "full ring", "split sinks")


@pytest.mark.parametrize(
    ("name", "lanes"), [(name, 16) for name in CASES] + [(name, lanes) for name in NARROW for lanes in (4, 8)]
)
def test_attention_is_what_numpy_says(run_kernel: Any, name: str, lanes: int) -> None:
    for past, step in CASES[name].steps:
        check(run_kernel, CASES[name], KNOBS[lanes], lanes, past, step)


@pytest.mark.parametrize(
    "knobs", [AttentionKnobs(1, 16, 32), AttentionKnobs(3, 32, 16), AttentionKnobs(14, 128, 32)]
)
def test_knobs_change_nothing_but_speed(run_kernel: Any, knobs: AttentionKnobs) -> None:
    case = replace(CASES["ring"], dim=80)
    for past, step in case.steps:
        check(run_kernel, case, knobs, 16, past, step)


@pytest.mark.parametrize(("rows", "keys"), [(0, 64), (4, 8), (4, 48)])
def test_knobs_out_of_range_are_refused(rows: int, keys: int) -> None:
    with pytest.raises(OptionError, match="attention knobs"):
        AttentionKnobs(rows, keys, 32)


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    shape = CacheShape(2, 64, 16, ring=False, dtype="float16")
    options = {"scale": 1.0, "window": None, "soft_cap": None, "sinks": False, "out_stride": 192}
    with pytest.raises(OptionError, match="3 heads for 2 kv heads"):
        attention_kernel(Vectors(16, "multiply"), KNOBS[16], heads=3, shape=shape, **options)
