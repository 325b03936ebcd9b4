"""The text of a small graph around the nodes that a test is about, and how close its results must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IDS = np.random.default_rng(4).integers(0, 96, 24).tolist()

HEAD = """
graph small
input %input_ids: i64[batch, seq]
input %logit_rows: i64[rows]
input %past_key_values.0.key: f32[batch, 2, 64, 16]
input %past_key_values.0.value: f32[batch, 2, 64, 16]
input %past_length: i32[]
weight @other: f32[96, 32]
weight @table: {table}
%o = Embed(%input_ids, @other)
%heads, %present.0.key, %present.0.value = GroupQueryAttention(%o, %o, %o, {caches}; {attention})
%x = Embed(%input_ids, @table)
"""
CACHES = "%past_key_values.0.key, %past_key_values.0.value, %past_length"
ATTENTION = "heads=2, scale=0.25, layout='linear'"
TAIL = """
%last = SelectRows(%y, %logit_rows)
%logits = {op}(%last, {weight})
output %logits
output %present.0.key
output %present.0.value
"""


def between(
    middle: str, table: str = "q8_0[96, 64]", op: str = "DequantMatMul", weight: str = "@table"
) -> str:
    """A model whose embedding ``%x`` becomes ``%y`` by these nodes; attention ``%heads`` stands beside it."""
    return (
        HEAD.format(table=table, caches=CACHES, attention=ATTENTION)
        + middle
        + TAIL.format(op=op, weight=weight)
    )


def assert_close(result: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float = 1e-4) -> None:
    """Equal but for rounding: chains of a few f32 products, whose size has no unit, so that the bound is relative."""
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * np.abs(expected).max())
