"""A sequence of tokens as an engine holds it, and the adapters that its steps run with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

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


class TokenSequence:
    """Tokens that a model has read.

    An activated LoRA (Greenewald et al. 2025, https://arxiv.org/abs/2504.12397) is trained to leave a prompt alone up
    to its invocation tokens, so that it can use the keys and values that the model made without it. It takes part from
    the first token of their last occurrence on, as in PEFT. The sequence remembers which adapters were invoked.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._invoked: WeakSet[LoadedAdapter] = WeakSet()
        self._stack: Stack = ()
        self._mix: Mix[Any] = ()

    @property
    def position(self) -> int:
        """The number of tokens held."""
        return self.cache.position

    def mix(self, stack: Stack) -> Mix[Any]:
        """What a step runs with: the adapters of a stack that take part, each once."""
        if stack is not self._stack:
            self._stack, self._mix = stack, self._mixed(stack)
        return self._mix

    def prompt_parts(self, tokens: Tokens, stack: Stack) -> Iterator[Tokens]:
        """Cut a prompt where activated adapters of the stack join in; run each part before asking for the next."""
        starts: dict[int, list[LoadedAdapter]] = {}
        for adapter, _ in stack:
            if adapter.invocation_tokens and adapter not in self._invoked:
                start = _last_occurrence(tokens, adapter.invocation_tokens)
                if start is not None:
                    starts.setdefault(start, []).append(adapter)
        begin = 0
        for start, adapters in sorted(starts.items()):
            if start > begin:
                yield tokens[begin:start]
            self._invoked.update(adapters)
            self._stack, self._mix = stack, self._mixed(stack)
            begin = start
        yield tokens[begin:]

    def release_adapters(self) -> None:
        """Let go of the adapters, so that their memory can be freed."""
        self._stack, self._mix = (), ()

    def _mixed(self, stack: Stack) -> Mix[Any]:
        scales: dict[LoadedAdapter, float] = {}
        for adapter, scale in stack:
            if not adapter.invocation_tokens or adapter in self._invoked:
                scales[adapter] = scales.get(adapter, 0.0) + scale
        return tuple((adapter.prepared, scale) for adapter, scale in scales.items() if scale)


def _last_occurrence(tokens: Tokens, wanted: tuple[int, ...]) -> int | None:
    """Where the last run of the wanted tokens begins."""
    if len(wanted) > len(tokens):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    found = np.flatnonzero((windows == np.array(wanted)).all(axis=1))
    return int(found[-1]) if len(found) else None
