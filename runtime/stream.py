"""Generated text: piece by piece, and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Literal

from rlxc.errors import OptionError
from rlxc.runtime.sampling import Choice
from rlxc.runtime.tokenizer import StopMatcher, TextStream

StopReason = Literal["eos", "stop", "length", "context", "closed"]
"""The model ended the text; a stop string came up; ``max_tokens`` or the context is reached; the user closed it."""


@dataclass(frozen=True)
class Piece:
    """One generated token, and the text that it completes.

    The text may be empty, where the token ends inside a character or inside what may become a stop string, and
    holds what was held back before it otherwise. ``logprob`` is in nats.
    """

    text: str
    id: int
    logprob: float


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Attributes:
        text: without the stop string that ended it.
        ids: all generated tokens, with the one that ended the text.
        logprobs: of each of ``ids``, in nats.
        prompt_tokens: length of the prompt.
        stop_reason: why it ended.
        prefill_seconds: from the start to the first token, which comes out of the prompt's own steps.
        decode_seconds: for the other ``len(ids) - 1`` tokens; time that the reader of a stream took is not in it. In a
            batch, all of the steps that the text had a part in.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    prompt_tokens: int
    stop_reason: StopReason
    prefill_seconds: float
    decode_seconds: float


class GrowingText:
    """A text while its tokens come: the pieces that they make, and what ends it.

    Args:
        text: turns tokens into text.
        stops: finds stop strings in it.
        eos_ids: tokens that end the text.
        prompt_tokens: length of the prompt.
        context: how many tokens prompt and text can have together.
        max_tokens: how many tokens there are at most; with 0, the text ends before it begins.

    Raises:
        OptionError: ``max_tokens`` is no integer, 0 or more.
    """

    def __init__(
        self,
        *,
        text: TextStream,
        stops: StopMatcher,
        eos_ids: Sequence[int],
        prompt_tokens: int,
        context: int,
        max_tokens: int,
    ) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise OptionError(f"max_tokens must be an integer, 0 or more, got {max_tokens!r}")
        self._text, self._stops, self._eos_ids = text, stops, eos_ids
        self._prompt_tokens, self._room, self._max_tokens = prompt_tokens, context - prompt_tokens, max_tokens
        self._pieces: list[Piece] = []
        self._stop_reason: StopReason = "length" if max_tokens == 0 else "closed"

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens may come."""
        return self._stop_reason != "closed"

    def add(self, choice: Choice) -> Piece:
        """The piece that the next token makes."""
        count = len(self._pieces) + 1
        shown, stopped = "", False
        if choice.id in self._eos_ids:
            self._stop_reason = "eos"
        else:
            shown, stopped = self._stops.push(self._text.push(choice.id))
            if stopped:
                self._stop_reason = "stop"
            elif count == self._max_tokens:
                self._stop_reason = "length"
            elif count > self._room:
                self._stop_reason = "context"
        if self.has_ended and not stopped:  # no more will come: show what was held back
            rest, _ = self._stops.push(self._text.flush())
            shown += rest + self._stops.flush()
        piece = Piece(shown, choice.id, choice.logprob)
        self._pieces.append(piece)
        return piece

    def completion(self, prefill_seconds: float, decode_seconds: float) -> Completion:
        """All pieces as one; a text that has not ended counts as closed."""
        return Completion(
            text="".join(piece.text for piece in self._pieces),
            ids=[piece.id for piece in self._pieces],
            logprobs=[piece.logprob for piece in self._pieces],
            prompt_tokens=self._prompt_tokens,
            stop_reason=self._stop_reason,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
        )


class Stream(Iterator[Piece]):
    """Iterates over the pieces of a text while it is generated; nothing runs before the first is asked for.

    Args:
        text: the text, of which there is nothing yet.
        start: reads the prompt and returns the token that follows it.
        choose: appends a token to the sequence and returns the one that follows it.
    """

    def __init__(
        self, text: GrowingText, *, start: Callable[[], Choice], choose: Callable[[int], Choice]
    ) -> None:
        self._text, self._start, self._choose = text, start, choose
        self._prefill_seconds = self._decode_seconds = 0.0
        self._pieces = self._generate()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def completion(self) -> Completion:
        """Run to the end, and return all pieces as one, those read before included."""
        for _ in self:
            pass
        return self._text.completion(self._prefill_seconds, self._decode_seconds)

    def close(self) -> None:
        """End the text here."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self) -> Generator[Piece, None, None]:
        if self._text.has_ended:
            return
        started = perf_counter()
        choice = self._start()
        self._prefill_seconds = perf_counter() - started
        yield self._text.add(choice)
        while not self._text.has_ended:
            started = perf_counter()
            choice = self._choose(choice.id)
            self._decode_seconds += perf_counter() - started
            yield self._text.add(choice)
