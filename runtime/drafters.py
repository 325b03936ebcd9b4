"""Drafters guess the tokens that come next, for a model to verify several in one step.

Whatever a drafter guesses, the text is one that the model could have written alone: see :mod:`rlxc.runtime.speculate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from rlxc.errors import OptionError
from rlxc.runtime.logits import Floats, Logits
from rlxc.runtime.sampling import Distribution, Sampler, SamplingOptions

if TYPE_CHECKING:
    from rlxc.runtime.session import Session

_TAIL = 16
"""Tokens before the newest ones that a drafter compares, to notice another text."""


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        ids: the tokens, maybe none.
        distributions: what each of them was drawn from, given the ones before it; None where nothing was drawn.
    """

    ids: Sequence[int] = ()
    distributions: Sequence[Distribution] | None = None


@runtime_checkable
class Drafter(Protocol):
    """Guesses how a text goes on. It follows one text at a time."""

    @property
    def is_free(self) -> bool:
        """Whether a guess takes no time worth speaking of.

        Such a drafter is asked even while its drafts are not verified, to see when it has become right.
        """

    def begin(self, sampling: SamplingOptions) -> None:
        """A text begins, whose tokens are chosen in this way."""

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        """Guess at most ``most`` tokens, 1 or more, that follow all those of the text, prompt included."""

    def verified(self, accepted: int, logits: Logits) -> None:
        """The model took so many tokens of the last draft, then chose another one from these logits."""


class NgramDrafter:
    """Prompt lookup: what followed the newest tokens where they came up last.

    The longest n-gram that has come up before decides, of 4, 3 or 2 tokens (Saxena 2023,
    https://github.com/apoorvumang/prompt-lookup-decoding). Each token is indexed once, when the next one is known; a
    guess takes the same time however long the text is.

    Args:
        longest: tokens of the longest n-gram.
        shortest: of the shortest.

    Raises:
        OptionError: they are no integers, ``1 <= shortest <= longest``.
    """

    is_free = True

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        for name, value in (("longest", longest), ("shortest", shortest)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}; it must be an integer, 1 or more", source="n-grams")
        if shortest > longest:
            raise OptionError(f"shortest is {shortest}, longest only {longest}", source="n-grams")
        self._sizes = range(longest, shortest - 1, -1)
        self._restart()

    def begin(self, sampling: SamplingOptions) -> None:
        """Forget the text before."""
        self._restart()

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        """What followed the newest tokens last time; where that reaches the end of the text, it repeats itself."""
        self._index(tokens)
        length = len(tokens)
        for size in self._sizes:
            at = self._next.get(tuple(tokens[-size:])) if size <= length else None
            if at is not None:
                ids: list[int] = []
                for place in range(at, at + most):
                    ids.append(tokens[place] if place < length else ids[place - length])
                return Draft(ids)
        return Draft()

    def verified(self, accepted: int, logits: Logits) -> None:
        """Says nothing that the tokens do not say."""

    def _restart(self) -> None:
        self._next: dict[
            tuple[int, ...], int
        ] = {}  # after each n-gram but the newest ones, where the text goes on
        self._known = 0  # tokens that have a successor, of which the n-grams are indexed
        self._tail: list[int] = []  # the newest of them

    def _index(self, tokens: Sequence[int]) -> None:
        """Take in the n-grams that end before the last token."""
        if list(tokens[max(0, self._known - _TAIL) : self._known]) != self._tail:
            self._restart()
        end = max(self._known, len(tokens) - 1)
        for after in range(self._known + 1, end + 1):
            for size in self._sizes:
                if size <= after:
                    self._next[tuple(tokens[after - size : after])] = after
        self._known, self._tail = end, list(tokens[max(0, end - _TAIL) : end])


class ModelDrafter:
    """A smaller model of the same vocabulary, in a session of its own.

    It draws its guesses as the text's own tokens are drawn, with random numbers of its own. It reads every text from
    its beginning, and guesses nothing once that does not fit its own context. The session's sequence stays as it is;
    its stack of adapters takes part.

    Args:
        session: of the draft model.
        target: the session whose texts it guesses.

    Raises:
        OptionError: the two are the same session, or forks of one, or their vocabularies differ.
    """

    is_free = False

    def __init__(self, session: Session, target: Session) -> None:
        if session._model is target._model:
            raise OptionError(
                "a session cannot draft for itself or its forks",
                source=session.artifact.path,
                remedy="load the draft model in a session of its own",
            )
        _check_vocabularies(session, target)
        self._session, self._model = session, session._model
        self._sequence = self._model.new_sequence()
        self._agreed = 0  # tokens of the sequence that are known to be the text's
        self._sampler = Sampler(SamplingOptions())

    def begin(self, sampling: SamplingOptions) -> None:
        """Draw as the text's tokens are drawn."""
        # Of another stream: the same random numbers would draw a token and judge it.
        self._sampler = Sampler(sampling, stream=1)

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        """What the draft model would write.

        Raises:
            SessionError: its session is closed or in use by another thread, or there is not enough memory.
        """
        room = self._model.engine.context - len(tokens)  # the last guess need not be read
        # With one more guess than can be taken back, it could not return to the text as it is now.
        most = min(most, room + 1, self._model.rollback + 1)
        if most < 1:
            return Draft()
        with self._session._using():
            return self._draw(tokens, most)

    def verified(self, accepted: int, logits: Logits) -> None:
        """Says nothing that the tokens do not say."""

    def _draw(self, tokens: Sequence[int], most: int) -> Draft:
        stack = self._session.adapters.stack
        self._return_to(tokens)
        unread = self._model.tokens(np.array(tokens[self._sequence.position :], np.int64))
        logits = self._model.prefill(self._sequence, unread, stack)
        self._agreed = len(tokens)
        text, ids, distributions = list(tokens), [], []
        while True:
            distribution = self._sampler.distribution(logits.row(0, 0), text)
            ids.append(self._sampler.draw(distribution))
            distributions.append(distribution)
            if len(ids) == most:
                return Draft(ids, distributions)
            text.append(ids[-1])
            logits = self._model.decode([self._sequence], ids[-1:], [stack])

    def _return_to(self, tokens: Sequence[int]) -> None:
        """Cut the sequence back to what it has in common with the text, less the last token, which is read again."""
        held, common = self._sequence.tokens, self._agreed
        start = max(0, common - _TAIL)
        if list(held[start:common]) != list(tokens[start:common]):  # another text
            common = 0
        end = min(len(held), len(tokens) - 1)
        common = min(common, end)
        while common < end and held[common] == tokens[common]:
            common += 1
        if common < self._sequence.cache.oldest:
            self._sequence = self._model.new_sequence()
        else:
            self._sequence.truncate(common)


class DraftHead(Protocol):
    """Guesses tokens from logits of the model itself."""

    def propose(self, logits: Floats, tokens: Sequence[int], most: int) -> Draft:
        """Guess at most ``most`` tokens that follow; the last of ``tokens`` was chosen from ``logits [vocab]``."""


class HeadDrafter:
    """Asks a draft head, with the newest logits that the model has computed.

    Args:
        head: what guesses.
        is_free: see :class:`Drafter`.
    """

    def __init__(self, head: DraftHead, is_free: bool = True) -> None:
        self.is_free = is_free
        self._head = head
        self._logits: Floats | None = None

    def begin(self, sampling: SamplingOptions) -> None:
        """Forget the text before."""
        self._logits = None

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        """What the head guesses; nothing before there are logits."""
        return Draft() if self._logits is None else self._head.propose(self._logits, tokens, most)

    def verified(self, accepted: int, logits: Logits) -> None:
        """Keep the logits for the next guess."""
        self._logits = logits.values


def _check_vocabularies(draft: Session, target: Session) -> None:
    """Refuse models that do not mean the same by the same token.

    Raises:
        OptionError: they differ in how many tokens there are, or in one of them.
    """

    def refuse(problem: str) -> OptionError:
        remedy = "use a draft model of the same family"
        return OptionError(f"{problem} {target.artifact.path}", source=draft.artifact.path, remedy=remedy)

    if draft.vocab_size != target.vocab_size:
        raise refuse(f"{draft.vocab_size} tokens cannot draft for the {target.vocab_size} of")
    name = "tokenizer.json"
    if draft.artifact.manifest.files[name].sha256 == target.artifact.manifest.files[name].sha256:
        return
    ours, theirs = draft.tokenizer, target.tokenizer
    if ours.vocab_size != theirs.vocab_size:
        raise refuse(f"a tokenizer of {ours.vocab_size} tokens cannot draft for the {theirs.vocab_size} of")
    for id in range(ours.vocab_size):
        if ours.piece_bytes(id, skip_special=False) != theirs.piece_bytes(id, skip_special=False):
            raise refuse(f"token {id} is {ours.piece(id)!r} here, but {theirs.piece(id)!r} in")
