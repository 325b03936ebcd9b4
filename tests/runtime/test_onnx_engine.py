"""The ONNX engine on a tiny model with rings: whatever happens to caches, logits are those of a fresh run."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlxc
from rlxc.backends.onnx.runtime import installed_runtime
from rlxc.runtime.engines.onnx_cache import OnnxCache
from rlxc.runtime.engines.onnxruntime import OnnxRuntimeEngine

CONTEXT, MAX_STEP, ROLLBACK = 90, 9, 4  # of texts; rings of 8 + 9 rows jump every 10 tokens
NO_ROWS = np.zeros(0, np.int64)

TOLERANCE = {"f32": 2e-4, "f16": 3e-2}
"""Logits near 10. A sum's order depends on how many tokens a run has, and where a ring's rows lie; now and then that
rounds a key or a value of f16 the other way. Other tokens in a cache change logits by more than one."""

Logits = Callable[[list[int]], npt.NDArray[np.float32]]


@pytest.fixture(scope="module", params=["f32", "f16"])
def kv_cache(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(kv_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxRuntimeEngine]:
    if not installed_runtime().has_ring:
        pytest.skip("this ONNX Runtime has no rings")
    tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "tiny.py"))
    folder = tmp_path_factory.mktemp("rings")
    model = tiny["VARIANTS"]["gemma3-window"].write(folder / "model.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlxc.lowering.MAX_STEP", MAX_STEP)
        rlxc.compile(
            model,
            folder / "model.rlx",
            backend="onnx",
            activations="float32",
            kv_cache=kv_cache,
            rollback=ROLLBACK,
        )
    with rlxc.load(folder / "model.rlx", threads=1) as session:
        layers = session.artifact.manifest.kv_cache.layers
        assert [layer.layout for layer in layers] == ["ring"] * 5 + ["linear", "ring"]
        assert {layer.dtype.value for layer in layers} == {kv_cache}
        assert isinstance(session.engine, OnnxRuntimeEngine)
        yield session.engine


@pytest.fixture(scope="module")
def fresh(engine: OnnxRuntimeEngine) -> Logits:
    """The logits after a text, read by a cache of its own."""
    return lambda ids: read(engine, engine.new_cache(), ids)


def read(engine: OnnxRuntimeEngine, cache: OnnxCache, ids: list[int]) -> npt.NDArray[np.float32]:
    """The logits after the last of these tokens."""
    for start in range(0, len(ids), MAX_STEP):
        part = np.array([ids[start : start + MAX_STEP]])
        values = engine.step([cache], part, np.array([part.shape[1] - 1])).values
    row: npt.NDArray[np.float32] = values[0, 0]
    return row


def text(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 300, size=count).tolist()
    return ids


def test_logits_of_a_split_step_come_in_the_order_that_was_asked_for(
    engine: OnnxRuntimeEngine, kv_cache: str
) -> None:
    ids, cache = text(18), engine.new_cache()
    read(engine, cache, ids[:9])
    rows = np.array([8, 0, 5, 4])
    assert cache.groups[0].group.longest(9, 9) == 8  # the last token has to wait
    logits = engine.step([cache], np.array([ids[9:]]), rows).values
    for row, logit in zip(rows, logits[0]):
        alone = read(engine, engine.new_cache(), ids[: 9 + row + 1])
        np.testing.assert_allclose(logit, alone, atol=TOLERANCE[kv_cache])


def test_sequences_of_any_length_decode_together(
    engine: OnnxRuntimeEngine, fresh: Logits, kv_cache: str
) -> None:
    texts = [text(count, count) for count in (0, 3, 17, 18, 40)]
    caches = [engine.new_cache() for _ in texts]
    for cache, ids in zip(caches, texts):
        if ids:
            read(engine, cache, ids)
    for step in range(45):  # each ring jumps four times
        new = text(len(texts), 100 + step)
        logits = engine.step(caches, np.array(new)[:, None], np.zeros(1, np.int64)).values
        assert logits.shape == (len(texts), 1, engine.vocab_size)
        for ids, token in zip(texts, new):
            ids.append(token)
        if step % 9 == 0:
            for ids, row in zip(texts, logits):
                np.testing.assert_allclose(row[0], fresh(ids), atol=TOLERANCE[kv_cache])
    for cache, ids in zip(caches, texts):
        np.testing.assert_allclose(read(engine, cache, [5]), fresh([*ids, 5]), atol=TOLERANCE[kv_cache])


def test_decoding_together_without_rows_gives_no_logits(engine: OnnxRuntimeEngine) -> None:
    caches = [engine.new_cache() for _ in range(3)]
    assert engine.step(caches, np.array([[5], [6], [7]]), NO_ROWS).values.shape == (3, 0, 300)
    assert [cache.position for cache in caches] == [1, 1, 1]


def test_memory_side_by_side_goes_with_its_sequences(engine: OnnxRuntimeEngine) -> None:
    engine.step([engine.new_cache()], np.array([[5]]), NO_ROWS)
    before = len(engine.bindings)
    caches = [engine.new_cache() for _ in range(3)]
    for cache in caches:
        engine.step([cache], np.array([[4]]), NO_ROWS)
    assert len(engine.bindings) == before + 3
    engine.step(caches, np.array([[5], [6], [7]]), NO_ROWS)
    assert len(engine.bindings) == before + 1  # the buffers that each had alone are gone
    del cache, caches
    engine.step([engine.new_cache()], np.array([[5]]), NO_ROWS)
    assert len(engine.bindings) == before


def test_without_memory_side_by_side_sequences_run_one_by_one(
    engine: OnnxRuntimeEngine, fresh: Logits, kv_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("rlxc.runtime.engines.onnxruntime.Lane", no_memory)
    caches = [engine.new_cache(), engine.new_cache()]
    logits = engine.step(caches, np.array([[5], [6]]), np.zeros(1, np.int64)).values
    for row, token in zip(logits, (5, 6)):
        np.testing.assert_allclose(row[0], fresh([token]), atol=TOLERANCE[kv_cache])


class Failing:
    """A session whose n-th run ends as ONNX Runtime 1.31 ends one without memory, after it has written."""

    def __init__(self, session: Any, good: int, message: str) -> None:
        self.session, self.good, self.message = session, good, message

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        self.session.run_with_iobinding(binding)
        self.good -= 1
        if self.good < 0:
            raise RuntimeError(self.message)


BAD_ALLOC = (
    "Error in execution: Non-zero status code returned while running MatMulNBits node. "
    "Name:'MatMulNBits_3' Status Message: std::bad_alloc"
)


@pytest.mark.parametrize(("step", "good"), [(1, 0), (4, 0), (4, 1)])
def test_step_without_memory_changes_no_cache(
    engine: OnnxRuntimeEngine,
    fresh: Logits,
    kv_cache: str,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    good: int,
) -> None:
    texts = [text(17), text(15, 1)]  # a ring is full at 17
    caches = [engine.new_cache() for _ in texts]
    for cache, ids in zip(caches, texts):
        read(engine, cache, ids[:-1])
    engine.step(caches, np.array([[ids[-1]] for ids in texts]), NO_ROWS)
    new = np.reshape(text(2 * step, 2), (2, step))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_session", Failing(engine._session, good, BAD_ALLOC))
        with pytest.raises(MemoryError):
            engine.step(caches, new, NO_ROWS)
    for cache, ids in zip(caches, texts):
        assert cache.position == len(ids)
        for position in range(cache.oldest, len(ids) + 1):
            back = cache.fork()
            back.truncate(position)
            row = read(engine, back, [9])
            np.testing.assert_allclose(row, fresh([*ids[:position], 9]), atol=TOLERANCE[kv_cache])


def test_other_failures_of_a_run_stay_what_they_are(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_session", Failing(engine._session, 0, "something else"))
    with pytest.raises(RuntimeError, match="something else"):
        engine.step([engine.new_cache()], np.array([[5]]), NO_ROWS)


WHICH = st.integers(0, 4)
OPERATIONS = st.one_of(
    st.tuples(st.just("read"), WHICH, st.integers(1, 2 * MAX_STEP)),
    st.tuples(st.just("together"), st.integers(1, 31), st.integers(1, 12)),
    st.tuples(st.just("truncate"), WHICH, st.integers(0, 2 * ROLLBACK)),
    st.tuples(st.just("fork"), WHICH, st.just(0)),
    st.tuples(st.just("load"), WHICH, st.just(0)),
    st.tuples(st.just("drop"), WHICH, st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, max_size=20), st.randoms(use_true_random=False))
def test_logits_are_those_of_a_fresh_run(
    engine: OnnxRuntimeEngine,
    fresh: Logits,
    kv_cache: str,
    operations: list[tuple[str, int, int]],
    random: Any,
) -> None:
    held: list[tuple[OnnxCache, list[int]]] = [(engine.new_cache(), [])]
    for name, number, count in operations:
        cache, ids = held[number % len(held)]
        if name == "read" and len(ids) + count <= CONTEXT:
            new = [random.randrange(2, 300) for _ in range(count)]
            ids += new
            np.testing.assert_allclose(read(engine, cache, new), fresh(ids), atol=TOLERANCE[kv_cache])
        elif name == "together":  # number is a set of them
            members = [
                one for i, one in enumerate(held) if number >> i & 1 and len(one[1]) + count <= CONTEXT
            ]
            for _ in range(count if members else 0):
                new = [random.randrange(2, 300) for _ in members]
                caches = [cache for cache, _ in members]
                logits = engine.step(caches, np.array(new)[:, None], np.zeros(1, np.int64)).values
                for (_, ids), token in zip(members, new):
                    ids.append(token)
            for (_, ids), row in zip(members, logits if members else ()):
                np.testing.assert_allclose(row[0], fresh(ids), atol=TOLERANCE[kv_cache])
        elif name == "truncate":
            position = max(cache.oldest, len(ids) - count)
            cache.truncate(position)
            del ids[position:]
        elif name == "fork":
            held.append((cache.fork(), ids[:]))
        elif name == "load":
            held.append((engine.load_cache(cache.position, cache.rows()), ids[:]))
        elif name == "drop" and len(held) > 1:
            held.remove((cache, ids))
    for cache, ids in held:
        np.testing.assert_allclose(read(engine, cache, [5]), fresh([*ids, 5]), atol=TOLERANCE[kv_cache])
