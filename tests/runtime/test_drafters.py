"""Drafters: what they guess, what they read for it, and which models they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlxc.errors import OptionError, SessionError
from rlxc.runtime import Session
from rlxc.runtime.drafters import Draft, HeadDrafter, ModelDrafter, NgramDrafter
from rlxc.runtime.logits import Floats, Logits
from rlxc.runtime.sampling import Sampler, SamplingOptions
from rlxc.runtime.speculate import Speculator

CONTEXT, VOCAB = 40, 258  # of the fake engine
GREEDY = SamplingOptions()


def looked_up(tokens: Sequence[int], most: int, longest: int, shortest: int) -> list[int]:
    """The definition: scan the text for the newest earlier place of its last tokens, the longest run first."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if list(tokens[start : start + size]) == list(tokens[len(tokens) - size :]):
                text = list(tokens)
                for place in range(start + size, start + size + most):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


TEXTS = st.lists(st.integers(0, 3), max_size=60)


@given(
    text=TEXTS,
    steps=st.lists(st.integers(1, 9), max_size=20),
    most=st.integers(1, 12),
    sizes=st.sampled_from([(4, 2), (1, 1), (3, 3), (6, 1)]),
)
def test_ngrams_are_those_of_the_definition_however_the_text_grows(
    text: list[int], steps: list[int], most: int, sizes: tuple[int, int]
) -> None:
    drafter, end = NgramDrafter(*sizes), 0
    for step in [0, *steps]:
        end += step
        draft = drafter.propose(text[:end], most)
        assert list(draft.ids) == looked_up(text[:end], most, *sizes)
        assert draft.distributions is None


def test_ngram_that_repeats_goes_on_repeating() -> None:
    assert NgramDrafter().propose([7, 1, 2, 3, 1, 2, 3], 8).ids == [1, 2, 3, 1, 2, 3, 1, 2]


def test_longer_ngram_wins_over_a_newer_one() -> None:
    #        1 2 3 -> 4           2 3 -> 5
    assert NgramDrafter().propose([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1).ids == [4]


def test_newest_of_equal_ngrams_wins() -> None:
    assert NgramDrafter().propose([1, 2, 4, 1, 2, 5, 1, 2], 1).ids == [5]


def test_text_that_never_repeats_has_no_draft() -> None:
    assert NgramDrafter().propose(range(100), 5).ids == ()


@given(TEXTS, TEXTS, st.booleans())
def test_ngrams_of_another_text_are_forgotten(first: list[int], second: list[int], begins: bool) -> None:
    """When it begins; and in any case where it differs within the newest 16 tokens, here always: they are negative."""
    drafter = NgramDrafter()
    drafter.propose(first, 3)
    if begins:
        drafter.begin(GREEDY)
    else:
        second = [-1 - token for token in second]
    assert list(drafter.propose(second, 3).ids) == looked_up(second, 3, 4, 2)


class Watched(list[int]):
    """A text that counts how many of its tokens are read."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found


def test_time_of_an_ngram_guess_does_not_grow_with_the_text() -> None:
    text, reads = Watched(np.random.default_rng(0).integers(0, 9, 4000).tolist()), []
    drafter = NgramDrafter()
    drafter.propose(text, 4)
    for token in (1, 2, 3, 1, 2, 3):
        text.append(token)
        text.read = 0
        assert len(drafter.propose(text, 4).ids) == 4
        reads.append(text.read)
    # 16 tokens to know the text again, and 16 to remember; the n-grams of one token, and those looked up; the guess.
    assert max(reads) <= 16 + 16 + 9 + 9 + 4


@pytest.mark.parametrize("sizes", [(0, 0), (2, 3), (True, 1), (2.0, 1), (3, -1)])
def test_impossible_ngrams_are_refused(sizes: tuple[Any, Any]) -> None:
    with pytest.raises(OptionError, match=r"n-grams: (longest|shortest) is"):
        NgramDrafter(*sizes)


Open = Callable[..., Session]


def softmax(logits: Floats, temperature: float) -> Any:
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    return weights / weights.sum()


def test_draft_model_guesses_what_it_would_write(open_session: Open, fake_engine: Any) -> None:
    engine = fake_engine()
    drafter = ModelDrafter(open_session(engine), open_session())
    drafter.begin(GREEDY)
    text = [5, 6, 7]
    for _ in range(6):
        text.append(int(engine.logits(text).argmax()))
    assert drafter.propose([5, 6, 7], 6).ids == text[3:]


def test_draft_model_says_what_it_drew_from(open_session: Open, fake_engine: Any) -> None:
    engine, options = fake_engine(), SamplingOptions(temperature=0.8, repetition_penalty=2.0, seed=3)
    drafter = ModelDrafter(open_session(engine), open_session())
    drafter.begin(options)
    draft = drafter.propose([5, 6, 7], 6)
    assert draft.distributions is not None
    text = [5, 6, 7]
    for id, distribution in zip(draft.ids, draft.distributions, strict=True):
        logits = engine.logits(text)
        for seen in set(text):
            logits[seen] *= 2 if logits[seen] < 0 else 0.5
        # Exponentials are float32, good to 1e-7 of the largest.
        np.testing.assert_allclose(distribution.probabilities, softmax(logits, 0.8), atol=1e-6)
        text.append(id)


@pytest.mark.parametrize("window", [False, True])
def test_draft_model_reads_each_token_once(open_session: Open, fake_engine: Any, window: bool) -> None:
    """Its own guesses that were accepted are not read again, nor anything before them."""
    engine, random = fake_engine(window=window), np.random.default_rng(0)
    drafter = ModelDrafter(open_session(engine), open_session())
    drafter.begin(GREEDY)
    text = list(range(2, 12))  # in chunks of 8 and 2 tokens
    draft = drafter.propose(text, 5)
    assert sum(engine.steps) == len(text) + 4
    for accepted in (0, 5, 2, 4):
        text += [*draft.ids[:accepted], int(random.integers(2, VOCAB))]
        # The last guess of a draft was never read.
        unread = 1 if accepted < 5 else 2
        engine.steps.clear()
        draft = drafter.propose(text, 5)
        assert sum(engine.steps) == unread + 4
        expected = list(text)
        for _ in range(5):
            expected.append(int(engine.logits(expected).argmax()))
        assert draft.ids == expected[len(text) :]


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("other", [[9, 8, 7], [2, 3, 4, 9], [2, 3], list(range(2, 30))], ids=str)
def test_draft_model_turns_to_another_text(
    open_session: Open, fake_engine: Any, window: bool, other: list[int]
) -> None:
    engine = fake_engine(window=window)
    drafter = ModelDrafter(open_session(engine), open_session())
    drafter.begin(GREEDY)
    drafter.propose(list(range(2, 22)), 5)
    assert drafter.propose(other, 1).ids == [int(engine.logits(other).argmax())]


def test_draft_model_guesses_as_much_as_it_can_take_back_and_hold(
    open_session: Open, fake_engine: Any
) -> None:
    drafter = ModelDrafter(open_session(fake_engine(window=True)), open_session())
    lengths = {
        held: len(drafter.propose([2] * held, 16).ids) for held in (1, CONTEXT - 1, CONTEXT, CONTEXT + 1)
    }
    # The last guess is not read, so there is one more than can be taken back, and than there is room for.
    assert lengths == {1: 7, CONTEXT - 1: 2, CONTEXT: 1, CONTEXT + 1: 0}


def test_draft_model_runs_with_its_sessions_adapters(
    split_session: Session, open_session: Open, engine: Any, write_adapter: Any
) -> None:
    split_session.adapters.push(write_adapter("a"), 0.5)
    drafter = ModelDrafter(split_session, open_session())
    drafter.propose([5, 6, 7], 2)
    assert [[scale for _, scale in mix] for step in engine.mixes for mix in step] == [[0.5], [0.5]]


def test_session_of_a_draft_model_stays_as_it_is(open_session: Open) -> None:
    session = open_session()
    session.prefill([5, 6])
    ModelDrafter(session, open_session()).propose([7, 8, 9], 3)
    assert session.position == 2


def test_session_cannot_draft_for_itself(session: Session) -> None:
    for other in (session, session.fork()):
        with pytest.raises(OptionError, match="cannot draft for itself or its forks"):
            ModelDrafter(other, session)


def test_closed_draft_model_is_refused(open_session: Open) -> None:
    session = open_session()
    drafter = ModelDrafter(session, open_session())
    session.close()
    with pytest.raises(SessionError, match="closed"):
        drafter.propose([5], 1)


def test_draft_model_with_another_number_of_tokens_is_refused(open_session: Open, fake_engine: Any) -> None:
    class Larger(fake_engine):  # type: ignore[misc]
        vocab_size = VOCAB + 64

    with pytest.raises(OptionError, match=r"322 tokens cannot draft for the 258 of .*; use a draft model of"):
        ModelDrafter(open_session(Larger()), open_session())


def changed_tokenizer(artifact: Any, change: Callable[[dict[str, Any]], None]) -> bytes:
    state = json.loads(artifact.file("tokenizer.json").read_bytes())
    change(state)
    return json.dumps(state, indent=1).encode()


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("<0x41>", "zz", r"token 67 is 'zz' here, but 'A' in"),
        ("<0xFF>", None, r"a tokenizer of 257 tokens cannot draft for the 258 of"),
    ],
)
def test_draft_model_with_other_tokens_is_refused(
    open_session: Open, make_artifact: Any, old: str, new: str | None, shown: str
) -> None:
    def change(state: dict[str, Any]) -> None:
        vocab = state["model"]["vocab"]
        number = vocab.pop(old)
        state["model"]["byte_fallback"] = False
        if new is not None:
            vocab[new] = number

    target = make_artifact("target.rlx")
    draft = make_artifact("draft.rlx", tokenizer__json=changed_tokenizer(target, change))
    with pytest.raises(OptionError, match=shown):
        ModelDrafter(open_session(artifact=draft), open_session(artifact=target))


def test_tokenizer_written_differently_is_the_same(open_session: Open, make_artifact: Any) -> None:
    target = make_artifact("target.rlx")
    draft = make_artifact("draft.rlx", tokenizer__json=changed_tokenizer(target, lambda state: None))
    name = "tokenizer.json"
    assert draft.manifest.files[name] != target.manifest.files[name]
    drafter = ModelDrafter(open_session(artifact=draft), open_session(artifact=target))
    assert len(drafter.propose([5], 3).ids) == 3


class BigramHead:
    """A table of what the model thought best after each token that it has read, filled as its logits come by."""

    def __init__(self) -> None:
        self.best: dict[int, int] = {}

    def propose(self, logits: Floats, tokens: Sequence[int], most: int) -> Draft:
        self.best[tokens[-2]] = int(logits.argmax())
        ids, last = [], tokens[-1]
        while len(ids) < most and last in self.best:
            last = self.best[last]
            ids.append(last)
        return Draft(ids)


def test_head_gets_the_logits_that_the_last_token_was_chosen_from(
    open_session: Open, fake_engine: Any
) -> None:
    engine, seen = fake_engine([2, 3, 4, 5] * 10), []

    class Head(BigramHead):
        def propose(self, logits: Floats, tokens: Sequence[int], most: int) -> Draft:
            np.testing.assert_array_equal(logits, engine.logits(tokens[:-1]))
            seen.append(len(tokens))
            return super().propose(logits, tokens, most)

    model = open_session(engine)._model
    drafter = HeadDrafter(Head())
    speculator = Speculator(model, drafter, Sampler(GREEDY))
    sequence, history = model.new_sequence(), [2, 3, 4]
    speculator.start(model.prefill(sequence, model.tokens(history), ()).row(0, 0), history)
    engine.steps.clear()
    while len(history) < CONTEXT:
        speculator.next(sequence, (), history, 10)
    assert history[:CONTEXT] == [2, 3, 4, 5] * 10
    assert seen[0] == 4  # the prompt's logits are the first
    assert speculator.accepted > 20
    assert len(engine.steps) < 15


def test_head_guesses_nothing_before_there_are_logits() -> None:
    drafter = HeadDrafter(BigramHead())
    assert drafter.propose([1, 2], 4) == Draft()
    drafter.verified(0, Logits.of(np.array([0, 0, 1], np.float32)))
    assert drafter.propose([2, 2], 4) == Draft([2, 2, 2, 2])
    drafter.begin(GREEDY)
    assert drafter.propose([2, 2], 4) == Draft()
