"""Tiles of 16 rows: a slow reader that follows the documentation finds in them what the model file has."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import MXFP4, NVFP4
from hypothesis import given
from hypothesis import strategies as st
from stored_weights import FLOATS, PACKED, random_weight, store

from rlxc.artifact.alignment import ALIGNMENT
from rlxc.backends.tvm.layout import FloatLayout, PackedLayout, in_tiles, layout_of
from rlxc.backends.tvm.layout_costs import layouts_of
from rlxc.backends.tvm.targets import TARGETS, find_target
from rlxc.dtypes import DType
from rlxc.weights.formats import FORMATS

Matrix = npt.NDArray[np.float32]

# What each format's blocks are, in numbers that do not come from the code under test: the width of a code, the code
# that stands for zero (0 where there is a codebook), and columns of a scale as stored and of a sub-block.
FACTS = {
    DType.Q4_0: (4, 8, 32, 32),
    DType.Q4_1: (4, 0, 32, 32),
    DType.Q5_0: (5, 16, 32, 32),
    DType.Q5_1: (5, 0, 32, 32),
    DType.Q8_0: (8, 128, 32, 32),
    DType.Q2_K: (2, 0, 256, 16),
    DType.Q3_K: (3, 4, 256, 16),
    DType.Q4_K: (4, 0, 256, 32),
    DType.Q5_K: (5, 0, 256, 32),
    DType.Q6_K: (6, 32, 256, 16),
    DType.IQ1_S: (3, 0, 256, 32),
    DType.IQ1_M: (3, 0, 256, 16),
    DType.IQ2_XXS: (3, 0, 256, 32),
    DType.IQ2_XS: (3, 0, 256, 16),
    DType.IQ2_S: (3, 0, 256, 16),
    DType.IQ3_XXS: (4, 0, 256, 32),
    DType.IQ3_S: (4, 0, 256, 32),
    DType.IQ4_NL: (4, 0, 32, 32),
    DType.IQ4_XS: (4, 0, 256, 32),
    DType.TQ1_0: (2, 1, 256, 32),
    DType.TQ2_0: (2, 1, 256, 32),
    DType.Q1_0: (1, 0, 128, 32),
    DType.MXFP4: (4, 0, 32, 32),
    DType.NVFP4: (4, 0, 16, 16),
    DType.NF4: (4, 0, 64, 32),
    DType.FP4: (4, 0, 64, 32),
    DType.INT4: (4, 8, 64, 32),
}
F32_SCALES = {DType.NF4, DType.FP4, DType.INT4}
BYTE_SCALES = {DType.MXFP4: MXFP4.e8m0_to_fp32_half, DType.NVFP4: NVFP4.ue4m3_to_fp32}
UNITS = {
    **dict.fromkeys([DType.IQ1_S, DType.IQ1_M, DType.IQ2_XXS, DType.IQ2_XS, DType.IQ2_S], 1 / 8),
    DType.IQ3_XXS: 1 / 4,
}
"""What scales are multiplied by beside their factors."""
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}
WITH_MINIMUMS = {DType.Q4_1, DType.Q5_1, DType.Q2_K, DType.Q4_K, DType.Q5_K}
# Bytes of a block here and in the model file, where they differ: 4- and 6-bit factors become bytes, and the small
# numbers of IQ1 to IQ3, of which a file has grids, and the five ternary digits of a byte become codes of whole bits.
GROWTH = {
    DType.Q2_K: Fraction(100, 84),
    DType.Q3_K: Fraction(114, 110),
    DType.Q4_K: Fraction(148, 144),
    DType.Q5_K: Fraction(180, 176),
    DType.IQ1_S: Fraction(106, 50),
    DType.IQ1_M: Fraction(114, 56),
    DType.IQ2_XXS: Fraction(106, 66),
    DType.IQ2_XS: Fraction(114, 74),
    DType.IQ2_S: Fraction(114, 82),
    DType.IQ3_XXS: Fraction(138, 98),
    DType.IQ3_S: Fraction(138, 110),
    DType.IQ4_XS: Fraction(138, 136),
    DType.TQ1_0: Fraction(66, 54),
}


def read_slowly(layout: PackedLayout, stored: npt.NDArray[np.int8]) -> Matrix:
    """Every row of every tile, the padding too: ``scale * code - minimum``, one number after the other."""
    bits, zero, block, sub_block = FACTS[layout.dtype]
    rows = 16
    if layout.chosen is not None:
        bits, rows = layout.chosen.bits, layout.chosen.tile
    data = stored.view(np.uint8)
    out = np.empty((rows * layout.tiles, layout.columns), np.float32)
    for row in range(len(out)):
        tile, lane = divmod(row, rows)

        def place(section: str, tile: int = tile) -> int:
            found = layout.sections[section]
            return found.offset + tile * found.tile_bytes

        def number(name: str, column: int, lane: int = lane) -> np.float32:
            if layout.dtype in BYTE_SCALES:
                at = place(name) + column // block * rows + lane
                return np.float32(BYTE_SCALES[layout.dtype](data[at : at + 1])[0])
            element = np.dtype("<f4" if layout.dtype in F32_SCALES else "<f2")
            at = place(name) + (column // block * rows + lane) * element.itemsize
            value = np.float32(data[at : at + element.itemsize].view(element)[0])
            value *= np.float32(UNITS.get(layout.dtype, 1))
            if f"{name}_factors" not in layout.sections:
                return value
            return value * np.float32(stored[place(f"{name}_factors") + column // sub_block * rows + lane])

        for column in range(layout.columns):
            group, code, low, vector = column % 32 // 4, 0, 0, 0
            for width in PLANES[bits]:
                start = place("codes") + (column // 32 * bits + vector + group % width) * 4 * rows
                byte = int(data[start + lane * 4 + column % 4]) >> group // width * width
                code |= (byte & (1 << width) - 1) << low
                vector, low = vector + width, low + width
            codebook = FORMATS[layout.dtype].codebook
            if codebook and bits == 8:  # numbers instead of codes, from the least on
                value = number("scale", column) * np.float32(code + min(codebook))
            else:
                value = number("scale", column) * np.float32(codebook[code] if codebook else code - zero)
            if layout.dtype in WITH_MINIMUMS:
                value -= number("minimum", column)
            out[row, column] = value
    return out


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_weight_keeps_every_number(dtype: DType) -> None:
    weight = random_weight(dtype, rows=21, columns=512)
    assert isinstance(weight.layout, PackedLayout)
    np.testing.assert_array_equal(read_slowly(weight.layout, weight.stored)[:21], weight.decoded)


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_weight_keeps_every_number_in_any_layout(dtype: DType) -> None:
    """Of all that a target with registers of eight lanes can run; others can run a part of these."""
    for chosen in layouts_of(find_target("x86-64-v3"), dtype):
        weight = random_weight(dtype, 21, 256, chosen=chosen)
        assert isinstance(weight.layout, PackedLayout)
        assert weight.layout.tiles == -(-21 // chosen.tile)
        decoded = read_slowly(weight.layout, weight.stored)
        np.testing.assert_array_equal(decoded[:21], weight.decoded)
        assert not decoded[21:].any()


@pytest.mark.parametrize("dtype", PACKED)
def test_layouts_of_a_target_begin_with_what_is_stored_without_a_choice(dtype: DType) -> None:
    default = PackedLayout(dtype, 32, 512)
    for target in TARGETS:
        first, *others = layouts_of(target, dtype)
        assert PackedLayout(dtype, 32, 512, first).sections == default.sections
        assert first not in others and len({*others}) == len(others)
        assert all(layout.tile in (16, target.lanes) for layout in others)


@pytest.mark.parametrize("dtype", PACKED)
def test_rows_that_only_fill_a_tile_are_zero(dtype: DType) -> None:
    weight = random_weight(dtype, rows=17, columns=256)
    assert isinstance(weight.layout, PackedLayout)
    assert not read_slowly(weight.layout, weight.stored)[17:].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_weight_keeps_every_bit(dtype: DType) -> None:
    weight = random_weight(dtype, rows=21, columns=40)
    element = np.uint32 if dtype is DType.F32 else np.uint16
    values = weight.stored[: 32 * 40 * element().nbytes].view(element).reshape(2, 40, 16)
    rows = values.transpose(0, 2, 1).reshape(32, 40)
    np.testing.assert_array_equal(rows[:21], weight.data.view(element))
    assert not rows[21:].any()


@pytest.mark.parametrize("dtype", PACKED + FLOATS)
@pytest.mark.parametrize("rows", [1, 16, 21, 48])
def test_sections_follow_each_other_on_cache_lines(dtype: DType, rows: int) -> None:
    layout, end = layout_of(dtype, rows, 512), 0
    for section in layout.sections.values():
        assert section.offset % ALIGNMENT == 0
        assert 0 <= section.offset - end < ALIGNMENT
        end = section.offset + section.tile_bytes * -(-rows // 16)
    assert layout.nbytes % ALIGNMENT == 0
    assert 0 <= layout.nbytes - end < ALIGNMENT


@pytest.mark.parametrize("dtype", PACKED)
def test_codes_take_the_bits_that_they_have(dtype: DType) -> None:
    layout = layout_of(dtype, 32, 512)
    assert layout.sections["codes"].tile_bytes * 2 * 8 == 32 * 512 * FACTS[dtype][0]


@pytest.mark.parametrize("dtype", PACKED)
def test_weight_takes_the_bytes_that_are_documented(dtype: DType) -> None:
    in_file = 1024 * FORMATS[dtype].row_bytes(1024)
    assert layout_of(dtype, 1024, 1024).nbytes == in_file * GROWTH.get(dtype, 1)


@pytest.mark.parametrize("dtype", [DType.Q4_0, DType.Q6_K, DType.F16])
def test_weight_in_parts_lies_like_the_whole(dtype: DType) -> None:
    weight = random_weight(dtype, rows=75, columns=256)
    for sizes in ([75], [5, 70], [16, 59], [37, 1, 1, 36], [7, 8, 60]):
        parts = np.split(weight.data, np.cumsum(sizes)[:-1])
        np.testing.assert_array_equal(store(weight.layout, parts, chunk_rows=16), weight.stored)


@given(sizes=st.lists(st.integers(0, 70), max_size=6), tiles=st.integers(1, 3))
def test_chunks_are_whole_tiles_of_all_rows_in_order(sizes: list[int], tiles: int) -> None:
    total = sum(sizes)
    numbers = np.arange(1, total + 1, dtype=np.uint32)
    rows = numbers.view(np.uint8).reshape(total, 4)
    chunks = list(in_tiles(np.split(rows, np.cumsum(sizes)[:-1]) if sizes else [], 16 * tiles))
    assert all(0 < len(chunk) <= 16 * tiles and len(chunk) % 16 == 0 for chunk in chunks)
    found = np.concatenate([np.zeros((0, 4), np.uint8), *chunks])
    assert len(found) == -(-total // 16) * 16
    np.testing.assert_array_equal(found[:total], rows)
    assert not found[total:].any()


def test_large_parts_are_not_copied_whole() -> None:
    """A part that starts within a tile borrows its rows like any other."""
    large = np.ones((4096, 64), np.uint8)

    def parts() -> Iterator[npt.NDArray[np.uint8]]:
        yield np.ones((5, 64), np.uint8)
        yield large

    borrowed = [np.shares_memory(chunk, large) for chunk in in_tiles(parts(), 64)]
    assert borrowed.count(False) == 2  # the tile of both parts, and the last one, which is padded


def test_layout_is_chosen_by_type() -> None:
    assert isinstance(layout_of(DType.Q4_K, 16, 256), PackedLayout)
    assert isinstance(layout_of(DType.BF16, 16, 256), FloatLayout)
