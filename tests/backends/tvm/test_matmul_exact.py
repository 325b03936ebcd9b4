"""Products with f32 activations against float64 on the decoded weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host import HERE, each_target
from stored_weights import FLOATS, PACKED, StoredWeight, random_weight

from rlxc.backends.tvm.kernels.matmul_exact import exact_matmul_kernel
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.dtypes import DType

ROWS = 37
"""Not whole tiles: the last one has 5 rows."""

ACROSS = [
    *(DType.Q5_1, DType.Q8_0, DType.Q3_K, DType.IQ2_XS, DType.Q1_0, DType.NVFP4, DType.NF4, *FLOATS),
]
"""Formats for every target: each width of codes, each kind of scale and codebook."""

TOLERANCE = 2e-6
"""Of the sum of the products' magnitudes: up to 512 sums in f32, each rounded to 6e-8, mostly in turns up and down."""


def check(
    run_kernel: Any,
    target: CpuTarget,
    weight: StoredWeight,
    tokens: int,
    *,
    bias: npt.NDArray[np.float32] | None = None,
    stride: int | None = None,
    out_stride: int | None = None,
    most: int = 2,
) -> None:
    """Run a product in passes of ``most`` tokens."""
    rows, columns = weight.layout.rows, weight.layout.columns
    output = OutputRows(rows, out_stride or rows)
    stride = stride or columns
    knobs = {"tokens": most, "prefetch": 1024}
    vectors = Vectors.of(target)
    kernel = exact_matmul_kernel(vectors, knobs, weight.layout, output, stride=stride, bias=bias is not None)
    kernel = replace(kernel, name=f"{kernel.name}_{most}")
    # What lies between the rows is read by nobody.
    x = np.full((tokens, stride), np.nan, np.float32)
    x[:, :columns] = np.random.default_rng(tokens).standard_normal((tokens, columns))
    out = np.full((tokens, output.stride), 7, np.float32)
    given = [] if bias is None else [bias]
    run_kernel(kernel, weight.stored, x, *given, out, tokens, target=target)
    terms = x[:, None, :columns].astype(np.float64) * weight.decoded
    expected, size = terms.sum(-1), np.abs(terms).sum(-1)
    if bias is not None:
        expected, size = expected + bias[:rows], size + np.abs(bias[:rows])
    worst = (np.abs(out[:, :rows] - expected) / size).max()
    assert worst < TOLERANCE, worst
    assert (out[:, rows:] == 7).all()


@pytest.mark.parametrize("dtype", PACKED + FLOATS)
def test_product_is_that_of_the_decoded_weights(run_kernel: Any, dtype: DType) -> None:
    weight = random_weight(dtype, ROWS, 512)
    for tokens in (1, 2, 3, 5):
        check(run_kernel, HERE[0], weight, tokens)


@each_target
@pytest.mark.parametrize("dtype", ACROSS)
def test_every_target_gives_the_same(run_kernel: Any, target: CpuTarget, dtype: DType) -> None:
    weight = random_weight(dtype, ROWS, 256)
    for tokens in (1, 3):
        check(run_kernel, target, weight, tokens)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_tokens_may_share_a_pass_in_any_number(run_kernel: Any, most: int) -> None:
    weight = random_weight(DType.Q4_0, 16, 64)
    for tokens in range(1, 2 * most + 2):
        check(run_kernel, HERE[0], weight, tokens, most=most)


@pytest.mark.parametrize("dtype", [*FLOATS, DType.Q5_1, DType.IQ3_S])
def test_a_token_has_the_same_bits_alone_and_among_others(run_kernel: Any, dtype: DType) -> None:
    columns = 264 if dtype in FLOATS else 256
    weight = random_weight(dtype, ROWS, columns)
    x = np.random.default_rng(2).standard_normal((7, columns)).astype(np.float32)
    knobs, output = {"tokens": 4, "prefetch": 1024}, OutputRows(ROWS, ROWS)
    vectors = Vectors.of(HERE[0])
    kernel = exact_matmul_kernel(vectors, knobs, weight.layout, output, stride=columns, bias=False)
    kernel = replace(kernel, name=f"{kernel.name}_4")
    together, alone = np.empty((7, ROWS), np.float32), np.empty((7, 1, ROWS), np.float32)
    run_kernel(kernel, weight.stored, x, together, 7)  # a pass of four, and three of one
    for token in range(7):
        run_kernel(kernel, weight.stored, x[token : token + 1], alone[token], 1)
    np.testing.assert_array_equal(together, alone[:, 0])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 40), (16, 7), (17, 33), (100, 24)])
def test_float_weights_may_have_any_shape(run_kernel: Any, rows: int, columns: int) -> None:
    check(run_kernel, HERE[0], random_weight(DType.F16, rows, columns), 3)


@each_target
def test_bias_is_added_and_strides_are_kept(run_kernel: Any, target: CpuTarget) -> None:
    # A bias fills whole vectors, as the weights file keeps it.
    bias = np.pad(np.random.default_rng(1).standard_normal(ROWS), (0, -ROWS % 16)).astype(np.float32)
    for dtype in (DType.Q4_1, DType.BF16):
        weight = random_weight(dtype, ROWS, 96)
        check(run_kernel, target, weight, 5, bias=bias, stride=101, out_stride=48)
