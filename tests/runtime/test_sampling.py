"""Sampling against a slow, obvious implementation, and against the frequencies it promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlxc.errors import OptionError, SessionError
from rlxc.runtime.logits import Logits
from rlxc.runtime.sampling import Choice, Distribution, Sampler, SamplingOptions, _pick

Floats = NDArray[np.float32]


def distribution(logits: Floats, options: SamplingOptions, history: list[int]) -> dict[int, float]:
    """The definition, in plain Python: which tokens may be drawn and how likely each is."""
    values = [float(value) for value in logits]
    if options.repetition_window:
        for i in set(history[-options.repetition_window :]):
            penalty = options.repetition_penalty
            values[i] = values[i] / penalty if values[i] > 0 else values[i] * penalty
    kept = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if options.temperature == 0:
        return {kept[0]: 1.0}
    if options.top_k:
        kept = kept[: options.top_k]
    shares = softmax([values[i] for i in kept])
    total, count = 0.0, 0
    while count < len(kept) and total < options.top_p:
        total += shares[count]
        count += 1
    kept = kept[:count]
    if options.min_p:
        kept = [i for i in kept if values[i] >= values[kept[0]] + math.log(options.min_p)]
    shares = softmax([values[i] / options.temperature for i in kept])
    return dict(zip(kept, shares, strict=True))


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


class ArraySampler(Sampler):
    """Takes logits as an array."""

    def sample(self, logits: Any, history: Sequence[int] = ()) -> Choice:
        return super().sample(Logits.of(logits), history)


def sampler(**options: Any) -> Sampler:
    return ArraySampler(SamplingOptions(**options))


def logits_of(size: int = 50, seed: int = 0, spread: float = 2.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


class TestGreedy:
    def test_the_best_token_is_taken(self) -> None:
        logits = logits_of()
        assert sampler().sample(logits).id == int(logits.argmax())

    def test_ties_go_to_the_lowest_id(self) -> None:
        assert sampler().sample(np.array([1, 3, 3, 2], np.float32)).id == 1

    def test_filters_do_not_change_it(self) -> None:
        logits = logits_of()
        assert sampler(top_k=5, top_p=0.5, min_p=0.9).sample(logits).id == int(logits.argmax())

    def test_a_repeated_token_is_penalised(self) -> None:
        greedy = sampler(repetition_penalty=2.0)
        logits = np.array([1.5, 2.0, -1.0], np.float32)
        assert greedy.sample(logits, history=[]).id == 1
        assert greedy.sample(logits, history=[1]).id == 0

    def test_negative_logits_are_penalised_downwards(self) -> None:
        logits = np.array([-1.0, -1.1], np.float32)
        assert sampler(repetition_penalty=1.5).sample(logits, history=[0]).id == 1

    def test_the_penalty_forgets_what_left_the_window(self) -> None:
        logits = np.array([1.5, 2.0], np.float32)
        assert sampler(repetition_penalty=2.0, repetition_window=1).sample(logits, history=[1, 0]).id == 1

    def test_the_callers_logits_are_left_alone(self) -> None:
        logits = logits_of()
        before = logits.copy()
        sampler(repetition_penalty=2.0, temperature=0.7, top_k=5).sample(logits, history=[1, 2])
        np.testing.assert_array_equal(logits, before)


class TestLogprob:
    def test_it_is_of_the_models_own_distribution(self) -> None:
        logits = logits_of()
        choice = sampler(temperature=3.0, top_k=4, repetition_penalty=1.3, seed=1).sample(
            logits, history=[3, 4]
        )
        exact = logits.astype(np.float64)
        expected = exact[choice.id] - math.log(np.exp(exact).sum())
        # float32 exponentials of some 50 terms are good to 1e-6.
        assert choice.logprob == pytest.approx(expected, abs=2e-6)

    def test_large_logits_do_not_overflow(self) -> None:
        assert sampler().sample(np.array([1e30, 0], np.float32)).logprob == 0.0


option_sets = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 2, 7, 1000]),
        "top_p": st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
        "repetition_window": st.sampled_from([0, 3, 64]),
    }
)


class TestDistribution:
    @given(options=option_sets, seed=st.integers(0, 10_000), size=st.sampled_from([1, 2, 40, 1500]))
    def test_only_tokens_of_the_definition_are_drawn(
        self, options: dict[str, Any], seed: int, size: int
    ) -> None:
        logits = logits_of(size, seed)
        history = [seed % size, (seed * 7) % size]
        expected = distribution(logits, SamplingOptions(**options), history)
        drawing = sampler(**options, seed=seed)
        assert {drawing.sample(logits, history).id for _ in range(10)} <= set(expected)

    @given(options=option_sets, seed=st.integers(0, 10_000))
    def test_excluded_tokens_are_never_drawn(self, options: dict[str, Any], seed: int) -> None:
        logits = logits_of(30, seed)
        logits[seed % 29 :] = -np.inf
        drawing = sampler(**options, seed=seed)
        assert all(drawing.sample(logits, [0]).id < max(seed % 29, 1) for _ in range(5) if seed % 29)

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 1.0},
            {"temperature": 0.5},
            {"temperature": 1.5, "top_k": 6},
            {"temperature": 1.0, "top_p": 0.8},
            {"temperature": 1.0, "min_p": 0.1},
            {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
        ],
        ids=str,
    )
    def test_frequencies_are_those_of_the_definition(self, options: dict[str, Any]) -> None:
        logits, history, draws = logits_of(40, seed=5), [1, 2, 3], 6000
        drawing = sampler(**options, seed=11)
        counts = np.zeros(len(logits))
        for _ in range(draws):
            counts[drawing.sample(logits, history).id] += 1
        expected = distribution(logits, drawing.options, history)
        chi_square = sum((counts[i] - draws * share) ** 2 / (draws * share) for i, share in expected.items())
        assert counts[list(expected)].sum() == draws
        # Its mean is the degrees of freedom f, its standard deviation sqrt(2 f): 5 of them happen by chance in
        # less than one of 10,000 seeds, and the seed is fixed.
        freedom = max(len(expected) - 1, 1)
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom)

    def test_a_whole_vocabulary_is_drawn_from_evenly(self) -> None:
        logits = np.zeros(2000, np.float32)
        drawing = sampler(temperature=1.0, seed=3)
        ids = [drawing.sample(logits).id for _ in range(4000)]
        # The mean of 4000 even draws has a standard error of 577 / sqrt(4000) = 9.1; 5 of them are allowed.
        assert abs(np.mean(ids) - 999.5) < 46
        assert max(ids) > 1980 and min(ids) < 20

    @pytest.mark.parametrize(("uniform", "index"), [(0.0, 1), (0.5, 600), (math.nextafter(1.0, 0.0), 600)])
    def test_a_token_of_no_weight_is_not_picked_at_the_edges(self, uniform: float, index: int) -> None:
        weights = np.zeros(700, np.float32)
        weights[[1, 600]] = 1.0
        assert _pick(weights, uniform) == index

    @pytest.mark.parametrize("value", np.linspace(-60, 60, 41))
    def test_a_tiny_nucleus_of_equals_keeps_the_lowest_id(self, value: float) -> None:
        assert sampler(temperature=1.0, top_p=1e-12).sample(np.full(300, value, np.float32)).id == 0

    def test_a_small_temperature_is_greedy(self) -> None:
        logits = logits_of()
        assert sampler(temperature=1e-300, seed=0).sample(logits).id == int(logits.argmax())

    def test_equal_logits_at_the_edge_of_top_k_go_to_the_lowest_ids(self) -> None:
        logits = np.array([0, 1, 1, 1, 5], np.float32)
        drawing = sampler(temperature=5.0, top_k=3, seed=0)
        assert {drawing.sample(logits).id for _ in range(200)} == {1, 2, 4}


def distribution_of(values: dict[int, float], size: int | None = None) -> Distribution:
    """From probabilities by id; with a size, over a whole vocabulary."""
    if size is None:
        return Distribution(np.array(list(values), np.int64), np.array(list(values.values())) * 3)
    weights = np.zeros(size, np.float32)
    weights[list(values)] = list(values.values())
    return Distribution(None, weights)


def as_dict(found: Distribution) -> dict[int, float]:
    ids = range(len(found.weights)) if found.ids is None else found.ids.tolist()
    return {i: float(share) for i, share in zip(ids, found.probabilities, strict=True) if share}


class TestSparseDistribution:
    """What speculative decoding compares with the drafter's distribution."""

    @given(options=option_sets, seed=st.integers(0, 10_000), size=st.sampled_from([1, 2, 40, 700]))
    def test_it_is_that_of_the_definition(self, options: dict[str, Any], seed: int, size: int) -> None:
        logits, history = logits_of(size, seed), [seed % size, (seed * 7) % size]
        found = Sampler(SamplingOptions(**options)).distribution(Logits.of(logits), history)
        expected = distribution(logits, SamplingOptions(**options), history)
        assert set(as_dict(found)) <= set(expected)
        # Exponentials are float32, and errors of some 1e-7 in the penalised logits grow with 1 / temperature.
        for i in range(size):
            assert found.probability(i) == pytest.approx(expected.get(i, 0.0), abs=3e-6)

    @pytest.mark.parametrize(
        "options", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.01}, {"temperature": 0.5}], ids=str
    )
    def test_sample_draws_from_it(self, options: dict[str, Any]) -> None:
        logits = Logits.of(logits_of(5000))
        options = {"temperature": 1.0, "seed": 1, **options}
        one, two = Sampler(SamplingOptions(**options)), Sampler(SamplingOptions(**options))
        for _ in range(20):
            assert one.sample(logits).id == two.draw(two.distribution(logits))

    @pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 1}], ids=["zero", "top-1"])
    def test_greedy_is_certain(self, options: dict[str, Any]) -> None:
        logits = logits_of()
        found = Sampler(SamplingOptions(**options)).distribution(Logits.of(logits))
        assert as_dict(found) == {int(logits.argmax()): 1.0}

    def test_logits_that_are_not_numbers_have_none(self) -> None:
        with pytest.raises(SessionError, match="no finite maximum"):
            Sampler(SamplingOptions()).distribution(Logits.of(np.full(4, np.nan, np.float32)))

    @given(
        p=st.dictionaries(st.integers(0, 6), st.floats(0.01, 1), min_size=1),
        q=st.dictionaries(st.integers(0, 6), st.floats(0.01, 1), min_size=1),
        sizes=st.sampled_from([(None, None), (7, None), (None, 7), (7, 7)]),
    )
    def test_excess_is_where_one_is_larger_than_the_other(
        self, p: dict[int, float], q: dict[int, float], sizes: tuple[int | None, int | None]
    ) -> None:
        p = {i: share / sum(p.values()) for i, share in p.items()}
        q = {i: share / sum(q.values()) for i, share in q.items()}
        excess = {i: max(0.0, share - q.get(i, 0.0)) for i, share in p.items()}
        total = sum(excess.values())
        found = as_dict(distribution_of(p, sizes[0]).excess(distribution_of(q, sizes[1])))
        if total < 1e-5:  # they are equal: what is left is rounding
            assert set(found) <= set(p)
            return
        for i in range(7):
            # Weights over a whole vocabulary are float32 here: differences of them are good to 1e-7.
            assert found.get(i, 0.0) == pytest.approx(excess.get(i, 0.0) / total, abs=2e-7 / total)

    def test_no_excess_is_the_distribution_itself(self) -> None:
        p = distribution_of({1: 0.25, 2: 0.75})
        assert p.excess(distribution_of({2: 0.75, 1: 0.25})) is p
        assert Distribution.certain(3).excess(Distribution.certain(3)).draw(0.5) == 3


class TestSeed:
    @pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9}], ids=str)
    def test_the_same_seed_draws_the_same_tokens(self, options: dict[str, Any]) -> None:
        logits = logits_of(5000)
        one, two = (sampler(temperature=1.0, seed=42, **options) for _ in range(2))
        assert [one.sample(logits) for _ in range(20)] == [two.sample(logits) for _ in range(20)]

    def test_seeds_differ(self) -> None:
        logits = logits_of(5000)
        one, two = sampler(temperature=1.0, seed=1), sampler(temperature=1.0, seed=2)
        assert [one.sample(logits).id for _ in range(20)] != [two.sample(logits).id for _ in range(20)]

    def test_streams_of_a_seed_are_independent(self) -> None:
        options = SamplingOptions(temperature=1.0, seed=5)
        one, two, again = (
            np.array([sampler.uniform() for _ in range(2000)])
            for sampler in (Sampler(options), Sampler(options, stream=1), Sampler(options, stream=1))
        )
        assert (two == again).all()
        # The correlation of 2000 independent pairs has a standard deviation of 1 / sqrt(2000) = 0.022.
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.1


class TestRefusals:
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_logits_that_are_not_numbers_are_refused(self, options: dict[str, Any], bad: float) -> None:
        logits = logits_of()
        logits[7] = bad
        with pytest.raises(SessionError, match="at token 7"):
            sampler(**options).sample(logits)

    def test_no_possible_token_is_refused(self) -> None:
        with pytest.raises(SessionError, match="no finite maximum"):
            sampler().sample(np.full(4, -np.inf, np.float32))

    @pytest.mark.parametrize("token_id", [-1, 50])
    def test_history_outside_the_vocabulary_is_refused(self, token_id: int) -> None:
        with pytest.raises(SessionError, match="outside the vocabulary of 50"):
            sampler(repetition_penalty=1.1).sample(logits_of(), history=[token_id])

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", -0.1),
            ("temperature", math.inf),
            ("temperature", math.nan),
            ("temperature", "1"),
            ("top_k", -1),
            ("top_k", 2.5),
            ("top_k", True),
            ("top_p", 0.0),
            ("top_p", 1.1),
            ("min_p", -0.1),
            ("min_p", 1.1),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", math.nan),
            ("repetition_window", -1),
            ("seed", -1),
            ("seed", 1.5),
        ],
    )
    def test_an_option_outside_its_range_is_named(self, name: str, value: Any) -> None:
        with pytest.raises(OptionError, match=f"{name} is .*must be") as caught:
            SamplingOptions(**{name: value})
        assert repr(value) in str(caught.value)

    def test_the_defaults_are_greedy(self) -> None:
        assert asdict(SamplingOptions())["temperature"] == 0.0
