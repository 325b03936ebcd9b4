"""The paged cache: what a sequence holds never changes by what others do, and memory comes back.

A few lines of numpy stand for the kernels: they see what kernels see, which is addresses.
"""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxc.artifact.kv import KvLayer, KvPlan, row_bytes
from rlxc.dtypes import DType
from rlxc.runtime.engines import KvRows, pages
from rlxc.runtime.engines.memory import private_memory
from rlxc.runtime.engines.pages import PagedCache, PagePool

PAGE, ROLLBACK, MAX_STEP, CONTEXT = 16, 7, 40, 200
WINDOWS = (None, 5, 33)
"""Of the block tables; page ends, windows and rollback fall on each other in every way."""

STORED = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: np.uint16, DType.INT8: np.int8}


def make_plan(dtype: DType = DType.F32, heads: int = 1, head_dim: int = 1, layers: int = 3) -> KvPlan:
    """Layers take turns at the windows."""
    size = row_bytes(dtype, heads, head_dim)
    plan = []
    for index in range(layers):
        table = index % len(WINDOWS)
        window = WINDOWS[table]
        plan.append(KvLayer(index, "paged", CONTEXT, window, heads, head_dim, dtype, 2 * size, None, table))
    return KvPlan(CONTEXT, MAX_STEP, ROLLBACK, PAGE, 2 * layers * size, tuple(plan))


PLAN = make_plan()


def array(address: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
    """What lies there."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_int8 * size).from_address(address), dtype).reshape(shape)


@dataclass(repr=False)
class Allocator:
    """Stands for the system; `kept` memory stays readable, whoever let go of it."""

    is_full: bool = False
    kept: list[Any] | None = None
    pieces: list[weakref.ref[Any]] = field(default_factory=list)
    asked: Callable[[], None] = lambda: None

    def __call__(self, size: int, *, large_pages: bool) -> npt.NDArray[np.int8]:
        self.asked()
        if self.is_full:
            raise MemoryError
        memory = private_memory(size)
        self.pieces.append(weakref.ref(memory))
        if self.kept is not None:
            self.kept.append(memory)
        return memory

    @property
    def in_use(self) -> int:
        return sum(piece() is not None for piece in self.pieces)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    monkeypatch.setattr(pages, "private_memory", allocator)
    return allocator


def make_cache(plan: KvPlan = PLAN, pages_per_slab: int = 3) -> PagedCache:
    """An empty cache with pools of its own. Addresses count from 64: from anywhere."""
    pools = [PagePool(layout, pages_per_slab * layout.nbytes) for layout in plan.pages]
    return PagedCache(plan, pools, 64)


def page_address(plan: KvPlan, cache: PagedCache, table: int, position: int) -> int:
    """Where the page of a position begins, as a kernel finds it."""
    entries = array(cache.tables, np.int64, len(plan.pages), plan.table_width)
    return 64 + int(entries[table, position // PAGE])


def step(cache: PagedCache, tokens: list[int]) -> None:
    """Append tokens: every layer's keys and values are the token."""
    cache.reserve(len(tokens))
    start, end = cache.position, cache.position + len(tokens)
    for begin in range(start // PAGE * PAGE, end, PAGE):
        first, last = max(start, begin), min(end, begin + PAGE)
        for table, layout in enumerate(PLAN.pages):
            memory = page_address(PLAN, cache, table, begin)
            for place in layout.layers.values():
                for offset in (place.keys, place.values):
                    rows = array(memory + offset, np.float32, PAGE)[first - begin : last - begin]
                    rows[:] = tokens[first - start : last - start]
    cache.advance(len(tokens))


def seen(cache: PagedCache, table: int) -> list[int]:
    """The tokens that a layer may look back to, now or after it was cut back as far as can be."""
    layout = PLAN.pages[table]
    first = 0 if layout.window is None else max(0, cache.oldest - layout.window + 1)
    (place,) = layout.layers.values()
    tokens: list[int] = []
    for begin in range(first // PAGE * PAGE, cache.position, PAGE):
        memory = page_address(PLAN, cache, table, begin)
        rows = slice(max(first - begin, 0), min(cache.position - begin, PAGE))
        keys = array(memory + place.keys, np.float32, PAGE)[rows].tolist()
        assert keys == array(memory + place.values, np.float32, PAGE)[rows].tolist()
        tokens += keys
    return tokens


@dataclass
class Held:
    """A cache, what it holds, and the furthest position that a step of its past began at, or that it was saved at."""

    cache: PagedCache
    tokens: list[int]
    furthest: int

    def check(self) -> None:
        assert self.cache.position == len(self.tokens)
        for table, window in enumerate(WINDOWS):
            first = 0 if window is None else max(0, self.cache.oldest - window + 1)
            assert seen(self.cache, table) == self.tokens[first:]
        assert self.cache.oldest <= max(0, self.furthest - ROLLBACK)

    def state(self) -> Any:
        return self.cache.position, self.cache.oldest, self.cache.writable_from, dict(self.cache.memory)


WHICH = st.integers(0, 99)
ACTION = st.one_of(
    st.tuples(st.just("step"), WHICH, st.integers(1, MAX_STEP)),
    st.tuples(st.just("step"), WHICH, st.integers(1, 3)),
    st.tuples(st.just("starve"), WHICH, st.integers(1, MAX_STEP)),
    st.tuples(st.just("fork"), WHICH, WHICH),
    st.tuples(st.just("truncate"), WHICH, st.integers(0, 40)),
    st.tuples(st.just("load"), WHICH, WHICH),
    st.tuples(st.just("drop"), WHICH, WHICH),
)


@settings(max_examples=2000, deadline=None)
@given(actions=st.lists(ACTION, max_size=30))
def test_nothing_that_a_cache_holds_is_ever_changed(actions: list[Any]) -> None:
    # A row that was let go too early is to be a wrong number, not a crash.
    allocator = Allocator(kept=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "private_memory", allocator)
        run_actions(actions, allocator)


def run_actions(actions: list[Any], allocator: Allocator) -> None:
    empty = make_cache()
    live, token = [Held(empty.fork(), [], 0)], 1
    for name, which, number in actions:
        held = live[which % len(live)]
        cache, position = held.cache, held.cache.position
        if name in ("step", "starve") and position + number <= CONTEXT:
            before = held.state()
            allocator.is_full = name == "starve"
            new = list(range(token, token + number))
            try:
                step(cache, new)
            except MemoryError:
                assert allocator.is_full and held.state() == before
            else:
                held.tokens += new
                held.furthest = max(held.furthest, position)
                token += number
            allocator.is_full = False
        elif name == "fork" and len(live) < 6:
            live.append(Held(cache.fork(), held.tokens[:], held.furthest))
        elif name == "truncate":
            back = max(position - number, cache.oldest)
            cache.truncate(back)
            del held.tokens[back:]
        elif name == "load" and len(live) < 6:
            loaded = empty.fork()
            loaded.load(position, cache.rows())
            live.append(Held(loaded, held.tokens[:], max(held.furthest, position)))
        elif name == "drop" and len(live) > 1:
            live.remove(held)
        for each in live:
            each.check()


# --- sharing ------------------------------------------------------------------------------------------------------


def addresses(cache: PagedCache) -> set[int]:
    """Of the pages that a cache has."""
    return set(cache.memory) - {cache.tables}


def test_fork_shares_its_pages_and_copies_the_last_ones_when_it_writes() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    fork = cache.fork()
    assert addresses(fork) == addresses(cache)
    step(fork, [1])
    copied = addresses(fork) - addresses(cache)
    assert copied == {page_address(PLAN, fork, table, 30) for table in range(len(WINDOWS))}
    step(fork, [2])
    assert copied == addresses(fork) - addresses(cache)


def test_parent_goes_on_in_place() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    before = addresses(cache)
    forks = [cache.fork(), cache.fork().fork()]
    step(cache, [1])
    assert addresses(cache) == before
    assert all(addresses(fork) == before for fork in forks)


def test_cut_back_parent_leaves_the_page_to_its_fork() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    fork = cache.fork()
    cache.truncate(28)
    step(cache, [100, 101])
    assert seen(fork, 0) == list(range(30))
    assert seen(cache, 0) == [*range(28), 100, 101]


def test_cutting_back_without_forks_copies_nothing() -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    before = addresses(cache)
    cache.truncate(27)
    step(cache, [1, 2])
    assert addresses(cache) == before


def test_fork_does_not_share_what_its_parent_has_yet_to_write() -> None:
    cache = make_cache()
    step(cache, list(range(16)))
    cache.reserve(20)  # and the step fails
    assert len(addresses(cache)) == 9
    assert len(addresses(cache.fork())) == 3


def test_pages_past_the_end_are_returned() -> None:
    cache = make_cache()
    step(cache, list(range(40)))
    cache.truncate(33)
    assert len(addresses(cache)) == 9
    cache.truncate(32)
    assert len(addresses(cache)) == 6


def test_memory_of_a_fork_counts_its_own_tables() -> None:
    cache = make_cache()
    step(cache, [1])
    both = {**cache.memory, **cache.fork().memory}
    tables = len(WINDOWS) * PLAN.table_width * 8
    assert sum(both.values()) == 2 * tables + sum(layout.nbytes for layout in PLAN.pages)


# --- windows ------------------------------------------------------------------------------------------------------


def test_windows_hold_no_more_than_the_plan_says() -> None:
    cache = make_cache()
    held = []
    for position in range(150):
        step(cache, [position])
        held.append(len(addresses(cache)) - -(-cache.position // PAGE))
    # Rounded up to whole pages, and one more: 5 + 7 + 1 positions, and 33 + 7 + 1.
    assert max(held) <= 2 + 4
    assert max(held[100:]) == max(held)


@pytest.mark.parametrize("count", [1, 3, MAX_STEP])
def test_newest_tokens_can_always_be_taken_back(count: int) -> None:
    cache = make_cache()
    for start in range(0, CONTEXT - count, count):
        step(cache, [start] * count)
        assert cache.oldest <= max(0, cache.position - ROLLBACK)
        assert cache.oldest <= max(
            0, start - ROLLBACK
        )  # nor does a step that is taken back whole cost anything


def test_oldest_says_what_the_windows_still_hold() -> None:
    cache = make_cache()
    step(cache, [0] * 40)
    assert cache.oldest == 0
    step(
        cache, [0] * 10
    )  # one that goes back to 40 - 7 looks back to 29: the narrow window's first page is let go
    assert cache.oldest == PAGE + 5 - 1
    cache.truncate(20)
    assert cache.oldest == 20


@pytest.mark.parametrize("position", [0, 5, 48, 61, 130])
def test_loaded_cache_can_be_cut_back_by_the_rollback(position: int) -> None:
    cache = make_cache()
    for token in range(position):
        step(cache, [token])
    loaded = make_cache()
    loaded.load(position, cache.rows())
    assert loaded.oldest == max(0, position - ROLLBACK)
    for table in range(len(WINDOWS)):
        tokens = seen(loaded, table)
        assert tokens == list(range(position - len(tokens), position))


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """What a layer should hold, positions first."""

    plan: KvLayer
    parts: list[npt.NDArray[Any]]

    @classmethod
    def random(cls, plan: KvLayer, count: int) -> Layer:
        rng = np.random.default_rng(plan.index)
        rows = (count, plan.heads, plan.head_dim)
        parts = [rng.integers(-127, 128, rows).astype(STORED[plan.dtype]) for _ in range(2)]
        if plan.dtype is DType.INT8:
            parts += [rng.random((count, plan.heads)).astype(np.float32) for _ in range(2)]
        return cls(plan, parts)

    def in_page(self, plan: KvPlan, cache: PagedCache, position: int) -> list[npt.NDArray[Any]]:
        """The same of one position, as the kernels' layout has it."""
        assert self.plan.table is not None
        begin = page_address(plan, cache, self.plan.table, position)
        place = plan.pages[self.plan.table].layers[self.plan.index]
        heads, dim, dtype, row = self.plan.heads, self.plan.head_dim, STORED[self.plan.dtype], position % PAGE
        found = [
            array(begin + place.keys, dtype, heads, PAGE // 16, dim, 16)[:, row // 16, :, row % 16],
            array(begin + place.values, dtype, heads, PAGE, dim)[:, row],
        ]
        for at in (place.key_scales, place.value_scales):
            if at is not None:
                found.append(array(begin + at, np.float32, heads, PAGE)[:, row])
        return found


def filled(plan: KvPlan, count: int) -> tuple[PagedCache, list[Layer]]:
    """A cache whose layers hold random numbers."""
    cache = make_cache(plan)
    layers = [Layer.random(layer, count) for layer in plan.layers if layer.shares is None]
    while cache.position < count:
        size = min(MAX_STEP, count - cache.position)
        cache.reserve(size)
        for position in range(cache.position, cache.position + size):
            for layer in layers:
                for part, place in zip(layer.parts, layer.in_page(plan, cache, position)):
                    place[:] = part[position]
        cache.advance(size)
    return cache, layers


def parts_of(rows: KvRows) -> list[npt.NDArray[Any]]:
    parts = [rows.keys, rows.values, rows.key_scales, rows.value_scales]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("count", [0, 32, 110])
def test_rows_are_what_kernels_wrote(dtype: DType, count: int) -> None:
    plan = make_plan(dtype, heads=2, head_dim=3, layers=4)
    cache, layers = filled(plan, count)
    for layer, rows in zip(layers, cache.rows(), strict=True):
        window = layer.plan.window
        assert rows.first == (0 if window is None else max(0, count - ROLLBACK - window + 1))
        for part, expected in zip(parts_of(rows), layer.parts, strict=True):
            width = math.prod(expected.shape[1:])
            assert part.dtype == expected.dtype
            np.testing.assert_array_equal(part, expected[rows.first :].reshape(count - rows.first, width))


@pytest.mark.parametrize("dtype", STORED)
def test_loaded_rows_lie_where_kernels_look(dtype: DType) -> None:
    plan = make_plan(dtype, heads=2, head_dim=3, layers=4)
    cache, layers = filled(plan, 110)
    saved = cache.rows()
    loaded = make_cache(plan, pages_per_slab=2)
    loaded.load(110, saved)
    for layer, rows in zip(layers, saved):
        for position in range(rows.first, 110):
            for part, place in zip(layer.parts, layer.in_page(plan, loaded, position), strict=True):
                np.testing.assert_array_equal(place, part[position])
    for rows, again in zip(saved, loaded.rows(), strict=True):
        assert rows.first == again.first
        for part, expected in zip(parts_of(again), parts_of(rows), strict=True):
            np.testing.assert_array_equal(part, expected)


def test_rows_before_the_first_loaded_one_are_finite() -> None:
    # Kernels read keys in tiles, and leave out what lies before the window.
    plan = make_plan()
    cache, _ = filled(plan, 60)
    saved = cache.rows()
    other = make_cache(plan)
    other.reserve(60)
    for number in range(len(plan.pages)):
        for position in range(0, 60, PAGE):
            array(page_address(plan, other, number, position), np.float32, PAGE)[:] = np.nan
    other.truncate(0)
    other.load(60, saved)
    assert saved[2].first % PAGE
    assert np.isfinite(array(page_address(plan, other, 2, saved[2].first), np.float32, PAGE)).all()


def test_layer_that_shares_another_s_cache_has_no_rows() -> None:
    plan = make_plan(DType.INT8)
    sharing = replace(plan.layers[0], index=3, shares=0)
    plan = replace(plan, layers=(*plan.layers, sharing))
    cache, _ = filled(plan, 20)
    saved = cache.rows()
    assert saved[3].first == 20
    assert [part.shape for part in parts_of(saved[3])] == [(0, 1)] * 4
    loaded = make_cache(plan)
    loaded.load(20, saved)
    np.testing.assert_array_equal(loaded.rows()[0].keys, saved[0].keys)


def test_without_memory_nothing_is_loaded(allocator: Allocator) -> None:
    cache = make_cache()
    step(cache, list(range(30)))
    saved, loaded = cache.rows(), make_cache()
    allocator.is_full = True
    with pytest.raises(MemoryError):
        loaded.load(30, saved)
    assert loaded.position == 0
    assert not addresses(loaded)


# --- interrupts ---------------------------------------------------------------------------------------------------


class Interrupt(Exception):
    """Stands for Ctrl-C, which may come between any two lines."""


def interrupted(work: Callable[[], object], line: int) -> bool:
    """Do this up to a line of `pages`; whether there are as many."""
    left = line

    # Python ignores what is raised while an object is deleted.
    deleting = {"__del__", "give_back", "_settle", "_put_back"}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != pages.__file__ or frame.f_code.co_name in deleting:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


WORK: list[Callable[[PagedCache], object]] = [lambda cache: cache.truncate(30), lambda cache: cache.fork()]


@pytest.mark.parametrize("work", WORK, ids=["truncate", "fork"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_interrupt_changes_nothing_for_others(work: Callable[[PagedCache], object], is_shared: bool) -> None:
    def run(line: int) -> bool:
        cache = make_cache()
        others = [cache.fork()]
        step(cache, list(range(40)))
        step(cache, [100] * 10)
        tokens = [[], [*range(40), *[100] * 10]]
        if is_shared:
            others.append(cache.fork())
        was_interrupted = interrupted(lambda: work(cache), line)
        position = cache.position
        assert position in (30, 50)
        step(others[0], list(range(500, 540)))  # in the pages that were returned
        step(cache, [200] * 25)
        assert seen(cache, 0) == [*tokens[1][:position], *[200] * 25]
        tokens[0] = list(range(500, 540))
        assert [seen(other, 0) for other in others] == tokens[: len(others)]
        return was_interrupted

    lines = 0
    while run(lines):
        lines += 1
    assert lines >= 5


# --- the pool -----------------------------------------------------------------------------------------------------


def test_pages_begin_at_cache_lines() -> None:
    pool = PagePool(PLAN.pages[0])
    assert all(pool.take().address % 64 == 0 for _ in range(5))


def test_page_is_used_again_when_the_last_cache_lets_go_of_it(allocator: Allocator) -> None:
    cache = make_cache(pages_per_slab=1)
    step(cache, [1])
    fork = cache.fork()
    used = addresses(cache)
    del cache
    other = fork.fork()
    other.truncate(0)
    step(other, [1])
    assert not addresses(other) & used
    other.truncate(0)
    del fork
    pieces = len(allocator.pieces)
    step(other, [1])
    assert len(allocator.pieces) == pieces


def test_all_but_a_reserve_of_memory_goes_back(allocator: Allocator) -> None:
    pool = PagePool(replace(PLAN.pages[0], nbytes=8 << 20))
    taken = [pool.take() for _ in range(10)]
    assert allocator.in_use == 10
    taken.clear()
    assert allocator.in_use == 4
    taken = [pool.take() for _ in range(4)]
    assert len(allocator.pieces) == 10


def test_memory_with_a_page_in_use_stays(allocator: Allocator) -> None:
    layout = PLAN.pages[0]
    pool = PagePool(layout, 2 * layout.nbytes)
    first, second, third = (pool.take() for _ in range(3))
    del first
    first = pool.take()
    assert allocator.in_use == 2
    assert len({first.address, second.address, third.address}) == 3


def test_page_may_return_while_another_is_taken(allocator: Allocator) -> None:
    # The garbage collector runs when it likes.
    pool = PagePool(PLAN.pages[0], PLAN.pages[0].nbytes)
    taken = [pool.take()]
    address = taken[0].address
    allocator.asked = taken.clear
    other = pool.take()
    allocator.is_full = True
    assert pool.take().address == address != other.address


def test_memory_that_the_system_does_not_have_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=f"no memory for {1 << 62} bytes"):
        private_memory(1 << 62)
