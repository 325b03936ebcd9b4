"""Summarised logits give what the whole vector gives, and read only the blocks that they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlxc.errors import SessionError
from rlxc.runtime import Session
from rlxc.runtime.logits import BLOCK, Logits, StepLogits, block_count
from rlxc.runtime.sampling import Sampler, SamplingOptions

Floats = npt.NDArray[np.float32]

SIZES = st.sampled_from([1, 2, 63, 64, 65, 300, 1000])
SEEDS = st.integers(0, 10_000)


def vector(size: int, seed: int, *, rounded: bool = True) -> Floats:
    """Logits, many of which are equal if they are rounded."""
    values = np.random.default_rng(seed).standard_normal(size) * 4
    return (values.round() if rounded else values).astype(np.float32)


def order(values: Floats) -> list[int]:
    """All tokens, the best first, the lowest of equals first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@given(SIZES, SEEDS)
def test_best_is_the_lowest_of_the_largest(size: int, seed: int) -> None:
    values = vector(size, seed)
    assert Logits.of(values).best() == (order(values)[0], values.max())


@pytest.mark.parametrize("place", [0, 63, 64, 130, 199])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_best_finds_what_is_not_a_number(place: int, bad: float) -> None:
    values = vector(200, 0)
    values[place] = bad
    token, logit = Logits.of(values).best()
    assert token == place
    assert not math.isfinite(logit)


@given(SIZES, SEEDS)
def test_log_total_is_that_of_all_exponentials(size: int, seed: int) -> None:
    values = vector(size, seed, rounded=False) - 300
    exact = values.astype(np.float64)
    expected = exact.max() + math.log(np.exp(exact - exact.max()).sum())
    # Every block's sum of up to 64 exponentials is rounded to float32 a few times.
    assert Logits.of(values).log_total() == pytest.approx(expected, abs=2e-6)


@given(SIZES, SEEDS, st.sampled_from([1, 2, 5, 64, 100, 2000]))
def test_top_is_the_best_k(size: int, seed: int, k: int) -> None:
    values = vector(size, seed)
    assert Logits.of(values).top(k).tolist() == sorted(order(values)[:k])


@given(SIZES, SEEDS, st.sampled_from([-100.0, -1.0, 0.0, 3.0, 100.0]))
def test_above_is_all_that_are_as_large(size: int, seed: int, least: float) -> None:
    values = vector(size, seed)
    assert Logits.of(values).above(least).tolist() == [i for i in range(size) if values[i] >= least]


@given(SIZES, SEEDS)
def test_changed_logits_are_those_of_a_changed_vector(size: int, seed: int) -> None:
    values = vector(size, seed)
    ids = np.unique(np.random.default_rng(seed).integers(size, size=5))
    other = values.copy()
    other[ids] = np.linspace(-20, 20, len(ids), dtype=np.float32)
    before = values.copy()
    changed, expected = Logits.of(values).changing(ids, other[ids]), Logits.of(other)
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(changed.maxima, expected.maxima)
    np.testing.assert_array_equal(changed.sums, expected.sums)
    np.testing.assert_array_equal(changed.all(), other)
    assert changed.best() == expected.best()
    assert changed.top(7).tolist() == expected.top(7).tolist()
    assert changed.above(2.0).tolist() == expected.above(2.0).tolist()


def test_excluded_logits_have_no_share() -> None:
    values = np.full(200, -np.inf, np.float32)
    values[70:72] = 1.0
    logits = Logits.of(values)
    assert logits.log_total() == pytest.approx(1 + math.log(2), abs=1e-6)
    assert logits.shares(np.float32(1.0)).tolist() == [0.0, 2.0, 0.0, 0.0]
    assert not np.isnan(logits.sums).any()


@pytest.mark.parametrize(("vocab", "count"), [(1, 1), (64, 1), (65, 2), (262_144, 4096)])
def test_last_block_may_be_short(vocab: int, count: int) -> None:
    assert block_count(vocab) == count


@dataclass
class Watched:
    """A vector that notes which of its numbers are read."""

    values: Floats
    read: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, ids: Any) -> Any:
        self.read.update(np.atleast_1d(ids).tolist())
        return self.values[ids]

    @property
    def blocks(self) -> set[int]:
        return {i // BLOCK for i in self.read}


def watched(values: Floats) -> tuple[Watched, Logits]:
    summary, watch = Logits.of(values), Watched(values)
    return watch, Logits(watch, summary.maxima, summary.sums)  # type: ignore[arg-type]


class TestReads:
    """What each way of choosing reads, of 100 blocks whose best tokens are e^0.5 times more or less likely."""

    VALUES = np.repeat(np.random.default_rng(0).permutation(100).astype(np.float32) / 2, BLOCK)
    VALUES -= (np.random.default_rng(1).random(100 * BLOCK) * 30).astype(np.float32)

    def blocks_read(self, history: Sequence[int] = (), **options: Any) -> set[int]:
        watch, logits = watched(self.VALUES)
        Sampler(SamplingOptions(**options, seed=0)).sample(logits, history)
        return watch.blocks

    def test_greedy_reads_one_block(self) -> None:
        assert self.blocks_read() == {int(self.VALUES.argmax()) // BLOCK}

    def test_top_k_reads_k_blocks(self) -> None:
        assert len(self.blocks_read(temperature=1.0, top_k=5)) == 5

    def test_min_p_reads_blocks_with_a_token_that_counts(self) -> None:
        least = self.VALUES.max() + math.log(0.05)
        expected = {i // BLOCK for i in np.flatnonzero(least <= self.VALUES)}
        assert self.blocks_read(temperature=1.0, min_p=0.05) == expected

    def test_top_p_reads_blocks_near_the_best(self) -> None:
        near = {i // BLOCK for i in np.flatnonzero(self.VALUES.max() - 8 <= self.VALUES)}
        assert self.blocks_read(temperature=0.7, top_p=0.9) <= near
        assert len(near) < 20

    def test_plain_sampling_reads_the_best_block_and_one_more(self) -> None:
        assert len(self.blocks_read(temperature=1.0)) <= 2

    def test_a_penalty_reads_the_blocks_of_the_history_as_well(self) -> None:
        worst = int(self.VALUES.argmin())
        assert self.blocks_read([worst], repetition_penalty=1.1) == {
            worst // BLOCK,
            int(self.VALUES.argmax()) // BLOCK,
        }


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "min_p": 0.5}], ids=str
)
def test_generating_does_not_read_the_whole_vector(
    open_session: Callable[..., Session], fake_engine: type[Any], options: dict[str, Any]
) -> None:
    watches: list[Watched] = []

    class WatchedLogits:
        def __init__(self, logits: StepLogits) -> None:
            self._values = logits.values

        def row(self, sequence: int, row: int) -> Logits:
            watch, logits = watched(self._values[sequence, row])
            watches.append(watch)
            return logits

    class WatchedEngine(fake_engine):  # type: ignore[misc]
        def step(self, *args: Any) -> Any:
            return WatchedLogits(super().step(*args))

    script = [5, 5, 5, 70, 70, 70]  # each the best by far
    session = open_session(WatchedEngine(script))
    completion = session.generate([5, 5, 5], max_tokens=3, seed=0, **options)
    assert completion.ids == [70, 70, 70]
    assert all(len(watch.blocks) <= 2 < block_count(len(watch)) for watch in watches)


def test_sampling_from_summaries_of_a_kernel_with_excluded_tokens() -> None:
    """The kernel counts an excluded token as e^-87, and no block of them has a share."""
    values = np.full(3 * BLOCK, -np.inf, np.float32)
    values[100] = 0.0
    sums = np.array([64 * math.exp(-87), 1.0, 64 * math.exp(-87)], np.float32)
    logits = Logits(values, np.array([-np.inf, 0.0, -np.inf], np.float32), sums)
    drawing = Sampler(SamplingOptions(temperature=1.0, seed=0))
    assert {drawing.sample(logits).id for _ in range(50)} == {100}


def test_row_without_summaries_makes_them() -> None:
    values = vector(2 * 3 * 100, 0).reshape(2, 3, 100)
    row = StepLogits(values).row(1, 2)
    np.testing.assert_array_equal(row.values, values[1, 2])
    assert row.best() == Logits.of(values[1, 2]).best()


def test_nan_in_a_watched_vector_is_refused() -> None:
    values = vector(200, 0)
    values[150] = np.nan
    with pytest.raises(SessionError, match="at token 150"):
        Sampler(SamplingOptions()).sample(watched(values)[1])
