"""Prefix reuse, with an engine that knows exactly what the logits after a prompt and its adapters are."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlxc.artifact import Artifact, KvLayer, Manifest
from rlxc.dtypes import DType
from rlxc.errors import ContextError
from rlxc.runtime.model import Model
from rlxc.runtime.prefix import PrefixCache
from rlxc.runtime.sequence import LoadedAdapter, Stack, TokenSequence

POINT_EVERY = 16  # twice what a step takes
ROLLBACK = 6  # of the engine with a window
PAGE, PAGE_BYTES = 4, 64  # of its caches
CALL = (7, 8)  # what invokes the activated adapter
PLENTY = 1 << 20

MakeModel = Callable[..., Model]


@pytest.fixture(autouse=True)
def _points_fit_the_tiny_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlxc.runtime.prefix.POINT_EVERY", POINT_EVERY)


@pytest.fixture
def make_model(split_manifest: Manifest, fake_engine: Any, tmp_path: Path) -> Iterator[MakeModel]:
    """``make_model(window=False)``: a model on an engine that keeps everything, or can go back by 6 tokens only."""
    artifact = Artifact(tmp_path, split_manifest)
    verification = artifact.start_verification()

    def make(window: bool = False) -> Model:
        plan = artifact.manifest.kv_cache
        if window:
            layer = KvLayer(0, "ring", 4 + plan.max_step + ROLLBACK, 4, 1, 4, DType.F32, 32)
            plan = replace(plan, layers=(layer,))
        manifest = replace(artifact.manifest, kv_cache=plan)
        return Model(replace(artifact, manifest=manifest), fake_engine(window=window), verification)

    yield make
    verification.close()


@pytest.fixture
def model(make_model: MakeModel) -> Model:
    return make_model()


def adapter(model: Model, seed: int, invocation: tuple[int, ...] = ()) -> LoadedAdapter:
    factors = np.random.default_rng(seed).standard_normal((2, 4, 4)).astype(np.float32)
    prepared = model.engine.prepare({"blk.0.attn_q.weight": (factors[0], factors[1])})
    return LoadedAdapter(f"a{seed}", Path("a"), f"{seed:064x}", prepared, invocation)


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int64)


def count_up(count: int, start: int = 10) -> Any:
    return np.arange(start, start + count, dtype=np.int64)


def read_count(model: Model, work: Callable[[], object]) -> int:
    """How many tokens the engine is given meanwhile."""
    engine: Any = model.engine
    engine.steps.clear()
    work()
    return sum(engine.steps)


def expected_logits(model: Model, tokens: Sequence[int], stack: Stack) -> Any:
    """What the engine answers to a prompt that is read from the start."""
    engine: Any = model.engine
    mixes: list[list[tuple[Any, float]]] = []
    tokens = list(tokens)
    for position in range(len(tokens)):
        mix = []
        for one, scale in stack:
            calls = [i for i in range(len(tokens)) if tuple(tokens[i : i + len(CALL)]) == CALL]
            if scale and (not one.invocation_tokens or (calls and calls[-1] <= position)):
                mix.append((one.prepared, scale))
        mixes.append(mix)
    return engine.logits(tokens, mixes)


# --- what is read again, and what is not --------------------------------------------------------------------------


def test_prompt_goes_on_from_the_longest_beginning_that_it_shares(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    prefixes.read(count_up(10), ())
    prefixes.read(np.concatenate([count_up(6), ids(99)]), ())
    prompt = np.concatenate([count_up(8), ids(98, 97)])
    assert read_count(model, lambda: prefixes.read(prompt, ())) == 2
    assert prefixes.begin(np.concatenate([count_up(6), ids(99, 1)]), ()).position == 7


def test_last_token_is_always_read(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    prefixes.read(count_up(10), ())
    sequence, logits, _ = prefixes.read(count_up(10), ())
    assert model.engine.steps[-1] == 1
    assert sequence.position == 10
    np.testing.assert_array_equal(logits.values[0, 0], expected_logits(model, count_up(10), ()))


def test_nothing_in_common_gives_an_empty_sequence(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    assert prefixes.begin(count_up(5), ()).position == 0
    prefixes.read(count_up(5), ())
    assert prefixes.begin(ids(9, 11, 12), ()).position == 0
    assert prefixes.begin(ids(10), ()).position == 0


def test_generated_tokens_that_are_kept_are_reused(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    sequence, _, _ = prefixes.read(count_up(5), ())
    for token in (50, 51, 52):
        model.decode([sequence], [token], [()])
    prefixes.keep(sequence)
    assert prefixes.begin(np.concatenate([count_up(5), ids(50, 51, 52, 53)]), ()).position == 8


def test_entry_stays_as_it_was_when_sequences_go_on_from_it(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    first, _, _ = prefixes.read(count_up(9), ())
    model.decode([first], [77], [()])
    second = prefixes.begin(np.concatenate([count_up(9), ids(1)]), ())
    model.decode([second], [78], [()])
    third = prefixes.begin(np.concatenate([count_up(9), ids(1)]), ())
    assert third.ids.tolist() == count_up(9).tolist()
    logits = model.decode([third], [79], [()])
    np.testing.assert_array_equal(
        logits.values[0, 0], expected_logits(model, [*count_up(9).tolist(), 79], ())
    )


def test_prompt_that_does_not_fit_is_refused_before_anything_happens(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    prefixes.read(count_up(4), ())
    with pytest.raises(ContextError, match="41 tokens do not fit the context of 40"):
        prefixes.read(count_up(41), ())
    assert len(prefixes) == 1


# --- sliding windows ----------------------------------------------------------------------------------------------


def test_long_prompt_with_a_window_can_be_left_at_its_points(make_model: MakeModel) -> None:
    model = make_model(window=True)
    prefixes = PrefixCache(model, PLENTY)
    prefixes.read(count_up(38), ())  # points after 16 and 32 tokens, and the end
    assert len(prefixes) == 3
    # Afterwards all of the prompt, two tokens more than is shared, can be cut back by 6.
    for shared, usable in [(37, 37), (32, 32), (30, 30), (29, 16), (16, 16), (14, 14), (13, 0)]:
        prompt = np.concatenate([count_up(shared), ids(99, 98)])
        assert prefixes.begin(prompt, ()).position == usable


def test_cutting_back_is_done_only_where_the_window_is_held(make_model: MakeModel) -> None:
    model = make_model(window=True)
    prefixes = PrefixCache(model, PLENTY)
    sequence = model.new_sequence()
    model.prefill(sequence, count_up(20), ())
    prefixes.keep(sequence)
    assert sequence.cache.oldest == 14
    for shared, usable in [(14, 14), (13, 0)]:
        prompt = np.concatenate([count_up(shared), np.full(20 - shared, 99)])
        assert prefixes.begin(prompt, ()).position == usable


def test_what_is_reused_can_be_cut_back_as_far_as_what_is_read_anew(make_model: MakeModel) -> None:
    model = make_model(window=True)
    prefixes = PrefixCache(model, PLENTY)
    sequence = model.new_sequence()
    model.prefill(sequence, count_up(20), ())
    prefixes.keep(sequence)
    assert prefixes.begin(count_up(20), ()).position == 19  # 20 tokens can be cut back to 14
    assert prefixes.begin(count_up(19), ()).position == 0  # 19 must be, to 13


def test_points_are_no_entries_where_nothing_is_lost(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    assert read_count(model, lambda: prefixes.read(count_up(30), ())) == 30
    assert model.engine.steps == [8, 8, 8, 6]
    assert len(prefixes) == 1


# --- adapters -----------------------------------------------------------------------------------------------------


def test_beginning_is_shared_only_as_far_as_the_adapters_were_the_same(model: Model) -> None:
    a, b = adapter(model, 1), adapter(model, 2)
    prefixes = PrefixCache(model, PLENTY)
    sequence = model.new_sequence()
    model.prefill(sequence, count_up(4), ((a, 1.0),))
    model.prefill(sequence, count_up(4, 14), ((b, 1.0),))
    prefixes.keep(sequence)
    cases: list[tuple[Stack, int]] = [
        (((a, 1.0),), 4),
        (((a, 0.5),), 0),
        (((b, 1.0),), 0),
        ((), 0),
        (((a, 1.0), (b, 0.0)), 4),
        (((a, 0.25), (a, 0.75)), 4),
        (((b, 1.0), (a, 1.0)), 0),
    ]
    for stack, usable in cases:
        assert prefixes.begin(count_up(9), stack).position == usable


def test_adapter_loaded_again_is_the_same_one(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    prefixes.read(count_up(9), ((adapter(model, 1), 1.0),))
    assert prefixes.begin(count_up(9), ((adapter(model, 1), 1.0),)).position == 8


def test_prompt_for_an_activated_adapter_shares_what_came_before_its_invocation(model: Model) -> None:
    stack: Stack = ((adapter(model, 1, CALL), 1.0),)
    prefixes = PrefixCache(model, PLENTY)
    prefixes.read(ids(5, 6, 7, 8, 9), ())
    assert prefixes.begin(ids(5, 6, 7, 8, 9), stack).position == 2
    prefixes.read(ids(5, 6, 7, 8, 9), stack)
    assert prefixes.begin(ids(5, 6, 7, 8, 9, 9), stack).position == 5
    assert (
        prefixes.begin(ids(5, 6, 7, 8, 9, 7, 8), stack).position == 5
    )  # the first entry's: invoked later, now
    assert prefixes.begin(ids(5, 6, 7, 8, 9, 9), ()).position == 5


def test_invocation_that_is_cut_in_two_still_counts(model: Model) -> None:
    stack: Stack = ((adapter(model, 1, CALL), 1.0),)
    prefixes = PrefixCache(model, PLENTY)
    prefixes.read(ids(5, 6, 7, 8), stack)
    sequence, logits, _ = prefixes.read(ids(5, 6, 7, 8), stack)
    assert model.engine.steps[-1] == 1  # the 8 alone
    np.testing.assert_array_equal(logits.values[0, 0], expected_logits(model, [5, 6, 7, 8], stack))
    assert sequence.invoked == {stack[0][0].fingerprint: 2}


def test_entries_keep_no_adapter_alive(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    stack: Stack = ((adapter(model, 1), 1.0),)
    gone = weakref.ref(stack[0][0])
    sequence, _, _ = prefixes.read(count_up(9), stack)
    sequence.release_adapters()
    del stack
    assert len(prefixes) == 1
    assert gone() is None


# --- the budget ---------------------------------------------------------------------------------------------------


def nbytes_of(*prompts: Any) -> int:
    """The bytes of the pages of these prompts, each shared by those that are alike up to its end."""
    pages = {
        (end, tuple(prompt[:end].tolist()))
        for prompt in prompts
        for end in range(PAGE, len(prompt) + PAGE, PAGE)
    }
    return PAGE_BYTES * len(pages)


def test_shared_memory_counts_once(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    prompts = [np.concatenate([count_up(8), ids(*tail)]) for tail in ((1, 2), (3, 4, 5, 6, 7))]
    for prompt in prompts:
        prefixes.read(prompt, ())
    assert len(prefixes) == 2
    assert prefixes.nbytes == nbytes_of(*prompts) == PAGE_BYTES * (2 + 1 + 2)


def test_budget_holds_more_entries_that_share(model: Model) -> None:
    prompts = [np.concatenate([count_up(16), ids(tail)]) for tail in (1, 2)]
    prefixes = PrefixCache(model, nbytes_of(*prompts))
    for prompt in prompts:
        prefixes.read(prompt, ())
    assert len(prefixes) == 2


def test_least_recently_used_entries_go_first(model: Model) -> None:
    prompts = [count_up(8, start) for start in (10, 20, 30)]
    prefixes = PrefixCache(model, nbytes_of(*prompts[:2]))
    prefixes.read(prompts[0], ())
    prefixes.read(prompts[1], ())
    prefixes.begin(prompts[0], ())
    prefixes.read(prompts[2], ())
    assert [prefixes.begin(prompt, ()).position for prompt in prompts] == [7, 0, 7]


def test_keeping_what_is_known_counts_as_use(model: Model) -> None:
    prompts = [count_up(8, start) for start in (10, 20, 30)]
    prefixes = PrefixCache(model, nbytes_of(*prompts[:2]))
    first, _, _ = prefixes.read(prompts[0], ())
    prefixes.read(prompts[1], ())
    prefixes.keep(first)
    assert len(prefixes) == 2
    prefixes.read(prompts[2], ())
    assert [prefixes.begin(prompt, ()).position for prompt in prompts] == [7, 0, 7]


def test_entry_over_the_budget_is_not_kept_and_drives_nothing_out(model: Model) -> None:
    prefixes = PrefixCache(model, nbytes_of(count_up(8)))
    prefixes.read(count_up(8), ())
    prefixes.read(count_up(9), ())  # of which the other is a beginning
    assert len(prefixes) == 1
    assert prefixes.begin(count_up(9), ()).position == 8


def test_entry_goes_that_a_newer_one_can_be_cut_back_to(make_model: MakeModel) -> None:
    for window, left in ((False, [20]), (True, [6, 20])):
        model = make_model(window)
        prefixes = PrefixCache(model, PLENTY)
        for count in (4, 6, 20):
            sequence = model.new_sequence()
            model.prefill(sequence, count_up(count), ())
            prefixes.keep(sequence)
        assert prefixes.nbytes == nbytes_of(*map(count_up, left))
        assert len(prefixes) == len(left)
        for count in left:
            assert prefixes.begin(count_up(count + 1), ()).position == count


def test_without_a_budget_nothing_is_kept_or_forked(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenSequence, "fork", None)
    for window in (False, True):
        model = make_model(window)
        prefixes = PrefixCache(model, 0)
        assert read_count(model, lambda model=model: prefixes.read(count_up(20), ())) == 20  # noqa: B023
        assert read_count(model, lambda: prefixes.read(count_up(20), ())) == 20  # noqa: B023
        assert (len(prefixes), prefixes.nbytes) == (0, 0)


def test_clear_forgets_everything(model: Model) -> None:
    prefixes = PrefixCache(model, PLENTY)
    sequence, _, _ = prefixes.read(count_up(9), ())
    prefixes.clear()
    assert (len(prefixes), prefixes.nbytes) == (0, 0)
    assert prefixes.begin(count_up(9), ()).position == 0
    assert sequence.position == 9


# --- all together -------------------------------------------------------------------------------------------------

SCALES = st.sampled_from([0.0, 0.5, 1.0])
PROMPT = st.lists(st.sampled_from([6, 7, 8]), min_size=1, max_size=30)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    window=st.booleans(),
    budget=st.sampled_from([0, 3 * PAGE_BYTES, 12 * PAGE_BYTES, PLENTY]),
    requests=st.lists(
        st.tuples(PROMPT, st.lists(st.tuples(st.integers(0, 2), SCALES), max_size=3)), min_size=2, max_size=8
    ),
)
def test_logits_and_notes_are_those_of_a_prompt_read_from_the_start(
    make_model: MakeModel, window: bool, budget: int, requests: list[tuple[list[int], Any]]
) -> None:
    """Prompts of three letters share beginnings, and invoke adapters, all the time."""
    model = make_model(window)
    adapters = [adapter(model, 1), adapter(model, 2, CALL), adapter(model, 3, CALL)]
    prefixes = PrefixCache(model, budget)
    for prompt, stacked in requests:
        scales: dict[int, float] = {}
        for number, scale in stacked:
            scales[number] = scale  # each adapter once, as the naive reference below expects
        stack = tuple((adapters[number], scale) for number, scale in scales.items())
        sequence, logits, _ = prefixes.read(ids(*prompt), stack)
        np.testing.assert_array_equal(logits.values[0, 0], expected_logits(model, prompt, stack))
        fresh = model.new_sequence()
        model.prefill(fresh, ids(*prompt), stack)
        assert sequence.ids.tolist() == prompt
        assert sequence.readings == fresh.readings
        assert sequence.invoked == fresh.invoked
        after = [model.decode([each], [6], [stack]).values for each in (sequence, fresh)]
        np.testing.assert_array_equal(*after)
        prefixes.keep(sequence)
        assert prefixes.nbytes <= budget


# --- time ---------------------------------------------------------------------------------------------------------


@dataclass
class LongCache:
    """A cache of many tokens, of pages of 64."""

    position: int
    first_page: int
    oldest: int = 0

    def fork(self) -> LongCache:
        return replace(self)

    def truncate(self, position: int) -> None:
        self.position = position

    @property
    def memory(self) -> dict[int, int]:
        return dict.fromkeys(range(self.first_page, self.first_page + self.position // 64), 64)


def test_finding_takes_no_time_per_token(model: Model) -> None:
    """100 entries of 8,192 tokens, the best one last: 0.6 ms when this was written. A loop over tokens takes 50."""
    count, entries = 8192, 100
    same = np.random.default_rng(0).integers(0, 258, count)
    times = []
    for _ in range(3):
        prefixes = PrefixCache(model, PLENTY)
        for number in range(entries):  # each shares a little less with the prompt than the one before
            tokens = same.copy()
            tokens[count - 2 - number] ^= 1
            sequence = TokenSequence(LongCache(count, number * count))  # type: ignore[arg-type]
            sequence.tokens.frombytes(tokens.tobytes())
            sequence.readings = [(0, ())]
            prefixes.keep(sequence)
        assert len(prefixes) == entries
        began = time.perf_counter()
        found = prefixes.begin(same, ())
        times.append(time.perf_counter() - began)
        assert found.position == count - 2
    assert min(times) < 0.01
