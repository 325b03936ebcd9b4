"""The largest logit of every 64, and the sum of their exponentials: what choosing a token needs of the others."""

from __future__ import annotations

from tvm.tirx import call_llvm_pure_intrin, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import (
    TASKS,
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    bind,
    local,
    parallel,
    serial,
    when,
)
from rlxc.backends.tvm.kernels.math import exp, reduce_sum
from rlxc.backends.tvm.kernels.vector import Vectors

BLOCK = 64
"""Logits that one maximum and one sum stand for."""

_MANY_BLOCKS = 256  # fewer are done before a parallel region has begun
_LOWEST = -3.4028234663852886e38


def blocks_of(vocab: int) -> int:
    """The blocks of a row of logits; the last one may be short."""
    return -(-vocab // BLOCK)


def summarise_kernel(vectors: Vectors, vocab: int) -> Kernel:
    """The kernel for rows of ``vocab`` logits.

    Its parameters: logits f32 ``[rows, vocab]``; for every block of 64 of a row (the last may be shorter), maxima f32
    ``[rows, blocks]`` and sums f32 ``[rows, blocks]`` of e^(x - maximum); the number of rows. A block that holds a
    NaN has a NaN for maximum, and a meaningless sum, as has one that holds infinity. Minus infinity counts as e^-87
    of the block's maximum, or of -3.4e38 where all are.
    """
    whole, rest = divmod(vocab, BLOCK)
    blocks = blocks_of(vocab)

    def body(logits: Buffer, maxima: Buffer, sums: Buffer, rows: Expr) -> None:
        def summarise(index: Expr) -> None:
            row, block = bind(index // blocks), bind(index % blocks)
            start = bind(T.cast(row, "int64") * vocab + block * BLOCK)
            if not rest:
                _summarise(vectors, logits, start, maxima, sums, index)
                return
            with when(block < whole):
                _summarise(vectors, logits, start, maxima, sums, index)
            with when(block == whole):
                last = local(BLOCK, "float32")
                for i in range(0, BLOCK, vectors.lanes):
                    vectors.store(last, i, vectors.splat(-float("inf")))
                with serial(rest) as i:
                    T.buffer_store(last, logits[start + i], [i])
                _summarise(vectors, last, 0, maxima, sums, index)

        count = bind(rows * blocks)
        with T.If(count >= _MANY_BLOCKS):
            with T.Then(), parallel(TASKS) as task:
                first = bind(_share(count, task))
                with serial(_share(count, task + 1) - first) as i:
                    summarise(bind(first + i))
            with T.Else(), serial(count) as index:
                summarise(index)

    params = (Pointer("logits", "float32"), Pointer("maxima", "float32"), Pointer("sums", "float32"))
    return Kernel(f"summarise_{vocab}", (*params, Number("rows")), body)


def _share(count: Expr, task: Expr) -> Expr:
    """Where a task begins: rows of a large vocabulary times 16 do not fit 32 bits."""
    return T.cast(T.cast(count, "int64") * task // TASKS, "int32")


def _summarise(vectors: Vectors, x: Buffer, start: Expr, maxima: Buffer, sums: Buffer, index: Expr) -> None:
    places = range(0, BLOCK, vectors.lanes)
    values = [bind(vectors.load(x, start + i)) for i in places]
    largest = values
    while len(largest) > 1:
        largest = [bind(_maximum(vectors, a, b)) for a, b in zip(largest[::2], largest[1::2])]
    lanes = vectors.lanes
    maximum = bind(call_llvm_pure_intrin("float32", f"llvm.vector.reduce.fmaximum.v{lanes}f32", largest[0]))
    T.buffer_store(maxima, maximum, [index])
    # Minus infinity less itself would be a NaN.
    base = bind(vectors.splat(T.max(maximum, const(_LOWEST, "float32"))))
    terms = [bind(exp(vectors, value - base)) for value in values]
    while len(terms) > 1:
        terms = [bind(a + b) for a, b in zip(terms[::2], terms[1::2])]
    T.buffer_store(sums, reduce_sum(vectors, terms[0]), [index])


def _maximum(vectors: Vectors, a: Expr, b: Expr) -> Expr:
    """The larger of each pair; NaN where one of them is."""
    lanes = vectors.lanes
    return call_llvm_pure_intrin(f"float32x{lanes}", f"llvm.maximum.v{lanes}f32", a, b)
