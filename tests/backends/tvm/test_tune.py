"""Tuning a tiny kernel for real: here, through an RPC tracker on loopback, interrupted, and by the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import tvm
from tvm import rpc
from tvm.rpc.server import Server
from tvm.rpc.tracker import Tracker
from tvm.target import codegen
from tvm.tirx import Broadcast, Ramp, Var
from tvm.tirx.script.builder import ir as T
from typer.testing import CliRunner, Result

from rlxc.backends.tvm.database import RECORDS, Database
from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Kernel, Knobs, Number, Pointer, serial, when
from rlxc.backends.tvm.measure import RpcAddress
from rlxc.backends.tvm.problem import Filled, Problem, call_data, measured_module
from rlxc.backends.tvm.tune import Trial, tune
from rlxc.cli import app
from rlxc.cli import tune as command
from rlxc.errors import OptionError, UnsupportedError

ELEMENTS = 1024
BROKEN, CRASHES = 3, 5
"""Lane counts that do not compile, and that crash the process."""


class Host(NamedTuple):
    name: str
    llvm: Any


HOST = Host("host", tvm.target.Target({"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())}))


def scale(knobs: Knobs) -> Kernel:
    """``y[i] = 2 x[i]`` for ``i`` from ``start[0]`` to ``n``, so many lanes at a time."""
    lanes = knobs["lanes"]

    def body(n: Expr, x: Buffer, start: Buffer, y: Buffer) -> None:
        with serial((n - start[0]) // lanes) as i:
            at = Ramp(start[0] + i * lanes, 1, lanes)
            T.buffer_store(y, x[at] * Broadcast(T.float32(2), lanes), [at])
        if lanes == BROKEN:
            T.buffer_store(y, T.float32(1), [Var("nowhere", "int32")])
        if lanes == CRASHES:
            with when(n > 0):
                T.buffer_store(y, T.float32(1), [T.int64(1 << 44)])

    params = (Number("n"), Pointer("x", "float32"), Pointer("start", "int32"), Pointer("y", "float32"))
    return Kernel(f"scale_{lanes}", params, body)


def problem(name: str = "scale 1024", lanes: tuple[int, ...] = (2, 4, 8), weight: int = 1) -> Problem:
    arguments = (ELEMENTS, ELEMENTS, Filled(1, 8), ELEMENTS)
    space = tuple({"lanes": count} for count in lanes)
    return Problem(name, space, scale, arguments, 8 * ELEMENTS, ELEMENTS, weight)


def records(folder: Path) -> list[str]:
    return (folder / HOST.name / RECORDS).read_text().splitlines()


def test_measured_function_is_the_kernel() -> None:
    library = tvm.tirx.build(measured_module(problem(), {"lanes": 4}), target=HOST.llvm)
    x = np.arange(ELEMENTS, dtype=np.float32)
    tensors = [np.array([ELEMENTS], np.int32), x, np.array([8], np.int32), np.zeros_like(x)]
    tensors = [tvm.runtime.tensor(array) for array in tensors]
    library["main"](*tensors)
    expected = 2 * x
    expected[:8] = 0
    np.testing.assert_array_equal(tensors[3].numpy(), expected)  # doubling is exact


def test_call_data_says_what_every_tensor_holds() -> None:
    numbers, x, start, y = map(astuple, call_data(problem()))
    assert numbers == ("int32", 1, (ELEMENTS,))
    assert x == y == ("float32", ELEMENTS, None)
    assert start == ("int32", 1, 8)


def test_candidates_are_measured_and_those_that_fail_are_skipped(tmp_path: Path) -> None:
    trials: list[Trial] = []
    candidates = problem(lanes=(2, BROKEN, CRASHES, 8))
    summary = tune([candidates], HOST, Database(tmp_path), threads=1, report=trials.append)
    assert (summary.trials, summary.failed, summary.complete) == (4, 2, True)
    taken = {trial.knobs["lanes"]: trial.seconds for trial in trials}
    assert taken[BROKEN] is None and taken[CRASHES] is None
    assert [(trial.done, trial.total) for trial in trials] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert trials[0].knobs == candidates.space[0]
    errors = {trial.knobs["lanes"]: trial.error for trial in trials}
    assert "nowhere" in str(errors[BROKEN]) and "terminated" in str(errors[CRASHES])
    (result,) = summary.results
    assert result == trials[-1].result
    assert result.default_seconds == taken[2]
    assert result.best_seconds == min(taken[2], taken[8])
    assert 0 < result.best_seconds < 1e-3
    database = Database(tmp_path)
    assert database.best(candidates, HOST.name) == result.best
    assert database.seconds(candidates, HOST.name, {"lanes": 8}) == taken[8]


def test_trials_go_where_a_model_spends_its_time(tmp_path: Path) -> None:
    light, heavy = problem("light"), problem("heavy", weight=1000)
    database = Database(tmp_path)
    for each in (light, heavy):
        database.add(each, HOST.name, HOST.llvm, each.space[0], [1e-6])
    summary = tune([light, heavy], HOST, database, trials=2, threads=1)
    assert [result.measured for result in summary.results] == [1, 3]
    assert (summary.trials, summary.complete, len(records(tmp_path))) == (2, False, 4)


def test_no_time_means_no_trial(tmp_path: Path) -> None:
    summary = tune([problem()], HOST, Database(tmp_path), seconds=0, threads=1)
    assert (summary.trials, summary.complete, summary.results[0].best) == (0, False, None)
    assert command._line(summary.results[0]).endswith(": not measured yet")


def test_ctrl_c_keeps_what_was_measured_for_the_next_run(tmp_path: Path) -> None:
    candidates = problem(lanes=tuple(range(6, 6 + 7)))
    measured = []

    def report(trial: Trial) -> None:
        measured.append(trial.knobs)
        if trial.done == 2:
            # While the third is measured: a Ctrl-C that comes in the middle of TVM's code.
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        tune([candidates], HOST, Database(tmp_path), threads=1, report=report)
    kept = len(records(tmp_path))
    assert 2 <= len(measured) <= kept < 7
    summary = tune([candidates], HOST, Database(tmp_path), trials=0)
    assert (summary.results[0].measured, summary.complete) == (kept, False)


@pytest.fixture(scope="module")
def loopback() -> Iterator[RpcAddress]:
    """A tracker, and a server with two threads, as processes of their own."""
    tracker = Tracker(host="127.0.0.1", port=9190, port_end=9990, silent=True)
    server = Server(
        host="127.0.0.1",
        port=9190,
        port_end=9990,
        tracker_addr=("127.0.0.1", tracker.port),
        key="loop",
        silent=True,
    )
    queue = rpc.connect_tracker("127.0.0.1", tracker.port)
    give_up = time.monotonic() + 20
    while not queue.summary()["server_info"]:  # the server registers when it is ready
        assert time.monotonic() < give_up
    queue.close()
    yield RpcAddress("127.0.0.1", tracker.port, "loop")
    server.terminate()
    tracker.terminate()


def test_rpc_tracker_s_machine_is_tuned(
    tmp_path: Path, loopback: RpcAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlxc.backends.tvm.tune.BATCH", 2)
    summary = tune([problem()], HOST, Database(tmp_path), threads=2, rpc=loopback)
    assert (summary.trials, summary.failed) == (3, 0)
    best = summary.results[0].best
    assert Database(tmp_path).best(problem(), HOST.name) == best
    last = json.loads(records(tmp_path)[-1])
    assert all(0 < seconds < 1e-3 for seconds in last[1][1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="links a library for a server without LLVM")
def test_machine_without_llvm_gets_a_shared_library(
    tmp_path: Path, loopback: RpcAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlxc.backends.tvm.measure._LOADS_LLVM", "no such function")
    summary = tune([problem(lanes=(4,))], HOST, Database(tmp_path), rpc=loopback)
    assert (summary.trials, summary.failed) == (1, 0)


def test_threads_that_the_server_does_not_have_are_refused(tmp_path: Path, loopback: RpcAddress) -> None:
    with pytest.raises(
        OptionError, match="the server runs 2 threads, not 64; start it with TVM_NUM_THREADS=64"
    ):
        tune([problem()], HOST, Database(tmp_path), threads=64, rpc=loopback)


def test_key_that_the_tracker_does_not_have_is_named(tmp_path: Path, loopback: RpcAddress) -> None:
    other = replace(loopback, key="phone")
    with pytest.raises(OptionError, match=f"127.0.0.1:{loopback.port}, key phone: no machine of that key"):
        tune([problem()], HOST, Database(tmp_path), rpc=other)


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_tracker_that_is_not_there_is_named(tmp_path: Path, closed_port: int) -> None:
    nobody = RpcAddress("127.0.0.1", closed_port, "phone")
    with pytest.raises(OptionError, match=f"127.0.0.1:{closed_port}, key phone: the tracker does not answer"):
        tune([problem()], HOST, Database(tmp_path), rpc=nobody)


def test_packages_that_would_crash_the_process_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm, "__version__", "0.27.0")
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.15")
    with pytest.raises(UnsupportedError, match=r"pip install 'apache-tvm-ffi<0\.1\.15'"):
        tune([problem()], HOST, Database(tmp_path))


Call = Callable[..., Result]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run ``rlxc tune`` in this process, with the tiny problem in place of a model's."""
    monkeypatch.setattr(command, "_problems", lambda model, target: [problem()])
    arguments = ["tune", "model.gguf", "--database", str(tmp_path)]
    return lambda *more: CliRunner().invoke(app, [*arguments, *map(str, more)])


def test_command_prints_what_it_found_and_where_it_is(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call("--trials", 1, "--threads", 1)
    assert first.exit_code == 0, first.output
    assert "scale 1024: " in first.stdout and "(1.00 × the default's speed): lanes 2" in first.stdout
    assert f"{tmp_path}: 1 measurements for " in first.stdout and "run it again to go on" in first.stdout
    monkeypatch.setattr(command, "_problems", lambda model, target: [problem(lanes=(2,))])
    facts = json.loads(call("--json").stdout)  # there is nothing left to measure
    assert (facts["trials"], facts["complete"], facts["database"]) == (0, True, str(tmp_path))
    assert facts["problems"][0]["best"] == {"lanes": 2}


def test_command_says_what_an_interrupt_left(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlxc.backends.tvm.tune.tune", interrupted)
    result = call()
    assert (result.exit_code, result.stderr) == (130, f"0 measurements are kept in {tmp_path}\ninterrupted\n")


def test_command_names_a_tracker_that_is_not_there(call: Call, closed_port: int) -> None:
    result = call("--target", "x86-64-v3", "--rpc", f"127.0.0.1:{closed_port}", "--key", "phone")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: RPC tracker 127.0.0.1:{closed_port}, key phone: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rpc", "host:9190"],
        ["--rpc", "host:port", "--target", "x86-64-v3"],
        ["--rpc", ":9190", "--target", "x86-64-v3"],
        ["--trials", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_has_exit_code_2(call: Call, arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2
