"""Adapters in the engine's memory, and the arrays that tell a step which of them each sequence uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from random_adapters import random_pairs

from rlxc.artifact import LoraGroup, LoraPart, LoraPlan
from rlxc.dtypes import DType
from rlxc.errors import SessionError
from rlxc.runtime.engines.tvm_adapters import Stacks, TvmAdapter

GROUPS = (
    LoraGroup(
        "linear",
        "qk.down",
        (LoraPart("q", 20, 24, "qk.up", 0, 33), LoraPart("k", 13, 24, "qk.up", 20, 33)),
    ),
    LoraGroup("embedding", "table.down", (LoraPart("table", 18, 50, "table.up", 0, 18),)),
)
F32, F16 = LoraPlan(DType.F32, 48, GROUPS), LoraPlan(DType.F16, 48, GROUPS)


def memory(adapter: TvmAdapter, unit: int) -> npt.NDArray[np.uint8]:
    """A unit's bytes."""
    start = adapter.addresses[unit] - adapter.addresses[0]
    return adapter._memory[start : start + adapter.plan.unit_bytes].view(np.uint8)


@pytest.mark.parametrize("plan", [F32, F16], ids=["f32", "f16"])
def test_unit_holds_what_the_plan_says(plan: LoraPlan) -> None:
    """Read one number after the other, as the plan's documentation says."""
    element = np.dtype(np.float32 if plan is F32 else np.float16)
    pairs = {**random_pairs(plan, 21, 1, ["q", "table"]), **random_pairs(plan, 16, 2, ["k"])}
    adapter = TvmAdapter(plan, pairs)
    assert adapter.units == 2
    for unit in range(2):
        raw = memory(adapter, unit)
        assert raw[:3].tolist() == [1, int(unit == 0), 1]
        for part, place in zip(plan.parts, plan.unit):
            if part.tensor == "k" and unit == 1:
                continue
            a, b = (side.astype(element) for side in pairs[part.tensor])
            for rank in range(16):
                there = unit * 16 + rank < len(a)
                for column in range(part.columns):
                    at = place.down + (column * 16 + rank) * element.itemsize
                    expected = a[unit * 16 + rank, column] if there else 0
                    assert raw[at : at + element.itemsize].view(element)[0] == expected
                for lane in range(16 * place.tiles):
                    row = 16 * place.first_tile + lane - part.first_row
                    at = place.up + (lane // 16 * 256 + rank * 16 + lane % 16) * element.itemsize
                    expected = b[row, unit * 16 + rank] if there and 0 <= row < part.rows else 0
                    assert raw[at : at + element.itemsize].view(element)[0] == expected


def test_memory_counts_what_is_there() -> None:
    sizes = [TvmAdapter(F32, random_pairs(F32, 16, 0, names)).nbytes for names in ([], ["k"], ["k", "q"])]
    # k's A, and its B in the two tiles that its 13 rows lie in; the bytes that say which matrices are there.
    assert sizes[:2] == [0, 3 + 4 * (24 * 16 + 2 * 16 * 16)]
    assert sizes[2] == sizes[1] + 4 * (24 * 16 + 2 * 16 * 16)


def test_number_too_large_for_f16_is_refused_by_name() -> None:
    pairs = dict(random_pairs(F16, 4, 0))
    pairs["k"][1][3, 2] = -7e4
    with pytest.raises(
        SessionError, match=r"^k: the adapter has a number of size 70000, which float16 cannot"
    ):
        TvmAdapter(F16, pairs)
    assert TvmAdapter(F32, pairs).units == 1


def test_matrix_that_the_plan_lacks_is_refused() -> None:
    (pair,) = random_pairs(F32, 4, 0, ["q"]).values()
    with pytest.raises(SessionError, match=r"^v: the artifact takes no adapters for this matrix"):
        TvmAdapter(F32, {"v": pair})


ANCHOR = 4096


def arrays(stacks: Stacks, sequences: int, mixes: Any) -> list[npt.NDArray[Any]]:
    return [np.from_dlpack(tensor) for tensor in stacks.tensors(sequences, mixes)]


def test_sequences_use_all_units_of_their_adapters_in_order() -> None:
    small, large = (TvmAdapter(F32, random_pairs(F32, rank, rank)) for rank in (5, 20))
    mixes = [[(large, 0.5), (small, -2.0)], [], [(small, 1.0)]]
    starts, units, scales = arrays(Stacks(F32, ANCHOR), 3, mixes)
    assert starts.tolist() == [0, 3, 3, 4]
    assert (units + ANCHOR).tolist() == [*large.addresses, *small.addresses, *small.addresses]
    assert scales.tolist() == [0.5, 0.5, -2.0, 1.0]


@pytest.mark.parametrize("mixes", [(), [[], []]])
def test_no_adapters_are_empty_stacks(mixes: Any) -> None:
    for plan in (F32, None):
        starts, units, scales = arrays(Stacks(plan, ANCHOR), 2, mixes)
        assert starts.tolist() == [0, 0, 0]
        assert len(units) == len(scales) == 1  # which nobody reads


def test_arrays_stay_while_stacks_do() -> None:
    one, other = (TvmAdapter(F32, random_pairs(F32, 5, seed)) for seed in range(2))
    stacks = Stacks(F32, ANCHOR)
    mix = [(one, 1.0)]
    first = stacks.tensors(1, [mix])
    assert stacks.tensors(1, [[(one, 1.0)]]) is first
    mix[0] = (one, 2.0)  # the very same list, with something else in it
    changed = stacks.tensors(1, [mix])
    assert np.from_dlpack(changed[2]).tolist() == [2.0]
    assert stacks.tensors(1, [[(other, 2.0)]]) is not changed
    assert np.from_dlpack(stacks.tensors(2, ())[0]).tolist() == [0, 0, 0]


def test_stack_of_more_ranks_than_planned_is_refused() -> None:
    adapter = TvmAdapter(F32, random_pairs(F32, 17, 0))
    small = TvmAdapter(F32, random_pairs(F32, 16, 0))
    stacks = Stacks(F32, ANCHOR)
    assert len(arrays(stacks, 1, [[(adapter, 1.0), (small, 1.0)]])[1]) == 3
    with pytest.raises(SessionError, match="a stack of 64 ranks, in units of 16, and 48 fit"):
        stacks.tensors(2, [[], [(adapter, 1.0), (adapter, 1.0)]])


def test_stacks_for_other_sequences_are_refused() -> None:
    adapter = TvmAdapter(F32, random_pairs(F32, 4, 0))
    with pytest.raises(SessionError, match="1 stacks of adapters for 2 sequences"):
        Stacks(F32, ANCHOR).tensors(2, [[(adapter, 1.0)]])


@pytest.mark.parametrize("plan", [F16, None], ids=["another", "none"])
def test_adapter_of_another_engine_is_refused(plan: LoraPlan | None) -> None:
    adapter = TvmAdapter(F32, random_pairs(F32, 4, 0))
    with pytest.raises(SessionError, match="prepared by another engine"):
        Stacks(plan, ANCHOR).tensors(1, [[(adapter, 1.0)]])
