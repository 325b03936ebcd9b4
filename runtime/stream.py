"""Generated text: piece by piece, and as a whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Literal, get_args

from rlxc.errors import ContextError, OptionError
from rlxc.runtime.sampling import Choice
from rlxc.runtime.tokenizer import StopMatcher, TextStream

StopReason = Literal["eos", "stop", "length", "context", "closed", "deadline", "cancelled"]
"""Why a text ended.

The model ended it; a stop string came up; ``max_tokens`` or the context is reached; its reader closed it; the time of
its request was over; the request was cancelled.
"""

OnFull = Literal["stop", "error"]
"""What happens at the end of the context: the text ends there, or an error says so."""


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
        cached_tokens: tokens of the prompt that were not read again, because their keys and values were kept.
        drafted: tokens that a drafter proposed, and
        accepted: how many of them the model took; both 0 without speculation.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    prompt_tokens: int
    stop_reason: StopReason
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class GrowingText:
    """A text while its tokens come: the pieces that they make, and what ends it.

    Args:
        text: turns tokens into text.
        stops: finds stop strings in it.
        eos_ids: tokens that end the text.
        prompt_tokens: length of the prompt.
        context: how many tokens prompt and text can have together.
        max_tokens: how many tokens there are at most; with 0, the text ends before it begins.
        on_full: whether the end of the context ends the text, or :meth:`check_room` refuses to go on.

    Attributes:
        cached_tokens, drafted, accepted: what :class:`Completion` says of them, for whoever knows to set.

    Raises:
        OptionError: ``max_tokens`` is no integer, 0 or more, or ``on_full`` is something else.
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
        on_full: OnFull = "stop",
    ) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise OptionError(f"max_tokens must be an integer, 0 or more, got {max_tokens!r}")
        if on_full not in get_args(OnFull):
            raise OptionError(f"on_full is {on_full!r}; it must be 'stop' or 'error'")
        self._text, self._stops, self._eos_ids = text, stops, eos_ids
        self._prompt_tokens, self._context, self._max_tokens = prompt_tokens, context, max_tokens
        self._on_full = on_full
        self._pieces: list[Piece] = []
        self._stop_reason: StopReason = "length" if max_tokens == 0 else "closed"
        self.cached_tokens = self.drafted = self.accepted = 0

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens may come."""
        return self._stop_reason != "closed"

    @property
    def remaining(self) -> int:
        """How many more tokens may come at most."""
        return min(self._max_tokens, self._most) - len(self._pieces)

    @property
    def _most(self) -> int:
        """The most tokens of the text; the last one needs no place, as nothing follows it."""
        return self._context - self._prompt_tokens + 1

    def check_room(self) -> None:
        """Refuse to go on where the context is full; only a text with ``on_full="error"`` comes to that.

        Raises:
            ContextError: there is no place for the last token; the pieces so far stay what they are.
        """
        if len(self._pieces) >= self._most:
            raise ContextError(
                f"{self._prompt_tokens} tokens of the prompt and {len(self._pieces)} of the text fill the context of "
                f"{self._context}",
                remedy="end the text there (on_full='stop'), or compile with a larger --context",
            )

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
            elif count == self._most and self._on_full == "stop":
                self._stop_reason = "context"
        if self.has_ended and not stopped:  # no more will come: show what was held back
            rest, _ = self._stops.push(self._text.flush())
            shown += rest + self._stops.flush()
        piece = Piece(shown, choice.id, choice.logprob)
        self._pieces.append(piece)
        return piece

    def end(self, reason: Literal["deadline", "cancelled"]) -> None:
        """End the text here, unless it has ended. As in one that is closed, what was held back is not shown."""
        if not self.has_ended:
            self._stop_reason = reason

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
            cached_tokens=self.cached_tokens,
            drafted=self.drafted,
            accepted=self.accepted,
        )


class Stream(Iterator[Piece]):
    """Iterates over the pieces of a text while it is generated; nothing runs before the first is asked for.

    Args:
        text: the text, of which there is nothing yet.
        start: reads the prompt and returns the token that follows it.
        choose: appends a token to the sequence and returns those that follow it, at least one; the sequence then holds
            all of them but the last.
        leave: is told how many of the tokens that ``choose`` returned last are not in the text, where it ends before
            them, so that the sequence can be cut back to what the text has.
    """

    def __init__(
        self,
        text: GrowingText,
        *,
        start: Callable[[], Choice],
        choose: Callable[[int], list[Choice]],
        leave: Callable[[int], None],
    ) -> None:
        self._text, self._start, self._choose, self._leave = text, start, choose, leave
        self._prefill_seconds = self._decode_seconds = 0.0
        self._last: int | None = None  # the newest token of the text
        self._waiting: deque[Choice] = deque()  # tokens after it
        self._closed = False

    def __next__(self) -> Piece:
        if self._closed or self._text.has_ended:
            raise StopIteration
        try:
            if not self._waiting:
                self._waiting.extend(self._generate())
            choice = self._waiting.popleft()
            self._last = choice.id
            piece = self._text.add(choice)
        except BaseException:
            self.close()
            raise
        if self._text.has_ended:
            self.close()
        return piece

    def completion(self) -> Completion:
        """Run to the end, and return all pieces as one, those read before included."""
        for _ in self:
            pass
        return self._text.completion(self._prefill_seconds, self._decode_seconds)

    def close(self) -> None:
        """End the text here."""
        self._closed = True
        left = len(self._waiting)
        self._waiting.clear()
        if left:
            self._leave(left)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """A loop that was broken out of leaves the sequence as its reader knows it."""
        if getattr(self, "_waiting", ()):  # it has none if it was never made
            self.close()

    def _generate(self) -> list[Choice]:
        """The next tokens, of which there is one at least."""
        started = perf_counter()
        if self._last is None:
            first = self._start()
            self._prefill_seconds = perf_counter() - started
            return [first]
        self._text.check_room()
        choices = self._choose(self._last)
        self._decode_seconds += perf_counter() - started
        return choices
