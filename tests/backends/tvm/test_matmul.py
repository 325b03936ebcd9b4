"""Integer matrix products against the documented formula in float64, on the very same rounded activations.

With nothing rounded between them, kernel and formula agree to the last bits of f32: no wrong scale or sum can hide
behind the error of int8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host import HERE, each_target
from stored_weights import INTEGERS, StoredWeight, random_weight

from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.matmul import matmul_kernel
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import PackedLayout
from rlxc.backends.tvm.layout_costs import layouts_of
from rlxc.backends.tvm.targets import CpuTarget, find_target
from rlxc.dtypes import DType
from rlxc.weights.formats import FORMATS

Doubles = npt.NDArray[np.float64]

COLUMNS = 512
ROWS = 70
"""Not whole tiles: the last one has 6 rows."""

ACROSS = [
    *(DType.Q4_0, DType.Q5_1, DType.Q8_0, DType.Q2_K, DType.Q6_K, DType.INT4),
    *(DType.IQ4_NL, DType.IQ1_M, DType.Q1_0, DType.MXFP4, DType.NVFP4),
]
"""Formats for every target: each width of codes, each kind of scale and codebook."""

TOLERANCE = 1e-6
"""Of the sum of the products' magnitudes. Sums over at most 64 sub-blocks in f32, each rounded to 6e-8."""


@dataclass(frozen=True)
class Activations:
    """Tokens in int8: codes ``[M, columns]``, scales ``[M, columns / 32]``; what x summed up to ``[M, sub-blocks]``."""

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float32]

    @classmethod
    def random(cls, tokens: int, sub_block: int, columns: int = COLUMNS) -> Activations:
        rng = np.random.default_rng(tokens)
        codes = rng.integers(-127, 128, (tokens, columns), dtype=np.int8)
        codes[:, ::7] = rng.choice(np.array([-127, 127], np.int8), codes[:, ::7].shape)
        scales = rng.uniform(0.001, 0.1, (tokens, columns // 32)).astype(np.float32)
        # Not the sums of these codes: a kernel that takes one for the other shows.
        return cls(codes, scales, rng.standard_normal((tokens, columns // sub_block)).astype(np.float32))

    def rows(self, row: QuantisedRow) -> npt.NDArray[np.int8]:
        """The rows that the kernel reads, ``[M, stride]``; 0xFF where they hold nothing."""
        tokens = len(self.codes)
        out = np.full((tokens, row.stride), 0xFF, np.uint8)
        by_sub_block = self.codes.reshape(tokens, row.sub_blocks, row.sub_block).astype(np.int32)
        starts = -row.centre * by_sub_block.sum(-1, dtype=np.int32)
        parts = [(0, self.codes), (row.scales, self.scales), (row.starts, starts)]
        if row.has_sums:
            parts.append((row.sums, self.sums))
        for offset, array in parts:
            raw = np.ascontiguousarray(array).view(np.uint8).reshape(tokens, -1)
            out[:, offset : offset + raw.shape[1]] = raw
        return out.view(np.int8)


def formula(weight: StoredWeight, x: Activations) -> tuple[Doubles, Doubles]:
    """``y [M, rows]`` as the kernel's documentation says it, and the sum of the magnitudes of what is added up."""
    layout = weight.layout
    assert isinstance(layout, PackedLayout)
    fmt = FORMATS[layout.dtype]
    planes = fmt.unpack(weight.data)
    sub_blocks = x.sums.shape[1]
    integers = planes.codes if fmt.codebook is None else np.array(fmt.codebook)[planes.codes]
    centre = layout.centre if fmt.has_mins else 0
    shape = (-1, sub_blocks, fmt.sub_block)
    dots = np.einsum(
        "msi,nsi->mns",
        x.codes.astype(np.float64).reshape(shape),
        integers.astype(np.float64).reshape(shape) - centre,
    )
    scales = np.repeat(planes.scales, planes.codes.shape[1] // fmt.sub_block // planes.scales.shape[1], 1)
    activation_scales = np.repeat(x.scales, 32 // fmt.sub_block, 1).astype(np.float64)
    terms = dots * scales.astype(np.float64) * activation_scales[:, None]
    if planes.mins is not None:
        rest = centre * scales.astype(np.float64) - planes.mins
        terms = np.concatenate([terms, rest * x.sums[:, None].astype(np.float64)], -1)
    return terms.sum(-1), np.abs(terms).sum(-1)


def check(
    run_kernel: Any,
    target: CpuTarget,
    weight: StoredWeight,
    tokens: int,
    *,
    bias: npt.NDArray[np.float32] | None = None,
    stride: int | None = None,
    most: int = 2,
) -> None:
    """Run a product in passes of ``most`` tokens."""
    layout = weight.layout
    assert isinstance(layout, PackedLayout)
    vectors, rows = Vectors.of(target), layout.rows
    output = OutputRows(rows, stride or rows)
    knobs = {"tokens": most, "prefetch": 1024}
    kernel = matmul_kernel(vectors, knobs, layout, output, bias=bias is not None)
    kernel = replace(kernel, name=f"{kernel.name}_{most}")
    x = Activations.random(tokens, layout.format.sub_block, layout.columns)
    out = np.full((tokens, output.stride), 7, np.float32)
    given = [] if bias is None else [bias]
    run_kernel(
        kernel, weight.stored, x.rows(QuantisedRow.of(layout, vectors)), *given, out, tokens, target=target
    )
    expected, size = formula(weight, x)
    if bias is not None:
        expected, size = expected + bias[:rows], size + np.abs(bias[:rows])
    worst = np.abs(out[:, :rows] - expected).max(0) / size.max(0)
    assert worst.max() < TOLERANCE, worst
    assert (out[:, rows:] == 7).all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_product_is_what_the_formula_says(run_kernel: Any, dtype: DType) -> None:
    weight = random_weight(dtype, ROWS, COLUMNS)
    for tokens in range(1, 15):
        check(run_kernel, HERE[0], weight, tokens, most=4)


@each_target
@pytest.mark.parametrize("dtype", ACROSS)
def test_every_target_gives_the_same(run_kernel: Any, target: CpuTarget, dtype: DType) -> None:
    weight = random_weight(dtype, ROWS, COLUMNS)
    for tokens in (1, 10):
        check(run_kernel, target, weight, tokens, most=3)


@pytest.mark.parametrize("dtype", ACROSS)
def test_small_tiles_of_any_width_give_the_same(run_kernel: Any, dtype: DType) -> None:
    target = find_target("x86-64-v3")
    if target not in HERE:
        pytest.skip("this CPU cannot run it")
    for chosen in layouts_of(target, dtype):
        if chosen.tile == 8:
            check(run_kernel, target, random_weight(dtype, ROWS, 256, chosen=chosen), 7)


@pytest.mark.parametrize(
    "target", [target for target in HERE if target.lanes != 8], ids=lambda target: target.name
)
@pytest.mark.parametrize("dtype", [DType.Q6_K, DType.IQ1_M])
def test_wider_codes_give_the_same(run_kernel: Any, target: CpuTarget, dtype: DType) -> None:
    *_, widest = layouts_of(target, dtype)
    check(run_kernel, target, random_weight(dtype, ROWS, 256, chosen=widest), 3)


@pytest.mark.parametrize("most", [1, 2, 7, 12])
def test_tokens_may_share_a_pass_in_any_number(run_kernel: Any, most: int) -> None:
    weight = random_weight(DType.Q4_K, 32, 256)
    for tokens in [*range(1, most + 2), 3 * most - 1, 3 * most, 4 * most + 1]:
        check(run_kernel, HERE[0], weight, tokens, most=most)


@pytest.mark.parametrize("rows", [1, 8, 15, 16, 17, 300])
def test_any_number_of_rows_is_written_and_no_more(run_kernel: Any, rows: int) -> None:
    check(run_kernel, HERE[0], random_weight(DType.Q8_0, rows, 64), 7, stride=rows + 3)


@each_target
def test_bias_is_added_and_strides_are_kept(run_kernel: Any, target: CpuTarget) -> None:
    # A bias fills whole vectors, as the weights file keeps it.
    bias = np.pad(10 * np.random.default_rng(1).standard_normal(ROWS), (0, -ROWS % 16)).astype(np.float32)
    for dtype in (DType.Q4_1, DType.Q5_0):
        weight = random_weight(dtype, ROWS, 96)
        for tokens in (5, 7):
            check(run_kernel, target, weight, tokens, bias=bias, stride=80)


def test_no_tokens_write_nothing(run_kernel: Any) -> None:
    weight = random_weight(DType.Q4_0, 16, 64)
    assert isinstance(weight.layout, PackedLayout)
    vectors = Vectors.of(HERE[0])
    kernel = matmul_kernel(
        vectors, {"tokens": 2, "prefetch": 0}, weight.layout, OutputRows(16, 16), bias=False
    )
    out = np.full(16, 7, np.float32)
    run_kernel(
        kernel, weight.stored, np.zeros(QuantisedRow.of(weight.layout, vectors).stride, np.int8), out, 0
    )
    assert (out == 7).all()
