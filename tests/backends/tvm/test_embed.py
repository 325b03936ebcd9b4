"""Rows of a table: bit for bit what ``gguf`` decodes, or the table of formats where it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from host import HERE, each_target
from stored_weights import FLOATS, PACKED, random_weight

from rlxc.backends.tvm.kernels.embed import embed_kernel
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout

ROWS = 37
ORDERS = {"one": [36], "few": [0, 16, 15, 36, 0], "many": [*range(36, -1, -1)]}

ACROSS = [
    *(DType.Q5_1, DType.Q8_0, DType.Q3_K, DType.Q4_K, DType.IQ2_XXS, DType.Q1_0, DType.MXFP4, DType.NVFP4),
    *(DType.NF4, *FLOATS),
]
"""Formats for every target: each width of codes, each kind of scale."""


def check(
    run_kernel: Any,
    target: CpuTarget,
    dtype: DType,
    columns: int,
    ids: list[int],
    chosen: WeightLayout | None = None,
) -> None:
    table = random_weight(dtype, ROWS, columns, chosen=chosen)
    expected = table.decoded[ids]
    out = np.full((len(ids), columns), 7, np.float32)
    run_kernel(embed_kernel(table.layout), table.stored, np.array(ids), out, len(ids), target=target)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("ids", ORDERS)
@pytest.mark.parametrize("dtype", PACKED + FLOATS)
def test_rows_are_exact(run_kernel: Any, dtype: DType, ids: str) -> None:
    check(run_kernel, HERE[0], dtype, 512, ORDERS[ids])


@each_target
@pytest.mark.parametrize("dtype", ACROSS)
def test_every_target_gives_the_same(run_kernel: Any, target: CpuTarget, dtype: DType) -> None:
    check(run_kernel, target, dtype, 256, ORDERS["few"])


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        *((DType.Q3_K, 4), (DType.Q4_1, 4), (DType.Q4_1, 8), (DType.IQ1_M, 3), (DType.IQ1_M, 4)),
        *((DType.IQ1_M, 8), (DType.Q1_0, 1), (DType.Q1_0, 8), (DType.NF4, 4)),
    ],
)
def test_rows_of_small_tiles_and_wide_codes_are_exact(run_kernel: Any, dtype: DType, bits: int) -> None:
    check(run_kernel, HERE[0], dtype, 256, ORDERS["few"], WeightLayout(bits, 32, 8))


@pytest.mark.parametrize("columns", [1, 24, 33])
def test_float_tables_may_have_any_width(run_kernel: Any, columns: int) -> None:
    check(run_kernel, HERE[0], DType.BF16, columns, ORDERS["few"])
