"""A session's sequence goes back, and branches: snapshots, truncation and forks, with the adapters it was read with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlxc.artifact import Artifact
from rlxc.errors import OptionError, RollbackError, SessionError, SnapshotError
from rlxc.runtime import Session

Open = Callable[..., Session]
WriteAdapter = Callable[..., Path]

IDS = list(range(10, 30))
ROLLBACK = 6  # how far the fake engine with a window can go back
CALL = [7, 8]  # what invokes the activated adapter


def assert_goes_on(session: Session, engine: Any, ids: Sequence[int], mixes: Sequence[Any] = ()) -> None:
    """The session holds these ids, read with these adapters: its next logits are those of a fresh run."""
    assert session.position == len(ids)
    mixes = [*mixes, *[()] * (len(ids) - len(mixes))]
    with session.fork() as fork:
        while fork.adapters.pop():
            pass
        np.testing.assert_array_equal(fork.decode(99), engine.logits([*ids, 99], [*mixes, ()]))


@pytest.fixture
def windowed(open_session: Open, fake_engine: Any) -> Session:
    """A session on an engine that can go back by 6 tokens only."""
    return open_session(fake_engine(window=True))


# --- snapshots ----------------------------------------------------------------------------------------------------


def test_session_goes_back_to_a_snapshot_as_often_as_one_likes(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    snapshot = session.snapshot()
    for token in (5, 6):
        session.decode(token)
        session.decode(7)
        session.restore(snapshot)
        assert_goes_on(session, engine, IDS)
    assert snapshot.tokens.tolist() == IDS


def test_restoring_and_taking_a_snapshot_read_nothing(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    engine.steps.clear()
    session.restore(session.snapshot())
    assert engine.steps == []


def test_snapshot_of_one_session_goes_on_in_another_of_the_same_model(
    session: Session, open_session: Open, engine: Any
) -> None:
    session.prefill(IDS)
    snapshot = session.snapshot()
    other = open_session()
    other.prefill([3])
    other.restore(snapshot)
    session.close()
    assert_goes_on(other, engine, IDS)


def test_saved_snapshot_is_loaded_and_gone_on_from(
    session: Session, open_session: Open, engine: Any, tmp_path: Path
) -> None:
    session.prefill(IDS)
    session.snapshot().save(tmp_path / "a.snapshot")
    other = open_session()
    other.prefill([3])
    snapshot = other.load_snapshot(tmp_path / "a.snapshot")
    assert_goes_on(other, engine, [3])
    other.restore(snapshot)
    assert_goes_on(other, engine, IDS)


def test_snapshot_of_another_model_changes_nothing(
    session: Session, open_session: Open, make_artifact: Any, split_manifest: Any, engine: Any
) -> None:
    manifest = replace(split_manifest, model=replace(split_manifest.model, fingerprint="1" * 64))
    other = open_session(artifact=make_artifact("other.rlx", manifest=manifest))
    other.prefill([3])
    session.prefill(IDS)
    with pytest.raises(SnapshotError, match="is of another model"):
        session.restore(other.snapshot())
    assert_goes_on(session, engine, IDS)


def test_file_that_is_no_snapshot_changes_nothing(session: Session, engine: Any, tmp_path: Path) -> None:
    session.prefill(IDS)
    (tmp_path / "notes").write_text("These are notes." * 10)
    for name in ("notes", "missing"):
        with pytest.raises(SnapshotError, match=name):
            session.load_snapshot(tmp_path / name)
    assert_goes_on(session, engine, IDS)


def test_path_is_no_snapshot_yet(session: Session, tmp_path: Path) -> None:
    path: Any = tmp_path / "a.snapshot"
    with pytest.raises(OptionError, match=r"is no snapshot; .*load_snapshot\(path\)"):
        session.restore(path)


# --- truncation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 8, 19, 20])
def test_tokens_are_taken_back_without_reading_any(session: Session, engine: Any, position: int) -> None:
    session.prefill(IDS)
    engine.steps.clear()
    session.truncate(position)
    assert engine.steps == []
    assert_goes_on(session, engine, IDS[:position])


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("position", [-1, 21, 10**30])
def test_position_that_is_not_held_is_refused(
    session: Session, engine: Any, position: int, replay: bool
) -> None:
    session.prefill(IDS)
    with pytest.raises(
        RollbackError, match=f"cannot go to position {position}: the sequence holds 20 tokens"
    ):
        session.truncate(position, replay=replay)
    assert_goes_on(session, engine, IDS)


@pytest.mark.parametrize("position", [True, 3.0, "3", None], ids=repr)
def test_position_that_is_no_integer_is_refused(session: Session, position: Any) -> None:
    with pytest.raises(OptionError, match="position must be an integer, got"):
        session.truncate(position)


def test_window_that_is_left_behind_is_an_error_unless_it_is_read_again(windowed: Session) -> None:
    engine: Any = windowed.engine
    windowed.prefill(IDS)
    engine.steps.clear()
    with pytest.raises(RollbackError, match=r"position 13: .* 14 is the first .*replay=True.*--rollback"):
        windowed.truncate(13)
    assert_goes_on(windowed, engine, IDS)
    engine.steps.clear()
    windowed.truncate(13, replay=True)
    assert engine.steps == [8, 5]
    assert_goes_on(windowed, engine, IDS[:13])


def test_window_that_is_held_is_not_read_again(windowed: Session) -> None:
    engine: Any = windowed.engine
    windowed.prefill(IDS)
    engine.steps.clear()
    windowed.truncate(len(IDS) - ROLLBACK, replay=True)
    assert engine.steps == []
    assert_goes_on(windowed, engine, IDS[:-ROLLBACK])


def test_everything_can_always_be_taken_back(windowed: Session) -> None:
    engine: Any = windowed.engine
    windowed.prefill(IDS)
    engine.steps.clear()
    windowed.truncate(0)
    assert engine.steps == []
    assert_goes_on(windowed, engine, [])


# --- forks --------------------------------------------------------------------------------------------------------


def test_forks_go_their_own_ways(session: Session, engine: Any) -> None:
    session.prefill(IDS)
    fork = session.fork()
    fork.decode(5)
    grandchild = fork.fork()
    grandchild.decode(6)
    session.decode(7)
    fork.truncate(3)
    assert_goes_on(session, engine, [*IDS, 7])
    assert_goes_on(fork, engine, IDS[:3])
    assert_goes_on(grandchild, engine, [*IDS, 5, 6])


def test_fork_has_the_same_facts(session: Session) -> None:
    fork = session.fork()
    assert fork.artifact is session.artifact
    assert (fork.context, fork.vocab_size) == (session.context, session.vocab_size)
    assert fork.tokenizer is session.tokenizer


def test_fork_has_a_stack_of_its_own(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(write_adapter("one", seed=1), 0.5)
    split_session.prefill([5])
    fork = split_session.fork()
    fork.adapters.push(write_adapter("two", seed=2))
    split_session.adapters.set_scale("one", 2.0)
    one, two = engine.prepared
    np.testing.assert_array_equal(
        fork.decode(6), engine.logits([5, 6], [((one, 0.5),), ((one, 0.5), (two, 1.0))])
    )
    np.testing.assert_array_equal(
        split_session.decode(6), engine.logits([5, 6], [((one, 0.5),), ((one, 2.0),)])
    )
    assert (split_session.adapters.loaded, fork.adapters.loaded) == (["one"], ["one", "two"])


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "ends"),
    [
        (lambda session, path: session.snapshot(), False),
        (lambda session, path: session.load_snapshot(path), False),
        (lambda session, path: session.fork(), False),
        (lambda session, path: session.fork().truncate(1), False),
        (lambda session, path: session.restore(session.snapshot()), True),
        (lambda session, path: session.truncate(3), True),
    ],
    ids=["snapshot", "load_snapshot", "fork", "change of a fork", "restore", "truncate"],
)
def test_only_a_change_of_the_sequence_ends_a_stream(
    session: Session, tmp_path: Path, use: Callable[[Session, Path], object], ends: bool
) -> None:
    session.snapshot().save(tmp_path / "a")
    expected = session.generate(IDS, max_tokens=4).ids
    stream = session.stream(IDS, max_tokens=4)
    ids = [next(stream).id, next(stream).id]
    use(session, tmp_path / "a")
    if ends:
        with pytest.raises(SessionError, match="put to other use, which ended this stream"):
            next(stream)
    else:
        assert ids + [piece.id for piece in stream] == expected


# --- adapters -----------------------------------------------------------------------------------------------------


def test_restored_tokens_keep_their_adapters_and_the_stack_stays(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(write_adapter("one", seed=1), 0.5)
    split_session.prefill([5, 6])
    snapshot = split_session.snapshot()
    split_session.adapters.clear()
    split_session.reset()
    split_session.restore(snapshot)
    assert split_session.adapters.entries() == []
    assert_goes_on(split_session, engine, [5, 6], [((engine.prepared[0], 0.5),)] * 2)


@pytest.fixture
def changing(
    open_session: Open, fake_engine: Any, make_artifact: Any, split_manifest: Any, write_adapter: WriteAdapter
) -> Session:
    """A session with a window: 8 tokens read with one adapter, 4 without, 8 with another; the stack is empty."""
    session = open_session(fake_engine(window=True), make_artifact("changing.rlx", manifest=split_manifest))
    for begin, end, name in ((0, 8, "one"), (8, 12, ""), (12, 20, "three")):
        if name:
            session.adapters.push(write_adapter(name, seed=len(name)), 0.5)
        session.prefill(IDS[begin:end])
        session.adapters.clear()
    return session


@pytest.mark.parametrize("position", [3, 8, 10, 12, 13])
def test_replay_reads_with_the_adapters_of_then(changing: Session, position: int) -> None:
    engine: Any = changing.engine
    one, three = engine.prepared
    mixes = [*[((one, 0.5),)] * 8, *[()] * 4, *[((three, 0.5),)] * 8]
    changing.truncate(position, replay=True)
    assert changing.adapters.entries() == []
    assert_goes_on(changing, engine, IDS[:position], mixes[:position])


def test_replay_needs_the_adapters_of_then(changing: Session) -> None:
    engine: Any = changing.engine
    one, three = engine.prepared
    mixes = [*[((one, 0.5),)] * 8, *[()] * 4, *[((three, 0.5),)] * 8]
    changing.adapters.unload("one")
    with pytest.raises(SessionError, match=r"an adapter that tokens were read with.*adapters\.load"):
        changing.truncate(12, replay=True)
    assert_goes_on(changing, engine, IDS, mixes)


@pytest.fixture
def activated(
    open_session: Open, fake_engine: Any, make_artifact: Any, split_manifest: Any, write_adapter: WriteAdapter
) -> Session:
    """A session whose adapter waits for `CALL`, with a window."""
    session = open_session(fake_engine(window=True), make_artifact("activated.rlx", manifest=split_manifest))
    session.adapters.push(write_adapter("one", invocation_tokens=CALL))
    return session


def logits_from(engine: Any, ids: Sequence[int], start: int) -> Any:
    """After ids that are read with the adapter from a place on."""
    return engine.logits(ids, [()] * start + [((engine.prepared[0], 1.0),)] * (len(ids) - start))


def test_invocation_that_is_taken_back_makes_the_adapter_wait_again(activated: Session) -> None:
    engine: Any = activated.engine
    activated.prefill([5, *CALL, 6])
    activated.truncate(2)
    np.testing.assert_array_equal(activated.decode(9), logits_from(engine, [5, 7, 9], 1))
    activated.truncate(1)
    np.testing.assert_array_equal(activated.decode(9), engine.logits([5, 9]))


def test_snapshot_and_fork_know_where_an_adapter_joined_in(activated: Session) -> None:
    engine: Any = activated.engine
    activated.prefill([5, *CALL, 6])
    snapshot, fork = activated.snapshot(), activated.fork()
    activated.reset()
    np.testing.assert_array_equal(activated.prefill([5, 6]), engine.logits([5, 6]))
    activated.restore(snapshot)
    for session in (activated, fork):
        np.testing.assert_array_equal(session.decode(9), logits_from(engine, [5, *CALL, 6, 9], 1))


def test_replay_lets_an_adapter_join_in_where_it_did(activated: Session) -> None:
    engine: Any = activated.engine
    ids = [5, *CALL, *IDS]
    activated.prefill(ids)
    activated.truncate(10, replay=True)
    np.testing.assert_array_equal(activated.decode(9), logits_from(engine, [*ids[:10], 9], 1))


def test_place_that_a_failed_prompt_did_not_reach_invokes_nothing(
    activated: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = activated.engine
    activated.prefill([5])
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "_read", no_memory)
        with pytest.raises(SessionError, match="not enough memory"):
            activated.prefill([6, *CALL])
    np.testing.assert_array_equal(activated.decode(9), engine.logits([5, 9]))
    np.testing.assert_array_equal(activated.prefill([6, *CALL]), logits_from(engine, [5, 9, 6, *CALL], 3))


def no_memory(*arguments: Any) -> Any:
    raise MemoryError


# --- all together -------------------------------------------------------------------------------------------------


@dataclass
class Naive:
    """What a session should hold: every token with what it was read with."""

    session: Session
    ids: list[int] = field(default_factory=list)
    mixes: list[Any] = field(default_factory=list)


WHICH = st.integers(0, 99)
ACTION = st.one_of(
    st.tuples(st.sampled_from(["prefill", "truncate", "adapter"]), WHICH, st.integers(0, 12)),
    st.tuples(st.sampled_from(["snapshot", "restore", "fork", "close", "reset", "generate"]), WHICH, WHICH),
)


@pytest.fixture
def split_artifact(make_artifact: Any, split_manifest: Any) -> Artifact:
    artifact: Artifact = make_artifact("all.rlx", manifest=split_manifest)
    return artifact


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    actions=st.lists(ACTION, max_size=25), window=st.booleans(), prefix_cache=st.sampled_from([0, 1 << 20])
)
def test_whatever_is_done_logits_are_those_of_a_fresh_run(
    open_session: Open,
    split_artifact: Artifact,
    fake_engine: Any,
    write_adapter: WriteAdapter,
    actions: list[tuple[str, int, int]],
    window: bool,
    prefix_cache: int,
) -> None:
    engine = fake_engine(window=window)
    session = open_session(engine, split_artifact, prefix_cache)
    for seed in range(2):
        session.adapters.load(write_adapter(f"a{seed}", seed=seed))
    live, snapshots = [Naive(session)], [(session.snapshot(), Naive(session))]
    for name, which, number in actions:
        held = live[which % len(live)]
        session = held.session
        mix = tuple((engine.prepared[int(name[1:])], scale) for name, scale in session.adapters.entries())
        if name == "prefill" and 0 < number <= session.context - session.position - 1:
            ids = [number % 3] * number  # prompts begin alike all the time
            held.ids += ids
            held.mixes += [mix] * number
            np.testing.assert_array_equal(session.prefill(ids), engine.logits(held.ids, held.mixes))
        elif name == "generate" and number < 20:
            ids = [number % 3] * (number + 1)
            made = session.generate(ids, max_tokens=2).ids
            held.ids, held.mixes = [*ids, *made[:-1]], [mix] * (number + len(made))
            assert made[0] == engine.logits(ids, held.mixes[: len(ids)]).argmax()
        elif name == "truncate":
            session.truncate(min(number, len(held.ids)), replay=True)
            del held.ids[number:], held.mixes[number:]
        elif name == "adapter":
            session.adapters.clear()
            if number < 2:
                session.adapters.push(f"a{number}", 0.5)
        elif name == "snapshot":
            snapshots.append((session.snapshot(), Naive(session, held.ids[:], held.mixes[:])))
        elif name == "restore":
            snapshot, then = snapshots[number % len(snapshots)]
            session.restore(snapshot)
            held.ids, held.mixes = then.ids[:], then.mixes[:]
        elif name == "fork" and len(live) < 5:
            live.append(Naive(session.fork(), held.ids[:], held.mixes[:]))
        elif name == "close" and len(live) > 1:
            session.close()
            live.remove(held)
        elif name == "reset":
            session.reset()
            held.ids, held.mixes = [], []
        for each in live:
            if each.session.position < each.session.context:
                assert_goes_on(each.session, engine, each.ids, each.mixes)
    for each in live:
        each.session.close()
    assert engine.closed
