"""Summaries of logits against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rlxc.backends.tvm.kernels.kernel import Kernel
from rlxc.backends.tvm.kernels.summarise import BLOCK, blocks_of, summarise_kernel
from rlxc.backends.tvm.kernels.vector import Vectors

Floats = npt.NDArray[np.float32]

LANES = pytest.mark.parametrize("lanes", [4, 8, 16])
VOCABULARIES = [1, 63, 64, 65, 258, 1000, 20_001]


def kernel(lanes: int, vocab: int) -> Kernel:
    made = summarise_kernel(Vectors(lanes, "multiply"), vocab)
    return Kernel(f"{made.name}_{lanes}", made.params, made.body)


def summarise(run_kernel: Any, lanes: int, logits: Floats) -> tuple[Floats, Floats]:
    rows, vocab = logits.shape
    maxima, sums = (np.full((rows, blocks_of(vocab)), np.nan, np.float32) for _ in range(2))
    run_kernel(kernel(lanes, vocab), logits, maxima, sums, rows)
    return maxima, sums


@LANES
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_each_block_has_its_maximum_and_its_sum(run_kernel: Any, lanes: int, vocab: int, rows: int) -> None:
    logits = (np.random.default_rng(vocab).standard_normal((rows, vocab)) * 5 - 20).astype(np.float32)
    maxima, sums = summarise(run_kernel, lanes, logits)
    for row, got_maxima, got_sums in zip(logits, maxima, sums):
        blocks = [row[start : start + BLOCK] for start in range(0, vocab, BLOCK)]
        np.testing.assert_array_equal(got_maxima, [block.max() for block in blocks])
        expected = [np.exp(block.astype(np.float64) - block.max()).sum() for block in blocks]
        # Each exponential is right to 2e-7, the rounded difference below it to 20 * 6e-8.
        np.testing.assert_allclose(got_sums, expected, rtol=1.5e-6)


@LANES
@pytest.mark.parametrize("place", [0, 5, 17, 63, 64, 99])
def test_a_nan_is_its_block_s_maximum(run_kernel: Any, lanes: int, place: int) -> None:
    logits = np.random.default_rng(0).standard_normal((1, 100)).astype(np.float32)
    logits[0, place] = np.nan
    maxima, _ = summarise(run_kernel, lanes, logits)
    assert np.isnan(maxima[0]).tolist() == [place < 64, place >= 64]


@LANES
def test_excluded_logits_add_nothing(run_kernel: Any, lanes: int) -> None:
    logits = np.full((1, 3 * BLOCK), -np.inf, np.float32)
    logits[0, 70:72] = 3.0
    logits[0, -1] = np.inf
    maxima, sums = summarise(run_kernel, lanes, logits)
    assert maxima.tolist() == [[-np.inf, 3.0, np.inf]]
    assert sums[0, 1] == 2.0
    assert 0 <= sums[0, 0] < 1e-35
