"""Generated text: piece by piece, and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Literal

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
        decode_seconds: for the other ``len(ids) - 1`` tokens; time that the reader of a stream took is not in it.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    prompt_tokens: int
    stop_reason: StopReason
    prefill_seconds: float
    decode_seconds: float


class Stream(Iterator[Piece]):
    """Iterates over the pieces of a text while it is generated; nothing runs before the first is asked for.

    Args:
        prompt: token ids, at least one.
        choose: appends ids to the sequence and returns the token that follows them.
        text: turns tokens into text.
        stops: finds stop strings in it.
        eos_ids: tokens that end the text.
        room: how many tokens can follow the prompt in the context.
        max_tokens: how many tokens to generate at most.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        choose: Callable[[Sequence[int]], Choice],
        text: TextStream,
        stops: StopMatcher,
        eos_ids: Sequence[int],
        room: int,
        max_tokens: int,
    ) -> None:
        self._choose, self._text, self._stops, self._eos_ids = choose, text, stops, eos_ids
        self._room, self._max_tokens = room, max_tokens
        self._produced: list[Piece] = []
        self._stop_reason: StopReason = "closed"
        self._prompt_tokens = len(prompt)
        self._prefill_seconds = self._decode_seconds = 0.0
        self._pieces = self._generate(prompt)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def completion(self) -> Completion:
        """Run to the end, and return all pieces as one, those read before included."""
        for _ in self:
            pass
        return Completion(
            text="".join(piece.text for piece in self._produced),
            ids=[piece.id for piece in self._produced],
            logprobs=[piece.logprob for piece in self._produced],
            prompt_tokens=self._prompt_tokens,
            stop_reason=self._stop_reason,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
        )

    def close(self) -> None:
        """End the text here."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self, ids: Sequence[int]) -> Generator[Piece, None, None]:
        if self._max_tokens == 0:
            self._stop_reason = "length"
            return
        ended = False
        while not ended:
            started = perf_counter()
            choice = self._choose(ids)
            seconds = perf_counter() - started
            if self._produced:
                self._decode_seconds += seconds
            else:
                self._prefill_seconds = seconds
            piece, ended = self._accept(choice)
            self._produced.append(piece)
            yield piece
            ids = [choice.id]

    def _accept(self, choice: Choice) -> tuple[Piece, bool]:
        """The piece that a token makes, and whether it is the last one."""
        count = len(self._produced) + 1
        shown, stopped, ended = "", False, True
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
            else:
                ended = False
        if ended and not stopped:  # no more will come: show what was held back
            rest, _ = self._stops.push(self._text.flush())
            shown += rest + self._stops.flush()
        return Piece(shown, choice.id, choice.logprob), ended
