"""What sessions and their forks share: it stays loaded while one of them lives, and serves one thread at a time."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlxc.errors import SessionError
from rlxc.runtime import Session, load
from rlxc.runtime.engines import Engine

Open = Callable[..., Session]
IDS = list(range(10, 20))


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    """What is freed is freed because nobody refers to it."""
    gc.disable()
    yield
    gc.enable()


def cache_of(session: Session) -> weakref.ref[Any]:
    """The memory of a session's sequence."""
    return weakref.ref(session._sequence.cache)


# --- closing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_engine_is_closed_with_the_last_of_a_session_and_its_forks(
    session: Session, engine: Any, order: tuple[int, ...]
) -> None:
    fork = session.fork()
    family = [session, fork, fork.fork()]
    for number in order:
        assert not engine.closed
        family[number].close()
    assert engine.closed


def test_others_go_on_when_one_is_closed(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    first, second = session.fork(), session.fork()
    first.decode(5)
    session.close()
    np.testing.assert_array_equal(second.decode(6), engine.logits([*IDS, 6]))
    np.testing.assert_array_equal(first.decode(7), engine.logits([*IDS, 5, 7]))


def test_closing_a_fork_twice_counts_once(session: Session, engine: Any) -> None:
    fork = session.fork()
    fork.close()
    fork.close()
    assert not engine.closed
    session.prefill(IDS)


@pytest.mark.parametrize(
    "use",
    [
        lambda session, snapshot: session.prefill([1]),
        lambda session, snapshot: session.snapshot(),
        lambda session, snapshot: session.restore(snapshot),
        lambda session, snapshot: session.load_snapshot("a"),
        lambda session, snapshot: session.truncate(0),
        lambda session, snapshot: session.fork(),
        lambda session, snapshot: session.stream([1]),
        lambda session, snapshot: session.adapters.pop(),
        lambda session, snapshot: session.position,
        lambda session, snapshot: session.tokenizer,
        lambda session, snapshot: session.chat_template,
    ],
)
def test_closed_fork_is_refused_and_its_origin_is_not(
    session: Session, use: Callable[[Session, Any], object]
) -> None:
    session.prefill(IDS)
    snapshot = session.snapshot()
    fork = session.fork()
    fork.close()
    with pytest.raises(SessionError, match="the session is closed; load the artifact again"):
        use(fork, snapshot)
    assert session.position == len(IDS)


@pytest.mark.usefixtures("without_garbage_collection")
def test_closed_session_lets_go_of_its_sequence(session: Session) -> None:
    session.prefill(IDS)
    fork = session.fork()
    memory = cache_of(fork)
    fork.close()
    assert memory() is None


def test_snapshot_outlives_its_session(session: Session, tmp_path: Path) -> None:
    session.prefill(IDS)
    snapshot = session.snapshot()
    session.close()
    assert snapshot.layers()[0].keys[:, 0].tolist() == IDS  # of the fake engine
    snapshot.save(tmp_path / "a")


# --- what nobody closes -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_garbage_collection")
def test_fork_that_is_let_go_of_is_gone_at_once(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    fork = session.fork()
    fork.generate([5, 6], max_tokens=3)
    memory = cache_of(fork)
    del fork
    assert memory() is None
    assert not engine.closed
    session.close()
    assert engine.closed


@pytest.mark.usefixtures("without_garbage_collection")
def test_engine_is_closed_when_the_last_fork_is_let_go_of(session: Session, engine: Any) -> None:
    fork = session.fork()
    session.close()
    assert not engine.closed
    del fork
    assert engine.closed


@pytest.mark.usefixtures("without_garbage_collection")
def test_stream_keeps_its_session(session: Session, engine: Any) -> None:
    stream = session.fork().stream(IDS, max_tokens=3)
    session.close()
    assert len(stream.completion().ids) == 3
    assert not engine.closed
    del stream
    assert engine.closed


def test_engine_is_closed_once_where_no_session_can_be_made(
    make_artifact: Any, fake_engine: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    class Small(fake_engine):  # type: ignore[misc]
        def new_cache(self) -> Any:
            raise MemoryError

        def close(self) -> None:
            closed.append(self)

    module = sys.modules[load.__module__]  # which the function has hidden
    monkeypatch.setattr(module, "find_engine", lambda *arguments: lambda *arguments: Small())
    with pytest.raises(SessionError, match="not enough memory"):
        load(make_artifact().path)
    gc.collect()
    assert len(closed) == 1


# --- threads and interrupts ---------------------------------------------------------------------------------------


class Gate:
    """An engine's step that waits to be let through."""

    def __init__(self, engine: Engine[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()
        step = engine.step

        def slow(*arguments: Any) -> Any:
            self.entered.set()
            assert self.leave.wait(60)
            return step(*arguments)

        monkeypatch.setattr(engine, "step", slow)


@pytest.mark.parametrize(
    "use",
    [
        lambda fork: fork.prefill([2]),
        lambda fork: fork.snapshot(),
        lambda fork: fork.truncate(0),
        lambda fork: fork.fork(),
        lambda fork: next(fork.stream([1])),
        lambda fork: fork.close(),
    ],
    ids=["prefill", "snapshot", "truncate", "fork", "stream", "close"],
)
def test_fork_is_refused_while_another_thread_uses_the_session(
    session: Session, engine: Any, monkeypatch: pytest.MonkeyPatch, use: Callable[[Session], object]
) -> None:
    fork = session.fork()
    gate = Gate(engine, monkeypatch)
    logits: list[Any] = []
    thread = threading.Thread(target=lambda: logits.append(session.prefill(IDS)))
    thread.start()
    assert gate.entered.wait(60)
    try:
        with pytest.raises(SessionError, match="another thread is using the session, or a fork of it"):
            use(fork)
    finally:
        gate.leave.set()
        thread.join()
    np.testing.assert_array_equal(logits[0], engine.logits(IDS))
    np.testing.assert_array_equal(fork.prefill([2]), engine.logits([2]))


def test_fork_may_be_let_go_of_while_another_thread_uses_the_session(
    session: Session, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forks = [session.fork()]
    gate = Gate(engine, monkeypatch)
    logits: list[Any] = []
    thread = threading.Thread(target=lambda: logits.append(session.prefill(IDS)))
    thread.start()
    assert gate.entered.wait(60)
    forks.clear()
    gate.leave.set()
    thread.join()
    np.testing.assert_array_equal(logits[0], engine.logits(IDS))
    assert not engine.closed


@pytest.mark.parametrize("step", [0, 1], ids=["first step", "second step"])
@pytest.mark.parametrize("is_done", [False, True])
def test_interrupted_session_holds_what_was_read(
    session: Session, engine: Any, monkeypatch: pytest.MonkeyPatch, step: int, is_done: bool
) -> None:
    """A Ctrl-C may come before a step has begun, or after it is done."""
    session.prefill([5, 6])
    run, left = engine.step, [step]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return run(*arguments)
        if is_done:
            run(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.prefill([*IDS, *IDS])  # 8 and 8 and 4
    monkeypatch.undo()
    held = [5, 6, *[*IDS, *IDS][: 8 * (step + is_done)]]
    assert session.snapshot().tokens.tolist() == held
    np.testing.assert_array_equal(session.decode(7), engine.logits([*held, 7]))
