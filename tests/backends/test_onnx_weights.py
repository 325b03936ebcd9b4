"""Packed weights in ONNX: stored to the bit, gathered to the bit, multiplied as the interpreter does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx
import pytest

from rlxc.backends.onnx.external import PAGE
from rlxc.backends.onnx.layout_costs import layouts_of
from rlxc.backends.onnx.runtime import installed_runtime
from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import WeightLayout
from rlxc.weights.formats import FORMATS

Build = Callable[..., Any]
PACKED = [dtype for dtype in DType if dtype.is_packed]
CODEBOOKS = [DType.NF4, DType.FP4]
"""Formats whose codebooks have fractions."""
INTEGERS = [dtype for dtype in PACKED if dtype not in CODEBOOKS]
FLOATS = [DType.F32, DType.F16, DType.BF16]
WITH_MINS = [dtype for dtype in PACKED if FORMATS[dtype].has_mins]
IN, OUT = 512, 48

LINEAR = f"""
graph linear
input %x: f32[batch, seq, {IN}]
weight @w: {{dtype}}[{OUT}, {IN}]
%y = {{op}}(%x, @w)
output %y
"""

EMBED = f"""
graph embed
input %ids: i64[batch, seq]
weight @w: {{dtype}}[{OUT}, {IN}]
%y = Embed(%ids, @w)
output %y
"""

TIED = f"""
graph tied
input %ids: i64[batch, seq]
weight @w: {{dtype}}[{OUT}, {IN}]
%x = Embed(%ids, @w)
%y = DequantMatMul(%x, @w)
output %x
output %y
"""


def laid_out(text: str, layout: WeightLayout | None) -> str:
    """The text with a layout of its weight."""
    if layout is None:
        return text
    size = f"[{OUT}, {IN}]"
    return text.replace(size, f"{size} layout({layout.bits}, {layout.block}, {layout.tile})")


def activations(tokens: int) -> npt.NDArray[np.float32]:
    """``[1, tokens, IN]`` with a mean that is not zero, so that minimums count."""
    return (0.3 + np.random.default_rng(1).standard_normal((1, tokens, IN))).astype(np.float32)


def relative_error(result: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The greatest error, as a fraction of the expected values' root mean square."""
    return float(np.abs(result - expected).max() / np.sqrt((expected**2).mean()))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", PACKED)
def test_float32_product_equals_the_interpreter(build: Build, dtype: DType, tokens: int) -> None:
    built = build(LINEAR.format(dtype=dtype, op="DequantMatMul"))
    x = activations(tokens)
    # Sums of 512 products in f32, in an unknown order: 512 * 2^-24 = 3e-5 at worst.
    assert relative_error(built.run({"x": x})["y"], built.interpret({"x": x})["y"]) < 3e-5


@pytest.mark.parametrize("dtype", [DType.TQ1_0, DType.Q1_0, DType.Q2_K, DType.INT4, DType.IQ3_S, DType.Q4_0])
def test_every_layout_multiplies_and_looks_up_exactly(build: Build, dtype: DType) -> None:
    ids = np.array([[5, 0, 47]])
    expected = build(TIED.format(dtype=dtype)).interpret({"ids": ids})
    for layout in layouts_of(installed_runtime(), dtype):
        results = build(laid_out(TIED.format(dtype=dtype), layout), folder=str(layout)).run({"ids": ids})
        np.testing.assert_array_equal(results["x"], expected["x"])
        # As of test_tied_table_serves_both_uses.
        assert relative_error(results["y"], expected["y"]) < 2e-4


@pytest.mark.parametrize("layout", [WeightLayout(2, 32, 1), WeightLayout(4, 64, 1), WeightLayout(4, 32, 16)])
def test_layout_that_cannot_hold_a_format_is_refused(build: Build, layout: WeightLayout) -> None:
    with pytest.raises(GraphError, match="cannot store q4_0 in"):
        build(laid_out(LINEAR.format(dtype="q4_0", op="DequantMatMul"), layout))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", FLOATS)
def test_product_with_a_float_weight_equals_the_interpreter(build: Build, dtype: DType, tokens: int) -> None:
    built = build(LINEAR.format(dtype=dtype, op="MatMul"))
    x = activations(tokens)
    assert relative_error(built.run({"x": x})["y"], built.interpret({"x": x})["y"]) < 3e-5


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_int8_product_is_close_to_the_interpreter(build: Build, dtype: DType, tokens: int) -> None:
    built = build(LINEAR.format(dtype=dtype, op="DequantMatMul"), activations="int8")
    x = activations(tokens)
    result, expected = built.run({"x": x})["y"], built.interpret({"x": x})["y"]
    # A step is a block's maximum / 127, and the error a step / sqrt(12). The maximum of 16 to 64 normal numbers is near
    # 2 standard deviations: 0.5%. That of 128 or 256 is about 3: 0.7%, and more by chance, as a row has few blocks.
    block = next(a.i for a in built.model.graph.node[0].attribute if a.name == "block_size")
    root_mean_square = np.sqrt(((result - expected) ** 2).mean() / (expected**2).mean())
    assert 1e-5 < root_mean_square < (0.008 if block <= 64 else 0.012)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", CODEBOOKS)
def test_product_with_a_codebook_is_exact_whatever_the_activations(
    build: Build, dtype: DType, tokens: int
) -> None:
    built = build(LINEAR.format(dtype=dtype, op="DequantMatMul"), activations="int8")
    x = activations(tokens)
    assert relative_error(built.run({"x": x})["y"], built.interpret({"x": x})["y"]) < 3e-5


@pytest.mark.parametrize("dtype", CODEBOOKS)
def test_every_code_of_a_codebook_is_multiplied_to_the_bit(build: Build, dtype: DType) -> None:
    built = build(LINEAR.format(dtype=dtype, op="DequantMatMul"))
    assert len(np.unique(built.region("w.codes"))) == 256
    # Rows of the identity: each sum has one term that is not zero.
    y = built.run({"x": np.eye(IN, dtype=np.float32)[None]})["y"]
    np.testing.assert_array_equal(y[0].T, built.tensors.decoded["w"])


@pytest.mark.parametrize("dtype", CODEBOOKS)
def test_codes_of_a_codebook_are_the_file_s_bytes(build: Build, dtype: DType) -> None:
    built = build(TIED.format(dtype=dtype))
    blocks = built.tensors.packed["w"].reshape(-1, 36)
    np.testing.assert_array_equal(built.region("w.codes"), blocks[:, 4:].ravel())
    np.testing.assert_array_equal(built.region("w.table").ravel(), blocks[:, 4:].ravel())
    np.testing.assert_array_equal(built.region("w.scales"), blocks[:, :4].copy().view(np.float32).ravel())


@pytest.mark.parametrize(
    ("dtype", "bits", "block"),
    [
        *((DType.INT4, 4, 64), (DType.Q1_0, 4, 128), (DType.TQ1_0, 4, 256), (DType.TQ2_0, 4, 256)),
        *((DType.IQ3_S, 4, 32), (DType.IQ1_S, 4, 32), (DType.IQ1_M, 4, 16), (DType.IQ4_NL, 8, 32)),
        *((DType.IQ2_XXS, 8, 32), (DType.IQ2_XS, 8, 16), (DType.MXFP4, 8, 32), (DType.NVFP4, 8, 16)),
    ],
)
def test_integers_are_as_narrow_and_scales_as_few_as_exactness_allows(
    build: Build, dtype: DType, bits: int, block: int
) -> None:
    built = build(LINEAR.format(dtype=dtype, op="DequantMatMul"))
    assert built.region("w.codes").nbytes == OUT * IN * bits // 8
    assert built.region("w.scales").shape == (OUT, IN // block)


@pytest.mark.parametrize("dtype", [*FLOATS, *PACKED])
def test_embedding_equals_the_decoded_rows_bit_for_bit(build: Build, dtype: DType) -> None:
    built = build(EMBED.format(dtype=dtype))
    ids = np.array([[0, OUT - 1, 17, 17, 3]])
    np.testing.assert_array_equal(built.run({"ids": ids})["y"], built.tensors.decoded["w"][ids])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_stored_parts_decode_to_the_file_s_weights_bit_for_bit(build: Build, dtype: DType) -> None:
    for layout in [None, *layouts_of(installed_runtime(), dtype)]:
        check_stored_parts(build, dtype, layout)


def check_stored_parts(build: Build, dtype: DType, layout: WeightLayout | None) -> None:
    built = build(laid_out(EMBED.format(dtype=dtype), layout), folder=str(layout))
    names = {tensor.name for tensor in built.model.graph.initializer}
    codes, scales = built.region("w.table"), built.region("w.scales")
    attributes = {a.name: a.i for a in built.model.graph.node[0].attribute}
    bits, block = attributes["bits"], attributes["block_size"]
    middle = 1 << (bits - 1)
    zero_point = (
        int(built.region("w.zero_points").flat[0]) & (2**bits - 1) if "w.zero_points" in names else middle
    )
    if layout is not None:
        assert (bits, block) == (layout.bits, layout.block)
    codes = np.stack([codes >> place & (1 << bits) - 1 for place in range(0, 8, bits)], axis=-1)
    signed = codes.reshape(OUT, -1, block).astype(np.int32) - zero_point
    weights = signed.astype(np.float32) * scales[..., None]
    if "w.mins" in names:
        weights -= built.region("w.mins")[..., None]
    for tensor in built.model.graph.initializer:
        if tensor.name.startswith("remainder."):  # of odd values
            weights += onnx.numpy_helper.to_array(tensor) * scales[..., None]
    np.testing.assert_array_equal(weights.reshape(OUT, IN), built.tensors.decoded["w"])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_product_reads_the_same_stored_parts(build: Build, dtype: DType) -> None:
    linear = build(LINEAR.format(dtype=dtype, op="DequantMatMul"), folder="linear")
    embed = build(EMBED.format(dtype=dtype), folder="embed")
    np.testing.assert_array_equal(linear.region("w.codes").ravel(), embed.region("w.table").ravel())
    np.testing.assert_array_equal(linear.region("w.scales"), embed.region("w.scales"))
    if dtype in WITH_MINS:
        # What the product leaves out: the code that stands in the middle, 8 or 128, less the least, which is zero.
        middle = (FORMATS[dtype].code_max + 1) // 2
        offsets = np.float32(middle) * embed.region("w.scales") - embed.region("w.mins")
        np.testing.assert_array_equal(linear.region("w.offsets"), offsets)


@pytest.mark.parametrize("dtype", [DType.Q8_0, DType.Q4_K, DType.Q6_K, DType.NF4])
def test_tied_table_is_stored_once(build: Build, dtype: DType) -> None:
    built = build(TIED.format(dtype=dtype))
    places = {}
    for tensor in built.model.graph.initializer:
        if tensor.name in ("w.table", "w.codes"):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            places[tensor.name] = (entries["offset"], entries["length"])
    assert places["w.table"] == places["w.codes"]


@pytest.mark.parametrize("dtype", PACKED)
def test_tied_table_serves_both_uses(build: Build, dtype: DType) -> None:
    built = build(TIED.format(dtype=dtype))
    ids = np.array([[5, 0, 47]])
    results, expected = built.run({"ids": ids}), built.interpret({"ids": ids})
    np.testing.assert_array_equal(results["x"], expected["x"])
    # As above, but a row times itself is a sum of squares, up to 7 times the root mean square of all results.
    assert relative_error(results["y"], expected["y"]) < 2e-4


@pytest.mark.parametrize("dtype", [DType.Q8_0, DType.Q4_0, DType.Q4_1, DType.Q5_K, DType.NF4])
def test_bias_is_added(build: Build, dtype: DType) -> None:
    text = LINEAR.format(dtype=dtype, op="DequantMatMul").replace("@w)", "@w, @b)")
    built = build(text.replace("%y =", f"weight @b: f32[{OUT}]\n%y ="))
    x = activations(3)
    result = built.run({"x": x})["y"]
    assert relative_error(result, built.interpret({"x": x})["y"]) < 3e-5
    assert np.abs(result - x @ built.tensors.decoded["w"].T).max() > 0.1


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_is_added_to_a_float_product(build: Build, dtype: DType) -> None:
    text = LINEAR.format(dtype=dtype, op="MatMul").replace("@w)", "@w, @b)")
    built = build(text.replace("%y =", f"weight @b: f32[{OUT}]\n%y ="))
    x = activations(3)
    assert relative_error(built.run({"x": x})["y"], built.interpret({"x": x})["y"]) < 3e-5


@pytest.mark.parametrize(
    ("whole", "first", "second"),
    [
        (DType.Q8_0, DType.Q5_0, DType.Q8_0),
        (DType.Q8_0, DType.Q8_0, DType.Q5_0),
        (DType.Q4_K, DType.Q4_K, DType.Q4_K),
        (DType.Q6_K, DType.Q6_K, DType.Q6_K),
        (DType.NF4, DType.NF4, DType.NF4),
        (DType.INT4, DType.INT4, DType.INT4),
    ],
)
def test_concatenated_weights_keep_every_part_exact(
    build: Build, whole: DType, first: DType, second: DType
) -> None:
    parts = f"concat(@a: {first}[16, {IN}], @b: {second}[{OUT - 16}, {IN}])"
    built = build(EMBED.format(dtype=whole).replace(f"[{OUT}, {IN}]\n", f"[{OUT}, {IN}] = {parts}\n"))
    ids = np.arange(OUT)[None]
    expected = np.concatenate([built.tensors.decoded["a"], built.tensors.decoded["b"]])
    np.testing.assert_array_equal(built.run({"ids": ids})["y"][0], expected)


def test_concatenated_float_weights_keep_their_order(build: Build) -> None:
    parts = f"concat(@a: f16[16, {IN}], @b: f16[{OUT - 16}, {IN}])"
    text = EMBED.format(dtype="f16").replace(f"[{OUT}, {IN}]\n", f"[{OUT}, {IN}] = {parts}\n")
    built = build(text)
    expected = np.concatenate([built.tensors.decoded["a"], built.tensors.decoded["b"]])
    np.testing.assert_array_equal(built.run({"ids": np.arange(OUT)[None]})["y"][0], expected)


def test_stack_of_an_encoded_and_a_given_part_widens_both(build: Build) -> None:
    parts = f"concat(@a: q4_0[16, {IN}] = encode(@x: f32[16, {IN}]), @b: q8_0[{OUT - 16}, {IN}])"
    built = build(EMBED.format(dtype="q8_0").replace(f"[{OUT}, {IN}]\n", f"[{OUT}, {IN}] = {parts}\n"))
    encoded = gguf.quantize(built.tensors.decoded["x"], gguf.GGMLQuantizationType.Q4_0)
    first = gguf.dequantize(encoded, gguf.GGMLQuantizationType.Q4_0)
    expected = np.concatenate([first, built.tensors.decoded["b"]])
    np.testing.assert_array_equal(built.run({"ids": np.arange(OUT)[None]})["y"][0], expected)


def test_folded_weight_multiplies_as_the_interpreter_says(build: Build) -> None:
    fold = f"fold(@base: q4_k[{OUT}, {IN}], @a: f32[4, {IN}], @b: f32[{OUT}, 4], 2.0)"
    text = LINEAR.format(dtype="f32", op="MatMul").replace(f"[{OUT}, {IN}]\n", f"[{OUT}, {IN}] = {fold}\n")
    built, x = build(text), activations(3)
    assert relative_error(built.run({"x": x})["y"], built.interpret({"x": x})["y"]) < 3e-5


def test_losses_of_encoded_weights_are_told(build: Build) -> None:
    built = build(EMBED.format(dtype="q8_0").replace("\n%y", f" = encode(@x: f32[{OUT}, {IN}])\n%y"))
    # Half a step of a 127th of a block's largest value, which is about 2 standard deviations.
    assert 0.003 < built.losses.by_weight["w"].relative < 0.01


def test_narrow_weight_that_is_read_twice_is_cast_once(build: Build) -> None:
    built = build(
        """graph twice
input %x: f32[batch, seq, 32]
weight @w: f16[32, 32]
%a = MatMul(%x, @w)
%b = MatMul(%a, @w)
output %b
"""
    )
    assert [node.op_type for node in built.model.graph.node].count("Cast") == 1
    x = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
    # Two f32 sums over 32 products of values below 1.
    np.testing.assert_allclose(built.run({"x": x})["b"], built.interpret({"x": x})["b"], rtol=0, atol=1e-5)


def test_weights_start_on_pages(build: Build) -> None:
    built = build(TIED.format(dtype="q4_k"))
    offsets = [
        int(entry.value)
        for tensor in built.model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert len(offsets) >= 4
    assert [offset % PAGE for offset in offsets] == [0] * len(offsets)


@pytest.mark.parametrize("dtype", [DType.Q4_K, DType.Q8_0, DType.Q2_K, DType.NF4])
def test_rows_unpacked_in_pieces_are_the_same(
    build: Build, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(TIED.format(dtype=dtype), folder="whole")
    monkeypatch.setattr("rlxc.backends.onnx.storage.CHUNK_BYTES", 5 * FORMATS[dtype].row_bytes(IN))
    pieces = build(TIED.format(dtype=dtype), folder="pieces")
    assert (pieces.folder / "weights.bin").read_bytes() == (whole.folder / "weights.bin").read_bytes()
