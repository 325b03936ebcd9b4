"""What ``rlxc bench`` measures of adapters: by how much they slow decoding, and how long a swap takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlxc.errors import ContextError, OptionError

if TYPE_CHECKING:
    from rlxc.runtime import Session

Progress = Callable[[str, int, int], None] | None

_LEAST_CONTEXT = 3  # one token before a swap and two after it


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of two ways that were measured in turns; ``ratio`` is the median of each turn's ratio."""

    first: float
    second: float
    ratio: float


@dataclass(frozen=True)
class AdapterCosts:
    """What adapters cost.

    Attributes:
        decode: decoding without an adapter, and with the first.
        swap_microseconds: taking one adapter off and putting another on, the next step's extra work included.
        batch: decoding several sequences that all use the first adapter, and that use different ones; None if no batch
            was asked for.
    """

    decode: Comparison
    swap_microseconds: float
    batch: Comparison | None


def measure_adapters(
    session: Session,
    adapters: Sequence[tuple[Path, float]],
    tokens: int,
    sequences: int | None,
    repetitions: int,
    progress: Progress,
) -> AdapterCosts:
    """Measure the costs of adapters at their scales.

    Sequence number i of a batch uses number i modulo how many there are.

    Raises:
        OptionError: a step does not take so many sequences.
        ContextError: the tokens, or the few that a swap takes, do not fit the context.
        RlxcError: an adapter cannot be used.
    """
    entries = [(session.adapters.load(path), scale) for path, scale in adapters]
    session.adapters.clear()
    ids = np.random.default_rng(0).integers(session.vocab_size, size=tokens).tolist()

    def decode(*stack: tuple[str, float]) -> Callable[[], None]:
        def work() -> None:
            session.adapters.clear()
            for name, scale in stack:
                session.adapters.push(name, scale)
            session.reset()
            for token in ids:
                session.decode(token)

        return work

    alone = _compare("adapter", tokens, repetitions, progress, decode(), decode(entries[0]))
    swap = _swap_seconds(session, entries, ids, repetitions)
    batch = None
    if sequences:
        same, different = (
            _together(session, [entries[i % count] for i in range(sequences)], tokens)
            for count in (1, len(entries))
        )
        batch = _compare("batch of adapters", sequences * tokens, repetitions, progress, same, different)
    return AdapterCosts(alone, 1e6 * swap, batch)


def _together(session: Session, entries: Sequence[tuple[str, float]], tokens: int) -> Callable[[], None]:
    """Decodes a sequence with each of the adapters, all in one step."""
    engine, count = session.engine, len(entries)
    if count > engine.max_step:
        raise OptionError(
            f"a step takes at most {engine.max_step} sequences, not {count}", remedy="measure fewer: --batch"
        )
    if tokens > engine.context:
        raise ContextError(f"{tokens} tokens do not fit the context of {engine.context}")
    mixes = [
        [(adapter.prepared, scale) for adapter, scale in session.adapters.stack_of([entry]) if scale]
        for entry in entries
    ]
    ids = np.random.default_rng(0).integers(session.vocab_size, size=(tokens, count, 1))
    rows = np.zeros(1, np.int64)

    def work() -> None:
        caches = [engine.new_cache() for _ in entries]
        for step in ids:
            engine.step(caches, step, rows, mixes)

    return work


def _compare(
    stage: str,
    tokens: int,
    repetitions: int,
    progress: Progress,
    first: Callable[[], None],
    second: Callable[[], None],
) -> Comparison:
    """Tokens per second of both, measured in turns after a warm-up, because a machine's speed changes with time."""
    rates: list[list[float]] = [[], []]
    for i in range(repetitions + 1):
        for found, work in zip(rates, (first, second)):
            started = time.perf_counter()
            work()
            found.append(tokens / (time.perf_counter() - started))
        if progress:
            progress(stage, i + 1, repetitions + 1)
    pairs = list(zip(*rates))[1:]
    ratio = statistics.median(b / a for a, b in pairs)
    return Comparison(statistics.median(rates[0][1:]), statistics.median(rates[1][1:]), ratio)


def _swap_seconds(
    session: Session, entries: Sequence[tuple[str, float]], ids: Sequence[int], repetitions: int
) -> float:
    """The median time of a swap, and of what the step after it takes more than the one after that."""
    if session.context < _LEAST_CONTEXT:
        raise ContextError(
            f"measuring a swap takes {_LEAST_CONTEXT} tokens, which do not fit the context of {session.context}"
        )
    session.reset()
    session.prefill(ids[:1])
    swaps: list[float] = []
    for i in range(min(16 * repetitions, (session.context - 1) // 2)):
        started = time.perf_counter()
        session.adapters.pop()
        session.adapters.push(*entries[i % len(entries)])
        swapped = time.perf_counter()
        session.decode(ids[0])
        first = time.perf_counter()
        session.decode(ids[0])
        second = time.perf_counter()
        swaps.append((swapped - started) + (first - swapped) - (second - first))
    session.adapters.clear()
    return statistics.median(swaps)


def lines(costs: AdapterCosts, sequences: int | None) -> Iterator[str]:
    """The costs as text."""
    decode, batch = costs.decode, costs.batch
    yield (
        f"adapter {decode.second:17.1f} tokens/s with an adapter, {decode.first:.1f} without, in turns: "
        f"{decode.ratio:.3f} times as fast; a swap takes {costs.swap_microseconds:.0f} µs"
    )
    if batch is not None:
        yield (
            f"        {batch.second:17.1f} tokens/s in {sequences} sequences with adapters in turn, "
            f"{batch.first:.1f} with one: {batch.ratio:.3f} times as fast"
        )
