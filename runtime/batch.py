"""Many texts at once: one step of the model makes the next token of each, and prompts are read between the steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Literal

import numpy as np

from rlxc.errors import OptionError, RlxcError, SessionError
from rlxc.runtime.logits import StepLogits
from rlxc.runtime.model import Ids, Model
from rlxc.runtime.prefix import PrefixCache
from rlxc.runtime.sampling import Sampler, SamplingOptions
from rlxc.runtime.scheduler import Clock, Scheduler, checked_count
from rlxc.runtime.sequence import Span, Stack, Tokens, TokenSequence
from rlxc.runtime.stream import Completion, GrowingText, OnFull, Piece


@dataclass(frozen=True)
class Request:
    """A text to generate in a batch.

    Attributes:
        prompt: text, which gets the model's begin token, or token ids, which are used as they are.
        adapters: names or paths of adapters, with their scales, that take the place of the session's stack; none at all
            is the model as it was compiled. None is the session's stack.
        sampling: how tokens are chosen.
        max_tokens: how many tokens to generate at most.
        stop: strings that end the text; they are not part of it.
        deadline: seconds from its submission after which nobody wants it any more; None is never.
        on_full: at the end of the context, "stop" ends the text there, "error" with a ContextError.

    Raises:
        OptionError: ``adapters``, ``sampling`` or ``deadline`` is something else.
    """

    prompt: str | Ids
    adapters: Sequence[tuple[str, float]] | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int = 128
    stop: str | Sequence[str] = ()
    deadline: float | None = None
    on_full: OnFull = "stop"

    def __post_init__(self) -> None:
        """Checks what Python would accept, but not mean."""
        if not isinstance(self.sampling, SamplingOptions):
            raise OptionError(f"sampling must be SamplingOptions, got {self.sampling!r}", source="request")
        adapters = () if self.adapters is None else self.adapters
        is_list = isinstance(adapters, Sequence) and not isinstance(adapters, str)
        if not is_list or not all(isinstance(entry, tuple) and len(entry) == 2 for entry in adapters):
            raise OptionError(
                f"adapters must be pairs of a name and a scale, got {self.adapters!r}",
                source="request",
                remedy="write adapters=[('name', 1.0)]",
            )
        if self.deadline is not None and not _is_duration(self.deadline):
            raise OptionError(
                f"deadline must be seconds from now, more than 0, got {self.deadline!r}", source="request"
            )


@dataclass(eq=False)
class Job:
    """A request that was found to be possible, and how far it has come."""

    prompt: Tokens
    stack: Stack
    sampler: Sampler
    text: GrowingText
    history: list[int] = field(default_factory=list)  # the prompt once it is read, and the tokens chosen
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def completion(self) -> Completion:
        """The text."""
        return self.text.completion(self.prefill_seconds, self.decode_seconds)


@dataclass(frozen=True)
class Event:
    """A token of a text, or its end.

    Attributes:
        ticket: of the text's request.
        piece: the token; None at the end.
        completion: at the end, the whole text, or as much of it as there is.
        error: at the end of a text that could not go on, why; its completion counts as closed.
    """

    ticket: int
    piece: Piece | None = None
    completion: Completion | None = None
    error: RlxcError | None = None


@dataclass(eq=False)
class _Text:
    """A request in the batch; it holds a sequence from when its prompt is read until it ends."""

    job: Job
    deadline: float
    ticket: int = 0
    sequence: TokenSequence | None = None
    part: tuple[Tokens, Span] | None = None  # what is left of the part of the prompt that is being read
    parts: Iterator[tuple[Tokens, Span]] = field(default_factory=lambda: iter(()))  # those after it
    error: RlxcError | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Which adapters it runs with, whatever their scales."""
        return tuple(adapter.fingerprint for adapter, _ in self.job.stack)

    @property
    def is_read(self) -> bool:
        """Whether the prompt is, all of it."""
        return self.sequence is not None and self.sequence.position >= len(self.job.prompt)


class Batch:
    """Texts that a model makes together: each has a prompt, adapters, a sampler and a place in the context of its own.

    In every round, each text whose prompt is read gets a token, all in one step. Then prompts are read, one after the
    other, but only ``token_budget`` of their tokens: a long prompt delays the texts beside it by that much in a round,
    and no more. The last piece of a prompt gives its text's first token. A text that ends makes room at once. Each text
    is what it would be alone, as far as the engine's sums are the same for one token and several.

    At most ``n`` texts are in work, ``max_batch`` or as many tokens as a step of the engine can take. The others wait;
    those for the same adapters run together, see :class:`Scheduler`. With prompts of at most ``P`` tokens and texts of
    at most ``M``, a text is in work for at most ``R = ceil(n * P / token_budget) + M`` rounds. So one that found ``k``
    others waiting gets its place within ``(patience + 1 + k / n) * R`` rounds, the scheduler's patience being 4.

    What goes wrong with one text ends that text, and its event has the error. When there is no memory for another token
    of each, the text that began last ends so, until there is enough for the others. After any other error, which is
    raised, the batch is closed.

    Args:
        model: what runs.
        prefixes: where a prompt's beginning may be found already read, and where sequences are left.
        make_job: checks a request, and says how it is run.
        max_batch: how many texts are in work at once, each with a cache of its own.
        token_budget: how many tokens of prompts a round reads at most.
        max_waiting: how many requests wait at most.
        using: held while the model is in use.
        clock: what deadlines are measured with, in seconds.

    Raises:
        OptionError: ``max_batch``, ``token_budget`` or ``max_waiting`` is no integer, 1 or more.
    """

    def __init__(
        self,
        model: Model,
        prefixes: PrefixCache,
        make_job: Callable[[Request], Job],
        *,
        max_batch: int = 8,
        token_budget: int = 256,
        max_waiting: int = 1024,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Clock = time.monotonic,
    ) -> None:
        self._model, self._prefixes, self._make_job = model, prefixes, make_job
        self._using, self._clock = using, clock
        self._max_batch = min(checked_count("max_batch", max_batch, 1), model.engine.max_step)
        self._token_budget = checked_count("token_budget", token_budget, 1)
        self._scheduler: Scheduler[_Text] = Scheduler(max_waiting=max_waiting, clock=clock)
        self._texts: dict[int, _Text] = {}  # those that have not ended, by ticket
        self._working: dict[int, _Text] = {}  # those of them that do not wait, the last to begin at the end
        self._events: deque[Event] = deque()  # that were not told yet
        self._is_closed = False

    def __len__(self) -> int:
        """The number of requests whose end has not been told."""
        return len(self._texts) + sum(event.completion is not None for event in self._events)

    def submit(self, request: Request) -> int:
        """Add a request; nothing runs yet.

        Returns:
            A ticket, which its events have.

        Raises:
            QueueFullError: as many requests wait as may.
            SessionError: the batch is closed.
            RlxcError: the request is not possible.
        """
        with self._using():
            if self._is_closed:
                raise SessionError("the batch is closed", remedy="make another one")
            now = self._clock()
            if self._scheduler.is_full:
                self._end_expired()
            self._scheduler.check_room()
            job = self._make_job(request)
            deadline = math.inf if request.deadline is None else now + request.deadline
            text = _Text(job, deadline)
            text.ticket = self._scheduler.submit(text, text.adapters, deadline)
            self._texts[text.ticket] = text
            self._end_if_complete(text)  # one of no tokens
            return text.ticket

    def cancel(self, ticket: int) -> bool:
        """End a text, whether it waits or is in work; returns False if it has ended before.

        Its last event, which has what there is of it, comes with the next :meth:`step`.

        Raises:
            SessionError: the model is not to be used now; nothing has changed.
        """
        with self._using():
            text = self._texts.get(ticket)
            if text is not None:
                self._end(text, "cancelled")
            return text is not None

    def step(self) -> list[Event]:
        """Run a round; returns what has happened since the last one, in order. Nothing runs when no text is left.

        Raises:
            RlxcError: the model cannot run at all, or is not to be used now. No event is lost.
        """
        self._run_round()
        events = list(self._events)
        self._events.clear()
        return events

    def run(self) -> Iterator[Event]:
        """Run rounds until all texts have ended, those included that are submitted meanwhile.

        Between two events, the model is not in use. An iterator that is left early leaves its events to the next one.

        Raises:
            RlxcError: as :meth:`step`.
        """
        while True:
            while self._events:
                yield self._events.popleft()
            if not self._texts:
                return
            self._run_round()

    def close(self) -> None:
        """End all texts where they are and let go of their memory. :meth:`step` still tells of what there was."""
        self._is_closed = True
        for text in list(self._texts.values()):
            self._end(text)

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- a round --------------------------------------------------------------------------------------------------

    def _run_round(self) -> None:
        if not self._texts:
            return
        with self._using():
            try:
                self._end_expired()
                self._decode()
                self._read_prompts()
            except BaseException:
                # A sequence may hold a token by now whose logits are lost: its text could not go on rightly.
                self.close()
                raise

    def _decode(self) -> None:
        """Give every text whose prompt is read its next token."""
        started = perf_counter()
        logits: StepLogits | None = None
        while logits is None and (running := self._running()):
            last = [text.job.history[-1] for text in running]
            try:
                logits = self._model.decode(list(running.values()), last, [t.job.stack for t in running])
            except SessionError as error:
                # No sequence has changed. The text that began last loses least, and leaves its memory to the others.
                youngest = next(t for t in reversed(self._working.values()) if t.sequence is not None)
                youngest.error = error
                self._end(youngest)
        if logits is None:
            return
        for i, text in enumerate(running):
            self._choose(text, logits, i)
        seconds = perf_counter() - started
        for text in running:
            text.job.decode_seconds += seconds
            self._end_if_complete(text)

    def _running(self) -> dict[_Text, TokenSequence]:
        """The texts whose prompts are read; those with the same adapters are neighbours in the step."""
        groups: dict[tuple[str, ...], dict[_Text, TokenSequence]] = {}
        for text in self._working.values():
            if text.sequence is not None and text.is_read:
                groups.setdefault(text.adapters, {})[text] = text.sequence
        return {text: sequence for group in groups.values() for text, sequence in group.items()}

    def _read_prompts(self) -> None:
        """Read as much of prompts as a round may; the places of texts that have ended are taken before."""
        left = self._token_budget
        while left:
            self._admit()
            text = next((text for text in self._working.values() if not text.is_read), None)
            if text is None:
                return
            started = perf_counter()
            left -= self._read(text, left)
            text.job.prefill_seconds += perf_counter() - started
            self._end_if_complete(text)

    def _admit(self) -> None:
        """Let those that wait take the free places."""
        for text in self._scheduler.next_batch(self._max_batch - len(self._working)):
            self._working[text.ticket] = text

    def _read(self, text: _Text, most: int) -> int:
        """Read the next tokens of a prompt, at most so many and one step of the engine; returns how many."""
        job = text.job
        try:
            if text.sequence is None:
                text.sequence = self._prefixes.begin(job.prompt, job.stack)
                job.text.cached_tokens = text.sequence.position
                rest = job.prompt[text.sequence.position :]
                # Whole parts, each read with the same adapters: how much of one fits the round is known only then.
                text.parts = self._model.chunks(text.sequence, rest, job.stack, len(rest))
            tokens, span = text.part or next(text.parts)
            count = min(len(tokens), most, self._model.engine.max_step)
            is_last = text.sequence.position + count == len(job.prompt)
            rows = [count - 1] if is_last else []  # logits cost as much as all layers together
            logits = self._model.step([text.sequence], tokens[None, :count], np.array(rows, np.int64), [span])
        except SessionError as error:
            text.error = error
            return 0
        text.part = (tokens[count:], span) if count < len(tokens) else None
        self._prefixes.keep_point(text.sequence, text.sequence.position - count)
        if is_last:
            job.history += job.prompt.tolist()
            self._choose(text, logits, 0)
            if text.error is None and not job.text.has_ended:
                self._prefixes.keep(text.sequence)
        return count

    def _choose(self, text: _Text, logits: StepLogits, sequence: int) -> None:
        """Add the next token to a text."""
        job = text.job
        try:
            choice = job.sampler.sample(logits.row(sequence, 0), job.history)
            self._events.append(Event(text.ticket, piece=job.text.add(choice)))
            job.history.append(choice.id)
            if not job.text.has_ended:
                job.text.check_room()
        except RlxcError as error:
            text.error = error

    # --- ends -----------------------------------------------------------------------------------------------------

    def _end_expired(self) -> None:
        now = self._clock()
        expired = self._scheduler.expired()
        expired += [text for text in self._working.values() if text.deadline <= now]
        for text in expired:
            self._end(text, "deadline")

    def _end_if_complete(self, text: _Text) -> None:
        if text.error is not None or text.job.text.has_ended:
            self._end(text)

    def _end(self, text: _Text, reason: Literal["deadline", "cancelled"] | None = None) -> None:
        """Take a text out of the batch and tell of it; without a reason, it is complete, failed or closed."""
        del self._texts[text.ticket]
        if self._working.pop(text.ticket, None) is None:
            self._scheduler.cancel(text.ticket)
        growing, sequence = text.job.text, text.sequence
        if reason is not None:
            growing.end(reason)
        if text.error is not None:
            _drop_frames(text.error)
        text.sequence, text.parts = None, iter(())
        self._events.append(Event(text.ticket, completion=text.job.completion(), error=text.error))
        # What has failed may hold numbers that nothing should go on from; what is closed goes for good.
        if sequence is not None and growing.has_ended and text.error is None:
            self._prefixes.keep(sequence)


def _drop_frames(error: BaseException) -> None:
    """Let go of the sequences and logits that an error's traceback keeps in memory."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


def _is_duration(value: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and value > 0
