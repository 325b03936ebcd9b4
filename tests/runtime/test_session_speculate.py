"""Speculation in a session: the text and the sequence are those of plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlxc.errors import ContextError, OptionError, SessionError
from rlxc.runtime import Draft, HeadDrafter, ModelDrafter, NgramDrafter, Session

Open = Callable[..., Session]

PROMPT = list(range(10, 18))
SCRIPT = [
    *[0] * 8,
    *[40 + i % 5 for i in range(32)],
]  # a text that a draft model may know, and n-grams find out


@pytest.fixture
def target(open_session: Open, fake_engine: Any) -> Session:
    """A session with a window, which writes what the script says."""
    return open_session(fake_engine(SCRIPT, window=True), prefix_cache=1 << 20)


@pytest.fixture
def plain(open_session: Open, fake_engine: Any) -> Session:
    """The same, to be used without speculation."""
    return open_session(fake_engine(SCRIPT, window=True), prefix_cache=1 << 20)


class Head:
    """Guesses from the model's own logits: what is most likely now comes next as well."""

    def propose(self, logits: Any, tokens: Any, most: int) -> Draft:
        return Draft([int(np.argmax(logits))] * most)


MAKE: dict[str, Callable[..., Any]] = {
    "ngram": lambda target, open_session, engine: "ngram",
    "n-grams": lambda target, open_session, engine: NgramDrafter(longest=3),
    "right": lambda target, open_session, engine: ModelDrafter(open_session(engine(SCRIPT)), target),
    "half right": lambda target, open_session, engine: ModelDrafter(
        open_session(engine([token if i % 3 else 0 for i, token in enumerate(SCRIPT)], window=True)), target
    ),
    "wrong": lambda target, open_session, engine: ModelDrafter(open_session(engine()), target),
    "head": lambda target, open_session, engine: HeadDrafter(Head()),
}


@pytest.mark.parametrize("temperature", [0.0, 1e-3], ids=["greedy", "hardly sampled"])
@pytest.mark.parametrize("name", MAKE)
def test_text_and_sequence_are_those_of_plain_decoding(
    target: Session, plain: Session, open_session: Open, fake_engine: Any, name: str, temperature: float
) -> None:
    """At a temperature of 0.001 the script's tokens are as good as certain: other logits are lower by 5 or more."""
    drafter = MAKE[name](target, open_session, fake_engine)
    options = {"max_tokens": 30, "temperature": temperature, "seed": 1}
    made = target.generate(PROMPT, **options, speculate=drafter)
    expected = plain.generate(PROMPT, **options)
    assert (made.ids, made.stop_reason) == (expected.ids, expected.stop_reason)
    np.testing.assert_allclose(made.logprobs, expected.logprobs, rtol=0, atol=0)
    assert target.position == plain.position
    np.testing.assert_array_equal(target.decode(5), plain.decode(5))
    again = [*PROMPT, *made.ids]
    assert target.generate(again, max_tokens=1).ids == plain.generate(again, max_tokens=1).ids
    assert 0 <= made.accepted <= made.drafted
    assert (made.accepted == made.drafted > 20) == (name == "right")


def test_right_guesses_save_steps(target: Session, open_session: Open, fake_engine: Any) -> None:
    drafter = ModelDrafter(open_session(fake_engine(SCRIPT)), target)
    target.generate(PROMPT, max_tokens=30, speculate=drafter)
    engine: Any = target.engine
    assert len(engine.steps) < 10  # of 30 without
    assert max(engine.steps[1:]) == 7  # no more than can be taken back, and the token before them


def test_one_drafter_serves_text_after_text(target: Session, plain: Session, open_session: Open) -> None:
    draft = open_session()
    drafter = ModelDrafter(draft, target)
    for prompt in (PROMPT, PROMPT[::-1], PROMPT):
        assert (
            target.generate(prompt, max_tokens=9, speculate=drafter).ids
            == plain.generate(prompt, max_tokens=9).ids
        )
    assert draft.position == 0


def test_text_runs_with_its_adapters(
    open_session: Open, fake_engine: Any, make_artifact: Any, split_manifest: Any, write_adapter: Any
) -> None:
    path: Path = write_adapter("one", seed=1)
    sessions = [open_session(fake_engine(), make_artifact(f"{i}", manifest=split_manifest)) for i in range(2)]
    made, expected = (
        session.generate(PROMPT, max_tokens=20, adapter=path, speculate=speculate)
        for session, speculate in zip(sessions, ("ngram", None))
    )
    assert (made.ids, made.logprobs) == (expected.ids, expected.logprobs)


@pytest.mark.parametrize("speculate", ["ngram", None])
def test_end_of_the_context_is_where_it_is_without_guesses(target: Session, speculate: Any) -> None:
    made = target.generate(PROMPT, max_tokens=100, speculate=speculate)
    assert (len(made.ids), made.stop_reason) == (target.context - len(PROMPT) + 1, "context")
    stream = target.stream(PROMPT, max_tokens=100, speculate=speculate, on_full="error")
    with pytest.raises(
        ContextError, match="8 tokens of the prompt and 33 of the text fill the context of 40"
    ):
        for _ in stream:
            pass
    assert target.position == target.context


def test_interrupted_verification_leaves_no_guesses_behind(
    target: Session, open_session: Open, fake_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = target.stream(
        PROMPT, max_tokens=30, speculate=ModelDrafter(open_session(fake_engine(SCRIPT)), target)
    )
    next(stream)
    next(stream)
    engine: Any = target.engine
    step = engine.step

    def interrupted(*arguments: Any) -> Any:
        step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.completion()
    monkeypatch.undo()
    assert engine.steps[-1] > 1  # guesses, too
    assert target.snapshot().tokens.tolist() == [*PROMPT, *stream.completion().ids]


@pytest.mark.parametrize("speculate", ["magic", "", 5, object()], ids=["name", "empty", "number", "object"])
def test_what_guesses_nothing_is_refused(session: Session, speculate: Any) -> None:
    with pytest.raises(OptionError, match=r"speculate is .*; write 'ngram', or give a drafter: ModelDrafter"):
        session.generate(PROMPT, speculate=speculate)


def test_draft_session_is_no_drafter_yet(session: Session, open_session: Open) -> None:
    draft: Any = open_session()
    with pytest.raises(OptionError, match=r"write 'ngram', or give a drafter: ModelDrafter\("):
        session.generate(PROMPT, speculate=draft)


def test_artifact_that_can_take_nothing_back_says_so(
    open_session: Open, make_artifact: Any, split_manifest: Any
) -> None:
    plan = replace(split_manifest.kv_cache, rollback=0)
    artifact = make_artifact("rigid.rlx", manifest=replace(split_manifest, kv_cache=plan))
    session = open_session(artifact=artifact)
    with pytest.raises(OptionError, match=r"compiled with rollback 0; compile with --rollback 16"):
        session.stream(PROMPT, speculate="ngram")


def test_draft_model_that_is_closed_ends_the_text(target: Session, open_session: Open) -> None:
    draft = open_session()
    stream = target.stream(PROMPT, max_tokens=20, speculate=ModelDrafter(draft, target))
    next(stream)
    draft.close()
    with pytest.raises(SessionError, match="the session is closed"):
        for _ in stream:
            pass
    assert target.snapshot().tokens.tolist() == PROMPT
