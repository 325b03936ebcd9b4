"""A sequence of tokens as an engine holds it, and the adapters that its steps run with."""

from __future__ import annotations

from array import array
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.errors import RollbackError
from rlxc.runtime.engines import Cache, Mix, Prepared

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in the engine's memory.

    Attributes:
        name: what the session calls it.
        source: the file or folder that it was read from.
        fingerprint: of what it was read from at first, before it was compiled in.
        prepared: the engine's own form of it.
        invocation_tokens: an activated LoRA takes part from the last of these in a prompt on; empty for others.
    """

    name: str
    source: Path
    fingerprint: str
    prepared: Prepared
    invocation_tokens: tuple[int, ...] = ()


Stack = tuple[tuple[LoadedAdapter, float], ...]
"""Adapters with their scales. A change makes another one: the same object always means the same."""


Reading = tuple[tuple[str, float], ...]
"""The adapters that took part when tokens were read, by their fingerprints, each with its scale."""


@dataclass(frozen=True)
class Span:
    """Tokens of a prompt from number ``begin`` on, up to the next span, and the adapters that they are read with."""

    begin: int
    adapters: Stack

    @cached_property
    def reading(self) -> Reading:
        """The adapters, told apart by what they are."""
        return tuple((adapter.fingerprint, scale) for adapter, scale in self.adapters)

    @cached_property
    def mix(self) -> Mix[Any]:
        """The adapters as the engine takes them."""
        return tuple((adapter.prepared, scale) for adapter, scale in self.adapters)


class TokenSequence:
    """Tokens that a model has read, and what it read them with.

    An activated LoRA (Greenewald et al. 2025, https://arxiv.org/abs/2504.12397) is trained to leave a prompt alone up
    to its invocation tokens, so that it can use the keys and values that the model made without it. It takes part from
    the first token of their last occurrence on, as in PEFT. The sequence remembers where adapters were invoked.

    Attributes:
        cache: the engine's memory of them.
        tokens: their ids, ``int64``.
        readings: what they were read with, each from that token on.
        invoked: where activated adapters joined in, by fingerprint.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.tokens = array("q")
        self.readings: list[tuple[int, Reading]] = []
        self.invoked: dict[str, int] = {}
        self._shares_notes = False  # tokens and readings, with forks
        self._stack: Stack = ()
        self._active = Span(0, ())

    @property
    def position(self) -> int:
        """The number of tokens held."""
        return self.cache.position

    @property
    def ids(self) -> Tokens:
        """A copy of the tokens."""
        return np.array(self.tokens, np.int64)

    def fork(self) -> TokenSequence:
        """Another sequence that holds the same; the two share memory until one of them changes."""
        fork = TokenSequence(self.cache.fork())
        fork.tokens, fork.readings = self.tokens, self.readings
        fork.invoked = dict(self.invoked)
        self._shares_notes = fork._shares_notes = True
        return fork

    def truncate(self, position: int) -> None:
        """Forget the tokens from ``position`` on.

        Raises:
            RollbackError: there are not as many, or layers no longer hold what was before; the sequence is unchanged.
        """
        oldest, held = self.cache.oldest, self.position
        if not 0 <= position <= held:
            raise RollbackError(f"cannot go to position {position}: the sequence holds {held} tokens")
        if position < oldest:
            raise RollbackError(
                f"cannot go back to position {position}: what sliding-window layers saw there is gone, "
                f"{oldest} is the first that they hold",
                remedy="read the tokens again (replay=True), or compile with a larger --rollback",
            )
        self.cache.truncate(position)
        self._own_notes()
        del self.tokens[position:]
        while self.readings and self.readings[-1][0] >= position:
            self.readings.pop()
        gone = [fingerprint for fingerprint, start in self.invoked.items() if start >= position]
        for fingerprint in gone:
            del self.invoked[fingerprint]
        if gone:
            self.release_adapters()

    def extend(self, ids: Tokens, span: Span) -> None:
        """Note tokens that the cache has taken in."""
        self._own_notes()
        if not self.readings or self.readings[-1][1] != span.reading:
            self.readings.append((len(self.tokens), span.reading))
        self.tokens.frombytes(ids.tobytes())

    def active(self, stack: Stack) -> Span:
        """The adapters of a stack that take part in the next step, each once."""
        if stack is not self._stack:
            self._stack, self._active = stack, Span(0, _together(stack, self.invoked))
        return self._active

    def spans(self, tokens: Tokens, stack: Stack) -> list[Span]:
        """A prompt to be appended, cut where activated adapters of the stack join in."""
        invoked = dict(self.invoked)
        spans = [self.active(stack)]
        for begin, fingerprints in sorted(self._invocations(tokens, stack).items()):
            invoked |= dict.fromkeys(fingerprints, begin)
            span = Span(begin, _together(stack, invoked))
            spans = [*spans, span] if begin else [span]
        return spans

    def invoke(self, tokens: Tokens, stack: Stack) -> None:
        """Note where activated adapters join in, in a prompt that will be appended."""
        for begin, fingerprints in self._invocations(tokens, stack).items():
            self.invoked |= dict.fromkeys(fingerprints, self.position + begin)
            self.release_adapters()

    def release_adapters(self) -> None:
        """Let go of the adapters, so that their memory can be freed."""
        self._stack, self._active = (), Span(0, ())

    def _own_notes(self) -> None:
        """Copy what is noted of the tokens, if forks share it: it is about to change."""
        if self._shares_notes:
            self.tokens, self.readings = self.tokens[:], self.readings[:]
            self._shares_notes = False

    def _invocations(self, tokens: Tokens, stack: Stack) -> dict[int, list[str]]:
        """Where adapters of the stack join in, that have not yet, by their fingerprints."""
        starts: dict[int, list[str]] = {}
        for adapter, _ in stack:
            if adapter.invocation_tokens and adapter.fingerprint not in self.invoked:
                start = _last_occurrence(tokens, adapter.invocation_tokens)
                if start is not None:
                    starts.setdefault(start, []).append(adapter.fingerprint)
        return starts


def _together(stack: Stack, invoked: Container[str]) -> Stack:
    """The adapters of a stack that take part, each once, with the sum of its scales."""
    scales: dict[LoadedAdapter, float] = {}
    for adapter, scale in stack:
        if not adapter.invocation_tokens or adapter.fingerprint in invoked:
            scales[adapter] = scales.get(adapter, 0.0) + scale
    return tuple((adapter, scale) for adapter, scale in scales.items() if scale)


def _last_occurrence(tokens: Tokens, wanted: tuple[int, ...]) -> int | None:
    """Where the last run of the wanted tokens begins."""
    if len(wanted) > len(tokens):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    found = np.flatnonzero((windows == np.array(wanted)).all(axis=1))
    return int(found[-1]) if len(found) else None
