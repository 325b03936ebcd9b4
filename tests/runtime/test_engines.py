"""Both engines on a real artifact: several sequences in a step, summaries of logits, and artifacts that are broken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from adapters import random_pairs, write_gguf_adapter

import rlxc
import rlxc.runtime.cpu
from rlxc.artifact import BackendName
from rlxc.errors import ArtifactError, SessionError
from rlxc.runtime import Request, Session
from rlxc.runtime.engines import Engine
from rlxc.runtime.engines.pages import PagePool
from rlxc.runtime.logits import Logits

Ids = npt.NDArray[np.int64]
CompileTiny = Callable[..., Path]


@pytest.fixture
def session(backend: BackendName, compile_tiny: CompileTiny) -> Any:
    with rlxc.load(compile_tiny(backend)) as session:
        yield session


@pytest.fixture
def engine(session: Session) -> Engine[Any, Any]:
    return session.engine


def tokens(*shape: int) -> Ids:
    return np.random.default_rng(len(shape)).integers(2, 300, size=shape)


def filled(engine: Engine[Any, Any], ids: Ids) -> Any:
    """A cache that holds these tokens."""
    cache = engine.new_cache()
    for start in range(0, len(ids), engine.max_step):
        engine.step([cache], ids[None, start : start + engine.max_step], np.zeros(0, np.int64))
    return cache


@pytest.mark.parametrize("step", [1, 5])
def test_sequences_of_one_step_do_not_touch_each_other(engine: Engine[Any, Any], step: int) -> None:
    pasts = [tokens(40), tokens(1), tokens(90), tokens(0)]
    ids, rows = tokens(4, step), np.array([0, step - 1])
    together = [filled(engine, past) for past in pasts]
    alone = [filled(engine, past) for past in pasts]
    for _ in range(2):  # the second step reads what the first one wrote
        logits = engine.step(together, ids, rows)
        assert logits.values.shape == (4, 2, engine.vocab_size)
        for i, cache in enumerate(alone):
            expected = engine.step([cache], ids[i : i + 1], rows).values[0]
            # A token's sums do not depend on its neighbours, but for the order in which a kernel adds its parts.
            np.testing.assert_allclose(logits.values[i], expected, atol=1e-5)
            assert together[i].position == cache.position


def test_logits_are_summarised(engine: Engine[Any, Any]) -> None:
    logits = engine.step([engine.new_cache(), engine.new_cache()], tokens(2, 6), np.array([1, 5, 0]))
    for sequence in range(2):
        for row in range(3):
            got, expected = logits.row(sequence, row), Logits.of(logits.values[sequence, row])
            np.testing.assert_array_equal(got.values, expected.values)
            np.testing.assert_array_equal(got.maxima, expected.maxima)
            # Exponentials of the kernel's and of numpy's, each right to 2e-7.
            np.testing.assert_allclose(got.sums, expected.sums, rtol=2e-6)


def test_logits_are_the_caller_s_to_keep(engine: Engine[Any, Any]) -> None:
    cache = engine.new_cache()
    first = engine.step([cache], tokens(1, 3), np.array([2]))
    before = first.values.copy()
    engine.step([cache], tokens(1, 3) + 1, np.array([2]))
    np.testing.assert_array_equal(first.values, before)


def test_step_without_rows_has_no_logits(engine: Engine[Any, Any]) -> None:
    cache = engine.new_cache()
    assert engine.step([cache], tokens(1, 3), np.zeros(0, np.int64)).values.shape == (1, 0, 300)
    assert cache.position == 3


def test_ticks_go_on_while_a_step_runs(tvm_artifact: Path) -> None:
    with rlxc.load(tvm_artifact) as session:
        session.prefill([5, 6, 7])
        ticks = session.engine.ticks
        assert ticks is not None
        (calls,) = json.loads((tvm_artifact / "kernels.json").read_bytes()).values()
        assert len(ticks) == len(calls) + 1
        assert (np.diff(ticks) > 0).all()


def test_listed_calls_read_every_matrix_once(tvm_artifact: Path) -> None:
    with rlxc.load(tvm_artifact) as session:
        weights = session.artifact.manifest.weights
    (calls,) = json.loads((tvm_artifact / "kernels.json").read_bytes()).values()
    matrices = [weight for weight in weights if len(weight.shape) == 2]
    expected = [weight.shape[0] * weight.shape[1] for weight in matrices]
    assert sorted(call["multiplications"] for call in calls if call["bytes_read"]) == sorted(expected)
    assert {call["amount"] for call in calls} == {"tokens", "rows"}


# --- pages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tvm_engine(tvm_artifact: Path) -> Any:
    with rlxc.load(tvm_artifact) as session:
        yield session.engine


def test_pages_that_come_and_go_do_not_show_in_the_logits(tvm_engine: Any) -> None:
    rng = np.random.default_rng(5)
    held: list[tuple[Any, Ids]] = [(tvm_engine.new_cache(), tokens(0)) for _ in range(4)]
    for _ in range(200):
        which, size, last = rng.integers(len(held)), int(rng.choice([1, 2, 5, 30])), np.array([0])
        cache, past = held[which]
        if len(past) + size > tvm_engine.context:
            cache, past = tvm_engine.new_cache(), past[:0]
        if rng.random() < 0.3:
            held[rng.integers(len(held))] = cache.fork(), past
        if rng.random() < 0.3:
            back = max(cache.oldest, len(past) - int(rng.integers(20)))
            cache.truncate(back)
            past = past[:back]
        if rng.random() < 0.1:
            cache = tvm_engine.load_cache(len(past), cache.rows())
        ids = rng.integers(2, 300, size=(1, size))
        logits = tvm_engine.step([cache], ids, last).values
        expected = tvm_engine.step([filled(tvm_engine, past)], ids, last).values
        # The past was read in other steps, which add in another order: now and then a key or an activation is rounded
        # the other way, which was seen to change logits by 0.03. Another token's keys change them by more than one.
        np.testing.assert_allclose(logits, expected, atol=0.2)
        held[which] = cache, np.concatenate([past, ids[0]])


def test_step_without_memory_changes_no_cache(tvm_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = filled(tvm_engine, tokens(70))
    caches = [
        filled(tvm_engine, tokens(64)),
        original.fork(),
    ]  # both need pages, of two tables: all, and a window
    expected = tvm_engine.step([cache.fork() for cache in caches], tokens(2, 1), np.zeros(1, np.int64)).values

    def held() -> list[Any]:  # the tables themselves may be copies by now
        return [(c.position, {k: v for k, v in c.memory.items() if k != c.tables}) for c in caches]

    before = held()
    take, left = PagePool.take, iter(range(3))

    def take_some(pool: PagePool) -> Any:
        if next(left, None) is None:
            raise MemoryError
        return take(pool)

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "take", take_some)
        with pytest.raises(MemoryError):
            tvm_engine.step(caches, tokens(2, 1), np.zeros(1, np.int64))
    assert held() == before
    logits = tvm_engine.step(caches, tokens(2, 1), np.zeros(1, np.int64))
    np.testing.assert_array_equal(logits.values, expected)


def test_plan_that_kernels_cannot_follow_is_refused(tvm_artifact: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tvm_artifact, tmp_path / "model.rlx"))
    manifest = json.loads((copied / "manifest.json").read_bytes())
    plan = manifest["kv_cache"]
    plan["page_size"] = None
    for layer in plan["layers"]:
        layer |= {"layout": "linear", "capacity": plan["context"], "table": None}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ArtifactError, match=r"model.rlx: kv_cache: .* without pages, .*; compile the model again"
    ):
        rlxc.load(copied)


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted_session(backend: BackendName, compile_tiny: CompileTiny, tmp_path: Path) -> Any:
    """A session with adapters ``a``, ``b`` and ``c`` loaded, of 4, 20 and 36 ranks; token 9 invokes the last one."""
    # Without prefix_cache: a prompt read in other pieces can round an int8 activation the other way.
    with rlxc.load(compile_tiny(backend, "split"), prefix_cache=0) as session:
        plan = session.artifact.manifest.lora
        assert plan is not None
        shapes = {part.tensor: (part.rows, part.columns) for part in plan.parts}
        for seed, name in enumerate("abc"):
            pairs = random_pairs(shapes, 4 + 16 * seed, seed=seed, size=0.2)
            invocation = [9] if name == "c" else []
            path = tmp_path / f"{name}.gguf"
            write_gguf_adapter(path, pairs, architecture="gemma3", invocation_tokens=invocation)
            session.adapters.load(path)
        yield session


def test_adapters_come_and_go_without_a_trace(adapted_session: Session) -> None:
    ids = tokens(12)
    base = adapted_session.score(ids)
    adapted_session.adapters.push("a")
    alone = adapted_session.score(ids)
    assert np.abs(alone - base).max() > 0.1
    adapted_session.adapters.push("b", -0.5)
    assert np.abs(adapted_session.score(ids) - alone).max() > 0.1
    adapted_session.adapters.pop()
    np.testing.assert_array_equal(adapted_session.score(ids), alone)
    adapted_session.adapters.clear()
    np.testing.assert_array_equal(adapted_session.score(ids), base)


def test_activated_adapter_leaves_what_is_before_its_call_alone(adapted_session: Session) -> None:
    ids = [5, 6, 7, 9, 8, 5]
    base = adapted_session.score(ids)
    adapted_session.adapters.push("c")
    invoked = adapted_session.score(ids)
    # The prompt is cut in two, whose steps may add in another order than one.
    np.testing.assert_allclose(invoked[:3], base[:3], atol=1e-4)
    assert np.abs(invoked[3:] - base[3:]).max(axis=1).min() > 0.1


def test_texts_of_a_batch_have_their_own_adapters(adapted_session: Session) -> None:
    stacks: list[list[tuple[str, float]]] = [
        [("a", 1.0)],
        [("b", 0.5)],
        [],
        [("a", -1.0)],
        [("c", 1.0)],
        [("a", 1.0), ("b", 1.0)],
    ]
    requests = [Request([5 + i, 9, 6, 7], stack, max_tokens=5 + i) for i, stack in enumerate(stacks)]
    together = adapted_session.generate_batch(requests, max_batch=4)
    for request, stack, completion in zip(requests, stacks, together):
        for name, scale in stack:
            adapted_session.adapters.push(name, scale)
        alone = adapted_session.generate(request.prompt, request.max_tokens)
        adapted_session.adapters.clear()
        assert completion.ids == alone.ids
        # A token's sums do not depend on its neighbours, but for the order in which a kernel adds its parts.
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=1e-4)


# --- artifacts that are broken ------------------------------------------------------------------------------------


@pytest.fixture
def copy(tvm_artifact: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tvm_artifact, tmp_path / "model.rlx"))


def library_of(artifact: Path) -> Path:
    (path,) = artifact.glob("model.*.o")
    return path


def replace_file(path: Path, data: bytes) -> None:
    """Put other data into an artifact, with the size and digest in the manifest that it should have."""
    path.write_bytes(data)
    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    manifest["files"][path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def test_changed_machine_code_is_never_loaded(copy: Path) -> None:
    path = library_of(copy)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{path.name} does not have the sha256 in its manifest"):
        rlxc.load(copy)


@pytest.mark.parametrize("name", ["weights.safetensors", "model"])
def test_truncated_file_is_refused(copy: Path, name: str) -> None:
    path = library_of(copy) if name == "model" else copy / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        ArtifactError, match=f"{path.name} has {len(data) - 1} bytes, its manifest says {len(data)}"
    ):
        rlxc.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"no machine code at all\n" * 100,
        lambda data: data[:64],
        lambda data: data[: len(data) // 2],
        lambda data: data[:1000] + bytes(len(data) - 1000),
    ],
    ids=["empty", "text", "header", "half", "zeros"],
)
def test_file_that_is_no_machine_code_is_named(copy: Path, change: Callable[[bytes], bytes]) -> None:
    path = library_of(copy)
    replace_file(path, change(path.read_bytes()))
    with pytest.raises(SessionError) as refused:
        rlxc.load(copy)
    text = str(refused.value)
    assert text.startswith(f"{path}: cannot be loaded as machine code (")
    assert text.endswith("; compile the model again")
    assert "\n" not in text


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: b"\2" + bytes(7) + b"{}" + data,
        lambda data: b"\0",
        lambda data: b"",
    ],
    ids=["short", "long", "header past the end", "no header", "no tensors", "one byte", "empty"],
)
def test_weights_that_end_too_early_or_too_late_are_refused(
    copy: Path, change: Callable[[bytes], bytes]
) -> None:
    path = copy / "weights.safetensors"
    replace_file(path, change(path.read_bytes()))
    with pytest.raises(
        ArtifactError, match=rf"{path}: not a safetensors file \(.*\); compile the model again"
    ):
        rlxc.load(copy)


def test_artifact_for_other_cpus_says_what_they_have(
    tvm_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlxc.runtime.cpu, "machine", lambda: "riscv64")
    with pytest.raises(SessionError, match=r"no library for this riscv64 CPU .*compile the model for it"):
        rlxc.load(tvm_artifact)


def test_no_compiler_is_needed(compile_tiny: CompileTiny, tvm_artifact: Path, tmp_path: Path) -> None:
    code = """if True:
        import shutil, sys
        import rlxc
        assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "ld")))
        rlxc.compile(sys.argv[1], sys.argv[2], backend="tvm")
        print(rlxc.load(sys.argv[2]).prefill([5, 6, 7]).argmax())
    """
    command = [sys.executable, "-c", code, tvm_artifact.with_name("model.gguf"), tmp_path / "model.rlx"]
    empty = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    (tmp_path / "bin").mkdir()
    done = subprocess.run(
        command, env={**empty, "PATH": str(tmp_path / "bin")}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with rlxc.load(tvm_artifact) as session:
        assert int(done.stdout) == session.prefill([5, 6, 7]).argmax()


def test_running_imports_no_compiler(tvm_artifact: Path) -> None:
    code = """if True:
        import sys
        import rlxc
        rlxc.load(sys.argv[1]).prefill([5, 6, 7])
        print([name for name in ("tvm", "rlxc.backends", "rlxc.ir", "onnxruntime") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tvm_artifact], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
