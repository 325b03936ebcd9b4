"""Attention over pages of every type against numpy in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from paged import PagedMemory

from rlxc.backends.tvm.kernels.attention import AttentionKnobs, attention_kernel, workspace_floats
from rlxc.backends.tvm.kernels.cache import CacheShape, CacheType
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import OptionError

Array = npt.NDArray[Any]

KNOBS = {4: AttentionKnobs(6, 64, 32), 8: AttentionKnobs(6, 64, 16), 16: AttentionKnobs(12, 64, 32)}


def knobs_of(case: Case, lanes: int) -> AttentionKnobs:
    """The usual ones; a block has no more keys than a page."""
    return replace(KNOBS[lanes], keys=min(KNOBS[lanes].keys, case.page))


@dataclass(frozen=True)
class Case:
    """A kernel and calls of it: pasts and steps."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    page: int = 64
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dtype: CacheType = "float16"
    steps: tuple[tuple[tuple[int, ...], int], ...] = (((0,), 1), ((5, 63, 17), 1), ((0,), 40), ((3, 80), 70))


CASES = {
    "grouped": Case(),
    "float32": Case(dtype="float32"),
    "bfloat16": Case(dtype="bfloat16"),
    "int8": Case(dtype="int8"),
    "multi-head": Case(heads=3, kv_heads=3, dim=80),
    "one kv head": Case(heads=4, kv_heads=1, dim=256, dtype="int8"),
    "many heads of a group": Case(heads=16, kv_heads=1, dim=16),
    "odd group": Case(heads=5, kv_heads=1, dim=96, dtype="float32"),
    "smallest page": Case(page=16, dim=128, steps=(((0,), 16), ((15, 16), 1), ((3, 39), 25))),
    "large page": Case(page=256, dim=32, steps=(((0,), 16), ((255, 256, 600), 1), ((3, 240), 25))),
    "window": Case(window=24, steps=(((0,), 1), ((100, 7, 23, 63, 64), 1), ((0, 1000), 40), ((70, 3), 77))),
    "window of one": Case(window=1, steps=(((0, 50, 64), 3), ((63, 128), 1))),
    "window of pages": Case(window=128, page=32, steps=(((127, 128, 500), 1), ((95, 300), 33)), sinks=True),
    "soft cap": Case(soft_cap=5.0),
    "soft cap of int8": Case(soft_cap=5.0, dtype="int8", window=40),
    "sinks": Case(sinks=True, heads=8, dim=16),
    "split": Case(steps=(((511, 2100), 1), ((2299, 3), 5)), dim=16),
    "split int8": Case(steps=(((1023, 1100), 1),), dim=16, dtype="int8"),
    "split sinks": Case(steps=(((1023,), 1), ((1050,), 30)), dim=16, kv_heads=1, sinks=True),
    "split window": Case(window=1024, steps=(((5000, 600), 1), ((5000,), 7)), dim=16),
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


def filled(case: Case, rng: np.random.Generator, past: tuple[int, ...], step: int) -> PagedMemory:
    """Pages as a step finds them: shuffled; what it must not read is NaN, or has no page at all.

    The first two sequences share the pages before the one where the shorter one's step begins.
    """
    shape = CacheShape(case.kv_heads, case.dim, case.page, case.dtype)
    memory = PagedMemory(shape, sequences=len(past), context=max(past) + step, seed=step)
    for b, length in enumerate(past):
        first = max(0, length + 1 - (case.window or length + 1))
        if b == 1:
            pages = min(past[:2]) // case.page
            memory.entries(1)[:pages] = memory.entries(0)[:pages]
        memory.hold(b, first, length + step - 1)
        for position in range(first, length + step):
            key, value = rng.standard_normal((2, case.kv_heads, case.dim))
            memory.write(b, position, key, value)
    return memory


def check(
    run_kernel: Any, case: Case, knobs: AttentionKnobs, lanes: int, past: tuple[int, ...], step: int
) -> None:
    rng = np.random.default_rng(step)
    sequences, dim, heads = len(past), case.dim, case.heads
    # Large scores, of which few count: a wrong maximum or a key too many shows.
    scale = 3 / dim**0.5
    q = rng.standard_normal((sequences, step, heads, dim)).astype(np.float32)
    sinks = 2 * rng.standard_normal(heads).astype(np.float32) if case.sinks else None
    memory = filled(case, rng, past, step)
    expected = []
    for b, length in enumerate(past):
        first = max(0, length + 1 - (case.window or length + 1))
        seen = [memory.read(b, position) for position in range(first, length + step)]
        keys, values = (np.stack(both) for both in zip(*seen))
        exact = reference(case, q[b].astype(np.float64), keys, values, length - first, sinks, scale)
        expected.append(exact.reshape(step, -1))
    stride = heads * dim + 4
    out = np.full((sequences * step, stride), 7, np.float32)
    workspace = np.full(workspace_floats(knobs, dim), np.nan, np.float32)
    kernel = attention_kernel(
        Vectors(lanes, "multiply"),
        knobs,
        heads=heads,
        shape=memory.shape,
        scale=scale,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=case.sinks,
        out_stride=stride,
    )
    given = [] if sinks is None else [sinks]
    arguments = (q, *memory.arguments, np.array(past, np.int32), *given, workspace, out)
    run_kernel(kernel, *arguments, sequences, step)
    # f32 throughout: scores of about 10 are right to 1e-6 or so, and powers and values relatively to that.
    np.testing.assert_allclose(out[:, : heads * dim], np.concatenate(expected), rtol=0, atol=1e-5)
    assert (out[:, heads * dim :] == 7).all()


# Lanes change the tiles and tails of the loops, not what is masked, looked up or split.
NARROW = (
    "grouped",
    "float32",
    "bfloat16",
    "int8",
    "multi-head",
    "soft cap of int8",
    "window of pages",
    "split sinks",
)


@pytest.mark.parametrize(
    ("name", "lanes"), [(name, 16) for name in CASES] + [(name, lanes) for name in NARROW for lanes in (4, 8)]
)
def test_attention_is_what_numpy_says(run_kernel: Any, name: str, lanes: int) -> None:
    for past, step in CASES[name].steps:
        check(run_kernel, CASES[name], knobs_of(CASES[name], lanes), lanes, past, step)


@pytest.mark.parametrize(
    "knobs", [AttentionKnobs(1, 16, 32), AttentionKnobs(3, 32, 16), AttentionKnobs(14, 128, 32)]
)
def test_knobs_change_nothing_but_speed(run_kernel: Any, knobs: AttentionKnobs) -> None:
    for case in (replace(CASES["window"], dim=80, page=128), replace(CASES["int8"], window=100, page=128)):
        for past, step in case.steps:
            check(run_kernel, case, knobs, 16, past, step)


@pytest.mark.parametrize(("rows", "keys"), [(0, 64), (4, 8), (4, 48)])
def test_knobs_out_of_range_are_refused(rows: int, keys: int) -> None:
    with pytest.raises(OptionError, match="attention knobs"):
        AttentionKnobs(rows, keys, 32)


@pytest.mark.parametrize(
    ("heads", "page", "problem"),
    [(3, 64, "attention: 3 heads for 2 kv heads"), (4, 32, "blocks of 64 keys in pages of 32")],
)
def test_heads_and_blocks_that_do_not_fit_are_refused(heads: int, page: int, problem: str) -> None:
    shape = CacheShape(2, 64, page, "float16")
    options = {"scale": 1.0, "window": None, "soft_cap": None, "sinks": False, "out_stride": 192}
    with pytest.raises(OptionError, match=problem):
        attention_kernel(Vectors(16, "multiply"), KNOBS[16], heads=heads, shape=shape, **options)
