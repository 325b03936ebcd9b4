"""Rotary embedding: what the angles must be, whatever the way they are computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rlxc.errors import ModelError
from rlxc.ir import RopeSpec, Yarn
from rlxc.ir.interp import rotate

Floats = npt.NDArray[np.float64]

# Everything is float64; angles up to 1e4 leave 1e-12 of relative precision in a cosine.
TOLERANCE = 1e-10

SPECS = [
    RopeSpec(10000.0, 8),
    RopeSpec(10000.0, 8, interleaved=True),
    RopeSpec(1e6, 6),
    RopeSpec(500.0, 8, factor=4.0),
    RopeSpec(10000.0, 8, factor=8.0, yarn=Yarn(64, extrapolation=0.0)),
]


def at(x: Floats, position: int, spec: RopeSpec, factors: Floats | None = None) -> Floats:
    """One head ``[D]`` rotated to a position."""
    return rotate(x.reshape(1, 1, -1), np.array([[position]]), 1, spec, factors).ravel()


def rotations(spec: RopeSpec, factors: Any = None) -> Floats:
    """Radians per position of each pair; positions this small do not wrap."""
    cos, sin = spec.angles(np.array(1), factors)
    return np.arctan2(sin, cos)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_factors_that_are_no_positive_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(ModelError, match=f"a factor of the rope's frequencies is {wrong}"):
        rotations(SPECS[0], np.array([1, wrong, 2, 3], np.float32))


@pytest.fixture
def heads() -> Floats:
    return np.random.default_rng(0).standard_normal((2, 8))


@pytest.mark.parametrize("spec", SPECS)
def test_position_zero_changes_nothing(spec: RopeSpec, heads: Floats) -> None:
    np.testing.assert_array_equal(at(heads[0], 0, spec), heads[0])


@pytest.mark.parametrize("spec", SPECS)
def test_norm_is_preserved(spec: RopeSpec, heads: Floats) -> None:
    assert np.linalg.norm(at(heads[0], 1234, spec)) == pytest.approx(np.linalg.norm(heads[0]), abs=TOLERANCE)


@pytest.mark.parametrize("spec", SPECS)
def test_scores_depend_on_the_distance_alone(spec: RopeSpec, heads: Floats) -> None:
    q, k = heads
    near = at(q, 7, spec) @ at(k, 2, spec)
    far = at(q, 1007, spec) @ at(k, 1002, spec)
    assert near == pytest.approx(far, abs=TOLERANCE)


def test_scores_change_with_the_distance(heads: Floats) -> None:
    q, k = heads
    assert abs(at(q, 7, SPECS[0]) @ at(k, 2, SPECS[0]) - at(q, 8, SPECS[0]) @ at(k, 2, SPECS[0])) > 1e-2


def test_halves_are_paired_unless_interleaved() -> None:
    x = np.array([1.0, 0, 0, 0])
    turned = at(x, 1, RopeSpec(10000.0, 4))
    np.testing.assert_allclose(turned, [math.cos(1), 0, math.sin(1), 0], atol=TOLERANCE)


def test_neighbours_are_paired_if_interleaved() -> None:
    x = np.array([1.0, 0, 0, 0])
    turned = at(x, 1, RopeSpec(10000.0, 4, interleaved=True))
    np.testing.assert_allclose(turned, [math.cos(1), math.sin(1), 0, 0], atol=TOLERANCE)


def test_channels_beyond_dim_pass_through(heads: Floats) -> None:
    turned = at(heads[0], 99, RopeSpec(10000.0, 6))
    np.testing.assert_array_equal(turned[6:], heads[0][6:])


def test_frequencies_are_powers_of_theta() -> None:
    np.testing.assert_allclose(rotations(RopeSpec(10000.0, 8)), [1, 0.1, 0.01, 0.001], rtol=TOLERANCE)


def test_linear_scaling_divides_positions(heads: Floats) -> None:
    plain, scaled = RopeSpec(10000.0, 8), RopeSpec(10000.0, 8, factor=4.0)
    np.testing.assert_allclose(at(heads[0], 400, scaled), at(heads[0], 100, plain), atol=TOLERANCE)


def test_factors_divide_the_frequencies_one_by_one() -> None:
    factors = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    expected = np.array([1, 0.1, 0.01, 0.001]) / factors
    np.testing.assert_allclose(rotations(RopeSpec(10000.0, 8), factors), expected, rtol=TOLERANCE)


def test_attention_factor_needs_no_yarn() -> None:
    cos, sin = RopeSpec(10000.0, 8, factor=4.0, attention=1.25).angles(np.array(77))
    np.testing.assert_allclose(np.hypot(cos, sin), 1.25, rtol=TOLERANCE)


class TestYarn:
    """64 pairs with wavelengths from 6 to 54,000 tokens, trained on 4096 tokens and stretched 8 times."""

    plain = RopeSpec(10000.0, 128)
    spec = RopeSpec(10000.0, 128, factor=8.0, yarn=Yarn(4096))

    def test_high_frequencies_are_untouched(self) -> None:
        turns = 4096 * rotations(self.plain) / (2 * math.pi)
        fast = turns > 40  # beta_fast is 32; the ramp starts at a whole channel
        assert 0 < fast.sum() < 64
        np.testing.assert_allclose(rotations(self.spec)[fast], rotations(self.plain)[fast], rtol=TOLERANCE)

    def test_low_frequencies_are_divided_by_the_factor(self) -> None:
        turns = 4096 * rotations(self.plain) / (2 * math.pi)
        slow = turns < 0.8  # beta_slow is 1
        assert 0 < slow.sum() < 64
        np.testing.assert_allclose(
            rotations(self.spec)[slow], rotations(self.plain)[slow] / 8, rtol=TOLERANCE
        )

    def test_frequencies_in_between_are_in_between(self) -> None:
        turns = 4096 * rotations(self.plain) / (2 * math.pi)
        between = (turns > 1.5) & (turns < 25)
        ratio = rotations(self.spec)[between] / rotations(self.plain)[between]
        assert ((ratio > 1 / 8) & (ratio < 1)).all()
        assert (np.diff(ratio) < 0).all()

    def test_ramp_runs_over_whole_channels(self) -> None:
        # 128 ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 20.9, which is rounded down; with 1 turn 45.03, rounded up.
        ramp = np.clip((np.arange(64) - 20) / (46 - 20), 0, 1)
        expected = rotations(self.plain) * (1 - ramp * 7 / 8)
        np.testing.assert_allclose(rotations(self.spec), expected, rtol=TOLERANCE)

    def test_attention_grows_with_the_logarithm_of_the_factor(self) -> None:
        cos, sin = self.spec.angles(np.array(77))
        np.testing.assert_allclose(np.hypot(cos, sin), 1 + 0.1 * math.log(8), rtol=TOLERANCE)

    def test_attention_factor_multiplies(self) -> None:
        spec = RopeSpec(10000.0, 128, factor=8.0, yarn=Yarn(4096), attention=0.5)
        cos, sin = spec.angles(np.array(77))
        np.testing.assert_allclose(np.hypot(cos, sin), 0.5 * (1 + 0.1 * math.log(8)), rtol=TOLERANCE)

    def test_a_context_that_is_not_stretched_has_the_usual_magnitude(self) -> None:
        assert RopeSpec(10000.0, 128, factor=0.5, yarn=Yarn(4096)).magnitude == 1

    def test_without_extrapolation_all_frequencies_are_divided(self) -> None:
        spec = RopeSpec(10000.0, 128, factor=8.0, yarn=Yarn(4096, extrapolation=0.0))
        np.testing.assert_allclose(rotations(spec), rotations(self.plain) / 8, rtol=TOLERANCE)
