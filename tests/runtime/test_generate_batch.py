"""`Session.generate_batch`: several texts at once, each what `Session.generate` makes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import facts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlxc.errors import ContextError, OptionError, RlxcError, SessionError
from rlxc.runtime import Completion, Request, SamplingOptions, Session

WriteAdapter = Callable[..., Path]
CONTEXT, MAX_STEP = 40, 8  # of the fake engine


@pytest.fixture
def adapters(split_session: Session, write_adapter: WriteAdapter) -> list[str]:
    """The names of three loaded adapters; token 9 invokes the last one."""
    load = split_session.adapters.load
    return [
        load(write_adapter("a", seed=1)),
        load(write_adapter("b", seed=2)),
        load(write_adapter("c", seed=3, invocation_tokens=[9])),
    ]


def alone(session: Session, request: Request) -> Completion:
    """The text of a request with one adapter at most, by itself."""
    options = request.sampling
    entries = request.adapters
    assert entries is None or len(entries) == 1
    return session.generate(
        request.prompt,
        max_tokens=request.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=request.stop,
        adapter=entries[0][0] if entries else None,
        scale=entries[0][1] if entries else 1.0,
    )


REQUESTS = st.builds(
    Request,
    prompt=st.one_of(
        st.lists(st.integers(2, 12), min_size=1, max_size=CONTEXT), st.text("abc é", min_size=1, max_size=9)
    ),
    adapters=st.one_of(
        st.none(), st.tuples(st.sampled_from("abc"), st.sampled_from([0.5, 1.0])).map(lambda e: [e])
    ),
    sampling=st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.0, 0.8]),
        top_k=st.sampled_from([0, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        seed=st.integers(0, 5),
    ),
    max_tokens=st.integers(0, 12),
    stop=st.sampled_from([(), "a", ("b", "\x00")]),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(REQUESTS, max_size=7), max_batch=st.integers(1, 9))
def test_each_text_is_what_it_is_alone(
    split_session: Session, adapters: list[str], requests: list[Request], max_batch: int
) -> None:
    split_session.adapters.clear()
    split_session.adapters.push("b", 2.0)
    together = split_session.generate_batch(requests, max_batch)
    assert [facts(c) for c in together] == [facts(alone(split_session, r)) for r in requests]


def test_step_makes_a_token_of_every_text(split_session: Session, engine: Any, adapters: list[str]) -> None:
    requests = [Request([5], [(name, 0.5)], max_tokens=3) for name in "ab"] + [Request([6], (), max_tokens=3)]
    split_session.generate_batch(requests)
    a, b, _ = engine.prepared
    assert [len(mixes) for mixes in engine.mixes] == [1, 1, 1, 3, 3]
    assert engine.mixes[3:] == [[((a, 0.5),), ((b, 0.5),), ()]] * 2


def test_no_adapters_is_the_model_alone_and_none_is_the_session_s_stack(
    split_session: Session, engine: Any, adapters: list[str]
) -> None:
    split_session.adapters.push("a", 0.5)
    first, second = split_session.generate_batch([Request([5], (), max_tokens=1), Request([5], max_tokens=1)])
    assert first.ids == [engine.logits([5]).argmax()]
    assert second.ids == [engine.logits([5], [((engine.prepared[0], 0.5),)]).argmax()]


def test_request_may_have_several_adapters(split_session: Session, engine: Any, adapters: list[str]) -> None:
    request = Request([5, 6], [("a", 0.5), ("b", 2.0)], max_tokens=4)
    (completion,) = split_session.generate_batch([request])
    for name, scale in request.adapters or ():
        split_session.adapters.push(name, scale)
    assert completion.ids == split_session.generate([5, 6], max_tokens=4).ids


def test_finished_texts_leave_and_waiting_ones_enter(split_session: Session, engine: Any) -> None:
    lengths = [1, 5, 2, 2]
    requests = [Request([5 + i], (), max_tokens=n) for i, n in enumerate(lengths)]
    completions = split_session.generate_batch(requests, max_batch=2)
    assert [len(c.ids) for c in completions] == lengths
    # The first ends with its prompt, so the next two take both places; the last one enters when the third leaves.
    assert [len(mixes) for mixes in engine.mixes] == [1, 1, 1, 2, 1, 2, 1, 1]


def test_texts_of_one_adapter_are_neighbours(
    split_session: Session, engine: Any, adapters: list[str]
) -> None:
    requests = [Request([5 + i], [(name, 1.0)], max_tokens=2) for i, name in enumerate("abab")]
    split_session.generate_batch(requests)
    a, b, _ = engine.prepared
    assert [mix[0][0] for mix in engine.mixes[-1]] == [a, a, b, b]


def test_batch_is_no_larger_than_the_engine_s_steps(split_session: Session, engine: Any) -> None:
    split_session.generate_batch([Request([5 + i], max_tokens=3) for i in range(12)], max_batch=100)
    assert max(len(mixes) for mixes in engine.mixes) == MAX_STEP


def test_session_s_own_sequence_stays(split_session: Session, engine: Any) -> None:
    stream = split_session.stream([5, 6], max_tokens=3)
    text = [next(stream).id]
    split_session.generate_batch([Request([7], max_tokens=2)])
    text += [piece.id for piece in stream]
    assert text == split_session.generate([5, 6], max_tokens=3).ids


def test_no_requests_give_no_texts(split_session: Session, engine: Any) -> None:
    assert split_session.generate_batch([]) == []
    assert split_session.generate_batch([Request([5], max_tokens=0)])[0].stop_reason == "length"
    assert engine.steps == []


def test_times_are_told(split_session: Session) -> None:
    one, many = split_session.generate_batch([Request([5], max_tokens=1), Request([5], max_tokens=3)])
    assert one.prefill_seconds > 0
    assert one.decode_seconds == 0
    assert many.decode_seconds > 0


@pytest.mark.parametrize(
    ("bad", "kind", "problem"),
    [
        (Request([1] * (CONTEXT + 1)), ContextError, "request 1: 41 tokens do not fit"),
        (Request([]), SessionError, "request 1: there are no tokens"),
        (Request([999]), SessionError, "request 1: token 999 is not in the vocabulary"),
        (Request([5], [("missing", 1.0)]), SessionError, "request 1: no adapter called 'missing'"),
        (Request([5], [("a", float("nan"))]), OptionError, "request 1: an adapter's scale"),
        (Request([5], max_tokens=-1), OptionError, "request 1: max_tokens"),
        (Request([5], stop=""), OptionError, "request 1: stop strings"),
        ("hello", OptionError, "request 1: 'hello' is no request"),
    ],
)
def test_impossible_request_is_named_before_anything_runs(
    split_session: Session, engine: Any, adapters: list[str], bad: Any, kind: type[RlxcError], problem: str
) -> None:
    with pytest.raises(kind, match=problem):
        split_session.generate_batch([Request([5]), bad])
    assert engine.steps == []


def test_stack_of_too_high_a_rank_is_refused(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    entries = [(str(write_adapter(name, rank=17)), 1.0) for name in "de"]
    with pytest.raises(SessionError, match="request 0: the stack would have 64 ranks"):
        split_session.generate_batch([Request([5], entries)])


@pytest.mark.parametrize("max_batch", [0, -1, True, 2.0, None])
def test_impossible_max_batch_is_refused(split_session: Session, max_batch: Any) -> None:
    with pytest.raises(OptionError, match="max_batch must be an integer, 1 or more"):
        split_session.generate_batch([Request([5])], max_batch)


def test_batch_holds_the_session(open_session: Callable[..., Session], fake_engine: type[Any]) -> None:
    entered, leave = threading.Event(), threading.Event()

    class SlowEngine(fake_engine):  # type: ignore[misc]
        def step(self, *args: Any) -> Any:
            entered.set()
            assert leave.wait(60)
            return super().step(*args)

    session = open_session(SlowEngine())
    first = threading.Thread(target=session.generate_batch, args=([Request([5], max_tokens=2)],))
    first.start()
    assert entered.wait(60)
    try:
        with pytest.raises(SessionError, match="another thread is using the session"):
            session.prefill([1])
    finally:
        leave.set()
        first.join()
    np.testing.assert_array_equal(session.prefill([1]), fake_engine().logits([1]))
