"""Tuning: measure the candidates of many problems, those first that cost a model most, and remember every result."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlxc.backends.tvm.database import Database, seconds_of
from rlxc.backends.tvm.kernels.kernel import Knobs
from rlxc.backends.tvm.measure import Measurer, RpcAddress
from rlxc.backends.tvm.problem import Problem

BATCH = 16
"""Candidates that are built before they are measured: few enough to stop in time, enough to keep all cores busy."""


class Target(Protocol):
    """What is measured for."""

    @property
    def name(self) -> str:
        """The target's name in databases."""

    @property
    def llvm(self) -> Any:
        """The target as TVM takes it."""


@dataclass(frozen=True)
class Result:
    """What is known about a problem: its default setting's time and the fastest one's, None where none works.

    ``measured`` of the problem's candidates are known to work or to fail, of them ``failed`` fail.
    """

    problem: Problem
    default_seconds: float | None
    best: Knobs | None
    best_seconds: float | None
    measured: int
    failed: int


@dataclass(frozen=True)
class Trial:
    """A candidate has been measured.

    Attributes:
        result: what is known about its problem now.
        knobs: the candidate's setting.
        seconds: of a call; None if it could not be built or run.
        error: why, in one line.
        done: trials of this run so far.
        total: trials of this run if time suffices.
    """

    result: Result
    knobs: Knobs
    seconds: float | None
    error: str | None
    done: int
    total: int


@dataclass(frozen=True)
class Summary:
    """What tuning came to: each problem's result, and whether every candidate of every problem is known."""

    results: tuple[Result, ...]
    trials: int
    failed: int
    complete: bool


def tune(
    problems: Sequence[Problem],
    target: Target,
    database: Database,
    *,
    trials: int | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    rpc: RpcAddress | None = None,
    report: Callable[[Trial], None] | None = None,
) -> Summary:
    """Measure candidates, and write each result to the database at once.

    What the database's last folder has is not measured again, unless it failed. First comes each problem's default;
    then the problems share the trials in proportion to the time that a model spends in them.

    Args:
        problems: what to tune, each by a name of its own.
        target: what their kernels are compiled for.
        database: gets the results.
        trials: measurements at most.
        seconds: wall-clock time after which no measurement starts.
        threads: threads that kernels run with; None for all cores, or what the RPC server was started with.
        rpc: machines that run the kernels; None for this one.
        report: told about every measurement. Whatever it raises ends tuning, as Ctrl-C does; no result is lost.

    Raises:
        UnsupportedError: packages are missing or do not fit each other.
        OptionError: there is no such RPC tracker, or it has no machine of that key.
        OSError: the database cannot be written.
    """
    stop_at = math.inf if seconds is None else time.monotonic() + seconds
    searches = [_Search.start(problem, target.name, database) for problem in problems]
    total = sum(len(search.waiting) for search in searches)
    total = total if trials is None else min(trials, total)
    done = failed = 0
    if total == 0 or time.monotonic() >= stop_at:
        return _summary(searches, done, failed)
    with Measurer(target.llvm, threads=threads, rpc=rpc) as measurer:
        while done < total and time.monotonic() < stop_at:
            batch = _next(searches, min(BATCH, total - done))
            measurer.check()
            builds = measurer.build([(search.problem, knobs) for search, knobs in batch])
            for (search, knobs), build in zip(batch, builds):
                if time.monotonic() >= stop_at:
                    search.waiting.append(knobs)
                    continue
                run_secs, error = None, build.error
                if build.file is not None:
                    run_secs, error = measurer.run(search.problem, build.file)
                database.add(search.problem, target.name, target.llvm, knobs, run_secs)
                search.learn(knobs, run_secs)
                done += 1
                failed += run_secs is None
                if report is not None:
                    taken = seconds_of(run_secs) if run_secs else None
                    why = None if error is None else (error.strip().splitlines() or ["no reason given"])[-1]
                    report(Trial(search.result(), knobs, taken, why, done, total))
    return _summary(searches, done, failed)


@dataclass
class _Search:
    """The state of one problem: the settings that wait, from the last to the first, and the times of the others."""

    problem: Problem
    waiting: list[Knobs]
    times: list[tuple[Knobs, float]] = field(default_factory=list)

    @classmethod
    def start(cls, problem: Problem, target: str, database: Database) -> _Search:
        """Go on from what the database knows: the default first, next what is best elsewhere, the rest in any order."""
        default, *others = problem.space
        random.Random(problem.name).shuffle(others)
        elsewhere = database.best(problem, target)
        others.sort(key=lambda knobs: knobs != elsewhere)
        search = cls(problem, [])
        for knobs in (*reversed(others), default):
            known = database.seconds(problem, target, knobs)
            if known is None or known == math.inf:
                search.waiting.append(knobs)
            else:
                search.times.append((knobs, known))
        return search

    def share(self, picked: int) -> float:
        """How much the next trial matters: the time that a model spends here, for every trial that it got."""
        tried = len(self.times) + picked
        if tried == 0:
            return math.inf
        best = min((seconds for _, seconds in self.times), default=math.inf)
        return self.problem.weight * best / tried if best < math.inf else 0.0

    def learn(self, knobs: Knobs, run_secs: list[float] | None) -> None:
        self.times.append((knobs, seconds_of(run_secs) if run_secs else math.inf))

    def result(self) -> Result:
        works = [(knobs, seconds) for knobs, seconds in self.times if seconds < math.inf]
        best, best_seconds = min(works, key=lambda entry: entry[1], default=(None, None))
        default = next((seconds for knobs, seconds in works if knobs == self.problem.space[0]), None)
        failed = len(self.times) - len(works)
        return Result(self.problem, default, best, best_seconds, len(self.times), failed)


def _next(searches: Sequence[_Search], count: int) -> list[tuple[_Search, Knobs]]:
    """Take the candidates that matter most from those that wait: `count`, or fewer if that depends on their times."""
    picked: list[tuple[_Search, Knobs]] = []
    while len(picked) < count:
        waiting = [search for search in searches if search.waiting]
        times = {id(search): sum(other is search for other, _ in picked) for search in waiting}
        comparable = [search for search in waiting if search.times or not times[id(search)]]
        if not comparable and len(waiting) != 1:
            break
        search = max(comparable or waiting, key=lambda search: search.share(times[id(search)]))
        picked.append((search, search.waiting.pop()))
    return picked


def _summary(searches: Sequence[_Search], trials: int, failed: int) -> Summary:
    complete = not any(search.waiting for search in searches)
    return Summary(tuple(search.result() for search in searches), trials, failed, complete)
