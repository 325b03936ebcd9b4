"""Side paths against float64, on units laid out by hand; what a unit lacks, and what lies around it, is NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host import HERE, each_target
from stored_weights import random_weight

from rlxc.artifact.lora import LoraGroup, LoraPart, LoraPlan
from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.lora import lora_down_kernel, lora_embed_kernel
from rlxc.backends.tvm.kernels.matmul import matmul_kernel
from rlxc.backends.tvm.kernels.matmul_exact import exact_matmul_kernel
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import PackedLayout
from rlxc.backends.tvm.program import InUnit
from rlxc.backends.tvm.side_paths import SidePaths
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout

Doubles = npt.NDArray[np.float64]

COLUMNS = 96
SIZES = (37, 20, 5)
"""Rows of the parts of one product: they end in the middle of tiles, and the last lies in one with the second."""

STACKS = ((0, 2), (), (1,), (2, 1, 0), (0,))
"""The units of each sequence; the third unit has only the middle part, the second lacks it."""

LACKING = {1: {1}, 2: {0, 2}}

TOLERANCE = 2e-6
"""Of the sum of the products' magnitudes: at most 100 sums in f32, each rounded to 6e-8."""

both_types = pytest.mark.parametrize("dtype", [DType.F16, DType.F32])


def plan(dtype: DType) -> LoraPlan:
    """A matrix of a layer before, so that nothing begins at zero; the product's parts; and a table."""
    first = LoraPart("other", 24, 40, "other.up", 0, 24)
    starts = np.cumsum([0, *SIZES])
    parts = tuple(
        LoraPart(f"part{i}", size, COLUMNS, "up", int(start), sum(SIZES))
        for i, (size, start) in enumerate(zip(SIZES, starts))
    )
    table = LoraPart("table", 42, 50, "table.up", 0, 42)
    groups = (
        LoraGroup("linear", "other.down", (first,)),
        LoraGroup("linear", "down", parts),
        LoraGroup("embedding", "table.down", (table,)),
    )
    return LoraPlan(dtype, 48, groups)


@dataclass(frozen=True)
class Units:
    """Three units somewhere in memory, and the A's ``[16, columns]`` and B's ``[rows, 16]`` in them by part."""

    plan: LoraPlan
    memory: npt.NDArray[np.uint8]
    distances: npt.NDArray[np.int64]
    a: dict[tuple[int, int], Doubles]
    b: dict[tuple[int, int], Doubles]

    @classmethod
    def random(cls, dtype: DType) -> Units:
        made = plan(dtype)
        rng = np.random.default_rng(7)
        element = np.dtype(np.float16 if dtype is DType.F16 else np.float32)
        distances = np.array([2, 0, 1]) * (made.unit_bytes + 192) + 64
        memory = np.full(int(distances.max()) + made.unit_bytes + 64, 0xFF, np.uint8)
        a, b = {}, {}
        for unit, distance in enumerate(distances):
            memory[distance : distance + len(made.parts)] = 0
            for index, (part, place) in enumerate(zip(made.parts, made.unit)):
                if index - 1 in LACKING.get(unit, ()):
                    continue
                memory[distance + index] = 1
                down = rng.standard_normal((part.columns, 16)).astype(element)
                up = rng.standard_normal((part.rows, 16)).astype(element)
                tiles = np.zeros((place.tiles, 16, 16), element)
                for row in range(part.rows):
                    tile, lane = divmod(part.first_row + row, 16)
                    tiles[tile - place.first_tile, :, lane] = up[row]
                for offset, numbers in ((place.down, down), (place.up, tiles)):
                    raw = numbers.view(np.uint8).ravel()
                    memory[distance + offset : distance + offset + raw.size] = raw
                a[unit, index], b[unit, index] = down.T.astype(np.float64), up.astype(np.float64)
        return cls(made, memory, distances.astype(np.int64), a, b)

    def anchored(self, argument: Any, dtype: str) -> npt.NDArray[Any]:
        """What a kernel gets for an argument: memory from there on."""
        assert isinstance(argument, InUnit)
        rest = self.memory[argument.offset :]
        return rest[: len(rest) // 4 * 4].view(dtype)

    def stacks(self, sequences: int) -> tuple[npt.NDArray[Any], ...]:
        """``starts``, ``units`` and ``scales``; a sequence more often than once has one unit with two scales."""
        uses = [unit for stack in STACKS[:sequences] for unit in stack]
        starts = np.cumsum([0, *map(len, STACKS[:sequences])]).astype(np.int32)
        scales = np.random.default_rng(3).standard_normal(len(uses)).astype(np.float32)
        return starts, self.distances[uses], scales


def expected_u(units: Units, x: Doubles, sequences: int) -> tuple[Doubles, Doubles]:
    """The product's u ``[tokens, 3 parts, 3 units, 16]``, NaN where nothing is; and its terms' magnitudes."""
    starts, _, scales = units.stacks(sequences)
    u = np.full((len(x), len(SIZES), 3, 16), np.nan)
    size = np.zeros_like(u)
    for token, row in enumerate(x):
        sequence = token * sequences // len(x)
        for depth, unit in enumerate(STACKS[sequence]):
            for part in set(range(len(SIZES))) - LACKING.get(unit, set()):
                terms = scales[starts[sequence] + depth] * units.a[unit, part + 1] * row
                u[token, part, depth], size[token, part, depth] = terms.sum(-1), np.abs(terms).sum(-1)
    return u, size


def expected_delta(units: Units, u: Doubles, sequences: int) -> tuple[Doubles, Doubles]:
    """What is added to the product ``[tokens, rows]``, and the magnitudes of its terms."""
    delta, size = np.zeros((2, len(u), sum(SIZES)))
    starts = np.cumsum([0, *SIZES])
    for token in range(len(u)):
        for depth, unit in enumerate(STACKS[token * sequences // len(u)]):
            for part in set(range(len(SIZES))) - LACKING.get(unit, set()):
                rows = slice(starts[part], starts[part + 1])
                terms = units.b[unit, part + 1] * u[token, part, depth]
                delta[token, rows] += terms.sum(-1)
                size[token, rows] += np.abs(terms).sum(-1)
    return delta, size


@both_types
@each_target
@pytest.mark.parametrize(("sequences", "step"), [(1, 1), (1, 9), (5, 1), (4, 3), (3, 70)])
def test_narrow_side_of_every_part_that_is_there(
    run_kernel: Any, target: CpuTarget, dtype: DType, sequences: int, step: int
) -> None:
    units, (starts, distances, scales) = Units.random(dtype), Units.random(dtype).stacks(sequences)
    down, (present, numbers) = SidePaths(units.plan).down("down")
    stride = COLUMNS + 3
    kernel = lora_down_kernel(Vectors.of(target), down, stride=stride)
    x = np.full((sequences * step, stride), np.nan, np.float32)
    x[:, :COLUMNS] = np.random.default_rng(1).standard_normal((len(x), COLUMNS))
    u = np.full((len(x), len(SIZES), 3, 16), np.nan, np.float32)
    run_kernel(
        *(kernel, x, units.anchored(present, "int8"), units.anchored(numbers, down.element)),
        *(starts, distances, scales, u, sequences, step),
        target=target,
    )
    expected, size = expected_u(units, x[:, :COLUMNS].astype(np.float64), sequences)
    np.testing.assert_array_equal(np.isnan(u), np.isnan(expected))
    assert np.nanmax(np.abs(u - expected) / np.where(size > 0, size, 1)) < TOLERANCE


def test_narrow_side_of_few_columns_of_any_number(run_kernel: Any) -> None:
    """As a float model of odd width has them: no number of chains divides them."""
    part = LoraPart("only", 16, 7, "up", 0, 16)
    tiny = LoraPlan(DType.F32, 16, (LoraGroup("linear", "down", (part,)),))
    down, _ = SidePaths(tiny).down("down")
    a = np.random.default_rng(1).standard_normal((7, 16)).astype(np.float32)
    x = np.random.default_rng(2).standard_normal((2, 7)).astype(np.float32)
    for step in (1, 2):
        u = np.zeros((step, 16), np.float32)
        stacks = (np.array([0, 1], np.int32), np.zeros(1, np.int64), np.full(1, -0.5, np.float32))
        kernel = lora_down_kernel(Vectors.of(HERE[0]), down, stride=7)
        run_kernel(kernel, x[:step].copy(), np.ones(1, np.int8), a, *stacks, u, 1, step)
        np.testing.assert_allclose(u, -0.5 * x[:step].astype(np.float64) @ a, atol=1e-5)


def run_product(
    run_kernel: Any, target: CpuTarget, units: Units | None, weight: DType, sequences: int, step: int, u: Any
) -> npt.NDArray[np.float32]:
    """The product of random weights and activations, with a bias; with side paths if there are units."""
    vectors, rows = Vectors.of(target), sum(SIZES)
    # Adapters' tiles have 16 rows, whatever the weight's have.
    small = WeightLayout(8, 32, 8) if target.lanes == 8 and weight.is_packed else None
    stored = random_weight(weight, rows, COLUMNS, chosen=small)
    output, knobs = OutputRows(rows, rows + 5), {"tokens": 4, "prefetch": 1024}
    rng = np.random.default_rng(5)
    bias = rng.standard_normal(-(-rows // 16) * 16).astype(np.float32)
    up, added = None, ()
    if units is not None:
        up, (present, numbers) = SidePaths(units.plan).up("up", 0, len(SIZES))
        starts, distances, _ = units.stacks(sequences)
        memory = (units.anchored(present, "int8"), units.anchored(numbers, up.element))
        added = (*memory, starts, distances, u.astype(np.float32), sequences, step)
    tokens = sequences * step
    if isinstance(stored.layout, PackedLayout):
        row = QuantisedRow.of(stored.layout, vectors)
        x = rng.integers(0, 64, (tokens, row.stride), dtype=np.int8)
        kernel = matmul_kernel(vectors, knobs, stored.layout, output, bias=True, lora=up)
    else:
        x = rng.standard_normal((tokens, COLUMNS)).astype(np.float32)
        kernel = exact_matmul_kernel(
            vectors, knobs, stored.layout, output, stride=COLUMNS, bias=True, lora=up
        )
    out = np.full((tokens, output.stride), 7, np.float32)
    run_kernel(kernel, stored.stored, x, bias, out, tokens, *added, target=target)
    assert (out[:, rows:] == 7).all()
    return out[:, :rows]


@each_target
@pytest.mark.parametrize(("weight", "dtype"), [(DType.Q8_0, DType.F16), (DType.F32, DType.F32)])
@pytest.mark.parametrize(("sequences", "step"), [(1, 1), (1, 13), (5, 1), (4, 3), (2, 30)])
def test_wide_side_is_added_to_the_product(
    run_kernel: Any, target: CpuTarget, dtype: DType, weight: DType, sequences: int, step: int
) -> None:
    units, tokens = Units.random(dtype), sequences * step
    rng = np.random.default_rng(2)
    u = rng.standard_normal((tokens, len(SIZES), 3, 16)).astype(np.float32)
    there = ~np.isnan(expected_u(units, np.zeros((tokens, COLUMNS)), sequences)[0])
    u = np.where(there, u, np.nan)
    alone = run_product(run_kernel, target, None, weight, sequences, step, None)
    result = run_product(run_kernel, target, units, weight, sequences, step, u)
    delta, size = expected_delta(units, u.astype(np.float64), sequences)
    worst = np.abs(result - alone.astype(np.float64) - delta) / (size + np.abs(alone))
    assert worst.max() < TOLERANCE
    untouched = [token for token in range(tokens) if not STACKS[token * sequences // tokens]]
    np.testing.assert_array_equal(result[untouched], alone[untouched])


def test_products_of_one_x_find_their_parts_of_u(run_kernel: Any) -> None:
    """A second product's parts are not u's first, and not the unit's first either."""
    parts = (LoraPart("a", 16, 32, "a.up", 0, 16), LoraPart("b", 32, 32, "b.up", 0, 32))
    two = LoraPlan(DType.F32, 32, (LoraGroup("linear", "down", parts),))
    up, (present, numbers) = SidePaths(two).up("b.up", 1, 2)
    assert (present, numbers) == (InUnit(1), InUnit(two.unit[1].up))
    rng = np.random.default_rng(0)
    b = rng.standard_normal((2, 16, 16)).astype(np.float32)
    u = rng.standard_normal((1, 2, 2, 16)).astype(np.float32)
    weight = random_weight(DType.F32, 32, 32)
    vectors, knobs = Vectors.of(HERE[0]), {"tokens": 2, "prefetch": 0}
    kernel = exact_matmul_kernel(
        vectors, knobs, weight.layout, OutputRows(32, 32), stride=32, bias=False, lora=up
    )
    out = np.zeros((1, 32), np.float32)
    stacks = (np.array([0, 1], np.int32), np.zeros(1, np.int64))
    run_kernel(
        *(kernel, weight.stored, np.zeros((1, 32), np.float32), out, 1),
        *(np.ones(1, np.int8), b, *stacks, u, 1, 1),
    )
    expected = np.einsum("tro,r->to", b.astype(np.float64), u[0, 1, 0]).ravel()
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


@both_types
@each_target
@pytest.mark.parametrize(("sequences", "step"), [(1, 1), (5, 1), (4, 3)])
def test_embedding_adds_looked_up_rows(
    run_kernel: Any, target: CpuTarget, dtype: DType, sequences: int, step: int
) -> None:
    units = Units.random(dtype)
    starts, distances, scales = units.stacks(sequences)
    paths = SidePaths(units.plan)
    place, (present, numbers) = paths.embedding("table.down")
    kernel = lora_embed_kernel(
        Vectors.of(target), element=paths.element, columns=42, stride=42, out_stride=48, place=place
    )
    rng = np.random.default_rng(1)
    tokens = sequences * step
    x = rng.standard_normal((tokens, 42)).astype(np.float32)
    ids = rng.integers(0, 50, tokens)
    out = np.full((tokens, 48), np.nan, np.float32)
    run_kernel(
        *(kernel, x, ids, units.anchored(present, "int8"), units.anchored(numbers, paths.element)),
        *(starts, distances, scales, out, sequences, step),
        target=target,
    )
    table = len(units.plan.parts) - 1
    for token in range(tokens):
        sequence = token // step
        expected, size = x[token].astype(np.float64), np.abs(x[token]).astype(np.float64)
        for depth, unit in enumerate(STACKS[sequence]):
            terms = (
                units.b[unit, table] * units.a[unit, table][:, ids[token]] * scales[starts[sequence] + depth]
            )
            expected, size = expected + terms.sum(-1), size + np.abs(terms).sum(-1)
        assert (np.abs(out[token, :42] - expected) / size).max() < TOLERANCE


def test_kernels_of_different_side_paths_have_different_names() -> None:
    """A kernel is compiled once for each name."""
    up, _ = SidePaths(plan(DType.F16)).up("up", 0, 3)
    others = [
        replace(up, element="float32"),
        replace(up, first=1),
        replace(up, of=4),
        replace(up, units=4),
        replace(up, parts=up.parts[:2]),
        replace(up, parts=(*up.parts[:2], replace(up.parts[2], place=0))),
    ]
    assert len({one.name for one in (up, *others)}) == 1 + len(others)
