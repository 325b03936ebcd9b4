"""A session: a loaded model with one sequence of tokens that grows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rlxc.errors import OptionError, RlxcError, RollbackError, SessionError
from rlxc.runtime.batch import Batch, Job, Request
from rlxc.runtime.drafters import Drafter, NgramDrafter
from rlxc.runtime.engines import Engine
from rlxc.runtime.loaded import Lease, Loaded
from rlxc.runtime.logits import Floats
from rlxc.runtime.model import Ids
from rlxc.runtime.sampling import Choice, Sampler, SamplingOptions
from rlxc.runtime.sequence import Stack, Tokens
from rlxc.runtime.session_adapters import AdapterName, SessionAdapters
from rlxc.runtime.snapshot import KvSnapshot, load_snapshot
from rlxc.runtime.speculate import Speculator
from rlxc.runtime.stream import Completion, GrowingText, OnFull, Stream
from rlxc.runtime.tokenizer import StopMatcher, TextStream, Tokenizer

if TYPE_CHECKING:
    from rlxc.runtime.chat import ChatTemplate


class Session:
    """A loaded model and the sequence that it continues.

    One thread at a time may use a session and its forks; a second one is refused, not queued. ``with`` closes it; one
    that is let go of closes itself.

    Attributes:
        artifact: what it runs.
        adapters: the LoRA adapters that it runs with.
    """

    def __init__(self, loaded: Loaded, origin: Session | None = None) -> None:
        """A new session, or a fork of ``origin``."""
        self._loaded, self._model, self._lease = loaded, loaded.model, Lease(loaded)
        self.artifact = loaded.artifact
        # Nothing of it refers to the session itself: one that is let go of is gone at once, and its memory with it.
        using = self._using = self._lease.using
        if origin is None:
            self._sequence = self._model.new_sequence()
            self.adapters = SessionAdapters(loaded.artifact, self.engine, loaded.verification, using)
        else:
            self._sequence = origin._sequence.fork()
            self.adapters = origin.adapters.fork(using)
        self._stream: object = None  # whose turn it is to extend the sequence; None after any other use of it

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        self._lease.check_open()
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How messages become a prompt, or None if the model has no chat format."""
        self._lease.check_open()
        return self._loaded.chat_template

    @property
    def engine(self) -> Engine[Any, Any]:
        """What runs the model's steps, for tools that measure it; it knows nothing of the session's sequence."""
        return self._model.engine

    @property
    def position(self) -> int:
        """The number of tokens that the sequence holds."""
        self._lease.check_open()
        return self._sequence.position

    @property
    def context(self) -> int:
        """The most tokens that a sequence can hold."""
        return self.engine.context

    @property
    def vocab_size(self) -> int:
        """The number of logits of a position."""
        return self.engine.vocab_size

    def prefill(self, ids: Ids) -> Floats:
        """Append tokens to the sequence; returns the logits ``[vocab]`` after the last one.

        They are read with the adapters that are on the stack now; those before them keep what they were read with.
        An empty sequence begins with what the session still holds of an earlier one that began alike.

        Raises:
            ContextError: they do not fit; the sequence is unchanged.
            SessionError: there are none, or one is not in the vocabulary, and the sequence is unchanged; or there is
                not enough memory, and it holds those that were read, or is empty if it was.
        """
        tokens = self._model.tokens(ids)
        with self._using():
            self._stream = None
            stack = self.adapters.stack
            if self.position:
                logits = self._model.prefill(self._sequence, tokens, stack)
            else:
                self._model.check_room(len(tokens))
                self._sequence, logits, _ = self._loaded.prefixes.read(tokens, stack)
            last: Floats = logits.values[0, 0]
            return last

    def decode(self, id: int) -> Floats:
        """Append one token; as :meth:`prefill`."""
        return self.prefill([id])

    def snapshot(self) -> KvSnapshot:
        """What the sequence holds now, to go back to with :meth:`restore`. It shares memory with the sequence."""
        with self._using():
            return KvSnapshot.take(self._model, self._sequence)

    def restore(self, snapshot: KvSnapshot) -> None:
        """Go on from where a snapshot was taken, in this session or in another one of the same model.

        The stack of adapters stays as it is.

        Raises:
            OptionError: it is no snapshot.
            SnapshotError: it is of another model, or of one with another plan; the sequence is unchanged.
            SessionError: there is not enough memory; the sequence is unchanged.
        """
        if not isinstance(snapshot, KvSnapshot):
            raise OptionError(
                f"{snapshot!r:.80} is no snapshot",
                remedy="session.snapshot() and session.load_snapshot(path) give one",
            )
        with self._using():
            self._sequence = snapshot.begin(self._model)
            self._stream = None

    def load_snapshot(self, path: str | os.PathLike[str]) -> KvSnapshot:
        """Read a snapshot that :meth:`KvSnapshot.save` wrote; the session's sequence stays as it is.

        Raises:
            SnapshotError: the file is damaged or none, or the snapshot of another model or plan.
            SessionError: there is not enough memory.
        """
        with self._using():
            return load_snapshot(path, self._model)

    def truncate(self, position: int, *, replay: bool = False) -> None:
        """Take back the tokens from ``position`` on.

        Args:
            position: how many tokens stay; none is always possible.
            replay: where sliding-window layers no longer hold what they need, read the tokens that stay once more,
                with the adapters that they were read with; it takes as long as it took at first.

        Raises:
            OptionError: ``position`` is no integer.
            RollbackError: the sequence holds fewer, or cannot go back as far; it is unchanged.
            SessionError: an adapter that is needed for the replay is no longer loaded, or there is not enough memory
                for it; the sequence is unchanged.
        """
        if isinstance(position, bool) or not isinstance(position, int):
            raise OptionError(f"position must be an integer, got {position!r}")
        with self._using():
            try:
                self._sequence.truncate(position)
            except RollbackError:
                if not (replay or position == 0) or not 0 <= position <= self.position:
                    raise
                self._sequence = self._model.replay(self._sequence, position, self.adapters.find)
            self._stream = None

    def fork(self) -> Session:
        """Another session that holds the same sequence and adapters, and goes its own way from here on.

        It uses the same loaded model, which stays loaded until both are closed. Its sequence shares memory with this
        one's, and what one of them adds is its own.
        """
        with self._using():
            return Session(self._loaded, self)

    def score(self, ids: Ids) -> Floats:
        """The logits ``[len(ids), vocab]`` after every token of a sequence of its own.

        It is read with the adapters that are on the stack now.

        Raises:
            ContextError: the ids do not fit the context.
            SessionError: there are none, or one is not in the vocabulary, or there is not enough memory.
        """
        tokens = self._model.tokens(ids)
        with self._using():
            return self._model.score(tokens, self.adapters.stack)

    def generate(
        self,
        prompt: str | Ids,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        adapter: AdapterName | None = None,
        scale: float = 1.0,
        speculate: Literal["ngram"] | Drafter | None = None,
        on_full: OnFull = "stop",
    ) -> Completion:
        """Generate text after a prompt, in a fresh sequence: what the session held before is dropped.

        A prompt that begins as one that was read before is read from there on; see ``prefix_cache`` of :func:`load`.

        Args:
            prompt: text, which gets the model's begin token, or token ids, which are used as they are.
            max_tokens: how many tokens to generate at most; 0 runs nothing.
            temperature: 0 takes the best token always; see :class:`SamplingOptions` for this and the others.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: keep the fewest best tokens with this probability together.
            min_p: keep tokens at least this fraction as probable as the best one.
            repetition_penalty: makes recent tokens less likely; 1 does nothing.
            seed: of the random numbers; None takes a fresh one.
            stop: strings that end the text; they are not part of it.
            adapter: name or path of an adapter that takes the place of the session's stack for this text; see
                :meth:`SessionAdapters.push`. Without one, each step runs with what is on the stack by then.
            scale: of that adapter.
            speculate: guesses several tokens, which the model then checks in one step: ``ngram`` guesses that the text
                repeats itself, a :class:`ModelDrafter` asks a smaller model. A greedy text is the same as without it,
                a sampled one as likely.
            on_full: what to do at the end of the context: ``stop`` ends the text, ``error`` raises ContextError.

        Raises:
            ContextError: the prompt does not fit the context, or the text does not, and ``on_full`` is ``error``.
            OptionError: an option is out of range.
            SessionError: the prompt is empty, or holds a token that is not in the vocabulary, or there is not enough
                memory.
            RlxcError: the adapter cannot be used.
        """
        return self.stream(
            prompt,
            max_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            stop,
            adapter,
            scale,
            speculate,
            on_full,
        ).completion()

    def stream(
        self,
        prompt: str | Ids,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        adapter: AdapterName | None = None,
        scale: float = 1.0,
        speculate: Literal["ngram"] | Drafter | None = None,
        on_full: OnFull = "stop",
    ) -> Stream:
        """As :meth:`generate`, piece by piece.

        A stream may be left at any point. Other use of the session's sequence ends it: its next piece raises
        SessionError.
        """
        sampler = Sampler(
            SamplingOptions(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            )
        )
        tokens, text = self._begin(prompt, max_tokens, stop, on_full)
        own_stack: Stack | None = None
        if adapter is not None:
            with self._using():
                own_stack = self.adapters.stack_of([(adapter, scale)])
        elif scale != 1.0:
            raise OptionError("scale is that of an adapter", remedy="name the adapter as well")
        speculator = self._speculator(speculate, sampler)
        history = tokens.tolist()
        turn = object()

        def stack() -> Stack:
            return self.adapters.stack if own_stack is None else own_stack

        def start() -> Choice:
            with self._using():
                self._restart(turn)
                self._sequence, logits, text.cached_tokens = self._loaded.prefixes.read(tokens, stack())
                if speculator is not None:
                    return speculator.start(logits.row(0, 0), history)
                return sampler.sample(logits.row(0, 0), history)

        def choose(last: int) -> list[Choice]:
            with self._using():
                if self._stream is not turn:
                    raise SessionError("the session was put to other use, which ended this stream")
                if speculator is not None:
                    choices = speculator.next(self._sequence, stack(), history, text.remaining)
                    text.drafted, text.accepted = speculator.drafted, speculator.accepted
                    return choices
                logits = self._model.decode([self._sequence], [last], [stack()])
                history.append(last)
                return [sampler.sample(logits.row(0, 0), history)]

        def leave(count: int) -> None:
            # It must not raise: it may be a stream's last breath that calls it.
            if self._stream is turn and self._lease.is_open:
                self._sequence.truncate(self.position - count)

        return Stream(text, start=start, choose=choose, leave=leave)

    def generate_batch(self, requests: Sequence[Request], max_batch: int = 8) -> list[Completion]:
        """Generate several texts at once, each with its own prompt, adapters and options.

        A step of the model gives every text a token. Where one ends, a request that waits takes its place: those for
        the same adapters run together, but none waits for long (see :class:`Batch`). Each text is what
        :meth:`generate` makes of its request alone (on ONNX Runtime, up to the rounding of sums that it adds in another
        order). The session's own sequence stays as it is.

        Texts share the reading of the weights: on TVM all of them, on ONNX Runtime those with the same adapters.

        Args:
            requests: any number of them.
            max_batch: how many texts are in work at once, each with a cache of its own; the engine may take fewer.

        Returns:
            A text for each request, in their order.

        Raises:
            ContextError: a prompt does not fit the context.
            OptionError: an option is out of range.
            RlxcError: as :meth:`generate`. Nothing has run if a request is refused, and the error names it.
        """
        with self._using():
            batch = Batch(
                self._model,
                self._loaded.prefixes,
                self._job,
                max_batch=max_batch,
                max_waiting=max(1, len(requests)),
            )
            numbers: dict[int, int] = {}
            for i, request in enumerate(requests):
                with _in_request(i):
                    numbers[batch.submit(request)] = i
            texts: dict[int, Completion] = {}
            with batch:
                for event in batch.run():
                    if event.error is not None:
                        with _in_request(numbers[event.ticket]):
                            raise event.error
                    if event.completion is not None:
                        texts[event.ticket] = event.completion
        return [texts[ticket] for ticket in numbers]

    def batch(self, *, max_batch: int = 8, token_budget: int = 256, max_waiting: int = 1024) -> Batch:
        """Texts that are made together, with requests that come and go while it runs; see :class:`Batch`.

        The session may be put to other use between its rounds.

        Args:
            max_batch: how many texts are in work at once, each with a cache of its own; the engine may take fewer.
            token_budget: how many tokens of prompts are read at most between two tokens of the texts that run.
            max_waiting: how many requests wait at most.

        Raises:
            OptionError: an option is no integer, 1 or more.
        """
        return Batch(
            self._model,
            self._loaded.prefixes,
            self._job,
            max_batch=max_batch,
            token_budget=token_budget,
            max_waiting=max_waiting,
            using=self._using,
        )

    def reset(self) -> None:
        """Start a new, empty sequence."""
        with self._using():
            self._restart(None)

    def close(self) -> None:
        """Let go of the sequence and the adapters, and of the model if no fork uses it; any later use is refused."""
        if not self._lease.is_open:
            return
        with self._using():
            self.adapters.release()
            del self._sequence
            self._lease.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restart(self, stream: object) -> None:
        """An empty sequence, for the stream whose turn it is; what the old one held may come in useful again."""
        self._stream = stream
        if self.position:
            self._loaded.prefixes.keep(self._sequence)
            self._sequence = self._model.new_sequence()

    def _speculator(self, speculate: str | Drafter | None, sampler: Sampler) -> Speculator | None:
        if speculate is None:
            return None
        if speculate != "ngram" and not isinstance(speculate, Drafter):
            raise OptionError(
                f"speculate is {speculate!r:.80}",
                remedy="write 'ngram', or give a drafter: ModelDrafter(rlxc.load(PATH), session)",
            )
        if not self._model.rollback:
            raise OptionError(
                "guesses that are wrong cannot be taken back: the artifact was compiled with rollback 0",
                source=self.artifact.path,
                remedy="compile with --rollback 16 or more",
            )
        drafter = NgramDrafter() if isinstance(speculate, str) else speculate
        return Speculator(self._model, drafter, sampler)

    def _begin(
        self, prompt: str | Ids, max_tokens: int, stop: str | Sequence[str], on_full: OnFull
    ) -> tuple[Tokens, GrowingText]:
        """A prompt's tokens, and the text after it, which is still empty."""
        stops = StopMatcher(stop)
        tokens = self._model.tokens(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        self._model.check_room(len(tokens))
        return tokens, GrowingText(
            text=TextStream(self.tokenizer, continuation=True),
            stops=stops,
            eos_ids=self.tokenizer.eos_ids,
            prompt_tokens=len(tokens),
            context=self.context,
            max_tokens=max_tokens,
            on_full=on_full,
        )

    def _job(self, request: Request) -> Job:
        if not isinstance(request, Request):
            raise OptionError(f"{request!r} is no request", remedy="make it a rlxc.runtime.Request")
        tokens, text = self._begin(request.prompt, request.max_tokens, request.stop, request.on_full)
        adapters = request.adapters
        stack = self.adapters.stack if adapters is None else self.adapters.stack_of(adapters)
        return Job(tokens, stack, Sampler(request.sampling), text)


@contextmanager
def _in_request(number: int) -> Iterator[None]:
    """Say which request an error is about."""
    try:
        yield
    except RlxcError as error:
        problem = f"request {number}: {error.problem}"
        raise type(error)(problem, source=error.source, remedy=error.remedy) from error
