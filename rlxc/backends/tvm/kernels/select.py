"""Chosen tokens' rows."""

from __future__ import annotations

from tvm.tirx import Select
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Kernel, Number, Pointer, bind, serial


def select_kernel(columns: int, stride: int) -> Kernel:
    """The kernel for rows f32 ``[columns]`` whose tokens are ``stride`` apart.

    Its parameters: x f32 ``[sequences * step, columns]``; rows int64 ``[count]``, positions in a step (negative ones
    count from its end); the output f32 ``[sequences * count, columns]``; the numbers of sequences, of tokens in each
    one's step, and of rows.
    """

    def body(x: Buffer, rows: Buffer, out: Buffer, sequences: Expr, step: Expr, count: Expr) -> None:
        with serial(sequences) as sequence, serial(count) as index:
            row = bind(rows[index])
            token = bind(T.cast(Select(row < 0, row + step, row), "int32") + sequence * step)
            start = bind((sequence * count + index) * columns)
            with serial(columns) as column:
                T.buffer_store(out, x[token * stride + column], [start + column])

    params = (
        Pointer("x", "float32"),
        Pointer("rows", "int64"),
        Pointer("out", "float32"),
        Number("sequences"),
        Number("step"),
        Number("rows"),
    )
    return Kernel(f"select_{columns}_{stride}", params, body)
