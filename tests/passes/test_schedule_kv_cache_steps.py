"""Scheduled caches give what growing ones give: in steps of any size, taken back and shared, in any type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from rlxc.dtypes import DType
from rlxc.ir import Graph, interp, parse
from rlxc.ir.target import TargetFeatures
from rlxc.passes.fuse_rope_attention import FuseRopeAttention
from rlxc.passes.schedule_kv_cache import ScheduleKvCache

Floats = npt.NDArray[np.float64]

HEADS, KV_HEADS, DIM = 4, 2, 6
SCALE = 0.5
CONTEXT, MAX_STEP = 40, 6
POOL = 48
"""Pages of a pool; a table lists at most CONTEXT of them."""

# Queries, keys and values come from outside, so that a test knows how large they are.
TEXT = f"""
graph attention
input %input_ids: i64[batch, seq]
input %q: f32[batch, seq, {HEADS * DIM}]
input %k: f32[batch, seq, {KV_HEADS * DIM}]
input %v: f32[batch, seq, {KV_HEADS * DIM}]
input %past_key_values.0.key: f32[batch, {KV_HEADS}, past, {DIM}]
input %past_key_values.0.value: f32[batch, {KV_HEADS}, past, {DIM}]
%present.0.key = KvAppend(%past_key_values.0.key, %k)
%present.0.value = KvAppend(%past_key_values.0.value, %v)
%y = Attention(%q, %present.0.key, %present.0.value; heads={HEADS}, scale={SCALE}{{window}})
output %y
output %present.0.key
output %present.0.value
"""

EXACT = 1e-12
"""Both sides work in float64 and add up fewer than 100 numbers of size 1."""

DTYPES = (DType.F32, DType.F16, DType.BF16, DType.INT8)
LAYOUTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ring": {"ring_cache": True},
    "pages of 1": {"page_size": 1},
    "pages of 4": {"page_size": 4},
    "pages of 16": {"page_size": 16},
}


def read_nothing(name: str) -> npt.NDArray[np.float32]:
    raise AssertionError(f"the graph has no tensor {name}")


class Stepper:
    """Sequences that a scheduled graph reads step by step, with what the runtime does for it.

    Whatever the plan lets go is made unusable: entries of pages behind the window become -1.
    """

    def __init__(self, graph: Graph, plan: dict[str, Any], tables: npt.NDArray[np.int32], pool: Any) -> None:
        self.graph, self.plan, self.tables, self.pool = graph, plan, tables, pool
        self.past, self.newest = 0, 0

    @classmethod
    def of(
        cls, window: int | None, dtype: DType, layout: str, seed: int, rollback: int = 0, batch: int = 2
    ) -> tuple[Graph, Stepper]:
        """The graph before, and sequences that step through it scheduled; half of the graphs are fused, too."""
        features = TargetFeatures(
            cache_dtypes=(dtype,), group_query_attention=seed % 2 == 1, **LAYOUTS[layout]
        )
        before = parse(TEXT.format(window="" if window is None else f", window={window}"))
        one = ScheduleKvCache(features, context=CONTEXT, max_step=MAX_STEP, rollback=rollback, dtype=None)
        scheduled = one.run(before)
        graph = FuseRopeAttention(features).run(scheduled.graph).graph
        assert graph.types["present.0.key"].dtype is dtype
        plan = scheduled.facts["kv_cache"]
        rows = int(graph.types["present.0.key"].shape[2])
        first = batch if plan["page_size"] is None else POOL * batch
        # Of NaN, so that a row that was never written cannot be read unnoticed.
        pool = {f"0.{side}": np.full((first, KV_HEADS, rows, DIM), np.nan) for side in ("key", "value")}
        entries = -(-CONTEXT // (plan["page_size"] or CONTEXT))
        pages = np.random.default_rng(seed).permutation(POOL * batch)[: batch * entries]
        return before, cls(graph, plan, pages.reshape(batch, entries).astype(np.int32), pool)

    def step(self, q: Floats, k: Floats, v: Floats) -> Floats:
        """The attention of these tokens, which come after the past ones."""
        self._let_go(self.past + q.shape[1])
        feeds = {
            "input_ids": np.zeros(q.shape[:2], np.int64),
            "q": q,
            "k": k,
            "v": v,
            **{f"past_key_values.{name}": rows for name, rows in self.pool.items()},
            "past_length": np.array(self.past, np.int32),
            "block_table.0": self.tables,
        }
        results = interp.run(self.graph, feeds, read_nothing)
        self.pool = {name: results[f"present.{name}"] for name in self.pool}
        self.past += q.shape[1]
        self.newest = max(self.newest, self.past)
        return results["y"]  # type: ignore[return-value]

    def _let_go(self, total: int) -> None:
        """Forget the pages that nothing can see any more, and check that the rest is what the plan says."""
        (layer,), page = self.plan["layers"], self.plan["page_size"]
        if page is None:
            return
        oldest = 0
        if layer["window"] is not None:
            # The oldest query that may come again is as far back as can be taken back.
            oldest = max(0, self.newest - self.plan["rollback"] - layer["window"] + 1)
        self.tables[:, : oldest // page] = -1
        assert -(-total // page) - oldest // page <= layer["capacity"] // page


def whole_pass(graph: Graph, q: Floats, k: Floats, v: Floats) -> Floats:
    """The attention of all tokens at once, over caches that grow."""
    empty = np.zeros((len(q), KV_HEADS, 0, DIM))
    feeds = {"input_ids": np.zeros(q.shape[:2], np.int64), "q": q, "k": k, "v": v}
    feeds |= dict.fromkeys(("past_key_values.0.key", "past_key_values.0.value"), empty)
    return interp.run(graph, feeds, read_nothing)["y"]  # type: ignore[return-value]


def random_rows(rng: np.random.Generator, batch: int, tokens: int) -> tuple[Floats, Floats, Floats]:
    q = rng.standard_normal((batch, tokens, HEADS * DIM))
    k, v = rng.standard_normal((2, batch, tokens, KV_HEADS * DIM))
    return q, k, v


def steps_of(rng: np.random.Generator, total: int) -> Iterator[slice]:
    done = 0
    while done < total:
        size = int(rng.integers(1, MAX_STEP + 1))
        yield slice(done, min(done + size, total))
        done += size


def rounding(rows: Floats, dtype: DType) -> Floats:
    """The most by which storing a number of ``rows [B, T, K * D]`` can change it.

    Half a step: floats of p significant bits have steps of at most 2^(1 - p) of a number, and those of f16 are not
    below 2^-24; codes of 8 bits have steps of 1/127 of the largest of their head's row, in a scale that f32 rounds.
    """
    if dtype is DType.F32:
        return np.zeros_like(rows)
    if dtype is DType.INT8:
        heads = rows.reshape(*rows.shape[:2], KV_HEADS, DIM)
        largest = np.broadcast_to(abs(heads).max(-1, keepdims=True), heads.shape).reshape(rows.shape)
        return largest / 127 * (0.5 + 127 * 2.0**-24)
    bits = {DType.F16: 11, DType.BF16: 8}[dtype]
    return np.maximum(abs(rows) * 2.0**-bits, 2.0**-25)


def stored(rows: Floats, dtype: DType) -> Floats:
    """``rows [B, T, K * D]`` as a cache gives them back; the half floats are numpy's and ml_dtypes' own."""
    if dtype is DType.INT8:
        back = np.empty_like(rows)
        for index in np.ndindex(*rows.shape[:2], KV_HEADS):
            head = slice(index[2] * DIM, (index[2] + 1) * DIM)
            row = rows[index[:2]][head]
            scale = float(np.float32(max(abs(row)) / 127))
            back[index[:2]][head] = [round(x / scale) * scale for x in row]
        return back
    types = {DType.F32: np.float64, DType.F16: np.float16, DType.BF16: ml_dtypes.bfloat16}
    return rows.astype(types[dtype]).astype(np.float64)


def most_change(q: Floats, k: Floats, v: Floats, dtype: DType) -> float:
    """A bound on how far an attention's results can move when keys and values are rounded.

    A score moves by d = scale * sum |q| |dk| at most. Then a softmax weight becomes at most exp(2 d) times as large, or
    as small; so the result moves by at most max |dv| + (exp(2 d) - 1) max |v|.
    """
    widest_q = abs(q).reshape(*q.shape[:2], HEADS, DIM).sum(-1).max()
    score = SCALE * widest_q * rounding(k, dtype).max()
    return float(rounding(v, dtype).max() + np.expm1(2 * score) * abs(v).max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_of_any_size_equal_one_pass(layout: str, dtype: DType, window: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, stepper = Stepper.of(window, dtype, layout, seed)
    q, k, v = random_rows(rng, 2, CONTEXT)
    steps = [stepper.step(q[:, part], k[:, part], v[:, part]) for part in steps_of(rng, CONTEXT)]
    found = np.concatenate(steps, axis=1)
    bound = EXACT + most_change(q, k, v, dtype)
    np.testing.assert_allclose(found, whole_pass(before, q, k, v), rtol=0, atol=bound)
    # Sharper: it is the attention over rows that are rounded once, and nothing else.
    expected = whole_pass(before, q, stored(k, dtype), stored(v, dtype))
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rollback", [1, 7])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_can_be_taken_back_as_far_as_the_plan_says(
    layout: str, window: int | None, rollback: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before, stepper = Stepper.of(window, DType.F32, layout, seed, rollback)
    rows = random_rows(rng, 2, CONTEXT)
    for _ in range(30):
        past = stepper.past
        if past == CONTEXT or (past and rng.random() < 0.4):
            oldest = max(0, stepper.newest - rollback)
            stepper.past = int(rng.integers(min(oldest, past), past + 1))
            # Other tokens come instead of those.
            for old, new in zip(rows, random_rows(rng, 2, CONTEXT)):
                old[:, stepper.past :] = new[:, stepper.past :]
            continue
        size = min(int(rng.integers(1, MAX_STEP + 1)), CONTEXT - past)
        q, k, v = (array[:, : past + size] for array in rows)
        found = stepper.step(*(array[:, past:] for array in (q, k, v)))
        expected = whole_pass(before, q, k, v)[:, past:]
        np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_sequences_share_pages_that_neither_writes(dtype: DType, window: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, stepper = Stepper.of(window, dtype, "pages of 4", seed)
    both, tables = random_rows(rng, 2, 30), stepper.tables
    prompt = 4 * int(rng.integers(1, 5))
    for array in both:
        array[1, :prompt] = array[0, :prompt]  # one beginning, which is read once
    stepper.tables = tables[:1]
    for part in steps_of(rng, prompt):
        stepper.step(*(array[:1, part] for array in both))
    tables[1, : prompt // 4] = tables[0, : prompt // 4]
    shared = [stepper.pool[name][tables[0, : prompt // 4]] for name in stepper.pool]
    stepper.tables = tables.copy()
    found = []
    for part in steps_of(rng, 30 - prompt):
        found.append(stepper.step(*(array[:, prompt:][:, part] for array in both)))
    expected = whole_pass(before, *both)[:, prompt:]
    bound = EXACT + most_change(*both, dtype)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=bound)
    after = [stepper.pool[name][tables[0, : prompt // 4]] for name in stepper.pool]
    np.testing.assert_array_equal(after, shared)
