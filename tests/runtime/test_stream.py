"""Generating text: what ends it, which pieces it comes in, and what happens around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlxc.errors import ContextError, OptionError, SessionError
from rlxc.runtime import Session
from rlxc.runtime.sampling import Choice
from rlxc.runtime.stream import GrowingText, Stream
from rlxc.runtime.tokenizer import StopMatcher, TextStream

BOS, EOS, FIRST_BYTE, CONTEXT = 0, 1, 2, 40  # of the tiny vocabulary and the fake engine
PROMPT = [BOS, 3, 4]

Write = Callable[[str | Sequence[int]], Session]


def tokens(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


@pytest.fixture
def session_writing(open_session: Callable[..., Session], fake_engine: type[Any]) -> Write:
    """A session that continues ``PROMPT`` with this text, or these tokens."""

    def write(text: str | Sequence[int]) -> Session:
        script = tokens(text) if isinstance(text, str) else list(text)
        return open_session(fake_engine([EOS] * len(PROMPT) + script))

    return write


def test_text_is_that_of_the_generated_tokens(session_writing: Write) -> None:
    completion = session_writing("héllo").generate(PROMPT, max_tokens=6)
    assert (completion.text, completion.ids) == ("héllo", tokens("héllo"))
    assert completion.prompt_tokens == 3


def test_log_probabilities_are_the_model_s(session_writing: Write) -> None:
    session = session_writing("ab")
    completion = session.generate(PROMPT, max_tokens=2)
    logits = session.score([*PROMPT, completion.ids[0]])[2:].astype(np.float64)
    expected = logits[[0, 1], completion.ids] - np.log(np.exp(logits).sum(axis=1))
    # Sums of up to 64 exponentials are float32: each is right to some 1e-6 of itself.
    np.testing.assert_allclose(completion.logprobs, expected, rtol=1e-5, atol=2e-6)


def test_text_ends_at_max_tokens(session_writing: Write) -> None:
    completion = session_writing("abcdef").generate(PROMPT, max_tokens=3)
    assert (completion.text, completion.stop_reason) == ("abc", "length")


def test_text_ends_where_the_model_ends_it(session_writing: Write) -> None:
    completion = session_writing([*tokens("ab"), EOS]).generate(PROMPT)
    assert (completion.text, completion.stop_reason) == ("ab", "eos")
    assert completion.ids == [*tokens("ab"), EOS]


def test_text_ends_before_a_stop_string(session_writing: Write) -> None:
    completion = session_writing("one. two. three").generate(PROMPT, stop=["two", "w"])
    assert (completion.text, completion.stop_reason) == ("one. t", "stop")


def test_single_stop_string_needs_no_list(session_writing: Write) -> None:
    assert session_writing("one. two").generate(PROMPT, stop=". t").text == "one"


def test_text_ends_at_the_context(session_writing: Write) -> None:
    session = session_writing("a" * CONTEXT)
    completion = session.generate(PROMPT, max_tokens=100)
    # The last token needs no place: nothing follows it.
    assert (len(completion.ids), completion.stop_reason) == (CONTEXT - 3 + 1, "context")
    assert session.position == CONTEXT


def test_prompt_that_fills_the_context_gives_one_token(session: Session) -> None:
    completion = session.generate([2] * CONTEXT)
    assert (len(completion.ids), completion.stop_reason) == (1, "context")


def test_no_tokens_asked_for_runs_nothing(session: Session, engine: Any) -> None:
    completion = session.generate(PROMPT, max_tokens=0)
    assert (completion.text, completion.ids, completion.stop_reason) == ("", [], "length")
    assert engine.steps == []


@pytest.mark.parametrize("max_tokens", [-1, 1.5, True, None, "8"])
def test_impossible_max_tokens_is_refused(session: Session, max_tokens: Any) -> None:
    with pytest.raises(OptionError, match="max_tokens must be an integer"):
        session.generate(PROMPT, max_tokens=max_tokens)


def test_impossible_sampling_option_is_refused(session: Session) -> None:
    with pytest.raises(OptionError, match="temperature"):
        session.generate(PROMPT, temperature=-1)


def test_text_prompt_gets_the_begin_token(session: Session) -> None:
    as_text, as_ids = (
        session.generate("hi", max_tokens=4),
        session.generate([BOS, *tokens("hi")], max_tokens=4),
    )
    assert as_text.ids == as_ids.ids


def test_every_text_starts_a_fresh_sequence(session: Session) -> None:
    session.prefill([5, 6, 7])
    first = session.generate(PROMPT, max_tokens=4)
    assert session.generate(PROMPT, max_tokens=4).ids == first.ids


def test_seed_decides_the_text(session: Session) -> None:
    texts = [tuple(session.generate(PROMPT, 8, temperature=5.0, seed=seed).ids) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_repetition_penalty_counts_prompt_and_text(session_writing: Write) -> None:
    session = session_writing([9, 3, 9])  # 3 is in the prompt; 9 repeats itself
    plain, penalised = (session.generate(PROMPT, 3, repetition_penalty=p).ids for p in (1.0, 20.0))
    assert plain == [9, 3, 9]
    assert penalised[0] == 9
    assert not {3, 9} & set(penalised[1:])


def test_space_between_prompt_and_text_is_kept(session_writing: Write) -> None:
    assert session_writing(" a").generate(PROMPT, max_tokens=2).text == " a"


def test_half_a_character_waits_for_the_rest(session_writing: Write) -> None:
    pieces = [piece.text for piece in session_writing("né!").stream(PROMPT, max_tokens=4)]
    assert pieces == ["n", "", "é", "!"]


def test_character_cut_short_by_the_end_is_marked(session_writing: Write) -> None:
    assert session_writing("é").generate(PROMPT, max_tokens=1).text == "\ufffd"


@pytest.mark.parametrize("ending", ["length", "eos"])
def test_start_of_a_stop_string_is_given_out_at_the_end(session_writing: Write, ending: str) -> None:
    session = session_writing([*tokens("ab EN"), EOS])
    completion = session.generate(PROMPT, max_tokens=5 if ending == "length" else 9, stop=["END"])
    assert (completion.text, completion.stop_reason) == ("ab EN", ending)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    text=st.text(alphabet="abé€😀", max_size=12),
    stops=st.lists(st.text(alphabet="abé€", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(0, 50),
)
def test_pieces_add_up_to_the_text_cut_at_the_first_stop(
    session: Session, engine: Any, text: str, stops: list[str], max_tokens: int
) -> None:
    engine.script = [EOS] * len(PROMPT) + [*tokens(text)[:35], EOS]
    completion = session.generate(PROMPT, max_tokens, stop=stops)
    pieces = list(session.stream(PROMPT, max_tokens, stop=stops))
    assert "".join(piece.text for piece in pieces) == completion.text
    whole = session.tokenizer.decode(completion.ids, continuation=True)
    assert (
        completion.text == whole[: min((at for s in stops if (at := whole.find(s)) >= 0), default=len(whole))]
    )
    assert (completion.stop_reason == "stop") == any(stop in whole for stop in stops)


def test_nothing_runs_before_the_first_piece_is_asked_for(session: Session, engine: Any) -> None:
    session.prefill([5])
    session.stream(PROMPT)
    assert (session.position, engine.steps) == (1, [1])


def test_stream_left_early_leaves_the_session_usable(session_writing: Write) -> None:
    session = session_writing("abcdef")
    for _ in session.stream(PROMPT):
        break
    assert session.position == 3
    assert session.generate(PROMPT, max_tokens=2).text == "ab"


def test_closed_stream_ends(session_writing: Write) -> None:
    with session_writing("abcdef").stream(PROMPT) as stream:
        next(stream)
    completion = stream.completion()
    assert (completion.text, completion.stop_reason) == ("a", "closed")


def test_completion_holds_the_pieces_read_before(session_writing: Write) -> None:
    stream = session_writing("abc").stream(PROMPT, max_tokens=3)
    next(stream)
    assert stream.completion().text == "abc"


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.prefill([1]),
        lambda session: session.decode(1),
        lambda session: session.reset(),
        lambda session: session.generate([5], max_tokens=1),
    ],
)
def test_other_use_of_the_sequence_ends_a_stream(session: Session, use: Callable[[Session], object]) -> None:
    stream = session.stream(PROMPT)
    next(stream)
    use(session)
    with pytest.raises(SessionError, match="put to other use"):
        next(stream)


def test_score_does_not_disturb_a_stream(session_writing: Write) -> None:
    session = session_writing("abc")
    text = ""
    for piece in session.stream(PROMPT, max_tokens=3):
        session.score([7, 8, 9])
        text += piece.text
    assert text == "abc"


def test_session_closed_during_a_stream_refuses_the_next_piece(session: Session) -> None:
    stream = session.stream(PROMPT)
    next(stream)
    session.close()
    with pytest.raises(SessionError, match="closed"):
        next(stream)


def test_stream_may_move_to_another_thread_between_pieces(session_writing: Write) -> None:
    stream = session_writing("abc").stream(PROMPT, max_tokens=3)
    next(stream)
    other = threading.Thread(target=stream.completion)
    other.start()
    other.join()
    assert stream.completion().text == "abc"


def test_prefill_time_and_decode_time_are_told_apart(session_writing: Write) -> None:
    one, many = (session_writing("abc").generate(PROMPT, max_tokens=n) for n in (1, 3))
    assert one.prefill_seconds > 0
    assert one.decode_seconds == 0
    assert many.decode_seconds > 0


# Several tokens at once, as speculative decoding chooses them.


class Source:
    """A stream of tokens that come in groups, and what it is told of those that it does not want."""

    def __init__(self, session: Session, groups: Sequence[Sequence[int]], **options: Any) -> None:
        given = {"prompt_tokens": 3, "context": CONTEXT, "max_tokens": 100, "stop": (), **options}
        self.text = GrowingText(
            text=TextStream(session.tokenizer, continuation=True),
            stops=StopMatcher(given.pop("stop")),
            eos_ids=(EOS,),
            **given,
        )
        self.groups = [[Choice(id, -0.5) for id in group] for group in groups]
        self.asked: list[int] = []
        self.left: list[int] = []

    def choose(self, last: int) -> list[Choice]:
        self.asked.append(last)
        return self.groups.pop(0)

    def stream(self) -> Stream:
        return Stream(
            self.text, start=lambda: self.groups.pop(0)[0], choose=self.choose, leave=self.left.append
        )


def test_tokens_that_come_together_are_pieces_of_their_own(session: Session) -> None:
    source = Source(session, [tokens("a"), tokens("bcd"), tokens("e"), [*tokens("f"), EOS]])
    stream = source.stream()
    assert [piece.text for piece in stream] == ["a", "b", "c", "d", "e", "f", ""]
    assert source.asked == tokens("ade")
    assert source.left == []
    assert stream.completion().ids == [*tokens("abcdef"), EOS]


@pytest.mark.parametrize(
    ("groups", "options", "text", "reason", "left"),
    [
        (["a", [*tokens("bc"), EOS, *tokens("de")]], {}, "abc", "eos", 2),
        (["a", "bcd.ef"], {"stop": ["d."]}, "abc", "stop", 2),
        (["a", "bcdef"], {"max_tokens": 3}, "abc", "length", 3),
        (["a", "bcdef"], {"context": 5}, "abc", "context", 3),
        (["a", "bc"], {"max_tokens": 3}, "abc", "length", 0),
    ],
    ids=["eos", "stop", "length", "context", "nothing is left"],
)
def test_tokens_after_the_end_are_left(
    session: Session, groups: list[Any], options: dict[str, Any], text: str, reason: str, left: int
) -> None:
    source = Source(session, [tokens(g) if isinstance(g, str) else g for g in groups], **options)
    stream = source.stream()
    assert len(list(stream)) == sum(map(len, groups)) - left
    assert source.left == ([left] if left else [])
    completion = stream.completion()
    assert (completion.text, completion.stop_reason) == (text, reason)
    assert source.left == ([left] if left else [])  # once only


def test_tokens_are_left_before_the_last_piece_is_given_out(session: Session) -> None:
    source = Source(session, [tokens("a"), tokens("bcd")], max_tokens=2)
    stream = source.stream()
    next(stream)
    assert (next(stream).text, source.left) == ("b", [2])


@pytest.mark.parametrize("way", ["close", "with", "break"])
def test_tokens_that_the_reader_has_not_seen_are_left(session: Session, way: str) -> None:
    source = Source(session, [tokens("a"), tokens("bcde")])
    if way == "break":
        for piece in source.stream():
            if piece.text == "b":
                break
    else:
        stream = source.stream()
        assert [next(stream).text for _ in range(2)] == ["a", "b"]
        if way == "close":
            stream.close()
        else:
            with stream:
                pass
        assert stream.completion().text == "ab"
    assert source.left == [3]
    assert source.text.completion(0, 0).stop_reason == "closed"


def test_error_leaves_the_tokens_after_it_and_ends_the_stream(session: Session) -> None:
    source = Source(session, [tokens("a"), [*tokens("b"), 999, *tokens("cd")]])
    stream = source.stream()
    assert [next(stream).text for _ in range(2)] == ["a", "b"]
    with pytest.raises(SessionError, match="token 999 is outside the vocabulary"):
        next(stream)
    assert source.left == [2]
    assert stream.completion().text == "ab"


# The end of the context, of the time, and of patience.


def test_full_context_may_be_an_error_that_loses_nothing(session: Session) -> None:
    source = Source(session, [tokens(c) for c in "abcdef"], context=5, on_full="error")
    stream = source.stream()
    # The last of them needs no place: nothing follows it.
    assert [next(stream).text for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(ContextError, match=r"3 tokens of the prompt and 3 of the text fill the context of 5"):
        next(stream)
    assert source.asked == tokens("ab")
    completion = stream.completion()
    assert (completion.text, completion.stop_reason) == ("abc", "closed")


@pytest.mark.parametrize(("ending", "reason"), [("max_tokens", "length"), ("eos", "eos")])
def test_text_that_ends_where_the_context_does_is_no_error(
    session: Session, ending: str, reason: str
) -> None:
    groups = [tokens("a"), tokens("b"), [EOS] if ending == "eos" else tokens("c")]
    limit = 3 if ending == "max_tokens" else 100
    source = Source(session, groups, context=5, on_full="error", max_tokens=limit)
    assert source.stream().completion().stop_reason == reason


@pytest.mark.parametrize("on_full", ["stopp", None, True])
def test_other_behaviour_at_the_end_of_the_context_is_refused(session: Session, on_full: Any) -> None:
    with pytest.raises(OptionError, match=r"on_full is .*'stop' or 'error'"):
        Source(session, [], on_full=on_full)


def test_remaining_tokens_are_those_that_may_come(session: Session) -> None:
    short, full = Source(session, [], max_tokens=2).text, Source(session, [], context=5).text
    assert (short.remaining, full.remaining) == (2, 3)
    for text in (short, full):
        text.add(Choice(70, 0.0))
    assert (short.remaining, full.remaining) == (1, 2)


@pytest.mark.parametrize("reason", ["deadline", "cancelled"])
def test_text_may_be_ended_from_outside(session: Session, reason: Any) -> None:
    text = Source(session, [], stop=["END"]).text
    for id in tokens("ab EN"):
        text.add(Choice(id, -1.0))
    text.end(reason)
    assert text.has_ended
    completion = text.completion(0, 0)
    # "EN" may have become a stop string: as in a text that is closed, it was not shown.
    assert (completion.text, len(completion.ids), completion.stop_reason) == ("ab ", 5, reason)


def test_text_that_has_ended_keeps_its_reason(session: Session) -> None:
    text = Source(session, []).text
    text.add(Choice(EOS, -1.0))
    text.end("cancelled")
    assert text.completion(0, 0).stop_reason == "eos"


def test_completion_says_what_was_cached_and_drafted(session: Session) -> None:
    text = Source(session, []).text
    plain = text.completion(0, 0)
    assert (plain.cached_tokens, plain.drafted, plain.accepted) == (0, 0, 0)
    text.cached_tokens, text.drafted, text.accepted = 2, 9, 7
    completion = text.completion(0, 0)
    assert (completion.cached_tokens, completion.drafted, completion.accepted) == (2, 9, 7)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab.", min_size=10, max_size=36),
    stops=st.lists(st.text(alphabet="ab.", min_size=3, max_size=5), max_size=1),
    max_tokens=st.integers(0, 36),
    read=st.integers(1, 50),
)
def test_session_that_speculates_is_left_as_one_that_does_not(
    session: Session, engine: Any, text: str, stops: list[str], max_tokens: int, read: int
) -> None:
    """The same pieces and the same sequence, wherever the text ends or its reader leaves."""
    engine.script = [EOS] * len(PROMPT) + [*tokens(text), EOS]
    found = []
    for speculate in (None, "ngram"):
        stream = session.stream(PROMPT, max_tokens, stop=stops, speculate=speculate)
        pieces = [piece for _, piece in zip(range(read), stream)]
        stream.close()
        found.append((pieces, stream.completion().stop_reason, session.position, session.decode(5).tolist()))
        session.reset()
    assert found[0] == found[1]


def test_session_that_speculates_says_how_well(session_writing: Write) -> None:
    completion = session_writing("abcd" * 8).stream(PROMPT, 30, speculate="ngram").completion()
    assert completion.text == ("abcd" * 8)[:30]
    assert 0 < completion.accepted <= completion.drafted


def test_session_may_refuse_to_go_on_in_a_full_context(session_writing: Write) -> None:
    stream = session_writing("a" * CONTEXT).stream(PROMPT, 100, on_full="error")
    for _ in range(CONTEXT - len(PROMPT) + 1):
        assert next(stream).text == "a"
    with pytest.raises(ContextError, match="fill the context of 40"):
        next(stream)
