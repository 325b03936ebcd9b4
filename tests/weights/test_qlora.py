"""QLoRA layers against their formulas in plain numpy, in f64."""

from __future__ import annotations

import numpy as np
import pytest

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.encode import encode
from rlxc.weights.formats import FORMATS
from rlxc.weights.lora import LoraPair
from rlxc.weights.qlora import SCHEMES, QLoraLayer

OUT, IN, RANK = 96, 192, 8

per_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
per_kind = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])


def weight(out: int = OUT, in_: int = IN) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((out, in_)) * 0.1).astype(np.float32)


def pair(out: int = OUT, in_: int = IN, rank: int = RANK, scale: float = 2.0) -> LoraPair:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((rank, in_)), rng.standard_normal((out, rank))
    return LoraPair(a.astype(np.float32), b.astype(np.float32), scale)


def layer(scheme: DType, double: bool = False, out: int = OUT, in_: int = IN, **options) -> QLoraLayer:
    make = QLoraLayer.from_lora_double_quant if double else QLoraLayer.from_lora
    return make(weight(out, in_), pair(out, in_, **options), scheme)


def exact_weight(made: QLoraLayer) -> np.ndarray:
    """What the layer multiplies with, in f64."""
    base = made.base_weight_quantized.dequantize().astype(np.float64)
    return base + made.scale * (made.lora_b.astype(np.float64) @ made.lora_a)


def test_int4_base_is_rounded_to_sevenths_of_each_blocks_extreme():
    base = QLoraLayer.from_lora(weight(), pair()).base_weight_quantized
    blocks = weight().reshape(-1, 64).astype(np.float64)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 7
    expected = np.clip(np.rint(blocks / scales), -7, 7) * scales
    # The scale is f32.
    np.testing.assert_allclose(base.dequantize().reshape(-1, 64), expected, rtol=1e-6)


@pytest.mark.parametrize("scheme", [DType.NF4, DType.FP4], ids=str)
def test_codebook_base_has_the_nearest_value_of_the_codebook(scheme):
    base = layer(scheme).base_weight_quantized.dequantize().reshape(-1, 64)
    blocks = weight().reshape(-1, 64).astype(np.float64)
    absmax = np.abs(blocks).max(axis=1)[:, None, None]
    nearest = np.abs(blocks[..., None] - absmax * np.array(FORMATS[scheme].codebook)).min(axis=-1)
    # Which of two values is the nearer one may be lost in rounding to f32.
    np.testing.assert_allclose(np.abs(base - blocks), nearest, rtol=0, atol=1e-7)


@per_scheme
def test_base_of_whole_blocks_is_a_packed_weight(scheme):
    packed = layer(scheme).base_weight_quantized.packed().reshape(OUT, -1)
    np.testing.assert_array_equal(packed, encode(scheme, weight()))


@per_scheme
@per_kind
def test_blocks_run_on_from_row_to_row(scheme, double):
    odd = layer(scheme, double, out=8, in_=24).base_weight_quantized
    flat = QLoraLayer.from_lora(weight(8, 24).reshape(3, 64), pair(3, 64), scheme).base_weight_quantized
    assert (odd.shape, odd.codes.shape) == ((8, 24), (3, 32))
    np.testing.assert_array_equal(odd.codes, flat.codes)


@per_scheme
@per_kind
def test_last_block_is_filled_with_zeros(scheme, double):
    made = layer(scheme, double, out=5, in_=7)
    assert made.base_weight_quantized.dequantize().shape == (5, 7)
    assert made.base_weight_quantized.codes.shape == (1, 32)
    # One block: its scale is the mean of all, and comes back exactly from 8 bits.
    whole = np.zeros((1, 64), np.float32)
    whole[0, :35] = weight(5, 7).reshape(-1)
    expected = FORMATS[scheme].decode(encode(scheme, whole), 64)[0]
    assert not expected[35:].any()
    np.testing.assert_array_equal(made.base_weight_quantized.dequantize().reshape(-1), expected[:35])


@per_scheme
@per_kind
def test_blocks_of_zeros_are_zeros(scheme, double):
    values = weight()
    values[5] = 0
    base = QLoraLayer.from_lora_double_quant if double else QLoraLayer.from_lora
    assert not base(values, pair(), scheme).base_weight_quantized.dequantize()[5].any()


@per_scheme
def test_double_quantization_keeps_codes_and_moves_scales_a_little(scheme):
    plain, double = (layer(scheme, kind).base_weight_quantized for kind in (False, True))
    np.testing.assert_array_equal(plain.codes, double.codes)
    scales = plain.scales.astype(np.float64)
    # A code of the dynamic map is at most 0.9 / 64 / 2 of the greatest deviation from the mean away.
    allowed = np.abs(scales - scales.mean()).max() * 0.9 / 128 + 1e-7
    moved = double.scales.values() - scales
    assert 0 < np.abs(moved).max() <= allowed


@per_scheme
@per_kind
def test_forward_is_base_plus_adapter(scheme, double):
    made = layer(scheme, double)
    x = np.random.default_rng(3).standard_normal((2, 5, IN)).astype(np.float32)
    y = made.forward(x)
    expected = x.astype(np.float64) @ exact_weight(made).T
    assert (y.dtype, y.shape) == (np.float32, (2, 5, OUT))
    # Sums of 192 products in f32.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@per_scheme
@per_kind
def test_merged_weight_is_base_plus_scaled_product(scheme, double):
    made = layer(scheme, double)
    merged = made.merge_to_f32()
    assert (merged.dtype, merged.shape) == (np.float32, (OUT, IN))
    np.testing.assert_allclose(merged, exact_weight(made), rtol=0, atol=1e-5)


def test_adapter_of_zeros_leaves_the_base():
    zeros = LoraPair(pair().a, np.zeros((OUT, RANK), np.float32), 2.0)
    made = QLoraLayer.from_lora(weight(), zeros)
    np.testing.assert_array_equal(made.merge_to_f32(), made.base_weight_quantized.dequantize())


def test_trained_arrays_are_the_layers_own():
    given = pair()
    made = QLoraLayer.from_lora(weight(), given)
    a, b = made.trainable_params()
    assert a is made.lora_a and b is made.lora_b
    before = made.forward(np.ones((1, IN), np.float32))
    a += 1
    b *= 2
    np.testing.assert_array_equal(given.a, pair().a)
    np.testing.assert_array_equal(given.b, pair().b)
    after = made.forward(np.ones((1, IN), np.float32))
    assert np.abs(after - before).max() > 1
    np.testing.assert_allclose(made.merge_to_f32(), exact_weight(made), rtol=0, atol=1e-4)


@per_scheme
def test_memory_is_counted_in_bytes(scheme):
    blocks = OUT * IN // 64
    plain, double = (layer(scheme, kind).memory_stats() for kind in (False, True))
    assert plain.unquantized == double.unquantized == OUT * IN * 4
    assert plain.adapter == double.adapter == 4 * RANK * (OUT + IN)
    assert plain.quantized == blocks * (32 + 4)
    # A byte for each block's scale, an f32 for each 256 of them, and the mean.
    assert double.quantized == blocks * (32 + 1) + 4 * (blocks // 256 + 1) + 4
    for stats in (plain, double):
        assert stats.total == stats.quantized + stats.adapter
        assert stats.ratio == stats.unquantized / stats.quantized


@per_kind
def test_layer_says_how_its_scales_are_stored(double):
    assert layer(DType.NF4, double).is_double_quantized is double


def test_base_is_int4_unless_said_otherwise():
    assert QLoraLayer.from_lora(weight(), pair()).base_weight_quantized.scheme is DType.INT4
    assert QLoraLayer.from_lora_double_quant(weight(), pair()).base_weight_quantized.scheme is DType.INT4


def test_other_formats_are_refused():
    with pytest.raises(WeightError, match="q4_k is not a format of QLoRA"):
        layer(DType.Q4_K)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (OUT, IN, 1)])
def test_base_that_is_no_matrix_is_refused(shape):
    with pytest.raises(WeightError, match="is no matrix"):
        QLoraLayer.from_lora(np.zeros(shape, np.float32), pair())


def test_adapter_of_another_shape_is_refused():
    with pytest.raises(WeightError, match=r"for a weight \[96, 128\], but the base is \[96, 192\]"):
        QLoraLayer.from_lora(weight(), pair(in_=128))


def test_dora_pair_is_refused():
    dora = LoraPair(pair().a, pair().b, 1.0, np.ones(OUT, np.float32))
    with pytest.raises(WeightError, match="a DoRA pair has a magnitude"):
        QLoraLayer.from_lora(weight(), dora)


def test_base_with_nan_is_refused():
    values = weight()
    values[1, 1] = np.nan
    with pytest.raises(WeightError, match="NaN or infinite"):
        QLoraLayer.from_lora(values, pair())


def test_input_of_another_width_is_refused():
    with pytest.raises(WeightError, match="does not fit"):
        layer(DType.NF4).forward(np.zeros((1, IN + 1), np.float32))
