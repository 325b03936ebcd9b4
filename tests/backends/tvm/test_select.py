"""The rows whose logits are wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlxc.backends.tvm.kernels.select import select_kernel


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("rows", [[0], [4, 0, 2], [-1], [-5, 3, 3, -2]], ids=str)
def test_rows_of_every_sequence_are_chosen(run_kernel: Any, sequences: int, rows: list[int]) -> None:
    step, columns, stride = 5, 33, 48
    x = np.full((sequences * step, stride), np.nan, np.float32)
    x[:, :columns] = np.random.default_rng(0).standard_normal((sequences * step, columns))
    out = np.zeros((sequences * len(rows), columns), np.float32)
    run_kernel(select_kernel(columns, stride), x, np.array(rows), out, sequences, step, len(rows))
    expected = x[:, :columns].reshape(sequences, step, columns)[:, rows].reshape(-1, columns)
    np.testing.assert_array_equal(out, expected)
