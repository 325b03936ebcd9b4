"""Pools of threads: their size, who runs in them, and what they leave as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm_ffi")

import rlxc
from rlxc.runtime.engines.pool import count_workers, pool_of

PROCESSORS = os.cpu_count() or 1
COUNTS = sorted({1, 2, PROCESSORS} & set(range(1, PROCESSORS + 1)))


def workers(threads: int) -> int:
    found: list[int] = []
    pool_of(threads).call(lambda: found.append(count_workers()))
    return found[0]


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def test_each_pool_has_the_threads_asked_for() -> None:
    assert [workers(count) for count in (*COUNTS, *reversed(COUNTS))] == [*COUNTS, *reversed(COUNTS)]


def test_calls_from_many_threads_run_in_one() -> None:
    seen = []
    pool = pool_of(1)
    callers = [
        threading.Thread(target=lambda: pool.call(lambda: seen.append(threading.get_ident())))
        for _ in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_error_reaches_the_caller_and_the_pool_goes_on() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        pool_of(1).call(fail)
    assert workers(1) == 1


def test_interrupted_caller_waits_for_what_runs() -> None:
    finished = []

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)  # the signal arrives meanwhile
        finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        pool_of(1).call(work)
    assert finished == [True]


def test_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """if True:
        import os
        before = dict(os.environ)
        from rlxc.runtime.engines.pool import pool_of
        pool_of(1)
        assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
    """
    for name in ("TVM_BIND_THREADS", "TVM_THREAD_POOL_SPIN_COUNT"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_workers_may_run_anywhere() -> None:
    code = """if True:
        import os
        from rlxc.runtime.engines.pool import pool_of
        pool_of(os.cpu_count())
        everywhere = os.sched_getaffinity(0)
        tasks = os.listdir("/proc/self/task")
        assert all(os.sched_getaffinity(int(task)) == everywhere for task in tasks)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def expected(tvm_artifact: Path) -> Any:
    with rlxc.load(tvm_artifact, threads=1) as session:
        return session.prefill(range(2, 40))


def test_every_number_of_threads_gives_the_same_logits(tvm_artifact: Path, expected: Any) -> None:
    for threads in COUNTS:
        with rlxc.load(tvm_artifact, threads=threads) as session:
            np.testing.assert_array_equal(session.prefill(range(2, 40)), expected)


def test_sessions_with_different_numbers_of_threads_take_turns(tvm_artifact: Path) -> None:
    sessions = [rlxc.load(tvm_artifact, threads=threads) for threads in COUNTS * 2]
    for token_id in range(2, 8):
        logits = [session.decode(token_id) for session in sessions]
        for other in logits[1:]:
            np.testing.assert_array_equal(other, logits[0])
    assert [workers(count) for count in COUNTS] == COUNTS
    for session in sessions:
        session.close()


@pytest.mark.parametrize("counts", [[1, PROCESSORS], [PROCESSORS, PROCESSORS]], ids=["different", "equal"])
def test_sessions_run_at_the_same_time_in_threads(
    tvm_artifact: Path, expected: Any, counts: list[int]
) -> None:
    results: list[list[Any]] = [[] for _ in counts]

    def use(threads: int, results: list[Any]) -> None:
        with rlxc.load(tvm_artifact, threads=threads) as session:
            for _ in range(20):
                session.reset()
                results.append(session.prefill(range(2, 40)))

    users = [threading.Thread(target=use, args=pair) for pair in zip(counts, results)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert [len(found) for found in results] == [20, 20]
    for logits in [*results[0], *results[1]]:
        np.testing.assert_array_equal(logits, expected)


@pytest.mark.skipif(
    PROCESSORS == 1 or not Path("/proc/self/task").exists(), reason="needs workers, and Linux's /proc"
)
def test_using_a_session_from_many_threads_gathers_no_workers(tvm_artifact: Path) -> None:
    with rlxc.load(tvm_artifact, threads=PROCESSORS) as session:
        session.decode(5)
        before = tasks()
        for _ in range(20):
            user = threading.Thread(target=session.decode, args=(5,))
            user.start()
            user.join()
        # A pool for each user would be 20 workers or more. One that was joined may not be gone yet.
        assert tasks() < before + 10


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_idle_session_uses_no_cpu(tvm_artifact: Path) -> None:
    code = """if True:
        import os, sys, time
        import rlxc
        session = rlxc.load(sys.argv[1], threads=os.cpu_count())
        for _ in range(20):
            session.decode(5)
        time.sleep(0.3)  # workers look out for work for a while
        before = time.process_time()
        time.sleep(0.3)
        print(time.process_time() - before)
    """
    # A worker that spins would take all of the 0.3 s.
    assert float(run(code, tvm_artifact)) < 0.03


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_process_goes_on_by_itself(tvm_artifact: Path) -> None:
    code = """if True:
        import os, sys
        import numpy as np
        import rlxc
        session = rlxc.load(sys.argv[1], threads=os.cpu_count())
        session.prefill([5, 6, 7])
        alone = [session.decode(8), session.decode(9)]
        session.reset()
        session.prefill([5, 6, 7])
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(read, 1)  # until the parent has written where this writes now
            session.decode(10)
            os._exit(0)
        np.testing.assert_array_equal(session.decode(8), alone[0])
        os.write(write, b"x")
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_array_equal(session.decode(9), alone[1])
    """
    run(code, tvm_artifact)
