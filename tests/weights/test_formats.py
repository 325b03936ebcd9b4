"""Block formats against the ``gguf`` package's dequantisers, and those of QLoRA and Q1_0 against their definitions.

All are equal bit for bit, so there is no tolerance, but for the quantiles that NF4 was rounded from.
"""

from __future__ import annotations

import itertools
import json
import struct
import tracemalloc
import warnings
from pathlib import Path
from statistics import NormalDist

import gguf
import numpy as np
import pytest
from encoder_cases import digest_of_weights, random_blocks

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.fields import Bits, Trits, stacked
from rlxc.weights.formats import FORMATS, GGML_FORMATS, BlockFormat, Scales
from rlxc.weights.gguf import open_gguf
from rlxc.weights.grids import GridCodes

DATA = Path(__file__).resolve().parent.parent / "data"
ALL = list(FORMATS.values())
GGML = list(GGML_FORMATS.values())
BLOCKS = [form for form in ALL if not form.is_float]
# All but Q1_0, which the package knows by name only.
DEQUANTISED = [form for form in GGML if form.dtype is not DType.Q1_0]
GRIDS = [form for form in BLOCKS if isinstance(form.codes, GridCodes)]
QLORA = [FORMATS[dtype] for dtype in (DType.NF4, DType.FP4, DType.INT4)]
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


def test_formats_that_gguf_lacks_are_those_of_qlora():
    assert [form for form in ALL if form not in GGML] == QLORA


@per_format(QLORA)
def test_format_that_gguf_lacks_has_no_number_there(form):
    with pytest.raises(WeightError, match=f"GGUF has no type {form.dtype}"):
        _ = form.ggml_type


@per_format(GGML)
def test_block_sizes_are_those_of_gguf(form):
    assert (form.block_size, form.block_bytes) == gguf.GGML_QUANT_SIZES[form.ggml_type]


@per_format(BLOCKS)
def test_row_accounts_for_every_bit_of_a_block_once(form):
    scales = [scale for scale in (form.scale, form.minimum) if scale]
    seen = np.zeros((form.block_bytes, 8), int)
    fields: list[Bits] = []
    for scale in scales:
        if scale.pieces is None:
            seen[scale.offset : scale.offset + scale.bases * scale.base.itemsize] += 1
        else:
            fields.append(scale.pieces)
        fields += [bits for part in scale.factors.parts for bits in part] if scale.factors else []
    if isinstance(form.codes, Trits):
        for offset, nbytes, _ in form.codes.parts:
            seen[offset : offset + nbytes] += 1
    elif isinstance(form.codes, GridCodes):
        fields += [*form.codes.index, form.codes.signs]
    else:
        fields += [bits for part in form.codes.parts for bits in part]
    for bits in fields:
        words = bits.columns.reshape(-1, bits.word)
        for shift, bit in itertools.product(bits.shifts, range(bits.width)):
            seen[words[:, (shift + bit) // 8], (shift + bit) % 8] += 1
    assert (seen == 1).all()


@per_format(BLOCKS)
def test_row_has_a_code_per_weight_and_a_factor_per_sub_block(form):
    assert form.codes.count == form.block_size
    assert form.block_size % form.sub_block == 0
    factors, subs = form.scale.factors, form.block_size // form.sub_block
    assert factors is None or factors.count == subs
    assert subs % form.scale.bases == 0


@per_format(QLORA)
def test_qlora_block_decodes_as_it_is_defined(form):
    data = random_rows(form, rows=4)
    decoded = form.decode(data, 192).reshape(-1, 64)
    high_first = form.dtype is not DType.INT4
    for block, weights in zip(data.reshape(-1, 36), decoded):
        (scale,) = struct.unpack_from("<f", block)
        for i, weight in enumerate(weights):
            code = block[4 + i // 2] >> (4 if (i % 2 == 0) == high_first else 0) & 15
            value = int(code) - 8 if form.codebook is None else form.codebook[code]
            with np.errstate(all="ignore"):
                np.testing.assert_array_equal(weight, np.float32(scale) * np.float32(value))


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    # QLoRA, section 3: 8 positive and 7 negative quantiles, and zero, over the greatest. The last probability is
    # what makes the first of 8 and the last of 7 lie equally far from the ends, in bitsandbytes 0.9677083.
    def quantiles(count: int) -> np.ndarray:
        probabilities = np.linspace(0.9677083, 0.5, count + 1)[:-1]
        return np.array([NormalDist().inv_cdf(p) for p in probabilities])

    expected = np.sort(np.concatenate([quantiles(8), [0], -quantiles(7)])) / quantiles(8)[0]
    # bitsandbytes computed them in f32 and by another inverse of the distribution.
    np.testing.assert_allclose(FORMATS[DType.NF4].codebook, expected, rtol=0, atol=2e-7)


def test_fp4_values_are_a_sign_two_bits_of_exponent_and_one_of_fraction():
    expected = []
    for sign, high, low, fraction in itertools.product((0, 1), repeat=4):
        exponent = 2 * high + low
        value = 0.0625 * fraction if exponent == 0 else 2.0 ** (4 - exponent) * (1 + fraction / 2)
        expected.append((-1) ** sign * value / 12)
    assert list(FORMATS[DType.FP4].codebook) == expected


def test_q1_0_block_is_a_scale_and_signs():
    # As ggml_get_type_traits(41)->to_float of llama.cpp decodes it.
    form = FORMATS[DType.Q1_0]
    data = random_rows(form, rows=4)
    for block, weights in zip(data.reshape(-1, 18), form.decode(data, 384).reshape(-1, 128)):
        (scale,) = struct.unpack_from("<e", block)
        signs = [1 if block[2 + i // 8] >> i % 8 & 1 else -1 for i in range(128)]
        np.testing.assert_array_equal(weights, np.float32(scale) * np.array(signs, np.float32))


@per_format(BLOCKS)
def test_packing_what_was_read_gives_the_same_bytes(form):
    data = random_rows(form)
    if isinstance(form.codes, Trits):  # of whose bytes 243 are made, and 256 can be read
        data = form.pack(form.fields(data))
    np.testing.assert_array_equal(form.pack(form.fields(data)), data)


@per_format(DEQUANTISED)
def test_random_bytes_decode_as_gguf_decodes_them(form):
    assert_decodes_as_gguf_does(form, random_rows(form))


@per_format([form for form in GGML if not form.is_float])
def test_random_blocks_decode_as_llama_cpp_decodes_them(form):
    reference = json.loads((DATA / "encoder_quality.json").read_text())["decoded"]
    weights = form.decode(random_blocks(form.block_bytes), form.block_size)
    assert digest_of_weights(weights) == reference[form.dtype.name]


@per_format([form for form in DEQUANTISED if form.scale and form.scale.kind == "float16"])
def test_extreme_scales_decode_as_gguf_decodes_them(form):
    pairs = [(a, b) for a in EXTREME_HALVES for b in EXTREME_HALVES]
    data = random_rows(form, rows=len(pairs), blocks=1)
    for scale, halves in zip((form.scale, form.minimum), zip(*pairs)):
        if scale and scale.pieces:  # of IQ1_M: nibbles in the high ends of four words
            words = data[:, scale.offset :].view(np.uint16)
            words &= np.uint16(0x0FFF)
            words |= (
                np.array(halves, np.uint16)[:, None] >> np.arange(0, 16, 4, dtype=np.uint16) << np.uint16(12)
            )
        elif scale:
            data[:, scale.offset : scale.offset + 2] = np.array(halves).reshape(-1, 1).view(np.uint8)
    assert_decodes_as_gguf_does(form, data)


@pytest.mark.parametrize("dtype", [DType.MXFP4, DType.NVFP4], ids=str)
def test_every_byte_that_is_a_scale_decodes_as_gguf_decodes_it(dtype):
    form = FORMATS[dtype]
    data = random_rows(form, rows=256, blocks=1)
    data[:, : form.scale.bases] = np.arange(256, dtype=np.uint8)[:, None]
    assert_decodes_as_gguf_does(form, data)
    np.testing.assert_array_equal(form.fields(data).scale.base, data[:, : form.scale.bases])


@per_format(GRIDS)
def test_every_index_of_a_grid_decodes_as_gguf_decodes_it(form):
    # Enough blocks that each of the 2048 indices at most, and each of 128 signs, comes up.
    data = random_rows(form, rows=1024, blocks=1)
    indices = np.zeros(1 << sum(bits.width for bits in form.codes.index), int)
    indices[stacked(form.codes.index, data)] = 1
    assert indices.all()
    assert_decodes_as_gguf_does(form, data)


@per_format(GRIDS)
def test_codes_that_are_not_in_the_grid_are_refused(form):
    fields = form.fields(random_rows(form, rows=1, blocks=1))
    fields.codes[0, :8] = [0, 0, 0, 0, 0, 0, 0, form.code_max - fields.codes[0, 7]]

    def pack_with_every_fourth_code() -> None:
        for code in range(form.code_max + 1):
            fields.codes[0, 3] = code
            form.pack(fields)

    with pytest.raises(WeightError, match=f"not in the grid of {form.dtype.value[:3]}"):
        pack_with_every_fourth_code()


@per_format(BLOCKS)
def test_codebook_of_integers_is_what_it_says(form):
    expected = {DType.NF4: None, DType.FP4: None}.get(form.dtype, form.codebook)
    assert form.integers == expected
    if form.integers is not None:
        assert all(isinstance(value, int) and -128 <= value <= 127 for value in form.integers)
        assert (form.code_min, form.code_max) == (0, len(form.integers) - 1)


@per_format(GGML)
def test_bits_per_weight_are_those_of_the_file(form):
    size, nbytes = gguf.GGML_QUANT_SIZES[form.ggml_type]
    assert form.bits_per_weight * size == 8 * nbytes


def test_scale_of_mxfp4_is_half_a_power_of_two_though_the_power_is_beyond_f32():
    scale = FORMATS[DType.MXFP4].scale
    assert scale.table[[0, 127, 255]].tolist() == [2.0**-128, 0.5, 2.0**127]


def test_bases_of_a_block_each_have_as_many_sub_blocks():
    base = np.array([[1, 2], [3, 4]], np.float16)
    values = Scales(base, None, unit=0.5, bases=2).values(4)
    np.testing.assert_array_equal(values, [[0.5, 0.5, 1, 1], [1.5, 1.5, 2, 2]])


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
        values = planes.codes if form.codebook is None else np.array(form.codebook)[planes.codes]
        weights = np.repeat(planes.scales, form.sub_block, axis=1) * values.astype(np.float32)
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


@per_format(BLOCKS)
def test_codes_above_the_least_one_are_those_that_are_read_with_the_scales(form):
    data = random_rows(form)
    above = form.codes_above_min(data)
    assert above.dtype == np.uint8
    assert (above.astype(int) + form.code_min == form.fields(data).codes).all()


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


@per_format(FLOATS)
def test_float_format_has_no_codes_to_pack(form):
    fields = FORMATS[DType.Q8_0].fields(np.zeros((1, 34), np.uint8))
    with pytest.raises(WeightError, match="have no codes"):
        form.pack(fields)


def test_real_model_decodes_as_gguf_decodes_it(gemma_gguf):
    with open_gguf(gemma_gguf) as file:
        by_dtype = {info.dtype: info for info in file.tensors.values() if len(info.shape) == 2}
        assert len(by_dtype) == 4
        for info in by_dtype.values():
            form = FORMATS[info.dtype]
            rows = file.data(info.name).reshape(info.shape[0], form.row_bytes(info.shape[1]))
            assert_decodes_as_gguf_does(form, rows[:512])
