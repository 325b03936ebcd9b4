"""A loaded model: tokens go in, in steps that its engine can take, and logits come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.artifact import Artifact, Verification
from rlxc.errors import ContextError, SessionError
from rlxc.runtime.engines import Engine
from rlxc.runtime.logits import Floats, StepLogits
from rlxc.runtime.sequence import LoadedAdapter, Span, Stack, Tokens, TokenSequence

Ids = Sequence[int] | npt.NDArray[np.integer]

_SCORE_LOGITS = 1 << 25  # logits of one step of `score`: 128 MiB, enough rows to keep the matmuls busy


class Model:
    """An engine and what it must not be asked for. Results wait until the artifact's digests are compared."""

    def __init__(self, artifact: Artifact, engine: Engine[Any, Any], verification: Verification) -> None:
        self.engine = engine
        self.manifest = artifact.manifest
        self._artifact, self._verification = artifact, verification

    @property
    def rollback(self) -> int:
        """How many of a sequence's newest tokens can be taken back, whatever its layers' windows."""
        return self.manifest.kv_cache.rollback

    def new_sequence(self) -> TokenSequence:
        """An empty sequence.

        Raises:
            SessionError: there is not enough memory for its cache.
        """
        try:
            return TokenSequence(self.engine.new_cache())
        except MemoryError as error:
            raise SessionError(
                f"not enough memory for the cache of {self.engine.context} tokens",
                source=self._artifact.path,
                remedy="compile with a smaller --context",
            ) from error

    def tokens(self, ids: Ids) -> Tokens:
        """The ids as an array.

        Raises:
            SessionError: there are none, or one is not in the vocabulary.
        """
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
        vocab = self.engine.vocab_size
        wrong = array[(array < 0) | (array >= vocab)]
        if len(wrong):
            raise SessionError(f"token {wrong[0]} is not in the vocabulary of {vocab}")
        return array.astype(np.int64)

    def check_room(self, count: int, position: int = 0) -> None:
        """Refuse tokens that would not fit after ``position`` others.

        Raises:
            ContextError: they do not fit the context.
        """
        context = self.engine.context
        if position + count <= context:
            return
        held = f" after the {position} that the session holds" if position else ""
        raise ContextError(
            f"{count} tokens{held} do not fit the context of {context}",
            source=self._artifact.path,
            remedy=f"use fewer, or compile with --context {position + count} or more",
        )

    def prefill(
        self,
        sequence: TokenSequence,
        tokens: Tokens,
        stack: Stack,
        after_step: Callable[[], None] = lambda: None,
    ) -> StepLogits:
        """Append a prompt, or more of it; returns the logits after the last token, as the only row.

        ``after_step`` is called after each of its steps.

        Raises:
            ContextError: the tokens do not fit; the sequence is unchanged.
            SessionError: there is not enough memory; the sequence holds those that were read.
        """
        self.check_room(len(tokens), sequence.position)
        end = sequence.position + len(tokens)
        try:
            for chunk, span in self.chunks(sequence, tokens, stack, self.engine.max_step):
                is_last = sequence.position + len(chunk) == end
                rows = [len(chunk) - 1] if is_last else []  # logits cost as much as all layers together
                logits = self._step([sequence], chunk[None], np.array(rows, np.int64), [span])
                after_step()
        except BaseException:
            sequence.truncate(sequence.position)  # what was not read invokes no adapter
            raise
        self._verification.wait()
        return logits

    def decode(
        self, sequences: Sequence[TokenSequence], ids: Sequence[int], stacks: Sequence[Stack]
    ) -> StepLogits:
        """Append one generated token to each sequence, all in one step; returns a row for each.

        Raises:
            ContextError: a sequence is full; all are unchanged.
            SessionError: there is not enough memory; all are unchanged.
        """
        for sequence in sequences:
            self.check_room(1, sequence.position)
        spans = [sequence.active(stack) for sequence, stack in zip(sequences, stacks)]
        return self.step(sequences, np.array(ids, np.int64)[:, None], np.zeros(1, np.int64), spans)

    def replay(
        self, sequence: TokenSequence, position: int, find: Callable[[str], LoadedAdapter]
    ) -> TokenSequence:
        """Read the first tokens of a sequence once more, into a new one, with the adapters that they were read with.

        Args:
            sequence: which stays as it is.
            position: how many of its tokens.
            find: gives the loaded adapter with a fingerprint, or raises.
        """
        readings = [(start, reading) for start, reading in sequence.readings if start < position]
        ends = [*(start for start, _ in readings[1:]), position]
        spans = [
            Span(start, tuple((find(fingerprint), scale) for fingerprint, scale in reading))
            for start, reading in readings
        ]
        tokens, replayed = sequence.ids, self.new_sequence()
        for span, end in zip(spans, ends):
            for start in range(span.begin, end, self.engine.max_step):
                chunk = tokens[start : min(start + self.engine.max_step, end)]
                self._step([replayed], chunk[None], np.zeros(0, np.int64), [span])
        replayed.invoked = {name: start for name, start in sequence.invoked.items() if start < position}
        return replayed

    def score(self, tokens: Tokens, stack: Stack) -> Floats:
        """The logits ``[len(tokens), vocab]`` after every token of a sequence of its own.

        Raises:
            ContextError: the tokens do not fit the context.
            SessionError: there is not enough memory.
        """
        self.check_room(len(tokens))
        vocab = self.engine.vocab_size
        logits = np.empty((len(tokens), vocab), np.float32)
        sequence = self.new_sequence()
        size = min(self.engine.max_step, max(1, _SCORE_LOGITS // vocab))
        for chunk, span in self.chunks(sequence, tokens, stack, size):
            start, rows = sequence.position, np.arange(len(chunk), dtype=np.int64)
            step = self._step([sequence], chunk[None], rows, [span])
            logits[start : start + len(chunk)] = step.values[0]
        self._verification.wait()
        return logits

    def chunks(
        self, sequence: TokenSequence, tokens: Tokens, stack: Stack, size: int
    ) -> Iterator[tuple[Tokens, Span]]:
        """A prompt in pieces of at most ``size`` tokens, each with what to read it with; read each before the next."""
        spans = sequence.spans(tokens, stack)
        sequence.invoke(tokens, stack)
        ends = [*(span.begin for span in spans[1:]), len(tokens)]
        for span, end in zip(spans, ends):
            for start in range(span.begin, end, size):
                yield tokens[start : min(start + size, end)], span

    def step(
        self,
        sequences: Sequence[TokenSequence],
        ids: Tokens,
        rows: npt.NDArray[np.int64],
        spans: Sequence[Span],
    ) -> StepLogits:
        """Append ids ``[B, S]`` to ``B`` sequences that have room, each read with its span's adapters.

        Returns:
            The logits after the tokens in the places ``rows [R]`` of 0 ... S - 1, of every sequence.

        Raises:
            SessionError: there is not enough memory; all sequences are unchanged.
        """
        logits = self._step(sequences, ids, rows, spans)
        self._verification.wait()
        return logits

    def _step(
        self,
        sequences: Sequence[TokenSequence],
        ids: Tokens,
        rows: npt.NDArray[np.int64],
        spans: Sequence[Span],
    ) -> StepLogits:
        mixes = [span.mix for span in spans]
        caches = [sequence.cache for sequence in sequences]
        try:
            logits = self.engine.step(caches, ids, rows, mixes if any(mixes) else ())
        except MemoryError as error:
            raise SessionError(
                f"not enough memory to hold {ids.size} more tokens",
                source=self._artifact.path,
                remedy="let go of snapshots, use fewer sequences at once, or a smaller prefix_cache",
            ) from error
        finally:  # a Ctrl-C may come when the engine is done
            for sequence, tokens, span in zip(sequences, ids, spans):
                if sequence.position > len(sequence.tokens):
                    sequence.extend(tokens, span)
        return logits
