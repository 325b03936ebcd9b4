"""The tiny models: opened for the interpreter, compiled for the backend, and llama.cpp's logits of each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlxc
from rlxc.artifact import BackendName
from rlxc.weights.gguf import open_gguf

# What the tests share lies beside them; the script that makes the reference data uses it too, without pytest.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from oracle import Floats, OpenModel
from tiny import TEXT, VARIANTS

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """The name of each tiny model in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_gguf(variant)``: its file, written once."""
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: VARIANTS[name].write(folder / f"{name}.gguf"))


@pytest.fixture(scope="session")
def compile_tiny(
    tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``compile_tiny(backend, variant, activations, max_step=16)``: see `tiny_artifact`.

    It does not depend on the backend's parameter, whose changes would make an end of what is cached.
    """
    folder = tmp_path_factory.mktemp("tiny-artifacts")

    def compiled(backend: BackendName, name: str, activations: str, max_step: int = 16) -> Path:
        path = folder / f"{backend}-{name}-{activations}-{max_step}.rlx"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rlxc.lowering.MAX_STEP", max_step)
            options: Any = {"activations": activations, "rollback": 8}
            options["kv_cache"] = "f32" if activations == "float32" else "auto"
            rlxc.compile(tiny_gguf(name), path, backend=backend, **options)
        return path

    return cache(compiled)


@pytest.fixture(scope="session")
def tiny_artifact(backend: BackendName, compile_tiny: Callable[..., Path]) -> Callable[..., Path]:
    """``tiny_artifact(variant, activations, max_step=16)``: its artifact, compiled once, with rings of a few rows.

    With float32 activations, caches are f32 too: rounding them to f16 would hide mistakes a hundred times as large.
    """
    return partial(compile_tiny, backend)


@pytest.fixture(scope="session")
def score_tiny(compile_tiny: Callable[..., Path]) -> Callable[..., Floats]:
    """``score_tiny(backend, variant, activations)``: its artifact's logits ``f32 [len(TEXT), vocab]``, taken once."""

    def scored(backend: BackendName, name: str, activations: str) -> Floats:
        with rlxc.load(compile_tiny(backend, name, activations), threads=1) as session:
            return session.score(TEXT)

    return cache(scored)


@pytest.fixture(scope="session")
def open_tiny(tiny_gguf: Callable[[str], Path]) -> Callable[[str], OpenModel]:
    """``open_tiny(variant)``: the model for the interpreter."""
    return cache(lambda name: OpenModel(open_gguf(tiny_gguf(name))))


@pytest.fixture(scope="session")
def llama_cpp_logits() -> dict[str, Floats]:
    """llama.cpp's logits ``f32 [ROWS, vocab]`` by variant; see ``tests/data/README.md``."""
    with np.load(DATA / "tiny_logits.npz") as stored:
        return dict(stored)
