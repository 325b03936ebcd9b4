"""Encoders against llama.cpp's and bitsandbytes' results, and against plain numpy."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from encoder_cases import K_QUANTS, SEARCHED, SIMPLE, errors, real, synthetic

from rlxc.dtypes import ENCODABLE, DType
from rlxc.errors import WeightError
from rlxc.weights import encode as encode_module
from rlxc.weights.encode import encode, fitting
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import open_gguf

DATA = Path(__file__).resolve().parent.parent / "data"
REFERENCE = json.loads((DATA / "encoder_quality.json").read_text())
SYNTHETIC = synthetic()
ALL = list(ENCODABLE)
ONLY_READ = [dtype for dtype in FORMATS if dtype not in ENCODABLE]
PACKED = [dtype for dtype in ALL if dtype.is_packed]
K = [DType[name] for name in K_QUANTS]
F32_SCALES = (DType.NF4, DType.FP4, DType.INT4)
WITH_F16 = [dtype for dtype in ALL if dtype not in (DType.F32, DType.BF16, DType.MXFP4, *F32_SCALES)]

per_format = pytest.mark.parametrize("dtype", ALL, ids=str)
per_packed = pytest.mark.parametrize("dtype", PACKED, ids=str)
per_searched = pytest.mark.parametrize("dtype", [DType[name] for name in SEARCHED], ids=str)
per_k_quant = pytest.mark.parametrize("dtype", K, ids=str)


def decode(dtype: DType, packed: np.ndarray) -> np.ndarray:
    """By ``gguf`` where it has the format."""
    form = FORMATS[dtype]
    if dtype in (*F32_SCALES, DType.Q1_0):
        return form.decode(packed, packed.shape[1] // form.block_bytes * form.block_size)
    return gguf.dequantize(packed, form.ggml_type)


def again(dtype: DType, values: np.ndarray) -> np.ndarray:
    """The values after encoding and decoding."""
    return decode(dtype, encode(dtype, values))


def wide_rows(seed: int = 3) -> np.ndarray:
    """f32 ``[64, 512]`` whose blocks of 16 differ in size by up to 10^6, with outliers, zeros and one-sided ones."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((64, 32, 16)) * 10.0 ** rng.uniform(-4, 2, (64, 32, 1))
    rows[rng.random(rows.shape) < 0.01] *= 30
    rows[rng.random((64, 32)) < 0.1] = 0
    one_sided = rng.random((64, 32)) < 0.2
    rows[one_sided] = np.abs(rows[one_sided]) * rng.choice([-1, 1])
    return rows.reshape(64, 512).astype(np.float32)


def assert_as_good_as_llama_cpp(dtype: DType, case: str, values: np.ndarray) -> None:
    reference = REFERENCE["errors"][case][dtype.name]
    # A hundredth: both search, and weigh errors a little differently.
    assert np.all(np.array(errors(values, again(dtype, values))) <= 1.01 * np.array(reference))


@pytest.mark.parametrize("case", SYNTHETIC)
@per_searched
def test_searched_formats_are_as_good_as_llama_cpps(dtype, case):
    assert_as_good_as_llama_cpp(dtype, case, SYNTHETIC[case])


@per_searched
def test_searched_formats_of_real_weights_are_as_good_as_llama_cpps(dtype, gemma_gguf):
    for case, values in real(gemma_gguf).items():
        assert_as_good_as_llama_cpp(dtype, case, values)


@pytest.mark.parametrize("dtype", [DType[name] for name in SIMPLE], ids=str)
def test_simple_formats_are_those_of_llama_cpp_bit_for_bit(dtype):
    for case, values in SYNTHETIC.items():
        digest = hashlib.sha256(encode(dtype, values).tobytes()).hexdigest()
        assert digest == REFERENCE["sha256"][case][dtype.name]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebook_formats_are_those_of_bitsandbytes(kind):
    reference = np.load(DATA / "bnb_reference.npz")
    blocks = encode(DType(kind), reference["weight"].astype(np.float32)).reshape(-1, 36)
    np.testing.assert_array_equal(blocks[:, :4].copy().view("<f4")[:, 0], reference[f"{kind}_absmax"])

    def codes(packed: np.ndarray) -> np.ndarray:
        unpacked = np.stack([packed >> 4, packed & 15])
        if kind == "fp4":
            unpacked[unpacked == 8] = 0  # -0, which bitsandbytes has for some weights near 0
        return unpacked

    np.testing.assert_array_equal(codes(blocks[:, 4:]), codes(reference[f"{kind}_packed"]))


def test_int4_rounds_to_sevenths_of_the_blocks_extreme():
    values = SYNTHETIC["student"]
    planes = FORMATS[DType.INT4].unpack(encode(DType.INT4, values))
    blocks = values.reshape(-1, 64).astype(np.float64)
    scales = np.abs(blocks).max(axis=1) / 7
    # The scale is rounded to f32, and may move a weight that lies half-way to the other side.
    np.testing.assert_allclose(planes.scales[:, ::2].reshape(-1), scales, rtol=1e-7)
    exact = blocks / scales[:, None]
    assert np.abs(planes.codes.reshape(-1, 64) - exact).max() <= 0.5 + 1e-6
    assert (planes.codes.min(), planes.codes.max()) == (-7, 7)


def test_f32_keeps_every_bit():
    values = SYNTHETIC["gauss"]
    np.testing.assert_array_equal(encode(DType.F32, values).view("<f4"), values)


@per_format
def test_zeros_stay_zeros(dtype):
    values = np.zeros((2, 256), np.float32)
    values[1, 128:] = 1
    decoded = again(dtype, values)
    assert not decoded[0].any() and not decoded[1, :128].any()


@per_packed
def test_equal_weights_stay_equal(dtype):
    values = np.repeat(np.array([[0.5], [-0.5], [3.0], [-0.02]], np.float32), 256, axis=1)
    decoded = again(dtype, values)
    assert (decoded == decoded[:, :1]).all()
    # Scales are f16; those of K-quants small f16 times factors, of which the nearest to a scale may be 1/126 away.
    # Those of MXFP4 are powers of two, and of 4 to 8 scales it has 4 and 6 only.
    tolerance = {DType.MXFP4: 0.25} | dict.fromkeys(K, 0.01)
    np.testing.assert_allclose(decoded, values, rtol=tolerance.get(dtype, 2.0**-11))


@pytest.mark.parametrize("dtype", [*K, DType.IQ4_NL, *F32_SCALES], ids=str)
def test_no_block_is_worse_than_rounding_it_to_evenly_spaced_levels(dtype):
    form, values = FORMATS[dtype], wide_rows()
    blocks = values.reshape(-1, form.block_size).astype(np.float64)
    error = (again(dtype, values).astype(np.float64) - values).reshape(blocks.shape)
    # All levels from the least to the greatest weight (or zero), as many as there are codes; where there are no
    # minimums, from minus to plus the greatest size.
    top, bottom = np.maximum(blocks.max(axis=1), 0), np.minimum(blocks.min(axis=1), 0)
    if not form.has_mins:
        top = np.maximum(top, -bottom)
        bottom = -top
    step = np.maximum((top - bottom) / (form.code_max - form.code_min), 1e-30)[:, None]
    plain = np.rint((blocks - bottom[:, None]) / step) * step + bottom[:, None] - blocks
    # FP4's levels crowd around zero: they cost up to twice as much where weights are large. A block of one weight
    # and zeros is exact with such levels, but scales are f16.
    allowed = 2.0 if dtype is DType.FP4 else 1.3
    rounding = 2.0**-11 * np.linalg.norm(blocks, axis=1) + 1e-6
    assert (np.linalg.norm(error, axis=1) <= allowed * np.linalg.norm(plain, axis=1) + rounding).all()


@pytest.mark.parametrize("dtype", [dtype for dtype in ALL if dtype not in K], ids=str)
def test_encoding_decoded_weights_again_changes_nothing(dtype):
    for values in SYNTHETIC.values():
        once = again(dtype, values)
        # INT4's scale is a seventh of seven times it, rounded twice.
        np.testing.assert_allclose(again(dtype, once), once, rtol=3e-7 if dtype is DType.INT4 else 0)


@per_k_quant
def test_encoding_decoded_k_quants_again_adds_little_error(dtype):
    for case, values in SYNTHETIC.items():
        once = again(dtype, values)
        # The search need not find all scales again: a sixth of the format's own error is 3 % of it in squares. Where
        # d is subnormal, another one with other factors may be as good, and is found instead.
        assert errors(once, again(dtype, once))[0] <= errors(values, once)[0] / (2 if case == "small" else 6)


def test_weights_of_a_real_k_quant_are_found_again(gemma_gguf):
    with open_gguf(gemma_gguf) as file:
        info = file.tensors["blk.1.attn_output.weight"]
        assert info.dtype is DType.Q4_K
        weights = decode(info.dtype, file.data(info.name).reshape(info.shape[0], -1))
    # llama-quantize makes the greatest factor 63, as the first start of the search does.
    assert np.mean(again(info.dtype, weights) != weights) <= 1e-3


@per_format
def test_rows_do_not_depend_on_each_other(dtype, monkeypatch):
    values = wide_rows()
    together = encode(dtype, values)
    monkeypatch.setattr(encode_module, "CHUNK", 1)
    np.testing.assert_array_equal(encode(dtype, values), together)


@per_format
def test_values_are_left_as_they_are(dtype):
    values = wide_rows()
    copy = values.copy()
    values.flags.writeable = False
    encode(dtype, values)
    np.testing.assert_array_equal(values, copy)


@per_format
def test_part_of_a_wider_matrix_encodes_like_its_copy(dtype):
    values = wide_rows()[::2, 256:]
    np.testing.assert_array_equal(encode(dtype, values), encode(dtype, values.copy()))


@per_format
def test_no_rows_encode_to_no_rows(dtype):
    assert encode(dtype, np.zeros((0, 256), np.float32)).shape == (0, FORMATS[dtype].row_bytes(256))


@per_format
def test_encoding_warns_about_nothing(dtype):
    rows = [wide_rows()[:1, :256], np.full((1, 256), 1e-42, np.float32), np.zeros((1, 256), np.float32)]
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        decoded = again(dtype, np.concatenate(rows))
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@per_format
def test_values_that_are_not_finite_are_refused(dtype, value):
    values = np.ones((3, 256), np.float32)
    values[2, 17] = value
    with pytest.raises(WeightError, match=f"NaN or infinite values cannot be encoded as {dtype}"):
        encode(dtype, values)


@pytest.mark.parametrize("value", [1e10, 1e20, -3e38])
@pytest.mark.parametrize("dtype", WITH_F16, ids=str)
def test_values_beyond_the_format_are_refused(dtype, value):
    values = np.ones((3, 256), np.float32)
    values[2, 17] = value
    with pytest.raises(WeightError, match="are too large for"):
        encode(dtype, values)


def test_values_that_round_to_infinity_in_bf16_are_refused():
    with pytest.raises(WeightError, match="too large for bf16"):
        encode(DType.BF16, np.full((1, 4), np.finfo(np.float32).max, np.float32))


@pytest.mark.parametrize("dtype", [DType.F32, DType.NF4, DType.FP4, DType.INT4], ids=str)
def test_largest_f32_is_kept_where_scales_are_f32(dtype):
    greatest = np.finfo(np.float32).max
    values = np.zeros((1, 64), np.float32)
    values[0, 3] = -greatest
    np.testing.assert_allclose(again(dtype, values) if dtype.is_packed else values, values, rtol=1e-6)


@per_packed
def test_row_that_is_not_whole_blocks_is_refused(dtype):
    with pytest.raises(WeightError, match="is not whole"):
        encode(dtype, np.zeros((1, FORMATS[dtype].block_size + 1), np.float32))


@pytest.mark.parametrize("values", [np.zeros((1, 256)), np.zeros(256, np.float32)], ids=["f64", "vector"])
def test_values_of_another_kind_are_refused(values):
    with pytest.raises(WeightError, match="cannot be encoded"):
        encode(DType.Q4_0, values)


@pytest.mark.parametrize("dtype", ONLY_READ, ids=str)
def test_format_without_encoder_is_refused_and_has_one_that_stands_in(dtype):
    instead = fitting(dtype, 512)
    assert instead in ENCODABLE
    # As many bits, but for IQ1: there is no encoder below Q2_K.
    allowed = 1.1 if dtype in (DType.IQ1_S, DType.IQ1_M) else 0.6
    assert abs(FORMATS[instead].bits_per_weight - FORMATS[dtype].bits_per_weight) <= allowed
    with pytest.raises(WeightError, match=f"{dtype} can be read but not made.*encode in {instead} instead"):
        encode(dtype, np.zeros((1, 512), np.float32))


@per_format
def test_format_of_whole_blocks_fits(dtype):
    assert fitting(dtype, 512) is dtype


@pytest.mark.parametrize(
    ("wanted", "in_features", "fits"),
    [
        (DType.Q2_K, 640, DType.Q4_0),
        (DType.Q3_K, 640, DType.Q4_0),
        (DType.Q4_K, 640, DType.Q5_0),
        (DType.Q5_K, 640, DType.Q5_1),
        (DType.Q6_K, 640, DType.Q8_0),
        (DType.Q4_K, 80, DType.F16),
        (DType.Q8_0, 80, DType.F16),
        (DType.NF4, 96, DType.F16),
        (DType.BF16, 7, DType.BF16),
        (DType.IQ2_XS, 512, DType.Q2_K),
        (DType.IQ3_S, 640, DType.Q4_0),
        (DType.IQ4_XS, 512, DType.IQ4_NL),
        (DType.NVFP4, 64, DType.Q5_0),
        (DType.Q1_0, 128, DType.Q1_0),
        (DType.TQ2_0, 640, DType.F16),
    ],
)
def test_rows_that_are_not_whole_blocks_get_a_format_that_fits(wanted, in_features, fits):
    assert fitting(wanted, in_features) is fits
