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

import numpy as np
import numpy.typing as npt

from rlxc.artifact import Artifact, Verification
from rlxc.errors import ContextError, OptionError, SessionError
from rlxc.runtime.engines import Cache, Engine, find_engine, loads_slowly
from rlxc.runtime.logits import Floats, StepLogits
from rlxc.runtime.sampling import Choice, Sampler, SamplingOptions
from rlxc.runtime.stream import Completion, Stream
from rlxc.runtime.threads import choose_threads
from rlxc.runtime.tokenizer import StopMatcher, TextStream, Tokenizer

if TYPE_CHECKING:
    from rlxc.runtime.chat import ChatTemplate

Ids = Sequence[int] | npt.NDArray[np.integer]

ReadTokenizer = Callable[[], Tokenizer]

_SCORE_LOGITS = 1 << 25  # logits of one step of `score`: 128 MiB, enough rows to keep the matmuls busy

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
        return Session(artifact, make_engine(artifact, threads), verification, read_tokenizer)
    except BaseException:
        verification.close()
        raise


class Session:
    """A loaded model and the sequence that it continues.

    One thread at a time may use a session; a second one is refused, not queued. ``with`` closes it.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine[Any, Any],
        verification: Verification,
        read_tokenizer: ReadTokenizer,
    ) -> None:
        self.artifact = artifact
        self._engine = engine
        self._verification = verification
        self._read_tokenizer = read_tokenizer
        self._lock = threading.Lock()
        self._closed = False
        self._cache = self._new_cache()
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
        return self._engine

    @property
    def position(self) -> int:
        """The number of tokens that the sequence holds."""
        return self._cache.position

    @property
    def context(self) -> int:
        """The most tokens that a sequence can hold."""
        return self._engine.context

    @property
    def vocab_size(self) -> int:
        """The number of logits of a position."""
        return self._engine.vocab_size

    def prefill(self, ids: Ids) -> Floats:
        """Append tokens to the sequence; returns the logits ``[vocab]`` after the last one.

        Raises:
            ContextError: they do not fit; the sequence is unchanged.
            SessionError: there are none, or one is not in the vocabulary; the sequence is unchanged.
        """
        tokens = self._tokens(ids)
        with self._using():
            self._stream = None
            last: Floats = self._extend(tokens).values[0, 0]
            return last

    def decode(self, id: int) -> Floats:
        """Append one token; as :meth:`prefill`."""
        return self.prefill([id])

    def score(self, ids: Ids) -> Floats:
        """The logits ``[len(ids), vocab]`` after every token of a sequence of its own.

        Raises:
            ContextError: the ids do not fit the context.
            SessionError: there are none, or one is not in the vocabulary.
        """
        tokens = self._tokens(ids)
        with self._using():
            self._check_room(len(tokens), 0)
            logits = np.empty((len(tokens), self.vocab_size), np.float32)
            cache = self._new_cache()
            step = min(self._engine.max_step, max(1, _SCORE_LOGITS // self.vocab_size))
            for start in range(0, len(tokens), step):
                chunk = tokens[start : start + step]
                rows = np.arange(len(chunk), dtype=np.int64)
                logits[start : start + len(chunk)] = self._engine.step([cache], chunk[None], rows).values[0]
            self._verification.wait()
            return logits

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

        Raises:
            ContextError: the prompt does not fit the context.
            OptionError: an option is out of range.
            SessionError: the prompt is empty, or holds a token that is not in the vocabulary.
        """
        return self.stream(
            prompt, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop
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
    ) -> Stream:
        """As :meth:`generate`, piece by piece.

        A stream may be left at any point. Other use of the session's sequence ends it: its next piece raises
        SessionError.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise OptionError(f"max_tokens must be an integer, 0 or more, got {max_tokens!r}")
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
        stops = StopMatcher(stop)
        tokens = self._tokens(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        self._check_room(len(tokens), 0)
        history: list[int] = []
        turn = object()

        def choose(ids: Sequence[int]) -> Choice:
            with self._using():
                if not history:
                    self._restart(turn)
                elif self._stream is not turn:
                    raise SessionError("the session was put to other use, which ended this stream")
                logits = self._extend(np.asarray(ids, np.int64))
                history.extend(ids)
                return sampler.sample(logits.row(0, 0), history)

        return Stream(
            tokens.tolist(),
            choose=choose,
            text=TextStream(self.tokenizer, continuation=True),
            stops=stops,
            eos_ids=self.tokenizer.eos_ids,
            room=self.context - len(tokens),
            max_tokens=max_tokens,
        )

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
        self._engine.close()

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
        if self._cache.position:
            self._cache = self._new_cache()

    def _new_cache(self) -> Cache:
        try:
            cache: Cache = self._engine.new_cache()
            return cache
        except MemoryError as error:
            plan = self.artifact.manifest.kv_cache
            raise SessionError(
                f"not enough memory for the cache of {plan.context} tokens",
                source=self.artifact.path,
                remedy="compile with a smaller --context",
            ) from error

    def _extend(self, tokens: npt.NDArray[np.int64]) -> StepLogits:
        """Append to the sequence; returns the logits after the last token, as the only row."""
        self._check_room(len(tokens), self._cache.position)
        for start in range(0, len(tokens), self._engine.max_step):
            chunk = tokens[start : start + self._engine.max_step]
            is_last = start + len(chunk) == len(tokens)
            rows = [len(chunk) - 1] if is_last else []  # logits cost as much as all layers together
            logits = self._engine.step([self._cache], chunk[None], np.array(rows, np.int64))
        self._verification.wait()
        return logits

    def _check_room(self, count: int, position: int) -> None:
        if position + count <= self.context:
            return
        held = f" after the {position} that the session holds" if position else ""
        raise ContextError(
            f"{count} tokens{held} do not fit the context of {self.context}",
            source=self.artifact.path,
            remedy=f"use fewer, or compile with --context {position + count} or more",
        )

    def _tokens(self, ids: Ids) -> npt.NDArray[np.int64]:
        """The ids as an array, checked against the vocabulary."""
        try:
            array = np.asarray(ids)
        except ValueError:  # lists of unequal length inside
            array = np.empty((), object)
        if array.shape == (0,):
            raise SessionError("there are no tokens", remedy="give at least one")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise SessionError(
                "token ids must be a flat list of integers", remedy="session.tokenizer.encode(text) gives one"
            )
        wrong = array[(array < 0) | (array >= self.vocab_size)]
        if len(wrong):
            raise SessionError(f"token {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        return array.astype(np.int64)


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
