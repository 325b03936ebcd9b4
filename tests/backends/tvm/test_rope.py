"""Angles, rotation and cache writes against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlxc.backends.tvm.kernels.cache import CacheShape, rotate_and_write_kernel
from rlxc.backends.tvm.kernels.rope import angles_kernel
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import OptionError, UnsupportedError
from rlxc.ir.interp import rotate
from rlxc.ir.rope import RopeSpec

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


@pytest.mark.parametrize("capacity", [0, -16, 40])
def test_a_capacity_that_is_no_multiple_of_16_is_refused(capacity: int) -> None:
    with pytest.raises(OptionError, match="KV cache"):
        CacheShape(1, 64, capacity, ring=False, dtype="float16")


# heads, kv heads, head dim, rope
SHAPES = {
    "neox": (4, 2, 64, RopeSpec(1e4, 64)),
    "interleaved": (4, 2, 64, RopeSpec(1e4, 64, interleaved=True)),
    "partial": (2, 2, 80, RopeSpec(1e4, 32)),
    "partial interleaved": (3, 1, 96, RopeSpec(1e4, 48, interleaved=True)),
    "tiny": (2, 1, 16, RopeSpec(1e4, 16)),
    "wide": (2, 1, 256, RopeSpec(1e6, 256)),
    "unrotated": (4, 4, 64, None),
}


@pytest.mark.parametrize(("lanes", "dtype"), [(4, "float32"), (8, "float16"), (16, "float16")])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("ring", "past", "step"),
    [(False, [0, 5, 40], 1), (False, [3, 20], 9), (True, [0, 31, 100], 2), (True, [70, 2, 16], 17)],
)
def test_keys_and_values_are_written_where_the_cache_keeps_them(
    run_kernel: Any, lanes: int, dtype: Any, name: str, ring: bool, past: list[int], step: int
) -> None:
    heads, kv_heads, dim, rope = SHAPES[name]
    rng = np.random.default_rng(0)
    sequences, capacity = len(past), 32 if ring else 48
    shape = CacheShape(kv_heads, dim, capacity, ring, dtype)
    positions = np.array(past)[:, None] + np.arange(step)
    # Slices of one matrix, as a fused projection leaves them, with columns between that are nobody's.
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (rng.standard_normal((sequences * step, width + 8)).astype(np.float32) for width in widths)
    rotated = np.zeros((sequences * step, heads * dim), np.float32)
    # Caches in an order of their own, a gap between them.
    size = kv_heads * capacity * dim
    places = (np.arange(sequences)[::-1] * (size + 64)).astype(np.int64)
    keys, values = (rng.standard_normal(sequences * (size + 64)).astype(dtype) for _ in range(2))
    expected_keys, expected_values = keys.copy(), values.copy()

    def turned(x: Any, count: int) -> Any:
        x = x[:, : count * dim].astype(np.float64).reshape(sequences, step, -1)
        return (rotate(x, positions, count, rope, None) if rope else x).reshape(sequences, step, count, dim)

    new_keys, new_values = turned(k, kv_heads), v[:, : kv_heads * dim].reshape(sequences, step, kv_heads, dim)
    for b, start in enumerate(places):
        key = expected_keys[start : start + size].reshape(kv_heads, capacity // 16, dim, 16)
        value = expected_values[start : start + size].reshape(kv_heads, capacity, dim)
        for s, row in enumerate(positions[b] % capacity if ring else positions[b]):
            key[:, row // 16, :, row % 16] = new_keys[b, s]
            value[:, row] = new_values[b, s]

    strides = dict(zip(("q_stride", "k_stride", "v_stride"), (width + 8 for width in widths)))
    kernel = rotate_and_write_kernel(
        Vectors(lanes, "multiply"), heads=heads, shape=shape, rope=rope, **strides
    )
    tables = []
    if rope is not None:
        tables = [np.concatenate(rope.angles(positions.ravel()), 1).astype(np.float32)]
    offsets = places * np.dtype(dtype).itemsize
    memory = (np.array(past, np.int32), offsets, keys, values, rotated)
    run_kernel(kernel, q, k, v, *tables, *memory, sequences, step)

    # Cosines and sines were rounded to f32, and two products are added: 2 ulp of f32. Keys are rounded once more,
    # to f16 maybe; what lies beside them must be as it was, bit for bit.
    assert np.abs(rotated - turned(q, heads).reshape(rotated.shape)).max() < 1e-6
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == "float16" else {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(keys.astype(np.float64), expected_keys.astype(np.float64), **tolerance)
    assert np.count_nonzero(keys != expected_keys) <= new_keys.size
    np.testing.assert_array_equal(values, expected_values)
