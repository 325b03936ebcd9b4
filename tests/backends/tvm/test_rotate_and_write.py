"""Rotated queries, and keys and values in pages, against numpy in float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from paged import PagedMemory, restored, stored

from rlxc.backends.tvm.kernels.cache import CacheShape
from rlxc.backends.tvm.kernels.rotate_and_write import rotate_and_write_kernel
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import OptionError
from rlxc.ir.interp import rotate
from rlxc.ir.rope import RopeSpec

Array = npt.NDArray[Any]


@pytest.mark.parametrize("page", [0, -16, 8, 48])
def test_page_that_is_no_power_of_two_from_16_on_is_refused(page: int) -> None:
    with pytest.raises(OptionError, match=f"pages of {page} positions"):
        CacheShape(1, 64, page, "float16")


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


def run_write(
    run_kernel: Any,
    lanes: int,
    memory: PagedMemory,
    rope: RopeSpec | None,
    rows: tuple[Array, Array, Array],
    past: list[int],
    step: int,
) -> Array:
    """Rows ``[M, heads * D]`` of q, k and v through the kernel; returns what it made of q."""
    dim, heads = memory.shape.head_dim, rows[0].shape[1] // memory.shape.head_dim
    # Slices of one matrix, as a fused projection leaves them, with columns between that are nobody's.
    padded = [np.pad(row, ((0, 0), (0, 8)), constant_values=np.nan) for row in rows]
    strides = dict(zip(("q_stride", "k_stride", "v_stride"), (row.shape[1] for row in padded)))
    kernel = rotate_and_write_kernel(
        Vectors(lanes, "multiply"), heads=heads, shape=memory.shape, rope=rope, **strides
    )
    positions = np.array(past)[:, None] + np.arange(step)
    angles = []
    if rope is not None:
        angles = [np.concatenate(rope.angles(positions.ravel()), 1).astype(np.float32)]
    rotated = np.zeros((len(past) * step, heads * dim), np.float32)
    given = (*angles, np.array(past, np.int32), *memory.arguments)
    run_kernel(kernel, *padded, *given, rotated, len(past), step)
    return rotated


# Cosines and sines were rounded to f32, and two products are added: 2 ulp of f32. What is stored is rounded once more:
# to 11 or 8 bits, or to half a 127th of the head's largest number, which is less than 6.
ROUNDING: dict[str, dict[str, float]] = {
    "float32": {"rtol": 0, "atol": 1e-6},
    "float16": {"rtol": 2**-11, "atol": 1e-6},
    "bfloat16": {"rtol": 2**-8, "atol": 1e-6},
    "int8": {"rtol": 0, "atol": 6 / 254 + 1e-6},
}


@pytest.mark.parametrize(("lanes", "dtype"), [(4, "float32"), (8, "bfloat16"), (16, "float16"), (16, "int8")])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("past", "step"), [([0, 5, 40], 1), ([31, 2, 64], 17)])
def test_keys_and_values_are_written_into_the_pages_of_their_positions(
    run_kernel: Any, lanes: int, dtype: Any, name: str, past: list[int], step: int
) -> None:
    heads, kv_heads, dim, rope = SHAPES[name]
    rng = np.random.default_rng(0)
    memory = PagedMemory(CacheShape(kv_heads, dim, 32, dtype), sequences=len(past), context=96)
    for b, length in enumerate(past):
        memory.hold(b, length, length + step - 1)  # pages before are another layer's business
    q, k, v = (rng.standard_normal((len(past) * step, n * dim)) for n in (heads, kv_heads, kv_heads))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    before = deepcopy(memory)
    rotated = run_write(run_kernel, lanes, memory, rope, (q, k, v), past, step)

    positions = np.array(past)[:, None] + np.arange(step)

    def turned(x: Array, count: int) -> Array:
        x = x.astype(np.float64).reshape(len(past), step, -1)
        return (rotate(x, positions, count, rope, None) if rope else x).reshape(len(past), step, count, dim)

    assert np.abs(rotated - turned(q, heads).reshape(rotated.shape)).max() < 1e-6
    keys, values = turned(k, kv_heads), v.reshape(len(past), step, kv_heads, dim)
    for (b, s), position in np.ndenumerate(positions):
        key, value = memory.read(b, position)
        np.testing.assert_allclose(key, keys[b, s], **ROUNDING[dtype])
        np.testing.assert_array_equal(value, restored(*stored(values[b, s], dtype)))
        for part, place in memory.places(b, position).items():
            before.places(b, position)[part][...] = place
    for part, buffer in memory.buffers.items():
        # What lies beside them is as it was.
        np.testing.assert_array_equal(buffer.view(np.uint8), before.buffers[part].view(np.uint8))


HALVES = np.arange(-127, 128) / 2
"""With a scale of 1/2 or 2: whole and half codes, which round to even."""

SIZES = (1e-45, 1e-44, 2.6e-43, 4.5e-43, 1e-40, 1e-38, 1e38, 3.4e38)
"""Of subnormal numbers, whose scale has few digits or is zero; and the largest."""


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_what_is_stored_is_numpy_s_to_the_bit(run_kernel: Any, lanes: int, dtype: Any) -> None:
    rng = np.random.default_rng(lanes)
    tokens, dim = 64, 80
    k, v = rng.standard_normal((2, tokens, 2 * dim)).astype(np.float32)
    for x in (k, v):
        x *= 2.0 ** rng.integers(-20, 15, (tokens, 1))
        for row, scale in enumerate((0.5, 0.5, 0.5, 2, 2, 2)):
            x[row] = 2 * scale * rng.choice(HALVES, 2 * dim)
            x[row, [3, dim + 7]] = 127 * scale, -127 * scale
        for row, size in enumerate(SIZES, 8):
            x[row] = size * rng.uniform(-1, 1, 2 * dim)
            x[row, [0, dim]] = size, -size
        x[20] = 0
        x[21, dim:] = -0.0
    if dtype == "float16":
        k, v = k.clip(-65504, 65504), v.clip(-65504, 65504)
    memory = PagedMemory(CacheShape(2, dim, 16, dtype), sequences=1, context=tokens)
    memory.hold(0, 0, tokens - 1)
    expected = deepcopy(memory)
    for token in range(tokens):
        expected.write(0, token, k[token].reshape(2, dim), v[token].reshape(2, dim))
    run_write(run_kernel, lanes, memory, None, (k, k, v), [0], tokens)
    for part, buffer in memory.buffers.items():
        np.testing.assert_array_equal(buffer, expected.buffers[part])
