"""Several texts at once: each is what it would be alone, whoever is beside it, whenever it came."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from batches import MakeBench, bench_maker, facts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlxc.artifact import Manifest
from rlxc.errors import ContextError, OptionError, QueueFullError
from rlxc.runtime import Request, SamplingOptions

CONTEXT, MAX_STEP = 40, 8  # of the fake engine


@pytest.fixture
def make_bench(make_artifact: Any, split_manifest: Manifest, fake_engine: type[Any]) -> MakeBench:
    return bench_maker(make_artifact("bench.rlx", manifest=split_manifest), fake_engine)


REQUESTS = st.builds(
    Request,
    prompt=st.one_of(
        st.lists(st.integers(2, 12), min_size=1, max_size=CONTEXT),
        st.integers(1, CONTEXT).map(lambda n: ([5, 6, 9, 7] * CONTEXT)[:n]),  # which begin alike
        st.text("abc é", min_size=1, max_size=9),
    ),
    adapters=st.sampled_from([None, [("a", 1.0)], [("a", 0.5)], [("b", 1.0)], [("c", 1.0), ("a", -1.0)]]),
    sampling=st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        seed=st.integers(0, 5),
    ),
    max_tokens=st.integers(0, 12),
    stop=st.sampled_from([(), "a", ("b", "\x00")]),
    deadline=st.sampled_from([None, None, 1.0, 3.5]),
    on_full=st.sampled_from(["stop", "error"]),
)
ROUNDS = st.lists(
    st.tuples(
        st.lists(REQUESTS, max_size=4),
        st.lists(st.integers(0, 20), max_size=2),  # who cancels then
        st.sampled_from([0.0, 0.5]),  # how long the round takes
    ),
    max_size=10,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=ROUNDS,
    max_batch=st.integers(1, 9),
    token_budget=st.integers(1, 20),
    prefix_budget=st.sampled_from([0, 1500, 10**6]),
    window=st.booleans(),
)
def test_every_request_ends_once_and_its_text_is_what_it_is_alone(
    make_bench: MakeBench,
    fake_engine: type[Any],
    rounds: Any,
    max_batch: int,
    token_budget: int,
    prefix_budget: int,
    window: bool,
) -> None:
    bench = make_bench(
        fake_engine(window=window),
        max_batch=max_batch,
        token_budget=token_budget,
        prefix_budget=prefix_budget,
    )
    most, tickets = min(max_batch, MAX_STEP), list[int]()
    deadlines: dict[int, float] = {}
    latest: dict[int, float] = {}  # the round in which a text must have ended
    longest = max((len(bench.job(r).prompt) for requests, _, _ in rounds for r in requests), default=1)
    in_work = math.ceil(most * longest / token_budget) + 12  # rounds, with 12 tokens in the longest text
    empty: Any = ([], [], 0.5)
    for number, (requests, cancels, seconds) in enumerate(itertools.chain(rounds, itertools.repeat(empty))):
        if number >= len(rounds) and not len(bench.batch):
            break
        for request in requests:
            waiting = len(bench.open() - set(bench.begun()))
            (ticket,) = bench.submit(request)
            tickets.append(ticket)
            deadlines[ticket] = math.inf if request.deadline is None else bench.now + request.deadline
            latest[ticket] = number + (4 + 2 + waiting / most) * in_work
        for ticket in (tickets[i] for i in cancels if i < len(tickets)):
            is_open = ticket in bench.open() and not bench.jobs[ticket].text.has_ended
            assert bench.batch.cancel(ticket) == is_open
            bench.cancelled |= {ticket} if is_open else set()
        bench.now += seconds
        running = {t for t in bench.open() if bench.ids(t) and deadlines[t] > bench.now}
        bench.check_round(running, most, token_budget)
        for ticket in bench.open():
            assert bench.now < deadlines[ticket]
            assert number < latest[ticket]

    for adapter in ("a", "b", "ca"):
        begun = [t for t in bench.begun() if "".join(a.name for a, _ in bench.jobs[t].stack) == adapter]
        assert begun == sorted(begun)
    for ticket in tickets:
        end, alone = bench.end(ticket), bench.alone(ticket)
        assert end.completion is not None and alone.completion is not None
        reason = end.completion.stop_reason
        if ticket in bench.cancelled or reason == "deadline":
            assert reason == "cancelled" or bench.now >= deadlines[ticket]
            assert (ticket in bench.cancelled) == (reason == "cancelled")
            assert end.completion.ids == alone.completion.ids[: len(end.completion.ids)]
            assert alone.completion.text.startswith(end.completion.text)
        else:
            assert facts(end.completion) == facts(alone.completion)
            assert str(end.error) == str(alone.error)


def test_tokens_are_the_best_of_the_engine_s_logits(make_bench: MakeBench) -> None:
    bench = make_bench()
    ticket, adapted = bench.submit(Request([5, 6], max_tokens=4), Request([7], [("a", 0.5)], max_tokens=2))
    bench.finish()
    history = [5, 6]
    for _ in range(4):
        history.append(int(bench.engine.logits(history).argmax()))
    assert bench.completion(ticket).ids == history[2:]
    mix = ((bench.adapters["a"].prepared, 0.5),)
    first = int(bench.engine.logits([7], [mix]).argmax())
    assert bench.completion(adapted).ids == [first, bench.engine.logits([7, first], [mix] * 2).argmax()]


def test_texts_go_on_while_a_long_prompt_is_read(make_bench: MakeBench, fake_engine: type[Any]) -> None:
    bench = make_bench(fake_engine([50] * CONTEXT), token_budget=5)  # no text ends by itself
    first, second = bench.submit(Request([5], max_tokens=12), Request([6], max_tokens=12))
    bench.step()
    (long,) = bench.submit(Request(list(range(2, 34)), max_tokens=3))  # 32 tokens
    tickets = [sorted(e.ticket for e in bench.step()) for _ in range(8)]
    assert tickets == [[first, second]] * 6 + [[first, second, long]] * 2
    assert bench.engine.steps == [1, 1, *[1, 5] * 6, 1, 2, 1]
    assert [len(mixes) for mixes in bench.engine.mixes] == [1, 1, *[2, 1] * 6, 2, 1, 3]


def test_prompt_goes_on_from_what_others_have_read(make_bench: MakeBench) -> None:
    """One begins only when its turn to be read has come, so that it finds what the one before it has read."""
    bench = make_bench(prefix_budget=10**6)
    prompt = list(range(5, 25))
    first, second = bench.submit(Request(prompt, max_tokens=3), Request([*prompt, 30], max_tokens=3))
    bench.step()
    assert bench.engine.steps == [8, 8, 4, 1]
    bench.finish()
    (again,) = bench.submit(Request([*prompt, *bench.ids(first)[:2], 31], max_tokens=1))
    bench.finish()
    cached = [bench.completion(ticket).cached_tokens for ticket in (first, second, again)]
    assert cached == [0, len(prompt), len(prompt) + 2]
    for ticket in (second, again):
        assert facts(bench.completion(ticket)) == facts(bench.alone(ticket).completion)


def test_activated_adapter_joins_in_where_it_is_invoked_however_a_round_cuts_the_prompt(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(token_budget=3)
    (ticket,) = bench.submit(Request([9, 5, 6, 7, 9, 8], [("c", 1.0)], max_tokens=1))
    bench.finish()
    mix = ((bench.adapters["c"].prepared, 1.0),)
    assert bench.completion(ticket).ids == [
        bench.engine.logits([9, 5, 6, 7, 9, 8], [()] * 4 + [mix] * 2).argmax()
    ]
    assert bench.engine.steps == [3, 1, 2]


# Others of an adapter come in every round, which one for another adapter must not wait for.
@example(arrivals=["ab", *["a"] * 40], most=1)
@example(arrivals=["aabb", *["aa"] * 40], most=2)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(st.text("ab", max_size=3), min_size=1, max_size=30),
    most=st.integers(1, 3),
)
def test_no_request_waits_for_more_rounds_than_promised(
    make_bench: MakeBench, arrivals: list[str], most: int
) -> None:
    """Prompts of one token, texts of one, as many prompts in a round as places: every text is in work for a round."""
    bench = make_bench(max_batch=most, token_budget=most)
    came: dict[int, float] = {}
    for number, adapters in enumerate([*arrivals, *[""] * 100]):
        for adapter in adapters:
            waiting = len(bench.batch)
            (ticket,) = bench.submit(Request([5], [(adapter, 1.0)], max_tokens=1))
            came[ticket] = number + (4 + 1 + waiting / most)
        bench.step()
        assert all(number < latest for ticket, latest in came.items() if ticket in bench.open())
    assert len(bench.batch) == 0


def test_texts_of_one_adapter_begin_together_and_are_neighbours_in_the_step(make_bench: MakeBench) -> None:
    bench = make_bench(max_batch=2)
    tickets = bench.submit(*(Request([5 + i], [(name, 1.0)], max_tokens=3) for i, name in enumerate("abab")))
    bench.finish()
    assert bench.begun() == [tickets[0], tickets[2], tickets[1], tickets[3]]

    bench = make_bench(max_batch=4)
    for i, name in enumerate("abab"):
        bench.submit(Request([5 + i], [(name, 1.0)], max_tokens=9))
        bench.step()
    bench.step()
    a, b = (bench.adapters[name].prepared for name in "ab")
    assert [mix[0][0] for mix in bench.engine.mixes[-1]] == [a, a, b, b]


def test_deadline_ends_a_text_that_waits_and_one_in_work(make_bench: MakeBench) -> None:
    bench = make_bench(max_batch=1)
    working, waiting, patient = bench.submit(
        Request([5], max_tokens=9, deadline=2.0), Request([6], deadline=1.0), Request([7], max_tokens=1)
    )
    bench.step()
    bench.now = 1.0
    assert [(e.ticket, e.piece is None) for e in bench.step()] == [(waiting, True), (working, False)]
    bench.now = 2.0
    bench.finish()
    assert bench.completion(working).stop_reason == "deadline"
    assert len(bench.completion(working).ids) == 2
    assert (bench.completion(waiting).stop_reason, bench.completion(waiting).ids) == ("deadline", [])
    assert bench.completion(patient).stop_reason == "length"
    assert [len(tokens) for tokens in bench.prefixes.begun] == [1, 1]


def test_cancelled_request_ends_whether_it_waits_is_read_or_runs(make_bench: MakeBench) -> None:
    bench = make_bench(max_batch=2, token_budget=2)
    running, reading, waiting = bench.submit(*(Request([5] * n, max_tokens=9) for n in (1, 9, 1)))
    bench.step()
    for ticket in (running, reading, waiting):
        assert bench.batch.cancel(ticket)
        assert not bench.batch.cancel(ticket)
    assert len(bench.batch) == 3
    steps = len(bench.engine.steps)
    bench.step()
    assert len(bench.engine.steps) == steps
    assert [bench.completion(t).stop_reason for t in (running, reading, waiting)] == ["cancelled"] * 3
    assert [len(bench.completion(t).ids) for t in (running, reading, waiting)] == [1, 0, 0]
    assert len(bench.batch) == 0
    assert not bench.batch.cancel(99)


def test_full_queue_refuses_a_request_unless_one_has_expired(make_bench: MakeBench) -> None:
    bench = make_bench(max_batch=1, max_waiting=2)
    first, second = bench.submit(Request([5], max_tokens=1), Request([6], max_tokens=1, deadline=1.0))
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        bench.submit(Request([7]))
    bench.now = 1.0
    (third,) = bench.submit(Request([7], max_tokens=1))
    bench.finish()
    assert [bench.completion(t).stop_reason for t in (first, second, third)] == [
        "length",
        "deadline",
        "length",
    ]


def test_text_beyond_the_context_ends_with_the_error_that_was_asked_for(make_bench: MakeBench) -> None:
    bench = make_bench()
    prompt = [5] * (CONTEXT - 2)
    fails, stops, other = bench.submit(
        Request(prompt, on_full="error"), Request(prompt), Request([6], max_tokens=6)
    )
    bench.finish()
    assert bench.completion(stops).stop_reason == "context"
    assert isinstance(bench.end(fails).error, ContextError)
    assert bench.ids(fails) == bench.ids(stops)
    assert len(bench.completion(other).ids) == 6


def test_request_that_comes_while_others_run_joins_them(make_bench: MakeBench) -> None:
    bench = make_bench()
    tickets = bench.submit(Request([5], max_tokens=4))
    for event in bench.batch.run():
        bench.events.append(event)
        if len(tickets) < 3:
            tickets += bench.submit(Request([5 + len(tickets)], max_tokens=4))
    assert [len(bench.completion(t).ids) for t in tickets] == [4, 4, 4]
    assert max(len(mixes) for mixes in bench.engine.mixes) == 3


@pytest.mark.parametrize("option", ["max_batch", "token_budget", "max_waiting"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, None])
def test_counts_that_are_none_are_refused(make_bench: MakeBench, option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option} must be an integer, 1 or more"):
        make_bench(**{option: value})


@pytest.mark.parametrize("adapters", ["a", ["a"], [("a",)], [("a", 1.0, 2)], {"a": 1.0}, 3])
def test_adapters_that_are_no_pairs_are_refused(adapters: Any) -> None:
    with pytest.raises(
        OptionError, match=r"adapters must be pairs of a name and a scale.*\[\('name', 1.0\)\]"
    ):
        Request([5], adapters)


def test_sampling_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="sampling must be SamplingOptions"):
        Request([5], sampling={"temperature": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), True, "soon"])
def test_deadline_that_is_no_time_to_come_is_refused(deadline: Any) -> None:
    with pytest.raises(OptionError, match="deadline must be seconds from now, more than 0"):
        Request([5], deadline=deadline)
