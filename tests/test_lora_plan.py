"""Where the numbers of an adapter lie in memory, for any plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlxc.artifact import LoraGroup, LoraPart, LoraPlan
from rlxc.dtypes import DType

SIZES = st.integers(1, 200)


@st.composite
def lora_plans(draw: st.DrawFn) -> LoraPlan:
    """Products of one to three matrices, up to four of them, of any sizes."""
    groups = []
    for number in range(draw(st.integers(1, 4))):
        rows, columns, first, parts = draw(st.lists(SIZES, min_size=1, max_size=3)), draw(SIZES), 0, []
        for i, count in enumerate(rows):
            parts.append(LoraPart(f"{number}.{i}", count, columns, f"{number}.up", first, sum(rows)))
            first += count
        groups.append(LoraGroup("linear", f"{number}.down", tuple(parts)))
    return LoraPlan(draw(st.sampled_from([DType.F32, DType.F16])), 16, tuple(groups))


@given(lora_plans())
def test_unit_has_room_for_every_matrix_aligned_and_apart(plan: LoraPlan) -> None:
    itemsize = 4 if plan.dtype is DType.F32 else 2
    ends = [len(plan.parts)]  # a byte for each part comes first
    assert len(plan.unit) == len(plan.parts)
    for part, place in zip(plan.parts, plan.unit):
        numbers = [(place.down, 16 * part.columns), (place.up, 16 * 16 * place.tiles)]
        for start, count in numbers:
            assert start % 64 == 0
            assert start >= ends[-1]
            ends.append(start + itemsize * count)
    assert plan.unit_bytes % 64 == 0
    assert 0 <= plan.unit_bytes - ends[-1] < 64


@given(lora_plans())
def test_tiles_of_a_unit_are_those_that_its_rows_touch(plan: LoraPlan) -> None:
    for part, place in zip(plan.parts, plan.unit):
        touched = {row // 16 for row in range(part.first_row, part.first_row + part.rows)}
        assert touched == set(range(place.first_tile, place.first_tile + place.tiles))


def test_units_of_a_plan_are_its_ranks_in_sixteens() -> None:
    assert LoraPlan(DType.F32, 48, ()).max_units == 3
