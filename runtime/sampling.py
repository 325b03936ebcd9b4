"""Choosing the next token from logits, of which it reads as few as it can.

The filters and their order are llama.cpp's default chain: repetition penalty, top-k, top-p, min-p, temperature.
So top-p and min-p look at the model's own distribution, and temperature flattens only what they left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlxc.errors import OptionError, SessionError
from rlxc.runtime.logits import Floats, Ids, Logits


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the best token always.
        top_k: keep the k best tokens; 0 keeps all.
        top_p: keep the fewest best tokens that together have at least this probability; 1 keeps all.
        min_p: keep tokens at least this fraction as probable as the best one; 0 keeps all.
        repetition_penalty: divides positive logits of recent tokens and multiplies negative ones; 1 is off.
        repetition_window: how many recent tokens count.
        seed: of the random numbers; None takes a fresh one each time.

    Raises:
        OptionError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks every range."""
        _check("temperature", self.temperature, (int, float), "0 or more", lambda v: 0 <= v < math.inf)
        _check("top_k", self.top_k, int, "0 or more", lambda v: v >= 0)
        _check("top_p", self.top_p, (int, float), "above 0 and at most 1", lambda v: 0 < v <= 1)
        _check("min_p", self.min_p, (int, float), "from 0 to 1", lambda v: 0 <= v <= 1)
        _check(
            "repetition_penalty", self.repetition_penalty, (int, float), "above 0", lambda v: 0 < v < math.inf
        )
        _check("repetition_window", self.repetition_window, int, "0 or more", lambda v: v >= 0)
        if self.seed is not None:
            _check("seed", self.seed, int, "0 or more", lambda v: v >= 0)


def _check(name: str, value: Any, kinds: type | tuple[type, ...], allowed: str, accept: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not accept(value):
        raise OptionError(f"{name} is {value!r}; it must be {allowed}", source="sampling")


@dataclass(frozen=True)
class Choice:
    """A chosen token and its log-probability, in nats.

    The probability is the model's own: softmax of the raw logits, before any penalty, filter or temperature.
    """

    id: int
    logprob: float


@dataclass(frozen=True, eq=False)
class Distribution:
    """How likely each token is to come next.

    Attributes:
        ids: ``int64 [n]``, the tokens that are possible, each once; None is the whole vocabulary, in order.
        weights: ``[n]``, of each the probability times some number; 0 or more, and one of them is not 0.
    """

    ids: Ids | None
    weights: NDArray[np.floating[Any]]

    @classmethod
    def certain(cls, id: int) -> Distribution:
        """Nothing but this token."""
        return cls(np.array([id], np.int64), np.ones(1))

    @cached_property
    def total(self) -> float:
        """The sum of the weights."""
        return float(self.weights.sum(dtype=np.float64))

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """The probabilities ``[n]``."""
        return self.weights.astype(np.float64) / self.total

    def probability(self, id: int) -> float:
        """The probability of one token of the vocabulary."""
        if self.ids is None:
            return float(self.weights[id]) / self.total
        return float(self.weights[self.ids == id].sum()) / self.total

    def draw(self, uniform: float) -> int:
        """The token that a random number in [0, 1) falls on."""
        index = _pick(self.weights, uniform)
        return index if self.ids is None else int(self.ids[index])

    def excess(self, other: Distribution) -> Distribution:
        """Where this distribution is larger than another, and by how much: max(0, p - q)."""
        excess = self.probabilities.copy()
        if self.ids is None and other.ids is not None:
            excess[other.ids] -= other.probabilities
        else:
            excess -= other._probabilities_of(self.ids)
        np.maximum(excess, 0.0, out=excess)
        # Distributions that differ by rounding alone may leave nothing; then either one will do.
        return Distribution(self.ids, excess) if excess.any() else self

    def _probabilities_of(self, ids: Ids | None) -> NDArray[np.float64]:
        """The probabilities of some tokens, or of all if this distribution has all."""
        if ids is None or self.ids is None:
            return self.probabilities if ids is None else self.probabilities[ids]
        order = np.argsort(self.ids)
        places = order[np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)]
        return np.where(self.ids[places] == ids, self.probabilities[places], 0.0)


class Sampler:
    """Draws tokens; two samplers with the same options, a seed and the same stream draw the same ones."""

    def __init__(self, options: SamplingOptions, stream: int = 0) -> None:
        """Starts the random numbers at ``options.seed``; those of each ``stream`` are independent of the others'."""
        self.options = options
        seeds = np.random.SeedSequence(options.seed, spawn_key=(stream,) if stream else ())
        self._random = np.random.Generator(np.random.PCG64(seeds))

    def sample(self, logits: Logits, history: Sequence[int] = ()) -> Choice:
        """Returns the next token.

        Args:
            logits: of one position; minus infinity excludes a token.
            history: ids before this position, oldest first, for the repetition penalty.

        Raises:
            SessionError: a logit is NaN or plus infinity, or all tokens are excluded.
        """
        penalised, best, largest = self._judge(logits, history)
        if self._is_greedy:
            return self.choice(best, logits)
        ids = self._candidates(penalised, largest)
        if ids is None and self.options.temperature == 1:
            return self.choice(self._draw_by_blocks(penalised, largest), logits)
        return self.choice(self.draw(self._weighted(penalised, ids)), logits)

    def distribution(self, logits: Logits, history: Sequence[int] = ()) -> Distribution:
        """Returns what :meth:`sample` draws from; it takes the same arguments, and raises the same."""
        penalised, best, largest = self._judge(logits, history)
        if self._is_greedy:
            return Distribution.certain(best)
        return self._weighted(penalised, self._candidates(penalised, largest))

    def draw(self, distribution: Distribution) -> int:
        """Returns a token of a distribution."""
        return distribution.draw(self.uniform())

    def uniform(self) -> float:
        """Returns the next random number, in [0, 1)."""
        return self._random.random()

    def choice(self, id: int, logits: Logits) -> Choice:
        """Returns a token with the log-probability that the logits of its position give it."""
        return Choice(id, float(logits.values[id]) - logits.log_total())

    @property
    def _is_greedy(self) -> bool:
        return self.options.temperature == 0 or self.options.top_k == 1

    def _judge(self, logits: Logits, history: Sequence[int]) -> tuple[Logits, int, float]:
        """The penalised logits, the best token of them and its logit, which is finite."""
        penalised = self._penalise(logits, history)
        best, largest = penalised.best()  # a NaN if there is one
        if not math.isfinite(largest):
            raise SessionError(f"logits have no finite maximum ({largest} at token {best})")
        return penalised, best, largest

    def _penalise(self, logits: Logits, history: Sequence[int]) -> Logits:
        options = self.options
        if options.repetition_penalty == 1 or options.repetition_window == 0 or not len(history):
            return logits
        recent = np.unique(np.asarray(history[-options.repetition_window :], dtype=np.int64))
        if recent[0] < 0 or recent[-1] >= len(logits):
            raise SessionError(f"history holds ids outside the vocabulary of {len(logits)} tokens")
        penalty = np.float32(options.repetition_penalty)
        values = logits.at(recent)
        return logits.changing(recent, np.where(values > 0, values / penalty, values * penalty))

    def _candidates(self, logits: Logits, largest: float) -> Ids | None:
        """Returns the ids that the filters leave; None if no filter is on."""
        options = self.options
        ids: Ids | None = None
        if 0 < options.top_k < len(logits):
            ids = logits.top(options.top_k)
        if options.top_p < 1:
            ids = self._nucleus(logits, largest) if ids is None else self._nucleus_of(logits, ids)
        if options.min_p > 0:
            least = np.float32(largest) + np.float32(math.log(options.min_p))
            ids = logits.above(least) if ids is None else ids[logits.at(ids) >= least]
        return ids

    def _nucleus(self, logits: Logits, largest: float) -> Ids:
        log_total = logits.log_total()
        # Tokens below (1 - p) / n add up to less than 1 - p: the nucleus holds none of them. Mostly it holds
        # none of the far more numerous ones that are e^8 times less likely than the best, either.
        bound = min(log_total + math.log1p(-self.options.top_p) - math.log(len(logits)), largest)
        for least in (max(bound, largest - 8), bound):
            ids = logits.above(least)
            nucleus = self._first(logits, ids, log_total)
            if len(nucleus) < len(ids):
                break
        return nucleus

    def _nucleus_of(self, logits: Logits, ids: Ids) -> Ids:
        """The nucleus among some tokens, if there were no others."""
        values = logits.at(ids)
        largest = values.max()
        log_total = float(largest) + math.log(np.exp(values - largest).sum(dtype=np.float64))
        return self._first(logits, ids, log_total)

    def _first(self, logits: Logits, ids: Ids, log_total: float) -> Ids:
        """As many of the likeliest tokens as it takes to have the probability ``top_p``; all if they do not."""
        values = logits.at(ids)
        order = np.argsort(-values, kind="stable")
        mass = np.cumsum(np.exp(values[order].astype(np.float64) - log_total))
        return ids[order[: int(np.searchsorted(mass, self.options.top_p)) + 1]]

    def _weighted(self, logits: Logits, ids: Ids | None) -> Distribution:
        """The distribution over these tokens, or over all."""
        return Distribution(ids, self._weights(logits.all() if ids is None else logits.at(ids)))

    def _draw_by_blocks(self, logits: Logits, largest: float) -> int:
        """Draw among all tokens at temperature 1: the summaries have the blocks' probabilities."""
        shares = logits.shares(np.float32(largest)).astype(np.float64)
        block, point = _land(shares, self.uniform() * float(shares.sum()))
        ids = logits.block(block)
        weights = self._weights(logits.at(ids)).astype(np.float64)
        # The block's own weights, added up here, differ from its share by a common factor and by rounding.
        index, _ = _land(weights, point / float(shares[block]) * float(weights.sum()))
        return int(ids[index])

    def _weights(self, values: Floats) -> Floats:
        """The probabilities of tokens, times some number."""
        scale = 1.0 / max(self.options.temperature, 1e-30)  # finite in float32
        with np.errstate(over="ignore"):  # to minus infinity: no weight
            weights: Floats = np.exp((values - values.max()) * scale)
        return weights


def _pick(weights: NDArray[np.floating[Any]], uniform: float) -> int:
    """Returns an index with probability proportional to its weight, given ``uniform`` in [0, 1)."""
    # First a block, then an index in it: a running sum over a whole vocabulary takes 20 times as long.
    block = 512
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), block), dtype=np.float64)
    first, point = _land(blocks, uniform * float(blocks.sum()))
    index, _ = _land(weights[first * block : (first + 1) * block], point)
    return first * block + index


def _land(weights: NDArray[Any], point: float) -> tuple[int, float]:
    """Returns the index whose share of the running sum holds ``point``, and how far into it that is."""
    mass = np.cumsum(weights, dtype=np.float64)
    # Strictly below the total and searched from the right: a zero weight has no share to land in.
    point = min(point, float(np.nextafter(mass[-1], 0.0)))
    index = int(np.searchsorted(mass, point, side="right"))
    return index, point - (float(mass[index - 1]) if index else 0.0)
