"""Cosines and sines against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlxc.backends.tvm.kernels.rope import angles_kernel
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import UnsupportedError

LANES = pytest.mark.parametrize("lanes", [4, 8, 16])


@LANES
@pytest.mark.parametrize("dim", [8, 80, 96, 128])
def test_angles_are_right_at_every_position(run_kernel: Any, lanes: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    past = np.concatenate([[0, 131072 - 64], rng.integers(0, 131072, 14)]).astype(np.int32)
    step, magnitude = 64, 1.3
    frequencies = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    angles = np.zeros((len(past) * step, dim), np.float32)
    kernel = angles_kernel(Vectors(lanes, "multiply"), dim=dim, magnitude=magnitude)
    run_kernel(kernel, past, frequencies, angles, len(past), step)
    exact = (past[:, None] + np.arange(step)).reshape(-1, 1) * frequencies
    expected = np.concatenate([np.cos(exact), np.sin(exact)], 1) * magnitude
    assert np.abs(angles - expected).max() < 5e-7 * magnitude


def test_angles_that_vectors_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="25 channels cannot be divided"):
        angles_kernel(Vectors(16, "multiply"), dim=50, magnitude=1.0)


def test_kernels_of_different_magnitudes_have_different_names() -> None:
    names = {angles_kernel(Vectors(8, "multiply"), dim=64, magnitude=m).name for m in (1.0, 1.0 + 1e-15, 0.5)}
    assert len(names) == 3
