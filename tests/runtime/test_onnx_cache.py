"""Caches of the ONNX engine: where rows lie, who shares them, and what can be taken back.

ONNX Runtime takes no part: a stand-in for its op moves rows as the op's documentation says, and checks that every row
that attention would see lies where it looks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle, islice
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxc.artifact import KvLayer, KvPlan
from rlxc.dtypes import DType
from rlxc.runtime.engines import KvRows
from rlxc.runtime.engines.onnx_cache import (
    GroupRows,
    OnnxCache,
    RowGroup,
    empty_cache,
    loaded_cache,
    row_groups,
)
from rlxc.runtime.engines.onnx_lane import Lane

CONTEXT, MAX_STEP, ROLLBACK = 90, 9, 4
WINDOWS = (3, 7)
JUNK = -1.0


def layer(index: int, layout: Any, window: int | None, capacity: int, dtype: DType = DType.F32) -> KvLayer:
    return KvLayer(index, layout, capacity, window, 2, 3, dtype, 2 * 2 * 3 * 4)


LAYERS = (
    layer(0, "ring", WINDOWS[0], WINDOWS[0] + MAX_STEP + ROLLBACK),
    layer(1, "linear", None, CONTEXT),
    layer(2, "ring", WINDOWS[1], WINDOWS[1] + MAX_STEP + ROLLBACK),
    layer(3, "ring", WINDOWS[0], WINDOWS[0] + MAX_STEP + ROLLBACK, DType.F16),
    layer(4, "linear", WINDOWS[0], CONTEXT),
)
PLAN = KvPlan(CONTEXT, MAX_STEP, ROLLBACK, None, 0, LAYERS)
GROUPS = row_groups(PLAN)


def row(token: int, layer: KvLayer, part: int) -> npt.NDArray[np.float64]:
    """What the stand-in stores of a token below 100: ``[heads, head_dim]``, exact in f16."""
    rows = token + np.arange(6).reshape(2, 3) / 8 + layer.index % 2 / 16
    return -rows if part else rows


def run_op(rows: GroupRows, tokens: list[int], position: int) -> None:
    """What GroupQueryAttention does to the buffers when it reads ``tokens`` from ``position`` on."""
    group, end = rows.group, len(tokens)
    capacity, window = group.capacity, group.window
    stride = capacity - window + 1
    first = {t: t - _resident(t, capacity, stride) for t in (position, end)}
    for number, (layer, part) in enumerate((layer, part) for layer in group.layers for part in (0, 1)):
        buffer = rows.buffers.arrays[number]
        assert buffer.shape == (1, 2, capacity, 3)
        for seen in range(max(0, position - window + 1), position):
            expected = row(tokens[seen], layer, part)
            np.testing.assert_array_equal(buffer[0, :, seen - first[position]], expected)
        every = np.full((2, end, 3), JUNK)
        every[:, first[position] : position] = buffer[0, :, : position - first[position]]
        for new in range(position, end):
            every[:, new] = row(tokens[new], layer, part)
        if first[end] != first[position]:
            buffer[:] = JUNK
        buffer[0, :, : end - first[end]] = every[:, first[end] :]


def _resident(total: int, capacity: int, stride: int) -> int:
    """Rows in use after so many tokens, as the op's documentation states them."""
    return total if total <= capacity else total - stride * -(-(total - capacity) // stride)


@dataclass(eq=False)
class Held:
    """A cache, the tokens that it should hold, and the most that it ever held."""

    cache: OnnxCache
    tokens: list[int] = field(default_factory=list)
    furthest: int = 0

    def extend(self, tokens: list[int]) -> None:
        """As the engine does it for one sequence."""
        groups, position = self.cache.groups, len(self.tokens)
        self.tokens += tokens
        while position < len(self.tokens):
            count = min(rows.group.longest(position, len(self.tokens) - position) for rows in groups)
            groups = [rows.extended(position, position + count) for rows in groups]
            position += count
            for rows in groups:
                run_op(rows, self.tokens[:position], position - count)
        self.cache.position, self.cache.groups = position, groups
        self.furthest = max(self.furthest, position)

    def check(self) -> None:
        """All that is held is what should be, and enough is held, and no more."""
        cache, oldest = self.cache, 0
        assert cache.position == len(self.tokens)
        for layer, held in zip(LAYERS, cache.rows()):
            assert len(held.keys) == len(held.values) == cache.position - held.first <= layer.capacity
            if held.first:
                assert layer.window is not None
                oldest = max(oldest, held.first + layer.window - 1)
            for part, rows in enumerate((held.keys, held.values)):
                assert rows.dtype == (np.float16 if layer.dtype is DType.F16 else np.float32)
                expected = [row(token, layer, part).ravel() for token in self.tokens[held.first :]]
                np.testing.assert_array_equal(rows, np.reshape(expected, (-1, 6)))
        assert cache.oldest == oldest <= max(0, self.furthest - ROLLBACK)


def extend_together(lane: Lane, held: list[Held], tokens: list[int]) -> Lane:
    """As the engine does it for several, each of which gets a token; the lane that they are in."""
    if len(held) > lane.size:
        lane = Lane(GROUPS, len(held))
    gathered = lane.gather([each.cache for each in held])
    assert sorted(gathered.order) == list(range(len(held)))
    for place, number in enumerate(gathered.order):
        each = held[number]
        each.tokens.append(tokens[number])
        for rows, arrays in zip(gathered.groups[place], gathered.arrays):
            for array, own in zip(arrays, rows.buffers.arrays):
                assert array[place].ctypes.data == own.ctypes.data
            run_op(rows, each.tokens, len(each.tokens) - 1)
    for place, number in enumerate(gathered.order):
        each = held[number]
        each.cache.position, each.cache.groups = len(each.tokens), gathered.groups[place]
        each.furthest = max(each.furthest, len(each.tokens))
    return lane


def grow(count: int, *, start: int = 0) -> Held:
    """A cache that read ``count`` tokens one by one."""
    held = Held(empty_cache(GROUPS))
    for token in range(start, start + count):
        held.extend([token])
    return held


# --- where rows lie -----------------------------------------------------------------------------------------------


def test_rings_keep_what_rollback_needs_outside_their_buffers() -> None:
    rings = [(group.window, group.capacity) for group in GROUPS if group.capacity != CONTEXT]
    assert rings == [(window, window + MAX_STEP) for window in WINDOWS]
    assert [[layer.index for layer in group.layers] for group in GROUPS] == [[0, 3], [1], [2], [4]]


@pytest.mark.parametrize("group", GROUPS, ids=[str(group.window) for group in GROUPS])
def test_base_is_that_of_the_documentation(group: RowGroup) -> None:
    stride = group.capacity - group.window + 1
    for total in range(CONTEXT + 1):
        assert group.base(total) == total - _resident(total, group.capacity, stride)


def test_run_stops_where_it_would_jump_over_its_own_rows() -> None:
    ring = GROUPS[0]
    assert (ring.window, ring.capacity) == (3, 12)
    assert [ring.longest(position, 9) for position in range(14)] == [9, 9, 9, 9, 8, 7, 6, 5, 4, 3, 9, 9, 9, 9]
    assert ring.longest(10, 9) == 9  # jumps to 10, and nothing after that is lost


@pytest.mark.parametrize("steps", [[1], [9], [5, 9, 1, 2], [8, 9, 9, 3]])
def test_any_steps_leave_the_window_where_it_is_looked_for(steps: list[int]) -> None:
    held, token = grow(0), 0
    for step in islice(cycle(steps), 40):
        if token + step > CONTEXT:
            break
        held.extend(list(range(token, token + step)))
        token += step
        held.check()
    assert token > 2 * max(group.capacity for group in GROUPS if group.capacity != CONTEXT)


@pytest.mark.parametrize("count", range(1, CONTEXT + 1, 3))
def test_every_position_from_the_oldest_on_can_be_gone_back_to(count: int) -> None:
    held = grow(count)
    for position in range(held.cache.oldest, count + 1):
        back = Held(held.cache.fork(), held.tokens[:position], count)
        back.cache.truncate(position)
        back.check()
        if position < CONTEXT:
            back.extend([77])  # checks that the op finds its window
            back.check()
        held.check()


# --- who shares what ----------------------------------------------------------------------------------------------


def arrays(cache: OnnxCache) -> list[int]:
    """What tells the buffers apart that a next run would use."""
    return [id(rows.buffers) for rows in cache.groups]


def test_fork_copies_before_it_writes_and_its_parent_does_not() -> None:
    parent = grow(5)
    before = arrays(parent.cache)
    child = Held(parent.cache.fork(), parent.tokens[:], 5)
    assert arrays(child.cache) == before
    parent.extend([50])
    assert arrays(parent.cache) == before
    child.extend([60])
    assert not set(arrays(child.cache)) & set(before)
    for held in (parent, child):
        held.check()


def test_parent_that_goes_back_copies_as_long_as_somebody_looks() -> None:
    parent = grow(5)
    before = arrays(parent.cache)
    child = Held(parent.cache.fork(), parent.tokens[:], 5)
    parent.cache.truncate(3)
    del parent.tokens[3:]
    parent.extend([50])
    assert not set(arrays(parent.cache)) & set(before)
    child.check()
    parent.check()


def test_nobody_copies_when_nobody_else_looks() -> None:
    parent = grow(5)
    before = arrays(parent.cache)
    child = Held(parent.cache.fork(), parent.tokens[:], 5)
    del parent
    child.cache.truncate(4)
    del child.tokens[4:]
    child.extend([60])
    assert arrays(child.cache) == before
    child.check()


def test_a_fork_s_parent_that_went_back_writes_after_what_a_new_fork_needs() -> None:
    parent = grow(9)
    first = parent.cache.fork()
    del first
    parent.cache.truncate(4)
    del parent.tokens[4:]
    child = Held(parent.cache.fork(), parent.tokens[:], 9)
    before = arrays(parent.cache)
    parent.extend([50])
    assert arrays(parent.cache) == before
    child.check()


def test_ring_that_jumps_leaves_its_forks_where_they_are() -> None:
    ring = GROUPS[0]
    parent = grow(ring.capacity)
    child = Held(parent.cache.fork(), parent.tokens[:], ring.capacity)
    parent.extend([50])
    assert parent.cache.groups[0].base > child.cache.groups[0].base
    child.check()
    parent.check()


def test_failed_run_leaves_the_cache_as_it_was() -> None:
    held = grow(GROUPS[0].capacity)
    for rows in held.cache.groups:
        ahead = rows.extended(held.cache.position, held.cache.position + 1)
        run_op(ahead, [*held.tokens, 50], held.cache.position)
    held.check()
    held.extend([51])
    held.check()


def test_memory_is_counted_once_for_all_that_share_it() -> None:
    parent = grow(30)
    child = parent.cache.fork()
    assert child.memory == parent.cache.memory
    rows = sum(min(30, group.capacity) * 2 * 6 * _bytes(group) for group in GROUPS)
    aside = sum(array.nbytes for held in parent.cache.groups for array in held.aside)
    assert aside > 0
    assert sum(child.memory.values()) == rows + aside


def _bytes(group: RowGroup) -> int:
    return sum(2 if layer.dtype is DType.F16 else 4 for layer in group.layers)


def test_fork_and_truncate_cost_the_same_at_any_length() -> None:
    plan = KvPlan(8192, 256, 64, None, 0, (layer(0, "linear", None, 8192), layer(1, "ring", 512, 832)))
    rows = [KvRows(first, *np.zeros((2, 8000 - first, 6), np.float32)) for first in (0, 8000 - 575)]
    cache = loaded_cache(row_groups(plan), 8000, rows)
    times = []
    for _ in range(50):
        start = perf_counter()
        cache.fork().truncate(7950)
        times.append(perf_counter() - start)
    assert min(times) < 50e-6  # what copying 8,000 rows of one layer takes is ten times that


# --- side by side -------------------------------------------------------------------------------------------------


def slots(held: list[Held]) -> list[int]:
    """How far from the first of these each sequence lies, in slots."""
    starts = [each.cache.groups[0].buffers.arrays[0].ctypes.data for each in held]
    size = held[0].cache.groups[0].buffers.arrays[0].nbytes
    return [(start - min(starts)) // size for start in starts]


def test_sequences_that_go_on_together_stay_where_they_are() -> None:
    lane, held = Lane(GROUPS, 8), [grow(count) for count in (3, 20, 0)]
    extend_together(lane, held, [50, 51, 52])
    before = [arrays(each.cache) for each in held]
    assert sorted(slots(held)) == [0, 1, 2]
    extend_together(lane, held[::-1], [53, 54, 55])
    assert [arrays(each.cache) for each in held] == before
    for each in held:
        each.check()


def test_newcomer_takes_the_place_of_one_that_left() -> None:
    lane, held = Lane(GROUPS, 8), [grow(5), grow(6), grow(7)]
    extend_together(lane, held, [50, 51, 52])
    stay, gone = [held[0], held[2]], slots(held)[1]
    before = [arrays(each.cache) for each in stay]
    del held
    both = [stay[0], grow(9), stay[1]]
    extend_together(lane, both, [60, 61, 62])
    assert [arrays(each.cache) for each in stay] == before
    assert slots(both)[1] == gone


def test_sequence_whose_window_jumps_keeps_its_place() -> None:
    ring = GROUPS[0]
    lane, held = Lane(GROUPS, 4), [grow(5), grow(ring.capacity - 1), grow(7)]
    extend_together(lane, held, [50, 51, 52])
    before, kept = slots(held), Held(held[1].cache.fork(), held[1].tokens[:], ring.capacity)
    extend_together(lane, held, [60, 61, 62])
    assert held[1].cache.groups[0].base > kept.cache.groups[0].base
    assert slots(held) == before
    for each in (*held, kept):
        each.check()


def test_kept_fork_makes_room_and_keeps_its_rows() -> None:
    lane, held = Lane(GROUPS, 2), [grow(5), grow(6)]
    extend_together(lane, held, [50, 51])
    kept = Held(held[1].cache.fork(), held[1].tokens[:], 7)
    twin = Held(kept.cache.fork(), kept.tokens[:], 7)
    held[1] = grow(8)
    before = arrays(held[0].cache)
    extend_together(lane, held, [60, 61])
    assert arrays(held[0].cache) == before
    kept.check()
    assert arrays(kept.cache) == arrays(twin.cache)  # still one copy of what the two share
    twin.cache.truncate(5)
    del twin.tokens[5:]
    twin.extend([70])
    kept.check()
    twin.check()


def test_lane_knows_whether_it_is_used() -> None:
    lane, held = Lane(GROUPS, 4), [grow(5), grow(6)]
    assert not lane.is_used
    extend_together(lane, held, [50, 51])
    del held[0]
    assert lane.is_used
    held.clear()
    assert not lane.is_used


# --- everything at once -------------------------------------------------------------------------------------------

WHICH = st.integers(0, 5)
OPERATIONS = st.one_of(
    st.tuples(st.just("extend"), WHICH, st.integers(1, MAX_STEP)),
    st.tuples(st.just("extend"), WHICH, st.integers(1, MAX_STEP)),
    st.tuples(st.just("together"), st.integers(1, 63), st.just(0)),
    st.tuples(st.just("together"), st.integers(1, 63), st.just(0)),
    st.tuples(st.just("truncate"), WHICH, st.integers(0, 2 * ROLLBACK)),
    st.tuples(st.just("fork"), WHICH, st.just(0)),
    st.tuples(st.just("drop"), WHICH, st.just(0)),
    st.tuples(st.just("load"), WHICH, st.just(0)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(OPERATIONS, max_size=40))
def test_caches_never_change_each_other(operations: list[tuple[str, int, int]]) -> None:
    held, token, lane = [Held(empty_cache(GROUPS))], 0, Lane(GROUPS, 4)
    for name, number, count in operations:
        if name == "together":  # number is a set of them
            members = [each for i, each in enumerate(held) if number >> i & 1 and len(each.tokens) < CONTEXT]
            if members:
                lane = extend_together(lane, members, [(token + i) % 64 for i in range(len(members))])
                token += len(members)
            for each in held:
                each.check()
            continue
        one = held[number % len(held)]
        if name == "extend":
            new = [(token + i) % 64 for i in range(min(count, CONTEXT - len(one.tokens)))]
            one.extend(new)
            token += len(new)
        elif name == "truncate":
            position = max(one.cache.oldest, len(one.tokens) - count)
            one.cache.truncate(position)
            del one.tokens[position:]
        elif name == "fork":
            held.append(Held(one.cache.fork(), one.tokens[:], one.furthest))
        elif name == "load":
            cache = loaded_cache(GROUPS, one.cache.position, one.cache.rows())
            held.append(Held(cache, one.tokens[:], one.furthest))
        elif len(held) > 1:
            held.remove(one)
        for each in held:
            each.check()
