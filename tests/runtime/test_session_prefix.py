"""What a session has read before is not read again: prompts that begin alike, and conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlxc.errors import ContextError
from rlxc.runtime import Session

Open = Callable[..., Session]
WriteAdapter = Callable[..., Path]

PLENTY = 1 << 20
PROMPT = list(range(10, 22))


@pytest.fixture
def session(open_session: Open, engine: Any) -> Session:
    return open_session(engine, prefix_cache=PLENTY)


def count_read(engine: Any, work: Callable[[], Any]) -> tuple[Any, int]:
    """What some work returns, and how many tokens the engine is given for it."""
    before = sum(engine.steps)
    return work(), sum(engine.steps) - before


def test_prompt_that_is_known_costs_its_last_token(session: Session, engine: Any) -> None:
    first, read = count_read(engine, lambda: session.generate(PROMPT, max_tokens=1))
    assert (read, first.cached_tokens) == (len(PROMPT), 0)
    again, read = count_read(engine, lambda: session.generate(PROMPT, max_tokens=1))
    assert (read, again.cached_tokens) == (1, len(PROMPT) - 1)
    assert again.ids == first.ids == [engine.logits(PROMPT).argmax()]


def test_prompts_share_as_much_as_they_have_in_common(session: Session, engine: Any) -> None:
    session.generate(PROMPT, max_tokens=1)
    other = [*PROMPT[:7], 99, 98]
    completion, read = count_read(engine, lambda: session.generate(other, max_tokens=1))
    assert (read, completion.cached_tokens) == (2, 7)
    assert completion.ids == [engine.logits(other).argmax()]


@pytest.mark.parametrize("window", [False, True])
def test_each_turn_of_a_conversation_reads_what_is_new(
    open_session: Open, fake_engine: Any, window: bool
) -> None:
    """The answer is read while it is made, but for its last token; the conversation holds it when it goes on."""
    engine = fake_engine(window=window)
    session, conversation = open_session(engine, prefix_cache=PLENTY), [0]
    for turn in range(3):
        known, question = len(conversation), [50 + turn, 60 + turn, 70]
        conversation += question
        answer = session.generate(conversation, max_tokens=5)
        assert answer.cached_tokens == (known - 1 if turn else 0)
        for token in answer.ids:
            assert token == engine.logits(conversation).argmax()
            conversation.append(token)
    assert sum(engine.steps) == len(conversation) - 1


def test_text_that_its_reader_left_is_known(session: Session, engine: Any) -> None:
    stream = session.stream(PROMPT, max_tokens=20)
    text = [next(stream).id for _ in range(5)]
    stream.close()
    completion = session.generate([*PROMPT, *text, 99], max_tokens=1)
    assert completion.cached_tokens == len(PROMPT) + 4


def test_conversation_that_was_left_is_taken_up_again(session: Session) -> None:
    first = session.generate(PROMPT, max_tokens=4)
    session.generate([90, 91], max_tokens=4)
    again = session.generate([*PROMPT, *first.ids, 99], max_tokens=1)
    assert again.cached_tokens == len(PROMPT) + 3


def test_prefill_goes_on_from_what_an_earlier_sequence_held(session: Session, engine: Any) -> None:
    session.prefill(PROMPT)
    session.decode(5)
    session.reset()
    ids = [*PROMPT, 5, 6, 7]
    logits, read = count_read(engine, lambda: session.prefill(ids))
    assert read == 2
    assert session.position == len(ids)
    np.testing.assert_array_equal(logits, engine.logits(ids))


def test_prefill_of_a_sequence_that_has_begun_reads_all(session: Session, engine: Any) -> None:
    session.prefill(PROMPT)
    logits, read = count_read(engine, lambda: session.prefill(PROMPT))
    assert read == len(PROMPT)
    np.testing.assert_array_equal(logits, engine.logits([*PROMPT, *PROMPT]))


def test_sequence_that_goes_on_from_a_known_one_leaves_it_as_it_was(session: Session, engine: Any) -> None:
    session.prefill(PROMPT)
    session.reset()
    session.prefill([*PROMPT[:6], 99])
    session.truncate(3)
    session.prefill([98] * 9)
    session.reset()
    logits, read = count_read(engine, lambda: session.prefill(PROMPT))
    assert read == 1
    np.testing.assert_array_equal(logits, engine.logits(PROMPT))


def test_forks_know_what_each_of_them_has_read(session: Session, engine: Any) -> None:
    with session.fork() as fork:
        fork.generate(PROMPT, max_tokens=1)
    assert session.generate(PROMPT, max_tokens=1).cached_tokens == len(PROMPT) - 1


def test_without_a_prefix_cache_everything_is_read(open_session: Open, engine: Any) -> None:
    session = open_session(engine, prefix_cache=0)
    for _ in range(2):
        completion, read = count_read(engine, lambda: session.generate(PROMPT, max_tokens=1))
        assert (read, completion.cached_tokens) == (len(PROMPT), 0)


def test_prompt_that_is_refused_leaves_everything_known(session: Session) -> None:
    session.generate(PROMPT, max_tokens=1)
    with pytest.raises(ContextError):
        session.generate([*PROMPT, *[1] * session.context])
    assert session.generate(PROMPT, max_tokens=1).cached_tokens == len(PROMPT) - 1


def test_score_reads_all_and_leaves_nothing_behind(session: Session, engine: Any) -> None:
    session.prefill(PROMPT)
    session.reset()
    _, read = count_read(engine, lambda: session.score([*PROMPT[:5], 99]))
    assert read == 6
    assert session.generate([*PROMPT[:5], 99, 98], max_tokens=1).cached_tokens == 5


def test_prompt_read_with_other_adapters_is_another_one(
    open_session: Open, engine: Any, make_artifact: Any, split_manifest: Any, write_adapter: WriteAdapter
) -> None:
    session = open_session(engine, make_artifact("split.rlx", manifest=split_manifest), PLENTY)
    one, two = write_adapter("one", seed=1), write_adapter("two", seed=2)
    session.generate(PROMPT, max_tokens=1)
    first = session.generate(PROMPT, max_tokens=1, adapter=one)
    assert first.cached_tokens == 0
    assert session.generate(PROMPT, max_tokens=1, adapter=two).cached_tokens == 0
    assert session.generate(PROMPT, max_tokens=1, adapter=one, scale=0.5).cached_tokens == 0
    again = session.generate(PROMPT, max_tokens=1, adapter=one)
    assert again.cached_tokens == len(PROMPT) - 1
    assert again.logprobs == first.logprobs
    assert session.generate(PROMPT, max_tokens=1).cached_tokens == len(PROMPT) - 1
