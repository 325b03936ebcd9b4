"""Block formats against the ``gguf`` package's dequantisers: equal bit for bit, so no tolerance anywhere."""

from __future__ import annotations

import tracemalloc
import warnings

import gguf
import numpy as np
import pytest

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.formats import FORMATS, BlockFormat
from rlxc.weights.gguf import open_gguf

ALL = list(FORMATS.values())
BLOCKS = [form for form in ALL if not form.is_float]
FLOATS = [form for form in ALL if form.is_float]
# f16: zeros, infinities, quiet and signalling NaN, least subnormals, least normal, greatest, one.
EXTREME_HALVES = np.array(
    [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7D01, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00], np.uint16
)  # fmt: skip


def per_format(forms: list[BlockFormat]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", forms, ids=lambda form: form.dtype.value)


def random_rows(form: BlockFormat, rows: int = 64, blocks: int = 3, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    width = 96 if form.is_float else blocks
    return rng.integers(0, 256, (rows, width * form.block_bytes), dtype=np.uint8)


def in_features(form: BlockFormat, data: np.ndarray) -> int:
    return data.shape[1] // form.block_bytes * form.block_size


def assert_decodes_as_gguf_does(form: BlockFormat, data: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gguf.dequantize(data, form.ggml_type)
    actual = form.decode(data, in_features(form, data))
    assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
    # A NaN has many bit patterns, and which one inf * 0 gives is the processor's choice.
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_table_holds_every_packed_dtype_and_the_floats():
    floats = {DType.F32, DType.F16, DType.BF16}
    assert set(FORMATS) == {dtype for dtype in DType if dtype.is_packed} | floats
    assert {form.dtype for form in FLOATS} == floats


@per_format(ALL)
def test_block_sizes_are_those_of_gguf(form):
    assert (form.block_size, form.block_bytes) == gguf.GGML_QUANT_SIZES[form.ggml_type]


@per_format(BLOCKS)
def test_row_accounts_for_every_bit_of_a_block_once(form):
    scales = [scale for scale in (form.scale, form.minimum) if scale]
    seen = np.zeros((form.block_bytes, 8), int)
    for scale in scales:
        seen[scale.offset : scale.offset + 2] += 1
    for integers in [form.codes, *(scale.factors for scale in scales if scale.factors)]:
        for part in integers.parts:
            for bits in part:
                for shift in bits.shifts:
                    seen[bits.offset : bits.offset + bits.nbytes, shift : shift + bits.width] += 1
    assert (seen == 1).all()


@per_format(BLOCKS)
def test_row_has_a_code_per_weight_and_a_scale_per_sub_block(form):
    assert form.codes.count == form.block_size
    factors = form.scale.factors
    assert (factors.count if factors else 1) == form.block_size // form.sub_block


@per_format(ALL)
def test_random_bytes_decode_as_gguf_decodes_them(form):
    assert_decodes_as_gguf_does(form, random_rows(form))


@per_format(BLOCKS)
def test_extreme_scales_decode_as_gguf_decodes_them(form):
    pairs = [(a, b) for a in EXTREME_HALVES for b in EXTREME_HALVES]
    data = random_rows(form, rows=len(pairs), blocks=1)
    for scale, halves in zip((form.scale, form.minimum), zip(*pairs)):
        if scale:
            data[:, scale.offset : scale.offset + 2] = np.array(halves).reshape(-1, 1).view(np.uint8)
    assert_decodes_as_gguf_does(form, data)


@per_format(FLOATS)
def test_every_upper_half_of_a_float_decodes_as_gguf_decodes_it(form):
    halves = np.arange(2**16, dtype=np.uint16)
    words = halves if form.block_bytes == 2 else halves.astype(np.uint32) << 16
    assert_decodes_as_gguf_does(form, words.view(np.uint8).reshape(256, -1))


@per_format(ALL)
def test_decoding_nonsense_warns_about_nothing(form):
    data = np.full((2, form.block_bytes), 0xFF, np.uint8)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        form.decode(data, form.block_size)


@per_format(BLOCKS)
def test_weights_are_scales_times_codes_minus_mins(form):
    data = random_rows(form)
    planes = form.unpack(data)
    with np.errstate(all="ignore"):
        weights = np.repeat(planes.scales, form.sub_block, axis=1) * planes.codes.astype(np.float32)
        if planes.mins is not None:
            weights = weights - np.repeat(planes.mins, form.sub_block, axis=1)
    np.testing.assert_array_equal(weights, form.decode(data, in_features(form, data)))


@per_format(BLOCKS)
def test_planes_have_their_promised_types_and_shapes(form):
    data = random_rows(form, rows=5, blocks=2)
    planes = form.unpack(data)
    subs = (5, 2 * form.block_size // form.sub_block)
    assert (planes.codes.dtype, planes.codes.shape) == (np.int8, (5, 2 * form.block_size))
    assert (planes.scales.dtype, planes.scales.shape) == (np.float32, subs)
    assert (planes.mins is not None) == form.has_mins
    if planes.mins is not None:
        assert (planes.mins.dtype, planes.mins.shape) == (np.float32, subs)


@per_format(BLOCKS)
def test_codes_span_exactly_their_range(form):
    codes = form.unpack(random_rows(form, rows=256)).codes
    assert (codes.min(), codes.max()) == (form.code_min, form.code_max)


@per_format(BLOCKS)
def test_planes_of_a_single_block_are_fresh_memory(form):
    data = random_rows(form, rows=1, blocks=1)
    data.flags.writeable = False
    planes = form.unpack(data)
    assert planes.codes.flags.writeable
    assert not np.shares_memory(planes.codes, data)


@per_format(ALL)
def test_decoded_rows_are_fresh_memory(form):
    data = random_rows(form, rows=1)
    weights = form.decode(data, in_features(form, data))
    assert weights.flags.writeable
    assert not np.shares_memory(weights, data)


@per_format(ALL)
def test_rows_of_a_wider_table_decode_like_their_copy(form):
    table = random_rows(form, rows=8)
    data = table[::2, : 2 * form.block_bytes]
    features = 2 * form.block_size
    expected = form.decode(data.copy(), features).view(np.uint32)
    np.testing.assert_array_equal(form.decode(data, features).view(np.uint32), expected)


@per_format(ALL)
def test_no_rows_decode_to_no_rows(form):
    data = np.empty((0, 2 * form.block_bytes), np.uint8)
    assert form.decode(data, 2 * form.block_size).shape == (0, 2 * form.block_size)


@per_format(BLOCKS)
def test_unpacking_takes_a_few_bytes_per_weight(form):
    data = random_rows(form, rows=512, blocks=4096 // form.block_size)
    form.unpack(data[:1])
    tracemalloc.start()
    try:
        form.unpack(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One byte of code, at most half of scales and minimums; the rest is the field being read.
    assert peak <= 4 * 512 * 4096


@per_format(BLOCKS)
def test_row_that_is_not_whole_blocks_is_refused(form):
    for features in (0, form.block_size + 1, -form.block_size):
        with pytest.raises(WeightError, match=f"{features} weights is not whole {form.dtype} blocks"):
            form.row_bytes(features)


@per_format(ALL)
def test_data_of_another_row_length_is_refused(form):
    with pytest.raises(WeightError, match="but the data has shape"):
        form.decode(np.zeros((1, 3 * form.block_bytes), np.uint8), 2 * form.block_size)


@per_format(BLOCKS)
def test_bytes_that_are_not_whole_blocks_are_refused(form):
    with pytest.raises(WeightError, match="is not whole blocks"):
        form.unpack(np.zeros((1, form.block_bytes + 1), np.uint8))


def test_data_of_another_dtype_is_refused():
    with pytest.raises(WeightError, match="int8"):
        FORMATS[DType.Q8_0].unpack(np.zeros((1, 34), np.int8))


@per_format(FLOATS)
def test_float_format_has_no_codes_to_unpack(form):
    with pytest.raises(WeightError, match="have no codes"):
        form.unpack(np.zeros((1, 8), np.uint8))


def test_real_model_decodes_as_gguf_decodes_it(gemma_gguf):
    with open_gguf(gemma_gguf) as file:
        by_dtype = {info.dtype: info for info in file.tensors.values() if len(info.shape) == 2}
        assert len(by_dtype) == 4
        for info in by_dtype.values():
            form = FORMATS[info.dtype]
            rows = file.data(info.name).reshape(info.shape[0], form.row_bytes(info.shape[1]))
            assert_decodes_as_gguf_does(form, rows[:512])
