"""Rounding that keeps what an adapter changed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rlxc.dtypes import ENCODABLE, DType
from rlxc.errors import WeightError
from rlxc.weights.encode import changeable, encode
from rlxc.weights.encode_keeping import encode_keeping
from rlxc.weights.formats import FORMATS

Floats = npt.NDArray[np.float32]

ROWS, COLUMNS, RANK = 48, 512, 4
# Ternary and binary formats have no levels between which a small change could be told.
PACKED = [dtype for dtype in ENCODABLE if dtype.is_packed and changeable(dtype) is dtype]


def decoded(dtype: DType, packed: npt.NDArray[np.uint8]) -> Floats:
    return FORMATS[dtype].decode(packed, COLUMNS)


def folded_case(dtype: DType) -> tuple[Floats, Floats, Floats]:
    """A matrix on its format's grid, an adapter's A, and what the adapter adds: a hundredth of the matrix's size."""
    rng = np.random.default_rng(1)
    base = decoded(dtype, encode(dtype, rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)))
    a = rng.standard_normal((RANK, COLUMNS)).astype(np.float32)
    delta = (rng.standard_normal((ROWS, RANK)) @ a).astype(np.float32)
    return base, a, delta * np.float32(0.01 * np.linalg.norm(base) / np.linalg.norm(delta))


@pytest.mark.parametrize("dtype", PACKED)
def test_change_survives_in_the_directions_of_the_adapter(dtype: DType) -> None:
    base, a, delta = folded_case(dtype)
    values = base + delta
    lost = np.linalg.norm((decoded(dtype, encode_keeping(dtype, values, a)) - values) @ a.T)
    nearest = np.linalg.norm((decoded(dtype, encode(dtype, values)) - values) @ a.T)
    # Rounding to nearest takes most of it away in all formats but the finest.
    assert lost < 0.7 * np.linalg.norm(delta @ a.T)
    assert lost < nearest


@pytest.mark.parametrize("dtype", [DType.TQ1_0, DType.TQ2_0, DType.Q1_0])
def test_change_of_a_ternary_or_binary_weight_survives_in_the_format_that_it_is_given(dtype: DType) -> None:
    base, a, delta = folded_case(dtype)
    values, to = base + delta, changeable(dtype)
    added = np.linalg.norm(delta @ a.T)
    lost = np.linalg.norm((decoded(to, encode_keeping(to, values, a)) - values) @ a.T)
    lost_in_its_own = np.linalg.norm((decoded(dtype, encode_keeping(dtype, values, a)) - values) @ a.T)
    assert lost < 0.5 * added < 0.6 * added < lost_in_its_own


@pytest.mark.parametrize("dtype", PACKED)
def test_scales_are_those_of_plain_encoding(dtype: DType) -> None:
    base, a, delta = folded_case(dtype)
    kept = FORMATS[dtype].fields(encode_keeping(dtype, base + delta, a))
    plain = FORMATS[dtype].fields(encode(dtype, base + delta))
    np.testing.assert_array_equal(kept.scale.base, plain.scale.base)
    assert (kept.codes != plain.codes).any()


def test_what_lies_on_the_grid_stays_there() -> None:
    base, a, _ = folded_case(DType.Q8_0)
    np.testing.assert_array_equal(encode_keeping(DType.Q8_0, base, a), encode(DType.Q8_0, base))


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_float_formats_are_rounded_as_always(dtype: DType) -> None:
    base, a, delta = folded_case(DType.Q4_0)
    np.testing.assert_array_equal(encode_keeping(dtype, base + delta, a), encode(dtype, base + delta))


def test_directions_of_zero_change_nothing() -> None:
    base, a, delta = folded_case(DType.Q4_K)
    zeros = np.zeros_like(a)
    np.testing.assert_array_equal(
        encode_keeping(DType.Q4_K, base + delta, zeros), encode(DType.Q4_K, base + delta)
    )


def test_block_of_zeros_stays_zero() -> None:
    base, a, delta = folded_case(DType.Q4_0)
    values = base + delta
    values[:, 32:64] = 0
    assert not decoded(DType.Q4_0, encode_keeping(DType.Q4_0, values, a))[:, 32:64].any()


def test_values_that_are_no_numbers_are_refused() -> None:
    base, a, _ = folded_case(DType.Q4_0)
    base[3, 5] = np.nan
    with pytest.raises(WeightError, match="NaN"):
        encode_keeping(DType.Q4_0, base, a)
