"""TVM's runtime library, and its thread pools.

TVM gives every thread that calls it a pool of its own, whose size stays what it was at first, and whose workers never
end. So steps are not run by whoever asks for them, but by one thread for each number of threads: sessions with the same
number take turns, those with different ones run side by side, and a program that uses sessions from many threads of
its own does not gather workers. Handing a step over takes about 10 µs.

Workers are not bound to cores: one on the core of another library's thread would wait for it at every turn. They look
out for work for about a millisecond, which bridges the time between two steps, and sleep then.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import tvm_ffi

# What TVM reads when a pool begins. Whoever sets these has reasons to.
_ENVIRONMENT = {"TVM_BIND_THREADS": "0", "TVM_THREAD_POOL_SPIN_COUNT": "4000"}

_BIG_CORES = 1  # the mode of `config_threadpool` that takes a number of threads

_Task = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def _load_runtime() -> ctypes.CDLL:
    """Load TVM's runtime library, without TVM's Python package: that would take half a second, and 180 MB."""
    package = importlib.util.find_spec("tvm")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'tvm'", name="tvm")
    path = Path(package.origin).parent / "lib" / "libtvm_runtime.so"
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


_RUNTIME = _load_runtime()


class _Job:
    """A call, and what became of it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.error: BaseException | None = None
        self.done = threading.Event()  # a lock, taken just before a Ctrl-C, would be waited for a second time

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - it is for whoever waits
            self.error = error
        self.done.set()

    def wait(self) -> None:
        try:
            self.done.wait()
        except BaseException:  # Ctrl-C: what runs cannot be stopped, and must not be overtaken
            self.done.wait()
            raise
        if self.error is not None:
            raise self.error


class Pool:
    """A thread that calls compiled functions, with TVM's workers at its side: ``threads`` in all."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        # A daemon: it has nothing to finish when the program ends.
        threading.Thread(target=self._run, name=f"rlxc-pool-{threads}", daemon=True).start()
        self.call(self._start)

    def call(self, work: Callable[[], None]) -> None:
        """Do this in the pool's thread, and wait for it."""
        job = _Job(work)
        self._jobs.put(job)
        job.wait()

    def _run(self) -> None:
        while True:
            self._jobs.get().run()

    def _start(self) -> None:
        # As many processors, by any names: unless told of them, TVM takes half of the machine's for all there are.
        processors = list(map(str, range(self.threads)))
        with _environment():
            tvm_ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, self.threads, processors)
            # A worker reads the environment when it begins: it has done so once it has done something.
            count_workers()


def count_workers() -> int:
    """How many threads take part in a parallel loop of the calling thread."""
    seen = []

    def task(index: int, group: object, data: object) -> int:
        seen.append(index)
        return 0

    _RUNTIME.TVMBackendParallelLaunch(_Task(task), None, 0)
    return len(seen)


@contextmanager
def _environment() -> Iterator[None]:
    ours = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


_pools: dict[int, Pool] = {}
_lock = threading.Lock()


def pool_of(threads: int) -> Pool:
    """The pool of that many threads; ask anew for every step."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = Pool(threads)
        return _pools[threads]


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget)
