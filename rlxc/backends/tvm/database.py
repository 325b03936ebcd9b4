"""Results of tuning, in TVM's JSON database format.

A database is a folder with, for each target, a folder of two files that TVM's ``JSONDatabase`` reads and writes as
well: ``workloads.json`` has a problem in every line, ``records.json`` a measurement. Here the lines are read one by
one and without TVM, so that a damaged one costs no more than itself.
"""

from __future__ import annotations

import base64
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tvm.s_tir import Schedule
from tvm.s_tir.meta_schedule.arg_info import ArgInfo
from tvm.s_tir.meta_schedule.database import TuningRecord, Workload

from rlxc.backends.tvm.kernels.kernel import Knobs
from rlxc.backends.tvm.problem import KNOBS_ATTRIBUTE, NAME_ATTRIBUTE, Problem, knob_names, workload_module

WORKLOADS, RECORDS = "workloads.json", "records.json"

FAILED = 1e10
"""The seconds that TVM records for a candidate that could not be built or run."""

_Setting = tuple[tuple[str, int], ...]
_Times = dict[_Setting, float]
_Read = TypeVar("_Read")


def shipped_folder() -> Path:
    """The database that comes with rlxc, for a few common CPUs."""
    return Path(__file__).with_name("tuned")


def user_folder() -> Path:
    """The user's own database: ``tuned`` in ``$RLXC_CACHE``, or else in the platform's cache folder for rlxc."""
    if chosen := os.environ.get("RLXC_CACHE"):
        return Path(chosen) / "tuned"
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rlxc" / "tuned"


def seconds_of(run_secs: Sequence[float]) -> float:
    """The time that several calls are taken to need: their median; infinity if there was no call."""
    middle = statistics.median(run_secs)
    return math.inf if middle >= FAILED else middle


class Database:
    """Several databases as one; new results go to the last of them."""

    def __init__(self, *folders: Path, warn: Callable[[str], None] = warnings.warn) -> None:
        """The databases in these folders, which need not exist yet.

        Args:
            folders: the later one's results count where several know a problem: the user measured the machine at
                hand, whoever shipped a database another one.
            warn: told about lines that cannot be read.
        """
        if not folders:
            raise ValueError("a database needs a folder")
        self.folders = folders
        self._warn = warn
        self._times: dict[str, list[dict[str, _Times]]] = {}

    def best(self, problem: Problem, target: str) -> Knobs | None:
        """The fastest setting of the problem that was measured on a target of this name; None if none was.

        A setting that is no longer among the problem's candidates does not count.
        """
        known = {_setting(knobs): knobs for knobs in problem.space}
        for database in reversed(self._on(target)):
            times = database.get(problem.name, {})
            works = [setting for setting in known if times.get(setting, math.inf) < math.inf]
            if works:
                return known[min(works, key=lambda setting: times[setting])]
        return None

    def seconds(self, problem: Problem, target: str, knobs: Knobs) -> float | None:
        """How long a call took with these knobs, by the last database; infinity if it failed, None if unknown."""
        return self._on(target)[-1].get(problem.name, {}).get(_setting(knobs))

    def add(
        self, problem: Problem, target: str, llvm: Any, knobs: Knobs, run_secs: Sequence[float] | None
    ) -> None:
        """Write a result to the last database, at once.

        Args:
            problem: what was measured.
            target: the target's name.
            llvm: the target as TVM takes it.
            knobs: the setting, one of ``problem.space``.
            run_secs: the time of each of several calls; None if it could not be built or run.

        Raises:
            OSError: the database cannot be written.
        """
        times = self._on(target)[-1]
        run_secs = list(run_secs) if run_secs else [FAILED]
        module = workload_module(problem)
        workload = Workload(module)
        schedule = Schedule(module)
        for name in knob_names(problem):
            choices = sorted({candidate[name] for candidate in problem.space})
            share = 1 / len(choices)
            schedule.sample_categorical(choices, [share] * len(choices), decision=choices.index(knobs[name]))
        arguments = ArgInfo.from_prim_func(module["main"])
        record = TuningRecord(schedule.trace, workload, run_secs, llvm, arguments)
        folder = self.folders[-1] / target
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may add lines as well. Appending keeps both, and tells only afterwards which line is ours.
        line = _line_of(folder / WORKLOADS, json.dumps(workload.as_json()))
        _append(folder / RECORDS, json.dumps([line, record.as_json()]))
        _remember(times, problem.name, _setting(knobs), run_secs)

    def _on(self, target: str) -> list[dict[str, _Times]]:
        """For each folder, the times on a target: of each problem, by setting."""
        if target not in self._times:
            self._times[target] = [self._load(folder / target) for folder in self.folders]
        return self._times[target]

    def _load(self, folder: Path) -> dict[str, _Times]:
        times: dict[str, _Times] = {}
        workloads = dict(self._parse(folder / WORKLOADS, _read_workload))
        for _, (index, decisions, run_secs) in self._parse(folder / RECORDS, _read_record):
            # Records of an unreadable workload are lost with it, and that line has been named.
            name, knobs = workloads.get(index, ("", []))
            if name and len(knobs) == len(decisions):
                _remember(times, name, tuple(zip(knobs, decisions)), run_secs)
        return times

    def _parse(self, path: Path, read: Callable[[Any], _Read]) -> Iterator[tuple[int, _Read]]:
        """Every line of a file that can be read, after its number from 0."""
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for i, line in enumerate(lines):
            try:
                yield i, read(json.loads(line))
            except (ValueError, LookupError, TypeError, RecursionError):
                self._warn(f"{path}, line {i + 1}: no tuning result that can be read; it is skipped")


def _setting(knobs: Knobs) -> _Setting:
    return tuple(sorted(knobs.items()))


def _remember(times: dict[str, _Times], name: str, setting: _Setting, run_secs: Sequence[float]) -> None:
    known = times.setdefault(name, {})
    known[setting] = min(seconds_of(run_secs), known.get(setting, math.inf))


def _read_workload(line: Any) -> tuple[str, list[str]]:
    """The name and the knobs of a problem, from ``[hash, module]``: the module is a graph of numbered nodes."""
    _, encoded = line
    data = base64.b64decode(encoded, validate=True)
    length = int.from_bytes(data[:8], "little")
    graph = json.loads(data[8 : 8 + length])
    nodes = graph["nodes"]

    def fields(index: int) -> Any:
        return nodes[index]["data"]

    pairs = fields(fields(fields(graph["root_index"])["attrs"])["__dict__"])
    attributes = dict(zip(map(fields, pairs[::2]), pairs[1::2]))
    name = fields(attributes[NAME_ATTRIBUTE])
    knobs = [fields(knob) for knob in fields(attributes[KNOBS_ATTRIBUTE])]
    if not all(isinstance(text, str) for text in (name, *knobs)):
        raise TypeError("names are not text")
    return name, knobs


def _read_record(line: Any) -> tuple[int, list[int], list[float]]:
    """The number of the workload, the value of each knob, and the times, from ``[workload, record]``."""
    index, ((instructions, decisions), run_secs, _, _) = line
    values = []
    for at, choice in decisions:
        kind, _, (choices, _), _ = instructions[at]
        if kind != "SampleCategorical" or not isinstance(choices[choice], int):
            raise ValueError(f"instruction {kind} chooses no knob")
        values.append(choices[choice])
    if not isinstance(index, int) or not all(0 < seconds < math.inf for seconds in run_secs):
        raise ValueError("no times")
    statistics.median(run_secs)
    return index, values, run_secs


def _line_of(path: Path, line: str) -> int:
    """The number, from 0, of a line that is in the file, or is appended to it."""
    wanted = line.encode()
    if not path.exists() or wanted not in path.read_bytes().splitlines():
        _append(path, line)
    return path.read_bytes().splitlines().index(wanted)


def _append(path: Path, line: str) -> None:
    """Write a line in one piece; a line before it that was cut off stays a line of its own."""
    with open(path, "a+b", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")
