"""Scales in 8 bits against what bitsandbytes makes of the same, and against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.bnb import dequantize_absmax, dynamic_map, quantize_absmax
from rlxc.weights.formats import FORMATS

REFERENCE = np.load(Path(__file__).resolve().parent.parent / "data" / "bnb_reference.npz")

per_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def test_dynamic_map_is_that_of_bitsandbytes_to_the_last_bit():
    np.testing.assert_array_equal(dynamic_map(), REFERENCE["nf4_nested_map"])


def test_dynamic_map_has_64_values_of_each_sign_in_the_first_decade_and_half_as_many_in_each_next():
    values = dynamic_map()
    assert values.shape == (256,) and (np.diff(values) > 0).all()
    for decade in range(7):
        edge = 10.0**-decade
        inside = (np.abs(values) < edge) & (np.abs(values) > edge / 10)
        assert (
            np.count_nonzero(inside & (values > 0)) == np.count_nonzero(inside & (values < 0)) == 64 >> decade
        )


@per_kind
def test_nested_absmax_are_those_of_bitsandbytes(kind):
    absmax, theirs = REFERENCE[f"{kind}_absmax"], REFERENCE[f"{kind}_nested_absmax"]
    nested = quantize_absmax(absmax)
    np.testing.assert_array_equal(nested.absmax, REFERENCE[f"{kind}_nested_scales"])
    # torch and numpy may add the numbers of a mean in different orders.
    np.testing.assert_allclose(nested.offset, REFERENCE[f"{kind}_nested_offset"], rtol=2e-7)
    # On a CPU bitsandbytes rounds to a 65536th part of the range first: half-way between two codes it may err.
    scaled = (absmax - nested.offset) / np.repeat(nested.absmax, 256)[: absmax.size]
    half_way = (dynamic_map()[nested.codes] + dynamic_map()[theirs]) / 2
    assert ((nested.codes == theirs) | (np.abs(scaled - half_way) < 1 / 65536)).all()
    assert np.mean(nested.codes == theirs) > 0.99


@per_kind
def test_weights_with_nested_absmax_decode_as_bitsandbytes_decodes_them(kind):
    absmax = dequantize_absmax(
        REFERENCE[f"{kind}_nested_absmax"],
        REFERENCE[f"{kind}_nested_scales"],
        REFERENCE[f"{kind}_nested_map"],
        float(REFERENCE[f"{kind}_nested_offset"]),
    )
    blocks = np.concatenate([absmax[:, None].view(np.uint8), REFERENCE[f"{kind}_nested_packed"]], axis=1)
    decoded = FORMATS[DType(kind)].decode(blocks.reshape(100, -1), 192)
    np.testing.assert_array_equal(decoded, REFERENCE[f"{kind}_nested_decoded"])


def test_absmax_come_back_to_half_a_step_of_the_map():
    rng = np.random.default_rng(5)
    absmax = rng.uniform(0.01, 0.2, 1000).astype(np.float32)
    nested = quantize_absmax(absmax)
    assert (nested.codes.shape, nested.absmax.shape) == ((1000,), (4,))
    deviation = np.abs(absmax.astype(np.float64) - absmax.mean(dtype=np.float64))
    greatest = np.array([deviation[start : start + 256].max() for start in range(0, 1000, 256)])
    # The map's widest steps, by one, are 0.9 / 64; from the lowest value, -0.993, to -1 it is half a step.
    allowed = np.repeat(greatest, 256)[:1000] * 0.9 / 64 / 2
    assert (np.abs(nested.values() - absmax) <= allowed + 1e-7).all()


def test_equal_absmax_come_back_exactly():
    absmax = np.full(300, 0.125, np.float32)
    np.testing.assert_array_equal(quantize_absmax(absmax).values(), absmax)


def test_no_absmax_come_back_as_none():
    assert quantize_absmax(np.zeros(0, np.float32)).values().shape == (0,)


def test_codes_share_scales_by_the_given_block_size():
    values = dequantize_absmax(
        np.array([0, 255, 255], np.uint8), np.array([2, 3], np.float32), dynamic_map(), 10.0, blocksize=2
    )
    np.testing.assert_array_equal(values, np.float32([10 + 2 * dynamic_map()[0], 12, 13]))


def test_bytes_are_those_of_codes_and_what_they_share():
    # 300 codes, two scales and the offset.
    assert quantize_absmax(np.ones(300, np.float32)).nbytes == 300 + 8 + 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.zeros(3, np.int8)}, "nested absmax are int8"),
        ({"codes": np.zeros((3, 1), np.uint8)}, r"of shape \[3, 1\]"),
        ({"nested_absmax": np.zeros(2, np.float32)}, "the scales of 3 nested absmax are float32"),
        ({"nested_absmax": np.zeros(1)}, "the scales of 3 nested absmax are float64"),
        ({"nested_quant_map": np.zeros(255, np.float32)}, "the map of nested absmax"),
        ({"nested_quant_map": np.zeros(256)}, "the map of nested absmax is float64"),
        ({"blocksize": 0}, "0 nested absmax share a scale"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, message):
    arguments = {
        "codes": np.zeros(3, np.uint8),
        "nested_absmax": np.zeros(1, np.float32),
        "nested_quant_map": dynamic_map(),
        "offset": 0.0,
    }
    with pytest.raises(WeightError, match=message):
        dequantize_absmax(**(arguments | change))
