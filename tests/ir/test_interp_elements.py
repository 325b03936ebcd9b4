"""The oracle's norms, activations and mixture of experts, against loops that follow the definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numbers_in_f64 import assert_close, normal

from rlxc.ir import ops
from rlxc.ir.interp import evaluate


@pytest.mark.parametrize("heads", [1, 3])
def test_rms_norm_follows_its_definition(heads: int) -> None:
    x, weight = normal(2, 3, 12), normal(12 // heads, seed=1)
    (found,) = evaluate(ops.RmsNorm(0.1, heads), [x, weight])
    size = 12 // heads
    for index in np.ndindex(2, 3, heads):
        part = x[index[:2]][index[2] * size : (index[2] + 1) * size]
        root = math.sqrt(sum(value * value for value in part) / size + 0.1)
        assert_close(
            found[index[:2]][index[2] * size : (index[2] + 1) * size],
            [value / root * w for value, w in zip(part, weight)],
        )


def test_add_rms_norm_is_a_sum_and_its_norm() -> None:
    x, residual, weight = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(4, seed=2)
    norm, total = evaluate(ops.AddRmsNorm(0.1), [x, residual, weight])
    assert_close(total, x + residual)
    assert_close(norm, evaluate(ops.RmsNorm(0.1), [x + residual, weight])[0])


def slow_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("activation", "op", "function"),
    [
        ("silu", ops.Silu(), lambda x: x / (1 + math.exp(-x))),
        ("gelu", ops.Gelu(), slow_gelu),
    ],
)
def test_glu_is_the_activated_first_half_times_the_second(activation: str, op: ops.Op, function: Any) -> None:
    x = 3 * normal(2, 3, 8)
    (found,) = evaluate(ops.Glu(activation), [x])
    (active,) = evaluate(op, [x[..., :4]])
    for index in np.ndindex(2, 3, 4):
        assert found[index] == pytest.approx(function(x[index]) * x[index[0], index[1], index[2] + 4])
        assert active[index] == pytest.approx(function(x[index]))


def test_silu_of_large_numbers_is_finite() -> None:
    (found,) = evaluate(ops.Silu(), [np.array([-1000.0, 1000.0])])
    assert found.tolist() == [0.0, 1000.0]


@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm_follows_its_definition(with_bias: bool) -> None:
    x, weight, bias = 3 + normal(2, 3, 12), normal(12, seed=1), normal(12, seed=2)
    (found,) = evaluate(ops.LayerNorm(0.1), [x, weight, bias] if with_bias else [x, weight])
    for index in np.ndindex(2, 3):
        mean = sum(x[index]) / 12
        root = math.sqrt(sum((value - mean) ** 2 for value in x[index]) / 12 + 0.1)
        for i, value in enumerate(x[index]):
            expected = (value - mean) / root * weight[i] + (bias[i] if with_bias else 0)
            assert_close(found[index][i], expected)


def test_soft_cap_follows_its_definition() -> None:
    x = 5 * normal(2, 3, 4)
    (found,) = evaluate(ops.SoftCap(2.5), [x])
    for index in np.ndindex(2, 3, 4):
        assert_close(found[index], 2.5 * math.tanh(x[index] / 2.5))


def test_clamped_swiglu_follows_its_definition() -> None:
    gate, up = 5 * normal(2, 3, 40), 5 * normal(2, 3, 40, seed=1)
    (found,) = evaluate(ops.ClampedSwiglu(1.7, 2.0), [gate, up])
    for index in np.ndindex(2, 3, 40):
        g, u = min(gate[index], 2.0), max(-2.0, min(up[index], 2.0))
        assert_close(found[index], g / (1 + math.exp(-1.7 * g)) * (u + 1))


def test_clamped_swiglu_of_large_numbers_is_finite() -> None:
    gate, up = np.array([-1e4, 1e4]), np.array([1e4, -1e4])
    (found,) = evaluate(ops.ClampedSwiglu(1.0, 2.0), [gate, up])
    assert_close(found, [0.0, -2.0 / (1 + math.exp(-2.0))])


def test_route_follows_its_definition() -> None:
    scores = normal(2, 3, 7)
    experts, weights = evaluate(ops.Route(3), [scores])
    assert experts.dtype == np.int64
    for index in np.ndindex(2, 3):
        best = sorted(range(7), key=lambda e: -scores[index][e])[:3]
        assert experts[index].tolist() == best
        sizes = [math.exp(scores[index][e]) for e in best]
        assert_close(weights[index], [size / sum(sizes) for size in sizes])


def test_route_takes_the_first_of_equal_scores() -> None:
    experts, weights = evaluate(ops.Route(2), [np.array([[[1.0, 5.0, 5.0, 5.0]]])])
    assert experts.tolist() == [[[1, 2]]]
    assert weights.tolist() == [[[0.5, 0.5]]]


def test_route_of_large_scores_is_finite() -> None:
    _, weights = evaluate(ops.Route(2), [np.array([[[1e4, -1e4, 0.0]]])])
    assert weights.tolist() == [[[1.0, 0.0]]]


def test_weights_of_the_chosen_are_those_of_all_scores_divided_by_their_sum() -> None:
    scores = normal(1, 4, 6)
    experts, weights = evaluate(ops.Route(2), [scores])
    of_all = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    chosen = np.take_along_axis(of_all, experts.astype(np.int64), -1)
    assert_close(weights, chosen / chosen.sum(-1, keepdims=True))


@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_expert_product_follows_its_definition(per_slot: bool, with_bias: bool) -> None:
    experts = np.array([[[4, 0], [2, 2], [0, 1]], [[3, 4], [1, 0], [4, 2]]])
    x = normal(2, 3, 2, 8) if per_slot else normal(2, 3, 8)
    weight, bias = normal(5, 6, 8, seed=1), normal(5, 6, seed=2)
    (found,) = evaluate(ops.ExpertMatMul(), [x, weight, experts, bias] if with_bias else [x, weight, experts])
    assert found.shape == (2, 3, 2, 6)
    for batch, token, slot, row in np.ndindex(2, 3, 2, 6):
        expert = experts[batch, token, slot]
        own = x[batch, token, slot] if per_slot else x[batch, token]
        expected = sum(own[i] * weight[expert, row, i] for i in range(8))
        assert_close(found[batch, token, slot, row], expected + (bias[expert, row] if with_bias else 0))


def test_mixed_experts_follow_their_definition() -> None:
    x, weights = normal(2, 3, 4, 5), normal(2, 3, 4, seed=1)
    (found,) = evaluate(ops.MixExperts(), [x, weights])
    for batch, token, i in np.ndindex(2, 3, 5):
        expected = sum(weights[batch, token, slot] * x[batch, token, slot, i] for slot in range(4))
        assert_close(found[batch, token, i], expected)
