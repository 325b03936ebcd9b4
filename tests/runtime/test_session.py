"""A session's sequence: prefill, decode, score, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlxc.runtime.model
from rlxc.artifact import Artifact
from rlxc.errors import ArtifactError, ContextError, SessionError
from rlxc.runtime import Session

VOCAB, CONTEXT, MAX_STEP = 258, 40, 8  # of the fake engine
IDS = list(range(20))


def test_prefill_returns_the_logits_after_the_last_id(session: Session, engine: Any) -> None:
    logits = session.prefill(IDS)
    assert (logits.shape, logits.dtype) == ((VOCAB,), np.float32)
    np.testing.assert_array_equal(logits, engine.logits(IDS))


def test_prefill_runs_in_steps_that_the_engine_can_take(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    assert engine.steps == [8, 8, 4]


def test_logits_stay_as_they_are_during_later_steps(session: Session) -> None:
    logits = session.prefill(IDS)
    before = logits.copy()
    session.decode(5)
    np.testing.assert_array_equal(logits, before)


def test_decode_continues_the_sequence(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    np.testing.assert_array_equal(session.decode(7), engine.logits([*IDS, 7]))
    assert session.position == 21


def test_reset_starts_an_empty_sequence(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    session.reset()
    assert session.position == 0
    np.testing.assert_array_equal(session.prefill([3]), engine.logits([3]))


def test_ids_may_be_an_array(session: Session, engine: Any) -> None:
    np.testing.assert_array_equal(session.prefill(np.array(IDS, np.uint8)), engine.logits(IDS))


# The session is reset for every example, so that sharing it between examples changes nothing.
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=3))
def test_parts_of_a_sequence_give_the_same_logits_as_the_whole(
    session: Session, parts: list[list[int]]
) -> None:
    session.reset()
    whole = session.score([token for part in parts for token in part])
    end = 0
    for part in parts:
        end += len(part)
        np.testing.assert_array_equal(session.prefill(part), whole[end - 1])
    assert session.position == end


def test_score_returns_the_logits_after_every_id(session: Session, engine: Any) -> None:
    expected = np.stack([engine.logits(IDS[: n + 1]) for n in range(len(IDS))])
    np.testing.assert_array_equal(session.score(IDS), expected)


def test_score_leaves_the_sequence_alone(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    session.score([1, 2, 3])
    np.testing.assert_array_equal(session.decode(4), engine.logits([*IDS, 4]))


def test_score_bounds_the_logits_of_a_step(
    session: Session, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlxc.runtime.model, "_SCORE_LOGITS", 3 * VOCAB)
    session.score(IDS[:7])
    assert engine.steps == [3, 3, 1]


def test_sequence_may_fill_the_context(session: Session) -> None:
    session.prefill([1] * CONTEXT)
    assert session.position == session.context == CONTEXT


@pytest.mark.parametrize("call", ["prefill", "score", "generate", "stream"])
def test_more_tokens_than_the_context_are_refused(session: Session, call: str) -> None:
    with pytest.raises(ContextError, match=r"41 tokens do not fit the context of 40; .*--context 41"):
        getattr(session, call)([1] * 41)


@pytest.mark.parametrize(("call", "ids", "needed"), [("prefill", [1, 2, 3], 41), ("decode", 1, 39)])
def test_full_context_loses_nothing(session: Session, engine: Any, call: str, ids: Any, needed: int) -> None:
    held = [9] * (38 if call == "prefill" else 40)
    session.prefill(held)
    with pytest.raises(ContextError, match=f"after the {len(held)} that the session holds"):
        getattr(session, call)(ids)
    assert session.position == len(held)


def test_session_goes_on_after_a_refused_prefill(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    with pytest.raises(ContextError):
        session.prefill(IDS + IDS)
    np.testing.assert_array_equal(session.decode(4), engine.logits([*IDS, 4]))


@pytest.mark.parametrize("call", ["prefill", "score", "generate", "stream"])
@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([], "there are no tokens"),
        (np.zeros(0, np.int64), "there are no tokens"),
        ([1, VOCAB], "token 258 is not in the vocabulary of 258"),
        ([-1], "token -1 is not in"),
        (np.array([2**63], np.uint64), "token 9223372036854775808 is not in"),
        ([0.5], "flat list of integers"),
        ([True], "flat list of integers"),
        (["a"], "flat list of integers"),
        ([2**70], "flat list of integers"),
        ([[1, 2]], "flat list of integers"),
        ([[1], [1, 2]], "flat list of integers"),
        (5, "flat list of integers"),
        (None, "flat list of integers"),
    ],
    ids=repr,
)
def test_ids_that_are_no_tokens_are_refused(
    session: Session, engine: Any, call: str, ids: Any, problem: str
) -> None:
    with pytest.raises(SessionError, match=problem):
        getattr(session, call)(ids)
    assert engine.steps == []


def test_text_is_refused_where_ids_are_wanted(session: Session) -> None:
    with pytest.raises(SessionError, match=r"flat list of integers; session\.tokenizer\.encode"):
        session.prefill("hello")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.prefill([1]),
        lambda session: session.decode(1),
        lambda session: session.score([1]),
        lambda session: session.generate([1]),
        lambda session: session.reset(),
        lambda session: session.tokenizer,
    ],
)
def test_closed_session_is_refused(session: Session, use: Callable[[Session], object]) -> None:
    session.close()
    with pytest.raises(SessionError, match="the session is closed; load the artifact again"):
        use(session)


def test_closing_releases_the_engine(session: Session, engine: Any) -> None:
    with session:
        session.prefill([1])
    assert engine.closed


def test_closing_twice_does_nothing(session: Session) -> None:
    session.close()
    session.close()


def test_second_thread_is_refused_and_the_first_one_unharmed(
    open_session: Callable[..., Session], fake_engine: type[Any]
) -> None:
    entered, leave = threading.Event(), threading.Event()

    class SlowEngine(fake_engine):  # type: ignore[misc]
        def step(self, *args: Any) -> Any:
            entered.set()
            assert leave.wait(60)
            return super().step(*args)

    engine = SlowEngine()
    session = open_session(engine)
    results: list[Any] = []
    first = threading.Thread(target=lambda: results.append(session.prefill([1])))
    first.start()
    assert entered.wait(60)
    try:
        for use in (lambda: session.prefill([2]), session.reset, session.close):
            with pytest.raises(
                SessionError,
                match="another thread is using the session, or a fork of it; load one session for each",
            ):
                use()
    finally:
        leave.set()
        first.join()
    np.testing.assert_array_equal(results[0], engine.logits([1]))


def test_cache_that_does_not_fit_in_memory_is_refused(
    open_session: Callable[..., Session], fake_engine: type[Any]
) -> None:
    class HugeEngine(fake_engine):  # type: ignore[misc]
        def new_cache(self) -> Any:
            raise MemoryError

    with pytest.raises(
        SessionError, match=r"not enough memory for the cache of 40 tokens; .*smaller --context"
    ):
        open_session(HugeEngine())


@pytest.fixture
def damaged(make_artifact: Callable[..., Artifact]) -> Artifact:
    artifact = make_artifact("damaged.rlx")
    artifact.file("weights.bin").write_bytes(b"\1" * 4096)
    return artifact


@pytest.mark.parametrize("call", ["prefill", "score", "generate"])
def test_damaged_weights_give_no_result_ever(
    open_session: Callable[..., Session], damaged: Artifact, call: str
) -> None:
    session = open_session(artifact=damaged)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"weights\.bin does not have the sha256"):
            getattr(session, call)([1])


def test_damaged_tokenizer_is_refused(open_session: Callable[..., Session], make_artifact: Any) -> None:
    artifact = make_artifact("damaged.rlx")
    session = open_session(artifact=artifact)
    session.close()
    data = artifact.file("tokenizer.json").read_bytes()
    artifact.file("tokenizer.json").write_bytes(data.replace(b"0x41", b"0x14"))
    session = open_session(artifact=artifact)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json does not have the sha256"):
        _ = session.tokenizer


def test_model_without_chat_template_has_none(session: Session) -> None:
    assert session.chat_template is None


def test_chat_template_knows_the_model_s_tokens(
    open_session: Callable[..., Session], make_artifact: Any
) -> None:
    source = b"{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    session = open_session(artifact=make_artifact("chat.rlx", chat_template__jinja=source))
    assert session.chat_template is not None
    assert session.chat_template.render([{"role": "user", "content": "héllo"}]) == "<s>héllo</s>"
