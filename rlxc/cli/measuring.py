"""What ``rlxc bench`` measures of a session: tokens per second, memory bandwidth, and the time of each kernel."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlxc.artifact import Artifact, Manifest
from rlxc.cli.adapter_costs import lines
from rlxc.errors import ContextError, OptionError, SessionError
from rlxc.runtime.cpu import choose_library

if TYPE_CHECKING:
    from rlxc.runtime import Session

Progress = Callable[[str, int, int], None] | None
Ids = npt.NDArray[np.int64]

_STREAMED_BYTES = 256 << 20  # more than caches hold
_KERNELS = "kernels.json"


@dataclass(frozen=True)
class Rates:
    """Tokens per second in several measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def measure(
        cls, stage: str, count: int, repetitions: int, progress: Progress, work: Callable[[], None]
    ) -> Rates:
        """The rates of ``work``, which is about ``count`` tokens, after a warm-up."""
        rates = []
        for i in range(repetitions + 1):
            started = time.perf_counter()
            work()
            rates.append(count / (time.perf_counter() - started))
            if progress:
                progress(stage, i + 1, repetitions + 1)
        del rates[0]
        return cls(statistics.median(rates), min(rates), max(rates))


class Bench:
    """A session's measurements; token ids are random numbers, always the same."""

    def __init__(self, session: Session, repetitions: int, progress: Progress) -> None:
        self._session, self._repetitions, self._progress = session, repetitions, progress
        # Returns once the artifact's digests are compared, which is no part of any measurement.
        session.prefill([0])
        session.reset()

    def prefill(self, count: int) -> Rates:
        """Of a prompt, in an empty context."""
        ids = self._ids(count)

        def work() -> None:
            self._session.reset()
            self._session.prefill(ids)

        return self._measure("prefill", count, work)

    def decode(self, count: int, depth: int = 0) -> Rates:
        """Of single tokens, after ``depth`` others.

        Raises:
            ContextError: they do not fit the context.
        """
        session, ids = self._session, self._ids(count).tolist()
        session.reset()
        if depth:
            session.prefill(self._ids(depth))
        start = session.snapshot()

        def work() -> None:
            session.restore(start)
            for token_id in ids:
                session.decode(token_id)

        return self._measure("decode", count, work)

    def decode_together(self, sequences: int, count: int) -> Rates:
        """Of ``count`` tokens of each of several sequences, one of each in every step.

        Raises:
            ContextError: the sequences do not fit the context.
            OptionError: a step does not take so many sequences.
        """
        engine = self._session.engine
        if sequences > engine.max_step:
            raise OptionError(
                f"a step takes at most {engine.max_step} sequences, not {sequences}",
                remedy="measure fewer: --batch",
            )
        if count > engine.context:
            raise ContextError(f"{count} tokens do not fit the context of {engine.context}")
        ids, rows = self._ids(sequences * count).reshape(count, sequences, 1), np.zeros(1, np.int64)

        def work() -> None:
            caches = [engine.new_cache() for _ in range(sequences)]
            for step in ids:
                engine.step(caches, step, rows)

        return self._measure("batch", sequences * count, work)

    def profile(self, prompt_tokens: int, tokens: int) -> dict[str, list[KernelTime]]:
        """The time of each kernel in a prefill step, and in a decode step after it: the median ones of several.

        Raises:
            SessionError: the engine does not know.
        """
        engine = self._session.engine
        calls = _read_calls(self._session.artifact)
        prompt = self._ids(min(prompt_tokens, engine.max_step, max(1, engine.context - tokens)))[None]
        prefills, decodes = [], []
        for _ in range(self._repetitions + 1):
            cache = engine.new_cache()
            prefills.append(self._timed_step(cache, prompt))
        for token_id in self._ids(min(tokens, engine.context - prompt.size)):
            decodes.append(self._timed_step(cache, np.full((1, 1), token_id)))
        steps = {"decode": decodes, "prefill": prefills[1:]}
        counts = {"decode": 1, "prefill": prompt.size}
        return {
            name: _kernel_times(
                calls, *sorted(timed, key=lambda step: step[0])[len(timed) // 2], counts[name]
            )
            for name, timed in steps.items()
            if timed
        }

    def _timed_step(self, cache: Any, ids: Ids) -> tuple[float, Ids]:
        """How many seconds a step took, and the ticks of each of its calls."""
        engine = self._session.engine
        started = time.perf_counter()
        engine.step([cache], ids, np.array([ids.size - 1]))
        seconds = time.perf_counter() - started
        assert engine.ticks is not None
        return seconds, np.diff(engine.ticks)

    def _ids(self, count: int) -> Ids:
        return np.random.default_rng(0).integers(self._session.vocab_size, size=count)

    def _measure(self, stage: str, count: int, work: Callable[[], None]) -> Rates:
        return Rates.measure(stage, count, self._repetitions, self._progress, work)


@dataclass(frozen=True)
class KernelTime:
    """What all calls of a kernel in a step took; rates are None where it reads no weights."""

    kernel: str
    calls: int
    microseconds: float
    share: float
    gigabytes_per_second: float | None
    gigaoperations_per_second: float | None


def _read_calls(artifact: Artifact) -> list[dict[str, Any]]:
    if _KERNELS not in artifact.manifest.files:
        raise SessionError(
            "only artifacts of the tvm backend tell the time of each kernel",
            source=artifact.path,
            remedy="compile the model with --backend tvm",
        )
    calls: list[dict[str, Any]] = json.loads(artifact.file(_KERNELS).read_bytes())[
        choose_library(artifact).file
    ]
    return calls


def _kernel_times(
    calls: Sequence[dict[str, Any]], seconds: float, ticks: Ids, tokens: int
) -> list[KernelTime]:
    """Ticks per kernel as times, the longest first: the whole step, with what is around the calls, took ``seconds``."""
    times = seconds * ticks / ticks.sum()
    sums: dict[str, list[float]] = {}
    for call, taken in zip(calls, times, strict=True):
        amount = tokens if call["amount"] == "tokens" else 1
        facts = (1, float(taken), call["bytes_read"], 2 * amount * call["multiplications"])
        before = sums.get(call["kernel"], [0, 0.0, 0, 0])
        sums[call["kernel"]] = [a + b for a, b in zip(before, facts)]
    return [
        KernelTime(
            kernel,
            int(count),
            taken * 1e6,
            taken / seconds,
            read / taken / 1e9 if read else None,
            operations / taken / 1e9 if operations else None,
        )
        for kernel, (count, taken, read, operations) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]


def streaming_bandwidth(threads: int) -> float:
    """Bytes per second that so many threads read from memory: numpy ORs 256 MiB together, the best of 5 times."""
    parts = np.array_split(np.zeros(_STREAMED_BYTES // 8, np.int64), threads)
    for part in parts:
        part.fill(1)  # untouched pages would all be the same one
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - started)
    return _STREAMED_BYTES / best


def bytes_per_token(manifest: Manifest) -> int:
    """The weights that decoding a token reads: of experts those that it uses, of a table that is looked up none."""
    names = {weight.name for weight in manifest.weights}
    looked_up = {"token_embd.weight"} if "output.weight" in names else set()
    read = (weight for weight in manifest.weights if weight.name not in looked_up)
    used = manifest.model.experts_used
    return sum(
        weight.stored_bytes * used // weight.shape[0] if len(weight.shape) == 3 else weight.stored_bytes
        for weight in read
    )


def to_json(report: dict[str, Any]) -> str:
    """The report as a script reads it."""
    return json.dumps(report, indent=2, default=asdict)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines."""
    repetitions = report["repetitions"]
    for stage in ("prefill", "decode", "depth", "batch"):
        if stage not in report:
            continue
        facts, rates = report[stage], report[stage]["tokens_per_second"]
        line = (
            f"{stage:8}{facts['tokens']:6} tokens {rates.median:10.1f} tokens/s"
            f"   ({rates.min:.1f} to {rates.max:.1f} in {repetitions})"
        )
        if stage == "depth":
            line += f"; decode after {facts['depth']} tokens, {facts['ratio']:.2f} of the speed at the start"
        if stage == "batch":
            line += f"; {facts['sequences']} sequences together, {facts['ratio']:.2f} times one"
        yield line
    if "adapters" in report:
        yield from lines(report["adapters"], report.get("batch", {}).get("sequences"))
    memory = report["memory"]
    yield (
        f"memory  {memory['gigabytes_per_second']:6.1f} GB/s read by numpy in {memory['threads']} threads; "
        f"decoding reads {memory['bytes_per_token'] / 1e6:.1f} MB of weights a token, "
        f"{memory['fraction']:.0%} of that rate"
    )
    for stage, kernels in report.get("profile", {}).items():
        yield ""
        yield from _kernel_table(stage, kernels)


def _kernel_table(stage: str, kernels: Sequence[KernelTime]) -> Iterator[str]:
    width = max(len(kernel.kernel) for kernel in kernels)
    yield f"{stage + ' step':{width}}  calls        µs   share    GB/s   GOP/s"
    for kernel in kernels:
        rates = (kernel.gigabytes_per_second, kernel.gigaoperations_per_second)
        shown = "".join(f"{'' if rate is None else format(rate, '.1f'):>8}" for rate in rates)
        yield f"{kernel.kernel:{width}}{kernel.calls:7}{kernel.microseconds:10.1f}{kernel.share:8.1%}{shown}".rstrip()
    total = sum(kernel.microseconds for kernel in kernels)
    yield f"{'all':{width}}{sum(kernel.calls for kernel in kernels):7}{total:10.1f}"
