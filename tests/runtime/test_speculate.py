"""Speculative decoding: the greedy text is the plain one, and a sampled one is as likely as without a draft."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlxc.errors import ContextError, OptionError, SessionError
from rlxc.runtime import Session
from rlxc.runtime.drafters import Draft, Drafter, ModelDrafter, NgramDrafter
from rlxc.runtime.engines import Mix
from rlxc.runtime.logits import Logits, StepLogits
from rlxc.runtime.model import Model
from rlxc.runtime.sampling import Choice, Distribution, Sampler, SamplingOptions
from rlxc.runtime.sequence import LoadedAdapter, Stack, TokenSequence
from rlxc.runtime.speculate import Speculator

CONTEXT, MAX_STEP, ROLLBACK, VOCAB = 40, 8, 6, 258  # of the fake engine and its artifact
PROMPT = [0, 3, 4]

MakeModel = Callable[[Any], Model]


@pytest.fixture
def make_model(make_artifact: Callable[..., Any]) -> Iterator[MakeModel]:
    artifact = make_artifact()
    verification = artifact.start_verification()
    yield lambda engine: Model(artifact, engine, verification)
    verification.close()


class Scripted:
    """Drafts what a text has next, but for some places where it is wrong."""

    is_free = False

    def __init__(self, text: Sequence[int], wrong: Sequence[int] = ()) -> None:
        self.text, self.wrong = list(text), set(wrong)
        self.verifications: list[
            tuple[int, int]
        ] = []  # tokens accepted, and the best of the logits after them

    def begin(self, sampling: SamplingOptions) -> None:
        self.sampling = sampling

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        start = len(tokens)
        return Draft(
            [
                (token + (place in self.wrong)) % VOCAB
                for place, token in enumerate(self.text[start : start + most], start)
            ]
        )

    def verified(self, accepted: int, logits: Logits) -> None:
        self.verifications.append((accepted, logits.best()[0]))


def plain(model: Model, options: SamplingOptions, count: int, stack: Stack = ()) -> list[Choice]:
    """The text without speculation."""
    sampler, sequence, history = Sampler(options), model.new_sequence(), list(PROMPT)
    choices = [sampler.sample(model.prefill(sequence, model.tokens(PROMPT), stack).row(0, 0), history)]
    while len(choices) < count:
        history.append(choices[-1].id)
        choices.append(sampler.sample(model.decode([sequence], history[-1:], [stack]).row(0, 0), history))
    return choices


def speculate(
    model: Model,
    drafter: Drafter,
    options: SamplingOptions,
    count: int,
    stack: Stack = (),
    prompt: Sequence[int] = PROMPT,
) -> tuple[list[Choice], Speculator]:
    """The text with speculation; after each step, the sequence holds all of it but the last token."""
    speculator = Speculator(model, drafter, Sampler(options))
    sequence, history = model.new_sequence(), list(prompt)
    logits = model.prefill(sequence, model.tokens(prompt), stack)
    choices = [speculator.start(logits.row(0, 0), history)]
    while len(choices) < count:
        most = count - len(choices)
        more = speculator.next(sequence, stack, history, most)
        assert 1 <= len(more) <= most
        choices += more
        assert history == [*prompt, *(choice.id for choice in choices)]
        assert sequence.tokens.tolist() == sequence.cache.ids == history[:-1]  # type: ignore[attr-defined]
    return choices, speculator


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.integers(2, 5), max_size=CONTEXT),
    wrong=st.sets(st.integers(0, CONTEXT), max_size=12),
    window=st.booleans(),
    penalty=st.sampled_from([1.0, 1.5]),
    top_k=st.sampled_from([0, 1]),
    count=st.integers(1, CONTEXT - len(PROMPT) + 1),
)
def test_greedy_text_is_the_plain_one_whatever_is_drafted(
    make_model: MakeModel,
    fake_engine: Any,
    script: list[int],
    wrong: set[int],
    window: bool,
    penalty: float,
    top_k: int,
    count: int,
) -> None:
    """Ids and log-probabilities are equal: the fake engine gives the same logits however tokens came."""
    model = make_model(fake_engine(script, window))
    # With top_k 1, any temperature is greedy.
    options = SamplingOptions(temperature=float(top_k), top_k=top_k, repetition_penalty=penalty)
    expected = plain(model, options, count)
    text = [*PROMPT, *(choice.id for choice in expected)]
    for drafter in (Scripted(text), Scripted(text, sorted(wrong)), NgramDrafter()):
        choices, _ = speculate(model, drafter, options, count)
        assert choices == expected


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_the_plain_one_with_a_draft_model(
    open_session: Callable[..., Session], fake_engine: Any, window: bool, penalty: float
) -> None:
    script = [2, 3, 4, 5] * 10
    target = open_session(fake_engine(script, window))
    other = [token + (place % 5 == 0) for place, token in enumerate(script)]
    draft = open_session(fake_engine(other, window))
    options = SamplingOptions(repetition_penalty=penalty)
    expected = plain(target._model, options, 30)
    choices, speculator = speculate(target._model, ModelDrafter(draft, target), options, 30)
    assert choices == expected
    assert 0 < speculator.accepted < speculator.drafted


def test_drafts_are_verified_with_the_adapters_of_the_text(make_model: MakeModel, fake_engine: Any) -> None:
    engine = fake_engine()
    prepared = engine.prepare({"a": (np.ones((4, 4), np.float32), np.ones((4, 4), np.float32))})
    stack = ((LoadedAdapter("a", Path("a.gguf"), "f" * 64, prepared), 0.5),)
    model, options = make_model(engine), SamplingOptions()
    expected = plain(model, options, 20, stack)
    text = [*PROMPT, *(choice.id for choice in expected)]
    choices, speculator = speculate(model, Scripted(text, [9]), options, 20, stack)
    assert choices == expected
    assert speculator.accepted > 10


def test_repeating_text_takes_few_steps(make_model: MakeModel, fake_engine: Any) -> None:
    engine = fake_engine([2, 3, 4, 5] * 10)
    choices, speculator = speculate(make_model(engine), NgramDrafter(), SamplingOptions(), 37)
    assert [choice.id for choice in choices] == ([2, 3, 4, 5] * 10)[3:]
    # The prompt's end comes up again after 5 tokens; then drafts are of 3, 6, and 6 tokens as the rollback allows.
    assert len(engine.steps) <= 12
    assert speculator.accepted == speculator.drafted >= 25


def test_drafts_fit_context_step_and_rollback(make_model: MakeModel, fake_engine: Any) -> None:
    text = [2] * (CONTEXT + 1)
    engine = fake_engine(text, window=True)
    drafter = Scripted(text)
    speculate(make_model(engine), drafter, SamplingOptions(), CONTEXT - len(PROMPT) + 1)
    assert max(engine.steps) == min(MAX_STEP, ROLLBACK + 1)
    full = Speculator(make_model(engine), drafter, Sampler(SamplingOptions()))
    sequence = full._model.new_sequence()
    logits = full._model.prefill(sequence, full._model.tokens(text[:CONTEXT]), ())
    history = text[:CONTEXT]
    full.start(logits.row(0, 0), history)
    with pytest.raises(ContextError, match="do not fit the context of 40"):
        full.next(sequence, (), history, 5)
    assert sequence.position == CONTEXT


def test_without_rollback_nothing_is_drafted(make_model: MakeModel, fake_engine: Any) -> None:
    class Unable(Model):
        rollback = 0  # type: ignore[assignment]

    plain_model = make_model(fake_engine([2] * CONTEXT))
    model = Unable(plain_model._artifact, plain_model.engine, plain_model._verification)
    choices, speculator = speculate(model, Scripted([2] * CONTEXT), SamplingOptions(), 20)
    assert choices == plain(plain_model, SamplingOptions(), 20)
    assert speculator.drafted == 0


def test_drafter_is_told_how_the_text_is_chosen_and_what_was_accepted(
    make_model: MakeModel, fake_engine: Any
) -> None:
    text = list(range(2, 2 + CONTEXT))
    drafter, options = Scripted(text, wrong=[6]), SamplingOptions(top_k=1, temperature=0.5)
    choices, speculator = speculate(make_model(fake_engine(text)), drafter, options, 6, prompt=text[:3])
    assert drafter.sampling is options
    # Of the first draft 5, 6, 7 (places 3 to 5 follow the first token), places 4 and 5 are right and 6 is wrong.
    assert [choice.id for choice in choices] == text[3:9]
    assert drafter.verifications[:2] == [(0, text[3]), (2, text[6])]
    assert (speculator.drafted, speculator.accepted) == (4, 3)


# Sampling.

_PROMPT = [0, 1, 2, 0, 1, 3, 0, 1]  # an n-gram drafter has something to say after it
_SIZE = 4


class MarkovEngine:
    """Its logits depend on the last token alone: ``table [4, 4]``."""

    vocab_size, context, max_step, ticks = _SIZE, 64, 16, None

    def __init__(self, seed: int) -> None:
        table = np.random.default_rng(seed).standard_normal((_SIZE, _SIZE))
        self.table = table.astype(np.float32)

    def new_cache(self) -> Any:
        return MarkovCache()

    def step(
        self,
        caches: Sequence[MarkovCache],
        ids: Any,
        rows: Any,
        mixes: Sequence[Mix[Any]] = (),
    ) -> StepLogits:
        for cache, row in zip(caches, ids.tolist()):
            cache.ids += row
        return StepLogits(self.table[ids[:, rows]])

    def close(self) -> None:
        pass


class MarkovCache:
    oldest = 0

    def __init__(self) -> None:
        self.ids: list[int] = []

    @property
    def position(self) -> int:
        return len(self.ids)

    def truncate(self, position: int) -> None:
        del self.ids[position:]


def likelihoods(table: Any, options: SamplingOptions, text: Sequence[int]) -> list[float]:
    """How likely each token is to follow a text; in plain Python, as `SamplingOptions` says."""
    values = [float(value) for value in table[text[-1]]]
    for i in set(text[-options.repetition_window :]):
        values[i] *= options.repetition_penalty if values[i] < 0 else 1 / options.repetition_penalty
    least = sorted(values)[-options.top_k]
    weights = [math.exp(value / options.temperature) if value >= least else 0.0 for value in values]
    return [weight / sum(weights) for weight in weights]


def surprise(model: Model, drafter: Drafter, options: dict[str, Any], trials: int = 1500) -> float:
    """Chi-square of the next three tokens over many seeds, in standard deviations above its mean.

    The first of them has no draft before it, so that the others are drafted after several texts.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(trials):
        choices, _ = speculate(model, drafter, SamplingOptions(**options, seed=seed), 5, prompt=_PROMPT)
        counts[tuple(choice.id for choice in choices[:3])] += 1
    table, exact = model.engine.table, SamplingOptions(**options)  # type: ignore[attr-defined]
    expected = {}
    for tokens in product(range(_SIZE), repeat=3):
        share, text = 1.0, list(_PROMPT)
        for token in tokens:
            share *= likelihoods(table, exact, text)[token]
            text.append(token)
        expected[tokens] = share * trials
    assert sum(counts[tokens] for tokens, number in expected.items() if number == 0) == 0
    # Chi-square wants 5 or more expected in each cell: the rare ones are one cell together.
    common = {tokens: number for tokens, number in expected.items() if number >= 5}
    cells = [(counts[tokens], number) for tokens, number in common.items()]
    rest = trials - sum(common.values())
    if rest >= 5:
        cells.append((trials - sum(count for count, _ in cells), rest))
    chi_square = sum((count - number) ** 2 / number for count, number in cells)
    freedom = len(cells) - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


# Five standard deviations happen by chance for less than one set of seeds in 10,000, and the seeds are fixed.
_LIMIT = 5

_OPTIONS = [
    {"temperature": 1.0, "top_k": _SIZE},
    {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.6, "repetition_window": 3},
]


@pytest.fixture
def markov(open_session: Callable[..., Session]) -> Session:
    return open_session(MarkovEngine(0))


@pytest.fixture
def draft_model(open_session: Callable[..., Session], markov: Session) -> ModelDrafter:
    """Its distributions differ from the target's by as much as two random ones do."""
    return ModelDrafter(open_session(MarkovEngine(1)), markov)


@pytest.mark.parametrize("options", _OPTIONS, ids=["all", "filtered"])
def test_sampled_text_with_a_draft_model_is_as_likely_as_plain(
    markov: Session, draft_model: ModelDrafter, options: dict[str, Any]
) -> None:
    assert surprise(markov._model, draft_model, options) < _LIMIT


@pytest.mark.parametrize("options", _OPTIONS, ids=["all", "filtered"])
def test_sampled_text_with_ngrams_is_as_likely_as_plain(markov: Session, options: dict[str, Any]) -> None:
    assert surprise(markov._model, NgramDrafter(), options) < _LIMIT


class TestWrongRules:
    """The chi-square test notices rules that are nearly right: each is far beyond the limit."""

    def test_replacement_drawn_from_p_alone(
        self, markov: Session, draft_model: ModelDrafter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Distribution, "excess", lambda p, q: p)
        assert surprise(markov._model, draft_model, _OPTIONS[0]) > 2 * _LIMIT
        assert surprise(markov._model, NgramDrafter(), _OPTIONS[0]) > 2 * _LIMIT

    def test_every_token_accepted_that_is_possible(
        self, markov: Session, draft_model: ModelDrafter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Sampler, "uniform", lambda sampler: sampler._random.random() / 1e9)
        monkeypatch.setattr(Sampler, "draw", lambda sampler, p: p.draw(sampler._random.random()))
        assert surprise(markov._model, draft_model, _OPTIONS[0]) > 2 * _LIMIT

    def test_drafter_with_the_random_numbers_of_the_text(
        self, markov: Session, draft_model: ModelDrafter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("rlxc.runtime.drafters.Sampler", lambda options, stream=0: Sampler(options))
        assert surprise(markov._model, draft_model, _OPTIONS[0]) > 2 * _LIMIT


def test_same_seed_gives_the_same_text(markov: Session, draft_model: ModelDrafter) -> None:
    texts = [
        speculate(markov._model, draft_model, SamplingOptions(temperature=1.0, seed=seed), 20, prompt=_PROMPT)
        for seed in (1, 1, 2)
    ]
    assert texts[0][0] == texts[1][0] != texts[2][0]


# What goes wrong.


def test_logits_that_are_no_numbers_end_the_text_where_they_do_without_a_draft(
    make_model: MakeModel, fake_engine: Any
) -> None:
    class Broken(fake_engine):  # type: ignore[misc]
        def logits(self, history: Sequence[int], mixes: Any = ()) -> Any:
            row = super().logits(history, mixes)
            return np.full_like(row, np.nan) if len(history) == 6 else row

    text = [2] * CONTEXT
    model = make_model(Broken(text))
    speculator = Speculator(model, Scripted(text), Sampler(SamplingOptions()))
    sequence, history = model.new_sequence(), [2, 2, 2]
    speculator.start(model.prefill(sequence, model.tokens(history), ()).row(0, 0), history)
    assert len(speculator.next(sequence, (), history, 9)) == 2  # places 4 and 5
    assert (len(history), sequence.position) == (6, 5)
    for _ in range(2):
        before = sequence.position
        with pytest.raises(SessionError, match="no finite maximum"):
            speculator.next(sequence, (), history, 9)
        # As without a draft: the last token was read, nothing was chosen.
        assert sequence.position == before + 1
        assert len(history) == 6
        sequence.truncate(5)


class Fixed(Scripted):
    """Drafts always the same."""

    def __init__(self, draft: Draft) -> None:
        super().__init__([])
        self.draft = draft

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        return self.draft


CERTAIN = Distribution.certain(5)


@pytest.mark.parametrize(
    ("draft", "problem"),
    [
        (Draft([5] * 4), "4 tokens were drafted, where at most 3"),
        (Draft([VOCAB]), "token 258 is not in the vocabulary of 258"),
        (Draft([-1]), "token -1 is not in the vocabulary"),
        (Draft([1.5]), "flat list of integers"),  # type: ignore[list-item]
        (Draft([5, 5], [CERTAIN]), "2 tokens were drafted with 1 distributions"),
        (Draft([6], [CERTAIN]), "does not allow"),
        (Draft([5], [Distribution(None, np.ones(3))]), "does not allow"),
        (Draft([5], [Distribution(np.array([5, VOCAB]), np.ones(2))]), "does not allow"),
        (Draft([5], [Distribution(np.array([5]), np.full(1, np.nan))]), "does not allow"),
        (Draft([5], [Distribution(np.array([5]), np.zeros(1))]), "does not allow"),
        (Draft([5], [Distribution(np.empty(0, np.int64), np.empty(0))]), "does not allow"),
    ],
    ids=str,
)
def test_impossible_draft_is_refused_and_changes_nothing(
    make_model: MakeModel, fake_engine: Any, draft: Draft, problem: str
) -> None:
    model = make_model(fake_engine())
    speculator = Speculator(model, Fixed(draft), Sampler(SamplingOptions(temperature=1.0, seed=0)))
    sequence, history = model.new_sequence(), list(PROMPT)
    speculator.start(model.prefill(sequence, model.tokens(PROMPT), ()).row(0, 0), history)
    with pytest.raises(SessionError, match=problem):
        speculator.next(sequence, (), history, 9)
    assert (sequence.position, len(history)) == (3, 4)


@pytest.mark.parametrize("longest", [0, -1, True, 1.5, None])
def test_impossible_length_is_refused(make_model: MakeModel, fake_engine: Any, longest: Any) -> None:
    with pytest.raises(OptionError, match=r"longest is .* 1 or more"):
        Speculator(make_model(fake_engine()), NgramDrafter(), Sampler(SamplingOptions()), longest)


def test_free_drafter_that_becomes_right_is_noticed(make_model: MakeModel, fake_engine: Any) -> None:
    """Wrong at first, right from place 20 on; a pause would last to the end otherwise."""
    text = list(range(2, 2 + CONTEXT))
    found = []
    for is_free in (True, False):
        drafter = Scripted(text, wrong=range(20))
        drafter.is_free = is_free
        choices, speculator = speculate(
            make_model(fake_engine(text)), drafter, SamplingOptions(), 35, prompt=text[:3]
        )
        assert [choice.id for choice in choices] == text[3:38]
        found.append(speculator.accepted)
    assert found[0] > found[1] + 5


def test_sequence_is_left_as_a_plain_one(make_model: MakeModel, fake_engine: Any) -> None:
    """What a text leaves behind reads on as if no draft had ever been there."""
    text = [2] * CONTEXT
    model = make_model(fake_engine(text))
    sequence, history = model.new_sequence(), list(PROMPT)
    speculator = Speculator(model, Scripted(text, [5, 9, 12]), Sampler(SamplingOptions()))
    speculator.start(model.prefill(sequence, model.tokens(PROMPT), ()).row(0, 0), history)
    while len(history) < 20:
        speculator.next(sequence, (), history, 10)
    fresh = model.new_sequence()
    model.prefill(fresh, model.tokens(history[:-1]), ())
    assert isinstance(sequence, TokenSequence)
    assert sequence.readings == fresh.readings
    after = [model.decode([each], [7], [()]).values for each in (sequence, fresh)]
    np.testing.assert_array_equal(*after)
