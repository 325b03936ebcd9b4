"""The choice of experts against numpy in float64: which they are, their weights, and whose turn is when."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host import HERE, each_target

from rlxc.backends.tvm.kernels.route import Groups, route_kernel
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.targets import CpuTarget

Array = npt.NDArray[Any]


def route(
    run_kernel: Any, scores: Array, used: int, target: CpuTarget = HERE[0]
) -> tuple[Array, Array, Array]:
    """Chosen experts and their weights ``[tokens, used]``, and the groups."""
    tokens, experts = scores.shape
    given = np.full((tokens, experts + 3), np.nan, np.float32)
    given[:, :experts] = scores
    chosen = np.full((tokens, used), -1, np.int32)
    weights = np.full((tokens, used + 2), 7, np.float32)
    grouped = np.full(Groups(experts).order + tokens * used, -1, np.int32)
    kernel = route_kernel(Vectors.of(target), experts, used, experts + 3, used + 2)
    run_kernel(kernel, given, chosen, weights, grouped, tokens, target=target)
    assert (weights[:, used:] == 7).all()
    return chosen, weights[:, :used], grouped


def check(
    run_kernel: Any, tokens: int, experts: int, used: int, scores: Array, target: CpuTarget = HERE[0]
) -> None:
    chosen, weights, grouped = route(run_kernel, scores, used, target)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :used]
    np.testing.assert_array_equal(chosen, best)
    powers = np.exp(np.take_along_axis(scores, best, -1).astype(np.float64))
    # Powers are right to 2e-7; a sum of them, and the division, round again.
    np.testing.assert_allclose(weights, powers / powers.sum(-1, keepdims=True), rtol=1e-6)
    groups, flat = Groups(experts), best.ravel()
    wanted = np.unique(flat)
    assert grouped[0] == len(wanted)
    np.testing.assert_array_equal(grouped[groups.active :][: len(wanted)], wanted)
    counts = np.bincount(flat, minlength=experts)
    np.testing.assert_array_equal(grouped[groups.starts :][: experts + 1], [0, *counts.cumsum()])
    np.testing.assert_array_equal(grouped[groups.order :], np.argsort(flat, kind="stable"))


@pytest.mark.parametrize("tokens", [1, 7, 8, 60])
@pytest.mark.parametrize(("experts", "used"), [(1, 1), (3, 2), (5, 5), (32, 4), (128, 8)])
def test_best_experts_are_chosen_and_sorted(run_kernel: Any, tokens: int, experts: int, used: int) -> None:
    scores = 3 * np.random.default_rng(tokens).standard_normal((tokens, experts)).astype(np.float32)
    check(run_kernel, tokens, experts, used, scores)


@each_target
def test_of_equal_experts_the_first_is_chosen(run_kernel: Any, target: CpuTarget) -> None:
    scores = np.random.default_rng(1).integers(-2, 3, (40, 12)).astype(np.float32)
    check(run_kernel, 40, 12, 4, scores, target)
    check(run_kernel, 9, 12, 4, np.zeros((9, 12), np.float32), target)


def test_rising_and_falling_scores_come_out_best_first(run_kernel: Any) -> None:
    rising = np.arange(16, dtype=np.float32)
    check(run_kernel, 2, 16, 5, np.stack([rising, -rising]))


def test_scores_that_are_not_numbers_choose_experts_that_exist(run_kernel: Any) -> None:
    scores = np.random.default_rng(2).standard_normal((50, 6)).astype(np.float32)
    scores[np.random.default_rng(3).random(scores.shape) < 0.5] = np.nan
    scores[0] = np.nan
    scores[1] = -np.inf
    chosen, weights, grouped = route(run_kernel, scores, 3)
    assert chosen.min() >= 0 and chosen.max() < 6
    assert np.isnan(weights[:2]).all()  # as the oracle has it where all are infinite
    assert sorted(grouped[Groups(6).order :]) == list(range(150))


@pytest.mark.parametrize(("experts", "slots"), [(4, 2), (4, 4), (4, 11), (1, 3)])
def test_what_is_measured_is_what_routing_in_turn_gives(experts: int, slots: int) -> None:
    groups, chosen = Groups(experts), np.arange(slots) % experts
    even = np.array(groups.even(slots))
    assert len(even) == groups.order + slots and even[0] == len(np.unique(chosen))
    np.testing.assert_array_equal(even[groups.active :][: even[0]], np.unique(chosen))
    counts = np.bincount(chosen, minlength=experts)
    np.testing.assert_array_equal(even[groups.starts :][: experts + 1], [0, *counts.cumsum()])
    np.testing.assert_array_equal(even[groups.order :], np.argsort(chosen, kind="stable"))
