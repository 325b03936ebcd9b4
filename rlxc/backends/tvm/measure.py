"""Building and timing candidates with TVM's own builders and runners, on this machine or behind an RPC tracker.

Both start processes of their own, so that a candidate that crashes or hangs costs no more than itself. What is built
travels as LLVM's text of the optimised code, which any TVM with LLVM loads without a linker; for a machine whose TVM
has none (the RPC servers for phones) a shared library is linked here.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.rpc import base as rpc_protocol
from tvm.s_tir.meta_schedule.arg_info import TensorInfo
from tvm.s_tir.meta_schedule.builder import BuilderInput, LocalBuilder
from tvm.s_tir.meta_schedule.runner import (
    EvaluatorConfig,
    LocalRunner,
    RPCConfig,
    RPCRunner,
    RunnerInput,
)
from tvm.support.popen_pool import PopenPoolExecutor

from rlxc.backends.tvm.build import PIPELINE
from rlxc.backends.tvm.kernels.kernel import Knobs
from rlxc.backends.tvm.problem import Data, Problem, call_data, measured_module
from rlxc.errors import OptionError, UnsupportedError

BUILD_TIMEOUT, RUN_TIMEOUT, SESSION_TIMEOUT, TRACKER_TIMEOUT = 120, 60, 60, 10
"""Seconds after which a build, a measurement, an RPC session, and a tracker that does not answer are given up."""

# A model's weights come from memory, because a step reads all of them: caches are flushed before each timed call.
_EVALUATION = EvaluatorConfig(number=1, repeat=15, min_repeat_ms=0, enable_cpu_cache_flush=True)

_LOADS_LLVM = "ffi.Module.load_from_file.ll"
_CONFIGURE_THREADS = "runtime.config_threadpool"
_FILL = "tvm.contrib.random.random_fill_for_measure"
_BIG_CORES = 1


# The classes behind TVM's objects. Called through the objects, a Ctrl-C comes back from C++ as a RuntimeError; for the
# same reason `Measurer.run` asks whether a result is there before it calls for it.
_PyBuilder, _PyLocalRunner, _PyRpcRunner = LocalBuilder._cls, LocalRunner._cls, RPCRunner._cls


@dataclass(frozen=True)
class RpcAddress:
    """Machines that a TVM RPC tracker lends: where it listens, and the key under which they registered."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"RPC tracker {self.host}:{self.port}, key {self.key}"


class Measurer:
    """Builds and times candidates, as a context manager.

    Args:
        llvm: the target as TVM takes it.
        threads: threads of the measured kernels; None for all cores that this process may use, or what the RPC
            server was started with.
        rpc: where to run them; None for this machine.

    Raises:
        UnsupportedError: packages that measuring needs are missing, or do not fit each other.
        OptionError: the tracker cannot be reached, or has no machine of that key.
    """

    def __init__(self, llvm: Any, *, threads: int | None, rpc: RpcAddress | None) -> None:
        _check_packages()
        self._llvm, self._threads, self._rpc = llvm, threads, rpc
        self.check()
        self._jobs = _cores()
        linked = False
        if rpc is None:
            enter = partial(_set_threads, threads or self._jobs)
            self._runner = _PyLocalRunner(RUN_TIMEOUT, _EVALUATION, initializer=enter)
        else:
            config = RPCConfig(rpc.host, rpc.port, rpc.key, session_timeout_sec=SESSION_TIMEOUT)
            linked = not _probe(rpc, config, threads)
            self._runner = _PyRpcRunner(config, _EVALUATION)
            # TVM gives this runner's processes no time limit: they would wait for a machine that went away.
            self._runner.pool.shutdown()
            self._runner.pool = PopenPoolExecutor(1, RUN_TIMEOUT + SESSION_TIMEOUT, _silence)
        self._files = tempfile.TemporaryDirectory(prefix="rlxc-tune-")
        self._builder = _PyBuilder(
            max_workers=self._jobs,
            timeout_sec=BUILD_TIMEOUT,
            initializer=_silence,
            f_build=_build,
            f_export=partial(_export, self._files.name, linked),
        )

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.pool.shutdown(wait=False)
        self._files.cleanup()

    def check(self) -> None:
        """Make sure that the tracker is there, and has a machine of that key.

        Raises:
            OptionError: otherwise.
        """
        if self._rpc is not None:
            _check_tracker(self._rpc)

    def build(self, candidates: Sequence[tuple[Problem, Knobs]]) -> list[Build]:
        """Compile candidates, several at a time."""
        inputs = [BuilderInput(measured_module(*candidate), self._llvm) for candidate in candidates]
        results = self._builder.build(inputs)
        return [
            Build(None if result.artifact_path is None else Path(result.artifact_path), result.error_msg)
            for result in results
        ]

    def run(self, problem: Problem, file: Path) -> tuple[list[float] | None, str | None]:
        """The seconds of several calls of a built candidate, or why there are none; the file is removed."""
        data = call_data(problem)
        allocate = _allocate_here if self._rpc is None else partial(_allocate_there, self._threads)
        self._runner.f_alloc_argument = partial(allocate, data)
        tensors = [TensorInfo(entry.dtype, [entry.elements]) for entry in data]
        (future,) = self._runner.run([RunnerInput(str(file), "cpu", tensors)])
        while not future.done():
            time.sleep(0.005)
        result = future.result()
        file.unlink()
        seconds = None if result.run_secs is None else [float(value) for value in result.run_secs]
        return seconds, result.error_msg


@dataclass(frozen=True)
class Build:
    """A built candidate: its file, or why there is none."""

    file: Path | None
    error: str | None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_packages() -> None:
    missing = [name for name in ("psutil", "cloudpickle") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"tuning needs packages that are not installed: {', '.join(missing)}",
            remedy="install them: pip install 'apache-tvm[popen-pool]'",
        )
    ffi = metadata.version("apache-tvm-ffi")
    if tvm.__version__.startswith("0.27.") and not ffi.startswith("0.1.14."):
        # The process would die: TVM 0.27 cannot write any of its types as JSON with a later apache-tvm-ffi.
        raise UnsupportedError(
            f"TVM {tvm.__version__} cannot send functions to other processes with apache-tvm-ffi {ffi}",
            remedy="pip install 'apache-tvm-ffi<0.1.15'",
        )


def _check_tracker(rpc: RpcAddress) -> None:
    """Ask the tracker for its machines; TVM's own client would try for a minute, and never stop waiting for a key."""
    try:
        with socket.create_connection((rpc.host, rpc.port), timeout=TRACKER_TIMEOUT) as connection:
            magic = struct.pack("<i", rpc_protocol.RPC_TRACKER_MAGIC)
            connection.sendall(magic)
            if rpc_protocol.recvall(connection, len(magic)) != magic:
                raise OptionError("no RPC tracker listens there", source=rpc, remedy="check host and port")
            rpc_protocol.sendjson(connection, [rpc_protocol.TrackerCode.SUMMARY])
            _, summary = rpc_protocol.recvjson(connection)
    except OSError as error:
        raise OptionError(
            f"the tracker does not answer: {error}",
            source=rpc,
            remedy="start it: python -m tvm.exec.rpc_tracker, and a server beside every machine",
        ) from error
    if not any(machine["key"] == f"server:{rpc.key}" for machine in summary["server_info"]):
        raise OptionError(
            "no machine of that key is registered",
            source=rpc,
            remedy="start one: python -m tvm.exec.rpc_server --tracker HOST:PORT --key KEY",
        )


def _probe(rpc: RpcAddress, config: RPCConfig, threads: int | None) -> bool:
    """Make sure that a machine can run so many threads; say whether its TVM has LLVM."""
    try:
        session = config.connect_server()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OptionError(
            f"the tracker's machine cannot be reached: {reason}",
            source=rpc,
            remedy="start its server with an address that this machine can reach",
        ) from error
    if threads is not None:
        session.get_function(_CONFIGURE_THREADS)(_BIG_CORES, threads)
        if (there := session.get_function("runtime.NumThreads")()) != threads:
            raise OptionError(
                f"the server runs {there} threads, not {threads}",
                source=rpc,
                remedy=f"start it with TVM_NUM_THREADS={threads}",
            )
    try:
        session.get_function(_LOADS_LLVM)
    except AttributeError:
        return False
    return True


# What follows runs in the processes of the builder and the runner.


def _set_threads(threads: int) -> None:
    os.environ["TVM_NUM_THREADS"] = str(threads)  # read when the first kernel starts the pool


def _silence() -> None:
    """Errors come back as exceptions; what TVM's compiler says besides would run through the progress display."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _build(module: Any, target: Any, _: None) -> Any:
    return tvm.tirx.build(module, target=target, pipeline=PIPELINE)


def _export(folder: str, linked: bool, module: Any) -> str:
    """Write a built module where the runner finds it: `linked` for a machine without LLVM."""
    handle, path = tempfile.mkstemp(suffix=".so" if linked else ".ll", dir=folder)
    os.close(handle)
    if linked:
        from tvm.support import cc, ndk

        module.export_library(
            path, fcompile=ndk.create_shared if "TVM_NDK_CC" in os.environ else cc.create_shared
        )
    else:
        module.write_to_file(path, "ll")
    return path


def _allocate_here(data: Sequence[Data], device: Any, _: object, repeat: int) -> list[list[Any]]:
    fill = tvm.get_global_func(_FILL)
    return [[_tensor(entry, device, fill) for entry in data] for _ in range(repeat)]


def _allocate_there(
    threads: int | None, data: Sequence[Data], session: Any, device: Any, _: object, repeat: int
) -> list[list[Any]]:
    if threads is not None:
        session.get_function(_CONFIGURE_THREADS)(_BIG_CORES, threads)
    fill = session.get_function(_FILL)
    return [[_tensor(entry, device, fill) for entry in data] for _ in range(repeat)]


def _tensor(data: Data, device: Any, fill: Any) -> Any:
    """Random numbers are made where they are needed: weights are too large to be sent for every candidate."""
    tensor = tvm.runtime.empty((data.elements,), data.dtype, device)
    if data.values is None:
        fill(tensor)
    else:
        tensor.copyfrom(np.broadcast_to(np.array(data.values, data.dtype), data.elements))
    return tensor
