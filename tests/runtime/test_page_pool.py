"""The pages' memory: where it comes from, and when it goes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from paged_caches import PLAN, Allocator, addresses, make_cache, step

from rlxc.runtime.engines import pages
from rlxc.runtime.engines.memory import private_memory
from rlxc.runtime.engines.pages import PagePool


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    monkeypatch.setattr(pages, "private_memory", allocator)
    return allocator


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
