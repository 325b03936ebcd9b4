"""The workspace of any program: buffers in use together never share a byte, and little is left free."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rlxc.backends.tvm.kernels.kernel import Kernel
from rlxc.backends.tvm.program import Call, InWeights, InWorkspace, Program, Workspace, plan_workspace


def nothing() -> None:
    pass


def program(sizes: list[int], uses: list[set[int]]) -> Program:
    """A call for each set of buffers."""
    calls = tuple(
        Call(
            Kernel(f"kernel{index % 3}", (), nothing),
            (InWeights(0), *map(InWorkspace, sorted(used)), "step"),
            "tokens",
        )
        for index, used in enumerate(uses)
    )
    return Program(calls, tuple(sizes), most_tokens=4)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[int], list[set[int]]]:
    sizes = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
    buffers = st.sets(st.integers(0, len(sizes) - 1), max_size=4)
    return sizes, draw(st.lists(buffers, max_size=15))


def alive(uses: list[set[int]], call: int) -> set[int]:
    """The buffers that hold something while a call runs: used by it, or before and after it."""
    before = set().union(*uses[: call + 1])
    after = set().union(*uses[call:])
    return before & after


def extents(workspace: Workspace, sizes: list[int], buffers: set[int]) -> list[tuple[int, int]]:
    return sorted((workspace.offsets[b], workspace.offsets[b] + sizes[b]) for b in buffers if sizes[b])


@given(programs())
def test_buffers_in_use_together_share_nothing(case: tuple[list[int], list[set[int]]]) -> None:
    sizes, uses = case
    workspace = plan_workspace(program(sizes, uses))
    for call in range(len(uses)):
        found = extents(workspace, sizes, alive(uses, call))
        assert all(end <= start for (_, end), (start, _) in pairwise(found))


@given(programs())
def test_every_buffer_lies_inside_and_on_a_cache_line(case: tuple[list[int], list[set[int]]]) -> None:
    sizes, uses = case
    workspace = plan_workspace(program(sizes, uses))
    assert all(offset % 64 == 0 for offset in workspace.offsets)
    found = extents(workspace, sizes, set(range(len(sizes))))
    assert all(0 <= start <= end <= workspace.nbytes for start, end in found)


@given(programs())
def test_workspace_is_between_what_is_in_use_and_the_sum(case: tuple[list[int], list[set[int]]]) -> None:
    sizes, uses = case
    rounded = [-(-size // 64) * 64 for size in sizes]
    most = max((sum(rounded[b] for b in alive(uses, call)) for call in range(len(uses))), default=0)
    assert most <= plan_workspace(program(sizes, uses)).nbytes <= sum(rounded)


def test_chain_needs_two_buffers_only() -> None:
    """Each call reads what the call before wrote: a third buffer lies where the first was."""
    sizes, uses = [640] * 10, [{i, i + 1} for i in range(9)]
    assert plan_workspace(program(sizes, uses)).nbytes == 2 * 640


def test_small_buffers_fill_the_gap_that_a_large_one_left() -> None:
    sizes, uses = [1024, 512, 512, 64], [{0, 3}, {1, 2, 3}]
    assert plan_workspace(program(sizes, uses)).nbytes == 1024 + 64


def test_program_without_calls_needs_no_workspace() -> None:
    assert plan_workspace(Program((), (), 4)) == Workspace((), 0)


def test_kernels_are_listed_once_in_order_of_use() -> None:
    uses: list[set[int]] = [{0}] * 5
    assert [kernel.name for kernel in program([64], uses).kernels] == ["kernel0", "kernel1", "kernel2"]
