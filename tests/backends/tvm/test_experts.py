"""Products with experts, on the very same activations, against decoded weights in float64.

Whatever was rounded was rounded before, so that kernel and numpy agree to the last bits of f32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from host import HERE, each_target
from stored_weights import random_weight, store

from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.experts import Experts, exact_expert_matmul_kernel, expert_matmul_kernel
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.route import Groups
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import PackedLayout, tiled
from rlxc.backends.tvm.targets import CpuTarget, find_target
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout

Array = npt.NDArray[Any]

COLUMNS, KNOBS = 256, {"tokens": 3, "prefetch": 1024}

TOLERANCE = 2e-6
"""Of the sum of the products' magnitudes: sums of 256 terms in f32, most of them added in pairs or exactly."""


@dataclass(frozen=True)
class StoredExperts:
    """Experts as the kernel reads them, beside what they decode to, ``[E, rows, columns]``."""

    of: Experts
    stored: npt.NDArray[np.int8]
    decoded: npt.NDArray[np.float64]

    @classmethod
    def random(
        cls, dtype: DType, experts: int, rows: int, used: int, chosen: WeightLayout | None = None
    ) -> StoredExperts:
        of = Experts(dtype, experts, rows, COLUMNS, used, chosen)
        each = [random_weight(dtype, rows, COLUMNS, seed) for seed in range(experts)]
        parts = [np.pad(one.data, ((0, tiled(rows) - rows), (0, 0))) for one in each]
        decoded = np.stack([one.decoded for one in each]).astype(np.float64)
        return cls(of, store(of.layout, parts), decoded)

    def bias(self) -> tuple[Array, Array]:
        """Random biases ``[E, rows]``, and as they are stored."""
        values = 50 * np.random.default_rng(5).standard_normal(self.decoded.shape[:2]).astype(np.float32)
        return values, np.pad(values, ((0, 0), (0, tiled(self.of.rows) - self.of.rows)))


def grouped(chosen: Array, experts: int) -> Array:
    """Slots by expert, as the router leaves them."""
    groups, flat = Groups(experts), chosen.ravel()
    out = np.full(groups.order + flat.size, 1 << 30, np.int32)
    wanted = np.unique(flat)
    out[0] = len(wanted)
    out[groups.active :][: len(wanted)] = wanted
    out[groups.starts :][: experts + 1] = [0, *np.bincount(flat, minlength=experts).cumsum()]
    out[groups.order :] = np.argsort(flat, kind="stable")
    return out


def rounded(count: int, row: QuantisedRow) -> tuple[Array, Array]:
    """Random activations in int8, as the kernel reads them, and what they stand for, ``[count, columns]``."""
    rng = np.random.default_rng(count)
    codes = rng.integers(-127, 128, (count, row.columns), dtype=np.int8)
    scales = rng.uniform(0.001, 0.1, (count, row.blocks)).astype(np.float32)
    exact = codes.astype(np.float64) * np.repeat(scales, 32, 1)
    by_sub_block = codes.reshape(count, row.sub_blocks, row.sub_block).sum(-1, dtype=np.int32)
    sums = exact.reshape(count, row.sub_blocks, row.sub_block).sum(-1).astype(np.float32)
    parts = [(0, codes), (row.scales, scales), (row.starts, -row.centre * by_sub_block)]
    out = np.full((count, row.stride), -1, np.int8)
    for offset, array in [*parts, *([(row.sums, sums)] if row.has_sums else [])]:
        raw = np.ascontiguousarray(array).view(np.int8).reshape(count, -1)
        out[:, offset : offset + raw.shape[1]] = raw
    return out, exact


def check(
    run_kernel: Any,
    weight: StoredExperts,
    chosen: Array,
    *,
    shared: bool,
    exact: bool,
    bias: bool = False,
    target: CpuTarget = HERE[0],
) -> Array:
    """The results ``[tokens, used, rows]``, which must be what numpy says."""
    of, vectors = weight.of, Vectors.of(target)
    tokens, used = chosen.shape
    count = tokens if shared else tokens * used
    output = OutputRows(of.rows, of.rows + 3)
    if exact:
        x = np.full((count, COLUMNS + 5), np.nan, np.float32)
        x[:, :COLUMNS] = np.random.default_rng(count).standard_normal((count, COLUMNS))
        given, values = x, x[:, :COLUMNS].astype(np.float64)
        kernel = exact_expert_matmul_kernel(
            vectors, KNOBS, of, output, stride=COLUMNS + 5, shared=shared, bias=bias
        )
    else:
        assert isinstance(of.layout, PackedLayout)
        given, values = rounded(count, QuantisedRow.of(of.layout, vectors))
        kernel = expert_matmul_kernel(vectors, KNOBS, of, output, shared=shared, bias=bias)
    biases, stored = weight.bias()
    out = np.full((tokens * used, output.stride), 7, np.float32)
    more = [stored] if bias else []
    run_kernel(kernel, weight.stored, given, grouped(chosen, of.experts), *more, out, tokens, target=target)
    assert (out[:, of.rows :] == 7).all()
    slots = np.repeat(values, used, 0) if shared else values
    matrices = weight.decoded[chosen.ravel()]
    expected = np.einsum("sni,si->sn", matrices, slots)
    size = np.einsum("sni,si->sn", np.abs(matrices), np.abs(slots))
    if bias:
        added = biases[chosen.ravel()]
        expected, size = expected + added, size + np.abs(added)
    worst = np.abs(out[:, : of.rows] - expected) / size.max(0)
    assert worst.max() < TOLERANCE
    return out[:, : of.rows].reshape(tokens, used, -1)


def choose(tokens: int, experts: int, used: int) -> Array:
    """Distinct experts for each token; never the second one, if there is a choice."""
    rng = np.random.default_rng(7)
    allowed = np.array([e for e in range(experts) if e != 1 or used >= experts])
    return np.stack([rng.permutation(allowed)[:used] for _ in range(tokens)])


@pytest.mark.parametrize("rows", [40, 44, 48])
def test_tiles_of_eight_rows_meet_their_experts(run_kernel: Any, rows: int) -> None:
    """Each expert's rows are padded to tiles of 16, as biases are: the last of 8 may have none, some or all rows."""
    target = find_target("x86-64-v3")
    if target not in HERE:
        pytest.skip("this CPU cannot run it")
    weight = StoredExperts.random(DType.Q3_K, 5, rows, 2, WeightLayout(4, 32, 8))
    for exact in (False, True):
        check(run_kernel, weight, choose(3, 5, 2), shared=True, exact=exact, bias=True, target=target)


@pytest.mark.parametrize("shared", [True, False], ids=["rows of tokens", "rows of slots"])
@pytest.mark.parametrize("dtype", [DType.Q4_K, DType.Q8_0, DType.IQ4_NL, DType.MXFP4])
def test_rounded_rows_meet_their_experts(run_kernel: Any, dtype: DType, shared: bool) -> None:
    weight = StoredExperts.random(dtype, 5, 40, 2)
    for tokens in (1, 3, 40):  # few; too few for a tile to be unpacked; many
        check(run_kernel, weight, choose(tokens, 5, 2), shared=shared, exact=False)


@pytest.mark.parametrize("shared", [True, False], ids=["rows of tokens", "rows of slots"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.Q5_1, DType.NF4])
def test_exact_rows_meet_their_experts(run_kernel: Any, dtype: DType, shared: bool) -> None:
    weight = StoredExperts.random(dtype, 5, 40, 2)
    for tokens in (1, 40):
        check(run_kernel, weight, choose(tokens, 5, 2), shared=shared, exact=True)


@pytest.mark.parametrize("rows", [1, 15, 16, 290])  # less than a tile; more tiles than tasks
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_experts_of_any_size_have_their_own_biases(run_kernel: Any, rows: int, exact: bool) -> None:
    weight = StoredExperts.random(DType.Q8_0, 3, rows, 2)
    for tokens in (2, 11):
        check(run_kernel, weight, choose(tokens, 3, 2), shared=True, exact=exact, bias=True)


@each_target
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_every_target_gives_the_same(run_kernel: Any, target: CpuTarget, exact: bool) -> None:
    weight = StoredExperts.random(DType.Q4_K, 3, 20, 2)
    for tokens in (1, 30):
        check(run_kernel, weight, choose(tokens, 3, 2), shared=False, exact=exact, bias=True, target=target)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_all_tokens_may_want_one_expert_or_all(run_kernel: Any, exact: bool) -> None:
    one = StoredExperts.random(DType.Q8_0, 4, 32, 1)
    check(run_kernel, one, np.full((25, 1), 2), shared=True, exact=exact)
    every = StoredExperts.random(DType.Q8_0, 4, 32, 4)
    check(run_kernel, every, choose(25, 4, 4), shared=True, exact=exact)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_a_token_gives_the_same_bits_in_any_company(run_kernel: Any, exact: bool) -> None:
    """Its rows are the same numbers as those of other tokens: only experts' company differs."""
    weight = StoredExperts.random(DType.Q4_K, 4, 32, 2)
    chosen = np.tile([[3, 0]], (30, 1))
    crowd = check(run_kernel, weight, chosen, shared=True, exact=exact)
    chosen[1:] = choose(29, 4, 2)
    mixed = check(run_kernel, weight, chosen, shared=True, exact=exact)
    np.testing.assert_array_equal(mixed[0], crowd[0])
    assert not np.array_equal(mixed[1], crowd[1])
