"""Ops that work on one token's row at a time, several of them in one kernel, with rounding to int8 at the end.

Between two matrix products a row passes through norms, sums and activations. One kernel does all of them, so that the
row stays in the first-level cache; its program is a list of the IR's own ops over numbered rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx import Cast, Select, call_llvm_pure_intrin, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels import math
from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.kernel import (
    TASKS,
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    Register,
    bind,
    for_rows,
    serial,
    view,
)
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK
from rlxc.errors import UnsupportedError
from rlxc.ir import ops

_LEAST = 1e-36
"""Blocks of smaller numbers are rounded to zero: 127 divided by them would not be finite."""


@dataclass(frozen=True)
class Row:
    """A row of f32: ``width`` numbers, ``stride`` from one token to the next (0: the same for all tokens)."""

    width: int
    stride: int


@dataclass(frozen=True)
class Step:
    """An op, the rows that it reads and the one that it makes; a float among the inputs is that number."""

    op: ops.Op
    inputs: tuple[int | float, ...]
    output: int


@dataclass(frozen=True)
class RowProgram:
    """What a kernel does with each token.

    Attributes:
        inputs: rows 0 to n - 1, read from memory.
        steps: makes rows n and on, whose widths are ``widths``.
        stored: the rows that are written to memory, with their strides.
        rounded: the rows that are written rounded to int8, for the products that read them.
    """

    inputs: tuple[Row, ...]
    steps: tuple[Step, ...]
    widths: tuple[int, ...]
    stored: tuple[tuple[int, int], ...]
    rounded: tuple[tuple[int, QuantisedRow], ...]


def rowwise_kernel(vectors: Vectors, name: str, program: RowProgram) -> Kernel:
    """The kernel of a program.

    Its parameters: the inputs and the stored rows, f32; the rounded rows, int8; ``scratch_floats(program)`` f32 of
    scratch; the number of tokens.
    """

    def body(*arguments: Any) -> None:
        *buffers, scratch, count = arguments
        inputs = buffers[: len(program.inputs)]
        stored = buffers[len(inputs) : len(inputs) + len(program.stored)]
        rounded = buffers[len(inputs) + len(stored) :]
        size = scratch_floats(program) // TASKS

        def row(token: Expr, task: Expr) -> None:
            places = _places(program, inputs, stored, scratch, bind(task * size), token)
            for step in program.steps:
                args = [places[i] if isinstance(i, int) else i for i in step.inputs]
                _emit(vectors, step.op, args, places[step.output])
            for buffer, (index, quantised) in zip(rounded, program.rounded):
                _round(vectors, quantised, places[index], buffer, bind(token * quantised.stride))

        for_rows(count, row)

    params: tuple[Pointer | Number, ...] = (
        *(Pointer(f"in{i}", "float32") for i in range(len(program.inputs))),
        *(Pointer(f"out{i}", "float32") for i in range(len(program.stored))),
        *(Pointer(f"rounded{i}", "int8") for i in range(len(program.rounded))),
        Pointer("scratch", "float32"),
        Number("tokens"),
    )
    return Kernel(name, params, body)


@dataclass(frozen=True)
class _Place:
    """Where a row of the token at hand lies."""

    buffer: Buffer
    start: Expr
    width: int


def scratch_floats(program: RowProgram) -> int:
    """How many f32 the kernel needs for rows that it does not store: those of each task."""
    return TASKS * sum(_padded(width) for _, width in _temporary(program))


def _temporary(program: RowProgram) -> list[tuple[int, int]]:
    """The rows that are not stored, and their widths."""
    stored = {row for row, _ in program.stored}
    rows = enumerate(program.widths, len(program.inputs))
    return [(row, width) for row, width in rows if row not in stored]


def _places(
    program: RowProgram, inputs: list[Buffer], stored: list[Buffer], scratch: Buffer, free: Expr, token: Expr
) -> list[_Place]:
    """Where each row of a token lies; ``free`` is where this task's scratch begins."""
    places = {
        i: _Place(buffer, bind(token * row.stride), row.width)
        for i, (buffer, row) in enumerate(zip(inputs, program.inputs))
    }
    for buffer, (row, stride) in zip(stored, program.stored):
        places[row] = _Place(buffer, bind(token * stride), program.widths[row - len(inputs)])
    for row, width in _temporary(program):
        places[row] = _Place(scratch, free, width)
        free = free + _padded(width)
    return [places[i] for i in range(len(places))]


def _padded(width: int) -> int:
    return -(-width // 16) * 16


def _emit(vectors: Vectors, op: ops.Op, args: list[Any], out: _Place) -> None:
    match op:
        case ops.RmsNorm():
            x, weight = args
            _rms_norm(vectors, op, x, weight, out)
        case ops.LayerNorm():
            x, weight, *bias = args
            _layer_norm(vectors, op, x, weight, bias, out)
        case ops.Add():
            _elementwise(vectors, args, out, lambda v, a, b: a + b)
        case ops.Mul():
            _elementwise(vectors, args, out, lambda v, a, b: a * b)
        case ops.Square():
            _elementwise(vectors, args, out, lambda v, a: a * a)
        case ops.Sqrt():
            _elementwise(vectors, args, out, lambda v, a: v.sqrt(a))
        case ops.Rsqrt():
            _elementwise(vectors, args, out, lambda v, a: v.splat(1.0) / v.sqrt(a))
        case ops.Silu():
            _elementwise(vectors, args, out, math.silu)
        case ops.Gelu():
            _elementwise(vectors, args, out, math.gelu_tanh)
        case ops.SoftCap(cap=cap):
            _elementwise(vectors, args, out, lambda v, a: math.soft_cap(v, a, cap))
        case ops.ClampedSwiglu(alpha=alpha, limit=limit):
            _elementwise(vectors, args, out, lambda v, a, b: math.clamped_swiglu(v, a, b, alpha, limit))
        case ops.MixExperts():
            x, weights = args
            _mix(vectors, x, weights, out)
        case ops.Glu(activation=activation):
            (both,) = args
            gate = _Place(both.buffer, both.start, out.width)
            up = _Place(both.buffer, both.start + out.width, out.width)
            act = math.silu if activation == "silu" else math.gelu_tanh
            _elementwise(vectors, [gate, up], out, lambda v, a, b: act(v, a) * b)
        case ops.Mean():
            (x,) = args
            total = _sum(vectors, x, 0, x.width, lambda v, value: value)
            T.buffer_store(out.buffer, total * const(1 / x.width, "float32"), [out.start])
        case _:
            raise UnsupportedError(f"{op.name} is not an op on rows")


def supports(op: ops.Op) -> bool:
    """Whether a :class:`Step` can have this op."""
    kinds = (
        ops.RmsNorm,
        ops.LayerNorm,
        ops.Add,
        ops.Mul,
        ops.Square,
        ops.Sqrt,
        ops.Rsqrt,
        ops.Silu,
        ops.Gelu,
        ops.SoftCap,
        ops.ClampedSwiglu,
        ops.MixExperts,
        ops.Glu,
        ops.Mean,
    )
    return isinstance(op, kinds)


def _elementwise(vectors: Vectors, args: list[Any], out: _Place, function: Callable[..., Expr]) -> None:
    if out.width == 1:
        values = [vectors.splat(arg if isinstance(arg, float) else arg.buffer[arg.start]) for arg in args]
        value = math.lanes_of(bind(function(vectors, *values)), [0])
        T.buffer_store(out.buffer, value, [out.start])
        return
    v = _dividing(vectors, out.width)
    with serial(out.width // v.lanes) as index:
        at = index * v.lanes
        values = []
        for arg in args:
            if isinstance(arg, float):
                values.append(v.splat(arg))
            elif arg.width == 1 != out.width:
                values.append(v.splat(arg.buffer[arg.start]))
            else:
                values.append(bind(v.load(arg.buffer, arg.start + at)))
        v.store(out.buffer, out.start + at, function(v, *values))


def _rms_norm(vectors: Vectors, op: ops.RmsNorm, x: _Place, weight: _Place, out: _Place) -> None:
    size = x.width // op.heads
    v = _dividing(vectors, size)
    with serial(op.heads) as head:
        first = bind(head * size)
        squares = _sum(vectors, x, first, size, lambda v, value: value * value)
        mean = squares * const(1 / size, "float32") + const(op.eps, "float32")
        factor = bind(const(1.0, "float32") / T.sqrt(mean))
        with serial(size // v.lanes) as index:
            at = index * v.lanes
            scaled = v.load(x.buffer, x.start + first + at) * v.splat(factor)
            v.store(out.buffer, out.start + first + at, scaled * v.load(weight.buffer, weight.start + at))


def _layer_norm(
    vectors: Vectors, op: ops.LayerNorm, x: _Place, weight: _Place, bias: list[_Place], out: _Place
) -> None:
    v, size = _dividing(vectors, x.width), const(1 / x.width, "float32")
    mean = bind(v.splat(bind(_sum(vectors, x, 0, x.width, lambda v, value: value) * size)))

    def square(v: Vectors, value: Expr) -> Expr:
        distance = bind(value - mean)
        return distance * distance

    variance = _sum(vectors, x, 0, x.width, square) * size
    factor = bind(const(1.0, "float32") / T.sqrt(variance + const(op.eps, "float32")))
    with serial(x.width // v.lanes) as index:
        at = index * v.lanes
        scaled = (v.load(x.buffer, x.start + at) - mean) * v.splat(factor)
        value = scaled * v.load(weight.buffer, weight.start + at)
        for place in bias:
            value = value + v.load(place.buffer, place.start + at)
        v.store(out.buffer, out.start + at, value)


def _mix(vectors: Vectors, x: _Place, weights: _Place, out: _Place) -> None:
    """The weighted sum of a token's slots, in their order: they lie evenly in the row x."""
    v, stride = _dividing(vectors, out.width), x.width // weights.width
    with serial(out.width // v.lanes) as index:
        total = Register(v.lanes, v.splat(0.0))
        with serial(weights.width) as slot:
            value = v.load(x.buffer, x.start + slot * stride + index * v.lanes)
            weight = v.splat(weights.buffer[weights.start + slot])
            total.set(v.fma(value, weight, total.get()))
        v.store(out.buffer, out.start + index * v.lanes, total.get())


def _sum(vectors: Vectors, x: _Place, first: Expr, size: int, term: Callable[[Vectors, Expr], Expr]) -> Expr:
    """The sum of ``term`` over ``size`` numbers of a row, kept in four partial sums to hide their latency."""
    v = _dividing(vectors, size)
    chains = next(n for n in (4, 2, 1) if size // v.lanes % n == 0)
    sums = [Register(v.lanes, v.splat(0.0)) for _ in range(chains)]
    with serial(size // v.lanes // chains) as index:
        for i, total in enumerate(sums):
            value = bind(v.load(x.buffer, x.start + first + (index * chains + i) * v.lanes))
            total.set(total.get() + term(v, value))
    total = sums[0].get()
    for other in sums[1:]:
        total = total + other.get()
    return bind(math.reduce_sum(v, bind(total)))


def _round(vectors: Vectors, row: QuantisedRow, x: _Place, out: Buffer, start: Expr) -> None:
    """Round a row to int8 and write it as a :class:`QuantisedRow`."""
    v = replace(vectors, lanes=min(vectors.lanes, row.sub_block))
    floats, ints = view(out, "float32"), view(out, "int32")
    per_sub = row.sub_block // v.lanes
    with serial(row.blocks) as block:
        values = [
            bind(v.load(x.buffer, x.start + block * BLOCK + i * v.lanes)) for i in range(BLOCK // v.lanes)
        ]
        largest = v.absolute(values[0])
        for value in values[1:]:
            largest = v.maximum(largest, v.absolute(value))
        largest = bind(math.reduce_max(v, bind(largest)))
        T.buffer_store(floats, largest * const(1 / 127, "float32"), [(start + row.scales) // 4 + block])
        inverse = const(127.0, "float32") / largest
        inverse = bind(Select(largest > const(_LEAST, "float32"), inverse, const(0.0, "float32")))
        codes = [bind(v.ints(v.round(value * v.splat(inverse)))) for value in values]
        for i, code in enumerate(codes):
            v.store(out, start + block * BLOCK + i * v.lanes, Cast(f"int8x{v.lanes}", code))
        for part in range(BLOCK // row.sub_block):
            sub_block = block * (BLOCK // row.sub_block) + part
            these = slice(part * per_sub, (part + 1) * per_sub)
            total = _add_up(codes[these])
            total = call_llvm_pure_intrin("int32", f"llvm.vector.reduce.add.v{v.lanes}i32", total)
            T.buffer_store(ints, total * -row.centre, [(start + row.starts) // 4 + sub_block])
            if row.has_sums:
                total = math.reduce_sum(v, bind(_add_up(values[these])))
                T.buffer_store(floats, total, [(start + row.sums) // 4 + sub_block])


def _add_up(values: list[Expr]) -> Expr:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _dividing(vectors: Vectors, width: int) -> Vectors:
    """The widest vectors that a row of this width is whole ones of."""
    lanes = vectors.lanes
    while width % lanes:
        lanes //= 2
    if lanes < 2:
        raise UnsupportedError(f"rows of {width} numbers, which is odd")
    return replace(vectors, lanes=lanes)
