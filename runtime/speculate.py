"""Speculative decoding: a drafter guesses tokens, and one step of the model verifies them all.

The rule is that of Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192) and Chen et al. 2023
(https://arxiv.org/abs/2302.01318). A token x, drawn from the drafter's distribution q, is accepted with probability
min(1, p(x) / q(x)), where p is what the sampler would draw from. Where it is not, a token from max(0, p - q) takes its
place, and the rest of the draft is dropped; where all are accepted, one more is drawn. So the tokens are distributed
as they are without a draft. A greedy sampler has p = 1 at the best token: its text stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlxc.errors import OptionError, SessionError
from rlxc.runtime.drafters import Draft, Drafter
from rlxc.runtime.logits import Logits, StepLogits
from rlxc.runtime.model import Model
from rlxc.runtime.sampling import Choice, Distribution, Sampler
from rlxc.runtime.sequence import Stack, TokenSequence

_FIRST_LENGTH = 3  # on CPUs, reading so many more tokens takes little longer than reading one
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 64  # tokens
_PATIENCE = 4  # right guesses that end any pause


class Speculator:
    """Chooses the tokens of one text, several in a step where a drafter guesses right.

    With the same options, seed and drafter, the text is the same again. A sampled text is another one than without
    speculation, as likely as that.

    Args:
        model: what writes the text.
        drafter: what guesses its tokens.
        sampler: what draws them.
        longest: tokens of a draft at most; it grows to that while all of it is accepted.

    Attributes:
        drafted: tokens that were proposed and verified so far.
        accepted: how many of them the model took.

    Raises:
        OptionError: ``longest`` is no integer, 1 or more.
    """

    def __init__(self, model: Model, drafter: Drafter, sampler: Sampler, longest: int = 16) -> None:
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
            raise OptionError(f"longest is {longest!r}; it must be an integer, 1 or more", source="drafts")
        self._model, self._drafter, self._sampler = model, drafter, sampler
        self._pace = Pace(longest)
        self.drafted = self.accepted = 0

    def start(self, logits: Logits, history: list[int]) -> Choice:
        """Choose the first token of the text, which is appended to ``history``.

        Args:
            logits: after the prompt.
            history: the prompt.

        Raises:
            SessionError: the logits have no finite maximum.
        """
        self._drafter.begin(self._sampler.options)
        choice = self._sampler.sample(logits, history)
        history.append(choice.id)
        self._drafter.verified(0, logits)
        return choice

    def next(self, sequence: TokenSequence, stack: Stack, history: list[int], most: int) -> list[Choice]:
        """Append the last token to the sequence, and choose those that follow.

        Args:
            sequence: holds all of ``history`` but its last token; afterwards too.
            stack: adapters that the step runs with.
            history: all tokens so far, the prompt included; the chosen ones are appended.
            most: how many tokens are wanted, 1 or more.

        Returns:
            1 ... ``most`` tokens.

        Raises:
            ContextError: the sequence is full; it is unchanged.
            SessionError: there is not enough memory, or logits have no finite maximum, or the drafter cannot draft.
        """
        room = self._model.engine.context - sequence.position - 1
        bound = min(most - 1, room, self._model.engine.max_step - 1, self._model.rollback)
        length = min(bound, self._pace.length)
        if length > 0:
            draft = self._propose(history, length)
            if draft.ids:
                return self._verify(sequence, stack, history, draft)
        guess = self._propose(history, 1) if 0 == length < bound and self._drafter.is_free else Draft()
        logits = self._model.decode([sequence], history[-1:], [stack]).row(0, 0)
        choice = self._sampler.sample(logits, history)
        history.append(choice.id)
        self._pace.passed(choice.id in guess.ids)
        self._drafter.verified(0, logits)
        return [choice]

    def _propose(self, history: Sequence[int], most: int) -> Draft:
        """A draft of ids that exist, with distributions that allow them."""
        draft = self._drafter.propose(history, most)
        ids = self._model.tokens(draft.ids).tolist() if len(draft.ids) else []
        vocab, problem = self._model.engine.vocab_size, ""
        if len(ids) > most:
            problem = f"{len(ids)} tokens were drafted, where at most {most} were asked for"
        elif draft.distributions is not None:
            if len(draft.distributions) != len(ids):
                problem = f"{len(ids)} tokens were drafted with {len(draft.distributions)} distributions"
            elif not all(_allows(q, id, vocab) for q, id in zip(draft.distributions, ids)):
                problem = "a token was drafted that its distribution does not allow"
        if problem:
            raise SessionError(problem, source=type(self._drafter).__name__, remedy="correct the drafter")
        return Draft(ids, draft.distributions)

    def _verify(
        self, sequence: TokenSequence, stack: Stack, history: list[int], draft: Draft
    ) -> list[Choice]:
        """Append the last token and the draft, and take back what was not accepted."""
        start = sequence.position
        ids = np.array([[history[-1], *draft.ids]], np.int64)
        choices: list[Choice] = []
        try:
            logits = self._model.step([sequence], ids, np.arange(ids.size), [sequence.active(stack)])
            self._judge(logits, history, draft, choices)
        finally:
            sequence.truncate(min(sequence.position, start + max(1, len(choices))))
        accepted = len(choices) - 1
        self.drafted += len(draft.ids)
        self.accepted += accepted
        self._pace.judged(len(draft.ids), accepted)
        self._drafter.verified(accepted, logits.row(0, accepted))
        return choices

    def _judge(self, logits: StepLogits, history: list[int], draft: Draft, choices: list[Choice]) -> None:
        """Append what is accepted, and one token more, to the history and the choices."""
        for place in range(len(draft.ids) + 1):
            row = logits.row(0, place)
            try:
                choice = self._choose(row, history, draft, place)
            except SessionError:
                if not choices:
                    raise
                return  # those before are right; the next step comes to this position again
            choices.append(choice)
            history.append(choice.id)
            if place == len(draft.ids) or choice.id != draft.ids[place]:
                return

    def _choose(self, row: Logits, history: Sequence[int], draft: Draft, place: int) -> Choice:
        """The token of the draft in this place, if it is accepted; another one if it is not, or there is none."""
        if place == len(draft.ids):
            return self._sampler.sample(row, history)
        id = draft.ids[place]
        p = self._sampler.distribution(row, history)
        q = Distribution.certain(id) if draft.distributions is None else draft.distributions[place]
        if self._sampler.uniform() < p.probability(id) / q.probability(id):
            return self._sampler.choice(id, row)
        return self._sampler.choice(self._sampler.draw(p.excess(q)), row)


class Pace:
    """How long drafts are: twice as long as before when all is accepted, shorter when it is not.

    When nothing is, twice in a row, there is none for 4 steps, and for twice as many each time that it happens again,
    up to 64. A pause ends sooner when guesses that were not verified turn out right, as many in a row as drafts have
    failed, or 4. So a drafter that is always wrong costs the verification of 8 tokens in the first 100 or so, and of
    one in 65 from then on.

    Args:
        longest: tokens of a draft at most.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._length = min(_FIRST_LENGTH, longest)
        self._failed = 0  # drafts in a row of which nothing was accepted
        self._pause = 0  # steps until the next draft
        self._right = 0  # guesses in a row

    @property
    def length(self) -> int:
        """Tokens to draft now; 0 in a pause."""
        return 0 if self._pause else self._length

    def judged(self, drafted: int, accepted: int) -> None:
        """A draft was verified."""
        if accepted < drafted:
            self._length = accepted + 1
        elif drafted == self._length:
            self._length = min(2 * drafted, self._longest)
        self._failed = 0 if accepted else self._failed + 1
        if self._failed > 1:  # one may be chance
            self._pause = min(_FIRST_PAUSE << min(self._failed - 2, 8), _LONGEST_PAUSE)
            self._right = 0

    def passed(self, right: bool) -> None:
        """A step had no draft; whether there was a guess that was right."""
        self._right = self._right + 1 if right else 0
        if self._pause:
            self._pause -= 1
            if self._right >= min(self._failed, _PATIENCE):
                self._pause = 0


def _allows(distribution: Distribution, id: int, vocab: int) -> bool:
    """Whether this is a distribution over the vocabulary that has the token."""
    ids, weights = distribution.ids, distribution.weights
    if len(weights) != (vocab if ids is None else len(ids)) or not 0 < distribution.total < math.inf:
        return False
    is_known = ids is None or (ids.min() >= 0 and ids.max() < vocab)
    return bool(is_known and distribution.probability(id) > 0)
