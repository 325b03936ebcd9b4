"""Row-wise kernels against numpy in float64, and what they round against what int8 promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host import HERE, each_target

from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.rowwise import Row, RowProgram, Step, rowwise_kernel, scratch_floats, supports
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import PackedLayout
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.dtypes import DType
from rlxc.errors import UnsupportedError
from rlxc.ir import ops

Array = npt.NDArray[Any]
TOKENS = [1, 7, 8, 37]
"""Few, one after the other, and many, shared by the threads."""


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms_norm(op: ops.RmsNorm, x: Array, weight: Array) -> Array:
    heads = x.reshape(len(x), op.heads, -1)
    scaled = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + op.eps) * weight
    return scaled.reshape(x.shape)


def glu(op: ops.Glu, x: Array) -> Array:
    gate, up = np.split(x, 2, -1)
    return {"silu": silu, "gelu": gelu}[op.activation](gate) * up


def layer_norm(op: ops.LayerNorm, x: Array, weight: Array, bias: Array | None = None) -> Array:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + op.eps) * weight
    return scaled if bias is None else scaled + bias


def clamped_swiglu(op: ops.ClampedSwiglu, gate: Array, up: Array) -> Array:
    gate = np.minimum(gate, op.limit)
    return gate / (1 + np.exp(-op.alpha * gate)) * (np.clip(up, -op.limit, op.limit) + 1)


def mix(op: ops.MixExperts, x: Array, weights: Array) -> Array:
    """Slots lie evenly in a row; what is beyond `WIDTH_OF_SLOT` numbers of each is not theirs."""
    slots = x.reshape(len(x), weights.shape[1], -1)[..., :WIDTH_OF_SLOT]
    return np.einsum("tun,tu->tn", slots, weights)


WIDTH_OF_SLOT = 36

MEANING: Mapping[type[ops.Op], Callable[..., Array]] = {
    ops.Add: lambda op, a, b: a + b,
    ops.Mul: lambda op, a, b: a * b,
    ops.Square: lambda op, x: x * x,
    ops.Sqrt: lambda op, x: np.sqrt(x),
    ops.Rsqrt: lambda op, x: 1 / np.sqrt(x),
    ops.Silu: lambda op, x: silu(x),
    ops.Gelu: lambda op, x: gelu(x),
    ops.Mean: lambda op, x: x.mean(-1, keepdims=True),
    ops.RmsNorm: rms_norm,
    ops.LayerNorm: layer_norm,
    ops.SoftCap: lambda op, x: op.cap * np.tanh(x / op.cap),
    ops.ClampedSwiglu: clamped_swiglu,
    ops.MixExperts: mix,
    ops.Glu: glu,
}


def evaluate(program: RowProgram, inputs: Sequence[Array]) -> list[Array]:
    """Every row of every token, in float64."""
    rows = [array.astype(np.float64) for array in inputs]
    for step in program.steps:
        args = [rows[i] if isinstance(i, int) else np.float64(i) for i in step.inputs]
        rows.append(MEANING[type(step.op)](step.op, *args))
    return rows


def run(
    run_kernel: Any, target: CpuTarget, name: str, program: RowProgram, inputs: Sequence[Array], tokens: int
) -> tuple[list[Array], list[Array]]:
    """The stored rows and the rounded ones; between rows of f32 nothing may be read or written."""
    given = []
    for row, array in zip(program.inputs, inputs):
        memory = np.full((tokens if row.stride else 1, row.stride or row.width), np.nan, np.float32)
        memory[:, : row.width] = array
        given.append(memory)
    stored = [np.full((tokens, stride), 7, np.float32) for _, stride in program.stored]
    rounded = [np.zeros((tokens, row.stride), np.int8) for _, row in program.rounded]
    scratch = np.full(max(1, scratch_floats(program)), np.nan, np.float32)
    kernel = rowwise_kernel(Vectors.of(target), name, program)
    run_kernel(kernel, *given, *stored, *rounded, scratch, tokens, target=target)
    widths = [program.widths[row - len(program.inputs)] for row, _ in program.stored]
    assert all((array[:, width:] == 7).all() for array, width in zip(stored, widths))
    return [array[:, :width] for array, width in zip(stored, widths)], rounded


def program(inputs: list[Row], steps: list[Step], widths: list[int], *stored: int) -> RowProgram:
    return RowProgram(tuple(inputs), tuple(steps), tuple(widths), tuple((row, 400) for row in stored), ())


NORM, HEADS = ops.RmsNorm(eps=1e-6), ops.RmsNorm(eps=1e-5, heads=4)
LAYER = ops.LayerNorm(eps=1e-5)


def row(width: int) -> Row:
    return Row(width, width + 5)


def weight(width: int) -> Row:
    return Row(width, 0)


PROGRAMS = {
    "norm": program([row(256), weight(256)], [Step(NORM, (0, 1), 2)], [256], 2),
    "norm of an odd number of vectors": program([row(80), weight(80)], [Step(NORM, (0, 1), 2)], [80], 2),
    "norm of heads": program([row(64), weight(16)], [Step(HEADS, (0, 1), 2)], [64], 2),
    "norm of narrow heads": program([row(24), weight(6)], [Step(HEADS, (0, 1), 2)], [24], 2),
    "residual": program(
        [row(96), row(96), weight(96), weight(96)],
        [Step(NORM, (0, 2), 4), Step(ops.Add(), (1, 4), 5), Step(NORM, (5, 3), 6)],
        [96, 96, 96],
        *(5, 6),
    ),
    "layer norm": program(
        [row(80), weight(80), weight(80)],
        [Step(LAYER, (0, 1, 2), 3), Step(LAYER, (3, 1), 4)],
        [80, 80],
        *(3, 4),
    ),
    "layer norm of a narrow row": program([row(6), weight(6)], [Step(LAYER, (0, 1), 2)], [6], 2),
    "caps": program(
        [row(40), row(40)],
        [Step(ops.SoftCap(0.5), (0,), 2), Step(ops.ClampedSwiglu(1.7, 0.75), (2, 1), 3)],
        [40, 40],
        *(2, 3),
    ),
    "experts": program(
        [row(3 * 48), row(3), row(36)],
        [Step(ops.MixExperts(), (0, 1), 3), Step(ops.Add(), (3, 2), 4)],
        [36, 36],
        *(3, 4),
    ),
    "silu gate": program([row(192)], [Step(ops.Glu("silu"), (0,), 1)], [96], 1),
    "gelu gate": program([row(192)], [Step(ops.Glu("gelu"), (0,), 1)], [96], 1),
    "activations": program(
        [row(40), row(40)],
        [Step(ops.Silu(), (0,), 2), Step(ops.Gelu(), (1,), 3), Step(ops.Mul(), (2, 3), 4)],
        [40, 40, 40],
        *(2, 4),
    ),
    "numbers": program(
        [row(32)], [Step(ops.Mul(), (0, 16.0), 1), Step(ops.Add(), (0.5, 1), 2)], [32, 32], *(1, 2)
    ),
    "norm in small steps": program(
        [row(64), weight(64)],
        [
            Step(ops.Square(), (0,), 2),
            Step(ops.Mean(), (2,), 3),
            Step(ops.Add(), (3, 1e-6), 4),
            Step(ops.Rsqrt(), (4,), 5),
            Step(ops.Mul(), (0, 5), 6),
            Step(ops.Mul(), (6, 1), 7),
        ],
        [64, 1, 1, 1, 64, 64],
        *(3, 7),
    ),
    "deviation": program(
        [row(66)],
        [Step(ops.Square(), (0,), 1), Step(ops.Mean(), (1,), 2), Step(ops.Sqrt(), (2,), 3)],
        [66, 1, 1],
        *(1, 3),
    ),
    "one number": program(
        [row(1), weight(1)], [Step(ops.Mul(), (0, 1), 2), Step(ops.Silu(), (2,), 3)], [1, 1], *(2, 3)
    ),
}


def inputs_of(program: RowProgram, tokens: int) -> list[Array]:
    rng = np.random.default_rng(tokens)
    shapes = [(tokens if row.stride else 1, row.width) for row in program.inputs]
    return [(0.3 + rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


def check(run_kernel: Any, target: CpuTarget, name: str, tokens: int) -> None:
    program = PROGRAMS[name]
    inputs = inputs_of(program, tokens)
    stored, _ = run(run_kernel, target, name.replace(" ", "_"), program, inputs, tokens)
    rows = evaluate(program, inputs)
    for (index, _), found in zip(program.stored, stored):
        # Numbers near 1 in f32; sums of squares, sigmoids and roots are right to a few units in the last place.
        np.testing.assert_allclose(found, rows[index], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_are_what_numpy_says(run_kernel: Any, name: str) -> None:
    for tokens in TOKENS:
        check(run_kernel, HERE[0], name, tokens)


@each_target
@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "norm of narrow heads",
        "layer norm",
        "activations",
        "caps",
        "experts",
        "norm in small steps",
    ],
)
def test_every_target_gives_the_same(run_kernel: Any, target: CpuTarget, name: str) -> None:
    for tokens in (2, 8):
        check(run_kernel, target, name, tokens)


def test_layer_norm_of_nearly_equal_numbers_keeps_their_differences(run_kernel: Any) -> None:
    """The mean is taken off before anything is squared."""
    norm = program([row(64), weight(64)], [Step(LAYER, (0, 1), 2)], [64], 2)
    x = (100 + 0.01 * np.random.default_rng(0).standard_normal((3, 64))).astype(np.float32)
    (found,), _ = run(run_kernel, HERE[0], "far_from_zero", norm, [x, np.ones((1, 64), np.float32)], 3)
    expected = layer_norm(LAYER, x.astype(np.float64), np.ones(64))
    # The mean of numbers of 100 in f32 is right to 1e-5; the deviation is 0.01.
    np.testing.assert_allclose(found, expected, atol=3e-3)


def test_caps_and_clamps_hold_and_do_not_hide_what_is_not_a_number(run_kernel: Any) -> None:
    caps = program(
        [row(16)],
        [Step(ops.SoftCap(30.0), (0,), 1), Step(ops.ClampedSwiglu(1.7, 7.0), (0, 0), 2)],
        [16, 16],
        *(1, 2),
    )
    x = np.resize(np.array([np.nan, 1e30, -1e30, np.inf], np.float32), (1, 16))
    (capped, gated), _ = run(run_kernel, HERE[0], "hold", caps, [x], 1)
    np.testing.assert_allclose(capped[0, :4], [np.nan, 30, -30, 30], rtol=1e-6)
    # 7 sigmoid(7 alpha) (7 + 1), and nothing where the gate is closed.
    most = 56 / (1 + np.exp(-7 * 1.7))
    np.testing.assert_allclose(gated[0, :4], [np.nan, most, 0, most], rtol=1e-6, atol=1e-5)


def test_ops_are_either_supported_or_refused() -> None:
    assert [op for op in MEANING if not supports(op.__new__(op))] == []
    assert not supports(ops.Embed())
    refused = program([row(32)], [Step(ops.Embed(), (0,), 1)], [32], 1)
    with pytest.raises(UnsupportedError, match="Embed is not an op on rows"):
        rowwise_kernel(Vectors(4, "multiply"), "refused", refused).function(private=False)


def test_rows_of_an_odd_width_are_refused() -> None:
    odd = program([row(33)], [Step(ops.Silu(), (0,), 1)], [33], 1)
    with pytest.raises(UnsupportedError, match="rows of 33 numbers, which is odd"):
        rowwise_kernel(Vectors(4, "multiply"), "odd", odd).function(private=False)


# --- rounding -----------------------------------------------------------------------------------------------------


def difficult_rows(columns: int) -> Array:
    """Rows of ordinary numbers, of zeros, with blocks of very large and very small ones, and with one large number."""
    rows = np.random.default_rng(8).standard_normal((10, columns)).astype(np.float32)
    rows[1] = 0
    rows[2, 32:64] = 0
    rows[3] *= np.repeat(10.0 ** np.linspace(-37, 37, columns // 32), 32).astype(np.float32)
    rows[4, :32] = [3.4e38, -3.4e38, *[1e38] * 30]
    rows[5, :32] *= np.float32(1e-40)
    rows[6, 32:64] *= np.float32(1e-37)
    rows[7, 5] = 1e6
    rows[8] = np.where(np.arange(columns) % 2, -1, 1)
    # Halves: of two codes equally near, either is right.
    rows[9] = np.tile(np.concatenate([[127.0], np.arange(31) - 15.5]), columns // 32)
    return rows


def check_rounding(layout: PackedLayout, row: QuantisedRow, x: Array, found: Array) -> None:
    tokens, sub_block, f = len(x), layout.format.sub_block, np.float64
    codes = found[:, : row.columns].astype(f)
    assert codes.min() >= -127

    def section(offset: int, count: int, dtype: Any) -> Array:
        size = count * np.dtype(dtype).itemsize
        return np.ascontiguousarray(found[:, offset : offset + size]).view(dtype).astype(f)

    scales = section(row.scales, row.columns // 32, np.float32)
    largest = np.abs(x.astype(f)).reshape(tokens, -1, 32).max(-1)
    # A denormal scale has few bits.
    np.testing.assert_allclose(scales, largest / 127, rtol=2e-7, atol=2e-45)
    by_block = np.repeat(scales, 32, 1)
    # Half a step, and the errors of two multiplications; blocks below 1e-36 may become zero.
    assert (np.abs(by_block * codes - x.astype(f)) <= by_block * 0.50002 + 1e-36).all()
    whole = largest > 1e-36
    np.testing.assert_array_equal(np.abs(codes).reshape(tokens, -1, 32).max(-1)[whole], 127)
    sums = codes.reshape(tokens, -1, sub_block).sum(-1)
    starts = section(row.starts, row.columns // sub_block, np.int32)
    np.testing.assert_array_equal(starts, -row.centre * sums)
    if layout.format.has_mins:
        parts = x.astype(f).reshape(tokens, -1, sub_block)
        size = np.abs(parts).sum(-1)
        finite = size < 3e38
        error = section(row.sums, row.columns // sub_block, np.float32)[finite] - parts.sum(-1)[finite]
        assert (np.abs(error) <= 1e-6 * size[finite] + 1e-44).all()


@each_target
@pytest.mark.parametrize("dtype", [DType.Q4_0, DType.Q8_0, DType.Q5_1, DType.Q6_K, DType.Q2_K])
def test_rounded_rows_are_what_int8_promises(run_kernel: Any, target: CpuTarget, dtype: DType) -> None:
    layout = PackedLayout(dtype, 16, 512)
    quantised = QuantisedRow.of(layout, Vectors.of(target))
    x = difficult_rows(512)
    rounding = RowProgram((Row(512, 516),), (), (), (), ((0, quantised),))
    _, (found,) = run(run_kernel, target, f"round_{dtype}", rounding, [x], len(x))
    check_rounding(layout, quantised, x, found)
    assert quantised.centre == layout.centre - Vectors.of(target).shift(layout.max_number)


def test_rows_are_rounded_for_every_product_that_reads_them(run_kernel: Any) -> None:
    """A step's result, stored and rounded in two forms, and an earlier one that only the rounding reads."""
    vectors = Vectors.of(HERE[0])
    layouts = [PackedLayout(dtype, 16, 256) for dtype in (DType.Q5_0, DType.Q4_K, DType.Q6_K)]
    forms = [QuantisedRow.of(layout, vectors) for layout in layouts]
    steps = (Step(NORM, (0, 1), 2), Step(ops.Add(), (2, 0), 3))
    rounded = ((3, forms[0]), (3, forms[1]), (2, forms[2]))
    both = RowProgram((row(256), weight(256)), steps, (256, 256), ((3, 256),), rounded)
    inputs = inputs_of(both, 9)
    (stored,), found = run(run_kernel, HERE[0], "twice", both, inputs, 9)
    norm = RowProgram(both.inputs, steps[:1], (256,), ((2, 256),), ())
    (normed,), _ = run(run_kernel, HERE[0], "once", norm, inputs, 9)
    for layout, form, x, codes in zip(layouts, forms, [stored, stored, normed], found):
        check_rounding(layout, form, x, codes)
