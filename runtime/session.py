"""A session: a loaded model with one sequence of tokens that grows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from time import sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlxc.artifact import Artifact, Verification
from rlxc.errors import OptionError, RlxcError, SessionError
from rlxc.runtime.batch import Job, Request, run_batch
from rlxc.runtime.engines import Engine, find_engine, loads_slowly
from rlxc.runtime.logits import Floats
from rlxc.runtime.model import Ids, Model
from rlxc.runtime.sampling import Choice, Sampler, SamplingOptions
from rlxc.runtime.sequence import Stack, Tokens
from rlxc.runtime.session_adapters import AdapterName, SessionAdapters
from rlxc.runtime.stream import Completion, GrowingText, Stream
from rlxc.runtime.threads import choose_threads
from rlxc.runtime.tokenizer import StopMatcher, TextStream, Tokenizer

if TYPE_CHECKING:
    from rlxc.runtime.chat import ChatTemplate

ReadTokenizer = Callable[[], Tokenizer]

_HEAD_START = 0.03  # seconds


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
    """Open an artifact for running.

    Digests are compared while the model loads; no result is given before they are known to be right. The tokenizer is
    read while a model loads that takes a while, and when it is first needed else.

    Args:
        path: the artifact.
        threads: how many to compute with; by default one for each physical core that this process may use.

    Raises:
        ArtifactError: the artifact is damaged or is none.
        OptionError: ``threads`` is out of range.
        SessionError: what runs this kind of artifact is not installed.
    """
    threads = choose_threads(threads)
    artifact = Artifact.open(path)
    verification = artifact.start_verification()
    try:
        make_engine = find_engine(artifact, verification)
        read_tokenizer = _tokenizer_reader(artifact)
        if loads_slowly(artifact):
            read_tokenizer = _start(read_tokenizer)
        engine = make_engine(artifact, threads)
        try:
            return Session(artifact, engine, verification, read_tokenizer)
        except BaseException:
            engine.close()
            raise
    except BaseException:
        verification.close()
        raise


class Session:
    """A loaded model and the sequence that it continues.

    One thread at a time may use a session; a second one is refused, not queued. ``with`` closes it.

    Attributes:
        artifact: what it runs.
        adapters: the LoRA adapters that it runs with.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine[Any, Any],
        verification: Verification,
        read_tokenizer: ReadTokenizer,
    ) -> None:
        self.artifact = artifact
        self._verification = verification
        self._read_tokenizer = read_tokenizer
        self._lock = threading.Lock()
        self._closed = False
        self._model = Model(artifact, engine, verification)
        self._sequence = self._model.new_sequence()
        self.adapters = SessionAdapters(artifact, engine, verification, self._using)
        self._stream: object = None  # whose turn it is to extend the sequence; None after any other use of it

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        self._check_open()
        self._verification.wait("tokenizer.json")
        return self._read_tokenizer()

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How messages become a prompt, or None if the model has no chat format."""
        # Imported here because jinja2 takes a while, and most sessions do not chat.
        from rlxc.runtime.chat import ChatTemplate

        name = "chat_template.jinja"
        if name not in self.artifact.manifest.files:
            return None
        self._check_open()
        source = self.artifact.file(name)
        self._verification.wait(name)
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_ids[:1]
        return ChatTemplate(
            source.read_text(encoding="utf-8"),
            bos_token="" if bos is None else self.tokenizer.piece(bos),
            eos_token=self.tokenizer.piece(eos[0]) if eos else "",
        )

    @property
    def engine(self) -> Engine[Any, Any]:
        """What runs the model's steps, for tools that measure it; it knows nothing of the session's sequence."""
        return self._model.engine

    @property
    def position(self) -> int:
        """The number of tokens that the sequence holds."""
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

        Raises:
            ContextError: they do not fit; the sequence is unchanged.
            SessionError: there are none, or one is not in the vocabulary; the sequence is unchanged.
        """
        tokens = self._model.tokens(ids)
        with self._using():
            self._stream = None
            last: Floats = self._model.prefill(self._sequence, tokens, self.adapters.stack).values[0, 0]
            return last

    def decode(self, id: int) -> Floats:
        """Append one token; as :meth:`prefill`."""
        return self.prefill([id])

    def score(self, ids: Ids) -> Floats:
        """The logits ``[len(ids), vocab]`` after every token of a sequence of its own.

        It is read with the adapters that are on the stack now.

        Raises:
            ContextError: the ids do not fit the context.
            SessionError: there are none, or one is not in the vocabulary.
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
    ) -> Completion:
        """Generate text after a prompt, in a fresh sequence: what the session held before is dropped.

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

        Raises:
            ContextError: the prompt does not fit the context.
            OptionError: an option is out of range.
            SessionError: the prompt is empty, or holds a token that is not in the vocabulary.
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
        tokens, text = self._begin(prompt, max_tokens, stop)
        own_stack: Stack | None = None
        if adapter is not None:
            with self._using():
                own_stack = self.adapters.stack_of([(adapter, scale)])
        elif scale != 1.0:
            raise OptionError("scale is that of an adapter", remedy="name the adapter as well")
        history = tokens.tolist()
        turn = object()

        def stack() -> Stack:
            return self.adapters.stack if own_stack is None else own_stack

        def start() -> Choice:
            with self._using():
                self._restart(turn)
                logits = self._model.prefill(self._sequence, tokens, stack())
                return sampler.sample(logits.row(0, 0), history)

        def choose(last: int) -> Choice:
            with self._using():
                if self._stream is not turn:
                    raise SessionError("the session was put to other use, which ended this stream")
                logits = self._model.decode([self._sequence], [last], [stack()])
                history.append(last)
                return sampler.sample(logits.row(0, 0), history)

        return Stream(text, start=start, choose=choose)

    def generate_batch(self, requests: Sequence[Request], max_batch: int = 8) -> list[Completion]:
        """Generate several texts at once, each with its own prompt, adapters and options.

        A step of the model gives every text a token. Where one ends, a request that waits takes its place: those for
        the same adapters run together, but none waits for long (see :class:`AdapterScheduler`). Each text is what
        :meth:`generate` makes of its request alone, up to the rounding of sums that are added in another order. The
        session's own sequence stays as it is.

        On TVM, texts share the reading of the weights. ONNX Runtime runs them one after the other within a step: there,
        a batch takes as long as its texts alone.

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
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise OptionError(f"max_batch must be an integer, 1 or more, got {max_batch!r}")
        with self._using():
            jobs = [self._job(request, i) for i, request in enumerate(requests)]
            run_batch(self._model, jobs, min(max_batch, self.engine.max_step))
        return [job.completion() for job in jobs]

    def reset(self) -> None:
        """Start a new, empty sequence."""
        with self._using():
            self._restart(None)

    def close(self) -> None:
        """Release the model; any use afterwards is refused."""
        if self._closed:
            return
        with self._using():
            self._closed = True
        self._verification.close()
        self.adapters.release()
        self._sequence.release_adapters()
        self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise SessionError(
                "another thread is using the session", remedy="load one session for each thread"
            )
        try:
            self._check_open()
            yield
        finally:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed", remedy="load the artifact again")

    def _restart(self, stream: object) -> None:
        self._stream = stream
        if self._sequence.position:
            self._sequence = self._model.new_sequence()

    def _begin(
        self, prompt: str | Ids, max_tokens: int, stop: str | Sequence[str]
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
        )

    def _job(self, request: Request, number: int) -> Job:
        if not isinstance(request, Request):
            raise OptionError(f"request {number} is {request!r}", remedy="make it a rlxc.runtime.Request")
        try:
            tokens, text = self._begin(request.prompt, request.max_tokens, request.stop)
            adapters = request.adapters
            stack = self.adapters.stack if adapters is None else self.adapters.stack_of(adapters)
        except RlxcError as error:
            problem = f"request {number}: {error.problem}"
            raise type(error)(problem, source=error.source, remedy=error.remedy) from error
        return Job(tokens, stack, Sampler(request.sampling), text)


def _tokenizer_reader(artifact: Artifact) -> ReadTokenizer:
    path, facts = artifact.file("tokenizer.json"), artifact.manifest.tokenizer
    return lambda: Tokenizer(path, bos_id=facts.bos_id, eos_ids=facts.eos_ids)


def _start(read: ReadTokenizer) -> ReadTokenizer:
    """Read the tokenizer in a thread: a large vocabulary takes half a second."""

    def later() -> Tokenizer:
        # The library holds the GIL while it reads. Let the engine come to its own reading first, which does not.
        sleep(_HEAD_START)
        return read()

    pool = ThreadPoolExecutor(1, thread_name_prefix="rlxc-tokenizer")
    tokenizer = pool.submit(later)
    pool.shutdown(wait=False)
    return tokenizer.result
