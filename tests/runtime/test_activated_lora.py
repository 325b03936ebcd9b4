"""Adapters with invocation tokens: from where in a sequence they take part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlxc.errors import SessionError
from rlxc.runtime import Request, Session

WriteAdapter = Callable[..., Path]
CALL = [7, 8]  # what invokes the adapter


@pytest.fixture
def activated(split_session: Session, write_adapter: WriteAdapter) -> str:
    """The name of a loaded adapter that ``CALL`` invokes."""
    return split_session.adapters.load(write_adapter("activated", invocation_tokens=CALL))


def expected(engine: Any, ids: Sequence[int], start: int | None) -> Any:
    """The logits after ids that are read with the first adapter from a position on."""
    start = len(ids) if start is None else start
    return engine.logits(ids, [()] * start + [((engine.prepared[0], 1.0),)] * (len(ids) - start))


def naive_start(ids: list[int]) -> int | None:
    found = [i for i in range(len(ids)) if ids[i : i + len(CALL)] == CALL]
    return found[-1] if found else None


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.sampled_from([6, 7, 8]), min_size=1, max_size=30))
def test_adapter_takes_part_from_the_last_invocation_on(
    split_session: Session, engine: Any, activated: str, ids: list[int]
) -> None:
    adapters = split_session.adapters
    adapters.clear()
    adapters.push(activated)
    split_session.reset()
    np.testing.assert_array_equal(split_session.prefill(ids), expected(engine, ids, naive_start(ids)))


@pytest.mark.parametrize(
    ("ids", "steps"),
    [
        ([5, 6, 7, 8, 9], [2, 3]),
        ([7, 8, 9], [3]),
        ([5, 7, 8], [1, 2]),
        ([5] * 10 + [7, 8] + [5] * 8, [8, 2, 8, 2]),
        ([5, 6, 7], [3]),
        ([5, 7, 6, 8], [4]),
    ],
)
def test_prompt_is_cut_only_where_the_adapter_joins_in(
    split_session: Session, engine: Any, activated: str, ids: list[int], steps: list[int]
) -> None:
    split_session.adapters.push(activated)
    split_session.prefill(ids)
    assert engine.steps == steps


def test_invoked_adapter_stays_in_the_sequence(split_session: Session, engine: Any, activated: str) -> None:
    split_session.adapters.push(activated)
    split_session.prefill([5, 7, 8])
    split_session.decode(6)
    ids = [5, 7, 8, 6, 7, 8, 9]  # a later call starts nothing anew
    np.testing.assert_array_equal(split_session.prefill(ids[4:]), expected(engine, ids, 1))
    assert engine.steps == [1, 2, 1, 3]


def test_reset_makes_the_adapter_wait_again(split_session: Session, engine: Any, activated: str) -> None:
    split_session.adapters.push(activated)
    split_session.prefill([7, 8])
    split_session.reset()
    np.testing.assert_array_equal(split_session.prefill([5, 6]), engine.logits([5, 6]))


def test_tokens_of_one_prefill_invoke_it_and_not_of_two(
    split_session: Session, engine: Any, activated: str
) -> None:
    split_session.adapters.push(activated)
    split_session.prefill([5, 7])
    np.testing.assert_array_equal(split_session.prefill([8, 9]), engine.logits([5, 7, 8, 9]))


def test_adapter_pushed_after_its_call_waits_for_the_next(
    split_session: Session, engine: Any, activated: str
) -> None:
    split_session.prefill([7, 8])
    split_session.adapters.push(activated)
    split_session.decode(5)
    ids = [7, 8, 5, 7, 8]
    np.testing.assert_array_equal(split_session.prefill(ids[3:]), expected(engine, ids, 3))


def test_other_adapters_take_part_from_the_start(
    split_session: Session, engine: Any, activated: str, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(write_adapter("plain", seed=1), 0.5)
    split_session.adapters.push(activated, 2.0)
    split_session.prefill([5, 7, 8])
    first, plain = engine.prepared
    assert engine.mixes == [[((plain, 0.5),)], [((plain, 0.5), (first, 2.0))]]


def test_several_activated_adapters_join_in_one_after_the_other(
    split_session: Session, engine: Any, activated: str, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(activated)
    split_session.adapters.push(write_adapter("late", seed=1, invocation_tokens=[9]), 0.5)
    split_session.adapters.push(write_adapter("never", seed=2, invocation_tokens=[99]), 0.5)
    split_session.prefill([5, 7, 8, 6, 9, 5])
    first, late, _ = engine.prepared
    assert engine.steps == [1, 3, 2]
    assert engine.mixes == [[()], [((first, 1.0),)], [((first, 1.0), (late, 0.5))]]


def test_score_and_generate_look_into_their_own_tokens(
    split_session: Session, engine: Any, activated: str
) -> None:
    split_session.adapters.push(activated)
    ids = [5, 7, 8, 6]
    np.testing.assert_array_equal(split_session.score(ids)[-1], expected(engine, ids, 1))
    completion = split_session.generate(ids, max_tokens=2)
    assert completion.ids[0] == expected(engine, ids, 1).argmax()
    assert completion.ids[1] == expected(engine, [*ids, completion.ids[0]], 1).argmax()
    plain = split_session.generate([5, 6], max_tokens=1)
    assert plain.ids == [engine.logits([5, 6]).argmax()]


def test_generated_tokens_do_not_invoke_it(
    open_session: Callable[..., Session],
    make_artifact: Any,
    fake_engine: type[Any],
    split_manifest: Any,
    write_adapter: WriteAdapter,
) -> None:
    engine = fake_engine([0, 0, 7, 7, 7])
    session = open_session(engine, make_artifact(manifest=split_manifest))
    path = write_adapter("one", invocation_tokens=[7])
    alone = session.generate([5, 6], max_tokens=3, adapter=path)
    assert alone.ids == [7, 7, 7]
    session.generate_batch([Request([5, 6], [(str(path), 1.0)], max_tokens=3)])
    assert {mix for step in engine.mixes for mix in step} == {()}


def test_invocation_token_outside_of_the_vocabulary_is_refused(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    with pytest.raises(SessionError, match="invocation token 258 is not in the vocabulary of 258"):
        split_session.adapters.load(write_adapter("a", invocation_tokens=[258]))
