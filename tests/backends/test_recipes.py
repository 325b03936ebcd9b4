"""Recipes give the bytes that plain numpy gives, a bounded piece at a time, and say what encoding cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize
from random_tensors import RandomTensors

from rlxc.backends import recipes
from rlxc.backends.recipes import Losses, packed_rows
from rlxc.dtypes import DType
from rlxc.errors import RlxcError, UnsupportedError, WeightError
from rlxc.ir import Graph, Weight, parse
from rlxc.weights.formats import FORMATS, BlockFormat

Array = npt.NDArray[Any]
OUT, IN, RANK = 40, 64, 5

# Sums of 5 products, and of two terms of size 1, in f32.
ROUNDING = 1e-6


class Recipe:
    """One weight of a graph on random tensors, and its bytes."""

    def __init__(self, line: str) -> None:
        graph: Graph = parse(f"graph g\nweight @w: {line}")
        self.weight: Weight = graph.weights[0]
        self.tensors = RandomTensors(graph, seed=3)
        self.losses = Losses()

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        return self.tensors.packed[name]

    def pieces(self) -> list[Array]:
        return list(packed_rows(self.weight, self.read, self.losses))

    def bytes(self) -> bytes:
        return b"".join(piece.tobytes() for piece in self.pieces())

    def values(self) -> Array:
        """The decoded rows."""
        rows = np.concatenate(self.pieces())
        columns = (*self.weight.type.shape, 1)[1]
        return FORMATS[self.weight.type.dtype].decode(rows, int(columns))

    def __getitem__(self, tensor: str) -> Array:
        """A tensor of the file, decoded, in f64."""
        return self.tensors.decoded[tensor].astype(np.float64)


def fold(
    base: str = f"@base: q4_0[{OUT}, {IN}]", number: int = 0, scale: float = 0.5, extra: str = ""
) -> str:
    """The text of an adapter folded into a matrix."""
    a, b = f"@a{number}: f32[{RANK}, {IN}]", f"@b{number}: f32[{OUT}, {RANK}]"
    return f"fold({base}, {a}, {b}{extra}, {scale})"


# --- the file's own bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_tensors_of_the_file_are_not_copied(dtype: DType) -> None:
    recipe = Recipe(f"{dtype}[3, 512] = source('file')".replace("'", '"'))
    (piece,) = recipe.pieces()
    assert piece.shape == (3, FORMATS[dtype].row_bytes(512))
    assert np.shares_memory(piece, recipe.tensors.packed["file"])


def test_experts_are_rows_one_expert_after_the_other() -> None:
    plain = Recipe('q8_0[3, 5, 64] = source("file")')
    (piece,) = plain.pieces()
    assert piece.shape == (15, FORMATS[DType.Q8_0].row_bytes(64))
    assert np.shares_memory(piece, plain.tensors.packed["file"])
    encoded = Recipe("q8_0[3, 5, 64] = encode(@given: f32[3, 5, 64])")
    exact = encoded.tensors.decoded["given"].reshape(15, 64)
    assert encoded.bytes() == quantize(exact, GGMLQuantizationType.Q8_0).tobytes()


def test_vectors_are_rows_of_one_element() -> None:
    recipe = Recipe("f32[7] = concat(@a: f32[3], @b: f32[4])")
    assert [piece.shape for piece in recipe.pieces()] == [(3, 4), (4, 4)]
    np.testing.assert_array_equal(recipe.values()[:, 0], np.concatenate([recipe["a"], recipe["b"]]))


def test_stacked_tensors_are_not_copied() -> None:
    recipe = Recipe("q6_k[5, 256] = concat(@a: q6_k[2, 256], @b: q6_k[3, 256])")
    pieces = recipe.pieces()
    for name, piece in zip("ab", pieces, strict=True):
        assert np.shares_memory(piece, recipe.tensors.packed[name])


# --- encoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.Q8_0, DType.Q4_0, DType.F16, DType.BF16])
def test_encoded_rows_are_those_of_gguf(dtype: DType) -> None:
    recipe = Recipe(f"{dtype}[{OUT}, {IN}] = encode(@x: f32[{OUT}, {IN}])")
    expected = quantize(recipe.tensors.decoded["x"], GGMLQuantizationType[dtype.name])
    assert recipe.bytes() == expected.tobytes()


def test_stack_of_encoded_and_given_parts_keeps_their_order() -> None:
    parts = (
        "@a: q8_0[2, 64] = encode(@x: q5_1[2, 64]), @b: q8_0[3, 64], @c: q8_0[2, 64] = encode(@y: f16[2, 64])"
    )
    recipe = Recipe(f"q8_0[7, 64] = concat({parts})")
    x, y = (
        quantize(recipe.tensors.decoded[name], GGMLQuantizationType.Q8_0).tobytes() for name in ("x", "y")
    )
    assert recipe.bytes() == x + recipe.tensors.packed["b"].tobytes() + y


def test_encoding_a_stack_is_stacking_what_was_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pieces of 3 rows, which cross the parts' edges at rows 4 and 5.
    monkeypatch.setattr(recipes, "CHUNK_VALUES", 3 * IN)
    recipe = Recipe(
        f"q8_0[12, {IN}] = encode(@s: f32[12, {IN}] = concat(@a: f32[4, {IN}], @b: f32[1, {IN}], @c: q4_0[7, {IN}]))"
    )
    whole = np.concatenate([recipe.tensors.decoded[name] for name in "abc"])
    assert recipe.bytes() == quantize(whole, GGMLQuantizationType.Q8_0).tobytes()


def test_what_was_encoded_twice_lost_twice() -> None:
    recipe = Recipe(f"q8_0[{OUT}, {IN}] = encode(@m: q4_0[{OUT}, {IN}] = encode(@x: f32[{OUT}, {IN}]))")
    once = dequantize(
        quantize(recipe.tensors.decoded["x"], GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0
    )
    assert recipe.bytes() == quantize(once, GGMLQuantizationType.Q8_0).tobytes()


def test_value_that_cannot_be_encoded_is_an_error_that_names_the_weight() -> None:
    recipe = Recipe("q8_0[2, 32] = encode(@x: f32[2, 32])")
    recipe.tensors.packed["x"].view(np.float32)[40] = np.nan
    with pytest.raises(WeightError, match=r"^@w: NaN"):
        recipe.bytes()


# --- folding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["f32", "bf16", "q4_0"])
def test_folded_matrix_is_base_plus_scaled_product(base: str) -> None:
    recipe = Recipe(f"f32[{OUT}, {IN}] = " + fold(f"@base: {base}[{OUT}, {IN}]"))
    expected = recipe["base"] + 0.5 * recipe["b0"] @ recipe["a0"]
    np.testing.assert_allclose(recipe.values(), expected, rtol=0, atol=ROUNDING)
    assert np.abs(expected - recipe["base"]).max() > 1000 * ROUNDING


def test_folded_embedding_is_base_plus_transposed_product() -> None:
    vocab, width = 50, 32
    parts = f"@base: q8_0[{vocab}, {width}], @a: f32[{RANK}, {vocab}], @b: f32[{width}, {RANK}]"
    recipe = Recipe(f"f32[{vocab}, {width}] = fold_transposed({parts}, -1.5)")
    expected = recipe["base"] - 1.5 * (recipe["b"] @ recipe["a"]).T
    np.testing.assert_allclose(recipe.values(), expected, rtol=0, atol=ROUNDING)


def test_rows_of_a_folded_dora_adapter_have_its_magnitudes() -> None:
    recipe = Recipe(f"f32[{OUT}, {IN}] = " + fold(extra=f", @m: f32[{OUT}]"))
    plain = recipe["base"] + 0.5 * recipe["b0"] @ recipe["a0"]
    expected = np.array([m * row / np.sqrt((row**2).sum()) for m, row in zip(recipe["m"], plain)])
    np.testing.assert_allclose(recipe.values(), expected, rtol=0, atol=ROUNDING)


def test_row_of_zeros_has_no_direction_and_stays() -> None:
    recipe = Recipe(f"f32[{OUT}, {IN}] = " + fold(f"@base: f32[{OUT}, {IN}]", extra=f", @m: f32[{OUT}]"))
    recipe.tensors.packed["base"].view(np.float32)[:IN] = 0
    recipe.tensors.packed["b0"].view(np.float32)[:RANK] = 0
    values = recipe.values()
    assert not values[0].any()
    assert np.isfinite(values).all()
    assert values[1].any()


def test_adapters_are_folded_one_after_the_other() -> None:
    first = f"@first: f32[{OUT}, {IN}] = " + fold(extra=f", @m: f32[{OUT}]")
    recipe = Recipe(f"f32[{OUT}, {IN}] = " + fold(first, number=1, scale=2.0))
    plain = recipe["base"] + 0.5 * recipe["b0"] @ recipe["a0"]
    plain *= (recipe["m"] / np.sqrt((plain**2).sum(1)))[:, None]
    expected = plain + 2.0 * recipe["b1"] @ recipe["a1"]
    np.testing.assert_allclose(recipe.values(), expected, rtol=0, atol=ROUNDING)


def test_fold_that_overflows_is_an_error_that_names_the_weight() -> None:
    recipe = Recipe(f"f32[{OUT}, {IN}] = " + fold(scale=1e39))
    with pytest.raises(WeightError, match=r"^@w: folding .* infinite .*smaller scale$"):
        recipe.bytes()


def test_folded_matrix_in_a_stack_is_encoded_in_its_own_rows() -> None:
    folded = f"@m: q8_0[{OUT}, {IN}] = encode(@f: f32[{OUT}, {IN}] = {fold()})"
    recipe = Recipe(f"q8_0[{OUT + 2}, {IN}] = concat(@k: q8_0[2, {IN}], {folded})")
    expected = recipe["base"] + 0.5 * recipe["b0"] @ recipe["a0"]
    values = recipe.values()
    np.testing.assert_array_equal(values[:2], recipe["k"])
    # Q8_0 has steps of a 127th of a block's largest value: a code is at most one off, and the f16 scale has 11 bits.
    blocks = np.abs(expected).reshape(OUT, -1, 32).max(2).repeat(32, axis=1)
    assert (np.abs(values[2:] - expected) <= blocks * (1 / 127 + 2**-11)).all()


# --- balancing ----------------------------------------------------------------------------------------------------

# Of the 20 channels of a vector, 16 are rotated.
PAIRS = {
    "balance": [[i, i + 8] for i in range(8)] + [[i] for i in range(16, 20)],
    "balance_interleaved": [[2 * i, 2 * i + 1] for i in range(8)] + [[i] for i in range(16, 20)],
}


def balanced(own: Array, other: Array, pairs: list[list[int]]) -> Array:
    """``own * sqrt(|other| / |own|)``, pair by pair."""
    sizes = np.empty((2, len(own)))
    for i, vector in enumerate((own, other)):
        for pair in pairs:
            sizes[i, pair] = np.sqrt(sum(vector[channel] ** 2 for channel in pair))
        sizes[i] = np.maximum(sizes[i], sizes[i].sum() / len(own) / 100)
    return own * np.sqrt(sizes[1] / sizes[0])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("zeros", [[], [3], [2, 3], [3, 11], [17], range(19)], ids=str)
def test_balanced_vectors_meet_half_way(name: str, zeros: list[int]) -> None:
    first = Recipe(f"f32[20] = {name}(@a: f32[20], @b: f32[20], 16)")
    second = Recipe(f"f32[20] = {name}(@b: f32[20], @a: f32[20], 16)")
    second.tensors = first.tensors
    first.tensors.packed["b"].view(np.float32)[4] *= 1e4
    first.tensors.packed["b"].view(np.float32)[zeros] = 0
    a, b = (first.tensors.packed[key].view(np.float32).astype(np.float64) for key in "ab")
    # Rounded to f32 once.
    np.testing.assert_allclose(first.values()[:, 0], balanced(a, b, PAIRS[name]), rtol=1e-7, atol=0)
    np.testing.assert_allclose(second.values()[:, 0], balanced(b, a, PAIRS[name]), rtol=1e-7, atol=0)
    # And so twice in their product.
    products = first.values()[:, 0].astype(np.float64) * second.values()[:, 0]
    np.testing.assert_allclose(products, a * b, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["a", "b"])
def test_next_to_a_vector_of_zeros_nothing_changes(name: str) -> None:
    recipe = Recipe("f32[20] = balance(@a: f32[20], @b: f32[20], 16)")
    recipe.tensors.packed[name][:] = 0
    assert recipe.bytes() == recipe.tensors.packed["a"].tobytes()


def test_parts_of_a_balanced_vector_may_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = "@a: f32[20] = concat(@x: f32[7], @y: f32[13]), @b: f32[20]"
    recipe = Recipe(f"f32[20] = balance({parts}, 0)")
    expected = balanced(np.concatenate([recipe["x"], recipe["y"]]), recipe["b"], [[i] for i in range(20)])
    monkeypatch.setattr(recipes, "CHUNK_VALUES", 3)
    np.testing.assert_allclose(recipe.values()[:, 0], expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vector_that_is_not_finite_cannot_be_balanced(name: str, value: float) -> None:
    recipe = Recipe("f32[20] = balance(@a: f32[20], @b: f32[20], 16)")
    recipe.tensors.packed[name].view(np.float32)[5] = value
    with pytest.raises(WeightError, match=r"^@w: balancing .* infinite or not a number; .* than int8$"):
        recipe.bytes()


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, OUT])
def test_pieces_give_the_same_bytes_as_the_whole(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"q8_0[{OUT}, {IN}] = encode(@f: f32[{OUT}, {IN}] = {fold(extra=f', @m: f32[{OUT}]')})"
    whole = Recipe(line)
    expected = whole.bytes()
    monkeypatch.setattr(recipes, "CHUNK_VALUES", rows_at_once * IN + IN - 1)
    pieces = Recipe(line)
    assert [len(piece) for piece in pieces.pieces()] == [
        min(rows_at_once, OUT - start) for start in range(0, OUT, rows_at_once)
    ]
    # A product of other shape may add up in another order: then a code may differ by one, in few places.
    found, wanted = np.frombuffer(pieces.bytes(), np.int8), np.frombuffer(expected, np.int8)
    assert (found != wanted).mean() < 0.01
    assert pieces.losses.by_weight["w"].relative == pytest.approx(
        whole.losses.by_weight["w"].relative, rel=1e-3
    )


def test_only_a_piece_of_a_large_matrix_is_ever_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = fold(f"@base: q4_0[{OUT}, {IN}] = encode(@given: f16[{OUT}, {IN}])")
    recipe = Recipe(f"q8_0[{OUT}, {IN}] = encode(@f: f32[{OUT}, {IN}] = {folded})")
    sizes = []
    plain = BlockFormat.decode

    def decode(form: BlockFormat, data: Any, columns: int) -> Any:
        sizes.append(len(data) * columns)
        return plain(form, data, columns)

    monkeypatch.setattr(BlockFormat, "decode", decode)
    monkeypatch.setattr(recipes, "CHUNK_VALUES", 1000)
    assert max(len(piece) * IN for piece in recipe.pieces()) <= 1000
    assert max(sizes) <= 1000  # A and B, 320 and 200 numbers, are whole
    assert sizes.count(RANK * IN) == sizes.count(OUT * RANK) == 1  # and decoded once


# --- losses -------------------------------------------------------------------------------------------------------


def test_loss_of_encoding_is_relative_to_the_values() -> None:
    recipe = Recipe(f"q4_0[{OUT}, {IN}] = encode(@x: f32[{OUT}, {IN}])")
    difference = recipe.values() - recipe["x"]
    loss = recipe.losses.by_weight["w"]
    expected = np.sqrt((difference**2).sum() / (recipe["x"] ** 2).sum())
    assert 0.05 < expected < 0.2
    assert loss.relative == pytest.approx(expected, rel=1e-6)
    assert loss.of_change is None


def test_loss_of_folding_is_what_the_adapters_changed_in_their_own_directions() -> None:
    first = f"@first: f32[{OUT}, {IN}] = " + fold()
    twice = fold(first, number=1)
    recipe = Recipe(f"q8_0[{OUT}, {IN}] = encode(@second: f32[{OUT}, {IN}] = {twice})")
    change = 0.5 * recipe["b0"] @ recipe["a0"] + 0.5 * recipe["b1"] @ recipe["a1"]
    exact = recipe["base"] + change
    difference = recipe.values() - exact
    error = (difference**2).sum()
    directions = np.linalg.qr(np.concatenate([recipe["a0"], recipe["a1"]]).T)[0]
    loss = recipe.losses.by_weight["w"]
    # The difference of two f32 numbers of size 0.1 is a 1000th of that here, and right to 1e-4 of itself.
    assert loss.relative == pytest.approx(np.sqrt(error / (exact**2).sum()), rel=1e-3)
    lost = ((difference @ directions) ** 2).sum() / ((change @ directions) ** 2).sum()
    assert loss.of_change == pytest.approx(np.sqrt(lost), rel=1e-2)


def test_losses_of_a_stack_are_told_part_by_part() -> None:
    parts = ", ".join(f"@{name}: {dtype}" for name, dtype in PARTS.items())
    recipe = Recipe(f"q8_0[6, 64] = concat({parts})")
    recipe.bytes()
    assert list(recipe.losses.by_weight) == ["first", "third"]
    assert recipe.losses.by_weight["first"] != recipe.losses.by_weight["third"]


PARTS = {
    "first": "q8_0[2, 64] = encode(@x: f32[2, 64])",
    "second": "q8_0[2, 64]",
    "third": "q8_0[2, 64] = encode(@y: f32[2, 64])",
}


def test_encoding_zeros_loses_nothing() -> None:
    recipe = Recipe("q8_0[2, 32] = encode(@x: f32[2, 32])")
    recipe.tensors.packed["x"][:] = 0
    recipe.bytes()
    assert recipe.losses.by_weight["w"].relative == 0.0


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("q8_0[2, 32] = concat(@a: q8_0[1, 32], @b: q4_0[1, 32])", "@w stacks q4_0 and q8_0"),
        ("f32[2, 32] = alias(@other)", "of @w cannot be stored"),
        ("q8_0[2, 32] = encode(@a: f32[2, 32] = alias(@other))", "of @a cannot be stored"),
    ],
)
def test_recipe_without_bytes_is_refused(line: str, problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        Recipe(line).bytes()


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    recipe = Recipe("q8_0[2, 40] = encode(@x: f32[2, 40])")
    with pytest.raises(RlxcError, match="40 weights"):
        recipe.bytes()
