"""What goes wrong with one text ends that text; what goes wrong with the model, all; nothing is lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from batches import MakeBench, Prefixes, bench_maker, facts

from rlxc.artifact import Manifest
from rlxc.errors import ArtifactError, SessionError
from rlxc.runtime import Request
from rlxc.runtime.sequence import TokenSequence


@pytest.fixture
def make_bench(make_artifact: Any, split_manifest: Manifest, fake_engine: type[Any]) -> MakeBench:
    return bench_maker(make_artifact("bench.rlx", manifest=split_manifest), fake_engine)


def test_sampler_that_fails_ends_its_own_text_only(make_bench: MakeBench, fake_engine: type[Any]) -> None:
    class BrokenEngine(fake_engine):  # type: ignore[misc]
        def logits(self, history: Any, mixes: Any = ()) -> Any:
            row = super().logits(history, mixes)
            return row * np.nan if history[0] == 6 and len(history) > 2 else row

    kept: list[TokenSequence] = []

    class Keeping(Prefixes):
        def keep(self, sequence: TokenSequence) -> None:
            kept.append(sequence.fork())

    bench = make_bench(BrokenEngine(), prefixes=Keeping)
    good, broken, lame = bench.submit(*(Request(p, max_tokens=4) for p in ([5], [6], [6, 7, 8])))
    bench.finish()
    assert facts(bench.completion(good)) == facts(bench.alone(good).completion)
    for ticket, made in ((broken, 2), (lame, 0)):
        assert "no finite maximum" in str(bench.end(ticket).error)
        assert len(bench.ids(ticket)) == made
    # What a text has failed on is not kept: its beginning is, and of the good one its beginning and its end.
    assert sorted(sequence.ids.tolist()[0] for sequence in kept) == [5, 5, 6]


MakeScarce = Callable[..., Any]


@pytest.fixture
def scarce_engine(fake_engine: type[Any]) -> MakeScarce:
    """``scarce_engine(room=20)``: an engine with memory for three caches, and for 20 tokens in all of them."""

    class ScarceEngine(fake_engine):  # type: ignore[misc]
        def __init__(self, room: int) -> None:
            super().__init__()
            self.room = room
            self.made: list[weakref.ref[Any]] = []

        def caches(self) -> list[Any]:
            """Those that are in use."""
            return [cache for ref in self.made if (cache := ref()) is not None]

        def new_cache(self) -> Any:
            if len(self.caches()) == 3:
                raise MemoryError
            cache = super().new_cache()
            self.made.append(weakref.ref(cache))
            return cache

        def step(self, caches: Any, ids: Any, *args: Any) -> Any:
            if sum(cache.position for cache in self.caches()) + ids.size > self.room:
                raise MemoryError
            return super().step(caches, ids, *args)

    return ScarceEngine


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Memory must come back at once, not some time later."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_without_memory_for_all_the_last_to_begin_makes_room_for_the_others(
    make_bench: MakeBench, scarce_engine: MakeScarce
) -> None:
    # They hold 4 + 4 + 4 tokens, then 3 more after every round: 21 in the third would be too many.
    bench = make_bench(scarce_engine(room=19))
    tickets = bench.submit(*(Request([5 + i] * 4, max_tokens=n) for i, n in enumerate((6, 5, 9))))
    bench.finish()
    for ticket in tickets[:2]:
        assert facts(bench.completion(ticket)) == facts(bench.alone(ticket).completion)
    end, alone = bench.end(tickets[2]), bench.alone(tickets[2]).completion
    assert isinstance(end.error, SessionError) and "not enough memory to hold 3 more tokens" in str(end.error)
    assert end.completion is not None and alone is not None
    assert end.completion.ids == alone.ids[:3]
    assert end.completion.stop_reason == "closed"


@pytest.mark.usefixtures("no_collector")
def test_text_whose_prompt_is_being_read_makes_room_as_well(
    make_bench: MakeBench, scarce_engine: MakeScarce
) -> None:
    # Two tokens of prompts in a round: in the sixth, the texts have 5 and 4 tokens, the last prompt 8 of its 14.
    bench = make_bench(scarce_engine(room=18), token_budget=2)
    *tickets, last = bench.submit(*(Request([5 + i] * n, max_tokens=8) for i, n in enumerate((2, 2, 14))))
    bench.finish()
    for ticket in tickets:
        assert facts(bench.completion(ticket)) == facts(bench.alone(ticket).completion)
    assert "not enough memory to hold 2 more tokens" in str(bench.end(last).error)


def test_without_memory_for_its_prompt_or_its_cache_a_text_fails_alone(
    make_bench: MakeBench, scarce_engine: MakeScarce
) -> None:
    bench = make_bench(scarce_engine(room=20), token_budget=40)
    long, *short = bench.submit(Request([5] * 21), *(Request([6 + i], max_tokens=2) for i in range(4)))
    bench.finish()
    assert "not enough memory to hold" in str(bench.end(long).error)
    # The long one's cache is free again, which leaves room for three others.
    assert [bench.end(ticket).error is None for ticket in short] == [True, True, True, False]
    assert "not enough memory for the cache" in str(bench.end(short[3]).error)
    assert facts(bench.completion(short[0])) == facts(bench.alone(short[0]).completion)


def test_model_that_cannot_run_is_raised_and_closes_the_batch(
    make_bench: MakeBench, fake_engine: type[Any]
) -> None:
    class Failing(fake_engine):  # type: ignore[misc]
        def step(self, *args: Any) -> Any:
            if len(self.steps) == 3:
                raise ArtifactError("model.onnx is damaged")
            return super().step(*args)

    bench = make_bench(Failing(), max_batch=2)
    tickets = bench.submit(*(Request([5 + i], max_tokens=9) for i in range(3)))
    bench.step()
    bench.step()
    with pytest.raises(ArtifactError, match="damaged"):
        bench.step()
    assert len(bench.batch) == 3
    bench.finish()
    assert [bench.completion(t).stop_reason for t in tickets] == ["closed"] * 3
    assert [len(bench.ids(t)) for t in tickets] == [2, 2, 0]
    with pytest.raises(SessionError, match="the batch is closed"):
        bench.submit(Request([5]))


def test_closed_batch_lets_go_of_its_memory_and_tells_what_there_was(make_bench: MakeBench) -> None:
    bench = make_bench(max_batch=2)
    with bench.batch:
        tickets = bench.submit(*(Request([5 + i], max_tokens=9) for i in range(3)))
        bench.step()
        caches = [weakref.ref(text.sequence.cache) for text in bench.batch._working.values() if text.sequence]
    assert len(caches) == 2
    assert [ref() for ref in caches] == [None, None]
    assert len(bench.step()) == 3
    assert [bench.completion(t).stop_reason for t in tickets] == ["closed"] * 3
    assert bench.step() == []


def test_model_is_held_in_rounds_and_nothing_is_lost_when_it_is_refused(make_bench: MakeBench) -> None:
    held = [0, 0]  # now, and how often at all
    refuse = False

    @contextmanager
    def using() -> Iterator[None]:
        if refuse:
            raise SessionError("another thread is using the session")
        assert held[0] == 0
        held[:] = [1, held[1] + 1]
        yield
        held[0] = 0

    bench = make_bench(using=using)
    first, second = bench.submit(Request([5], max_tokens=3), Request([6], max_tokens=3))
    assert held == [0, 2]
    for event in bench.batch.run():
        assert held[0] == 0
        bench.events.append(event)
        if len(bench.events) == 3:
            break
    refuse = True
    with pytest.raises(SessionError, match="another thread"):
        bench.batch.step()
    with pytest.raises(SessionError, match="another thread"):
        bench.submit(Request([5]))
    refuse = False
    bench.finish()
    assert held == [0, 2 + 3]
    for ticket in (first, second):
        assert facts(bench.completion(ticket)) == facts(bench.alone(ticket).completion)
