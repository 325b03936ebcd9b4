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

Compile = Callable[[BackendName, str, str], Path]
HERE = Path(__file__).parent
DATA = HERE.parent / "data"
QUICK = ("gpt-oss",)
"""The architectures that `make test` compiles with all formats on TVM, too: a kernel for each takes 15 s or more."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one model run in one process, which compiles it; of models with all formats some are slow on TVM."""
    for item in items:
        if item.path.parent != HERE or not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        params = item.callspec.params
        architecture = params.get("architecture")
        variant = params.get("variant") or (architecture and f"{architecture}-formats")
        if variant is None:
            continue
        item.add_marker(pytest.mark.xdist_group(f"tiny model {variant}"))
        name, _, kind = variant.rpartition("-")
        if kind == "formats" and name not in QUICK and params.get("backend") == "tvm":
            item.add_marker(pytest.mark.slow)


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
def compile_tiny(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """``compile_tiny(backend, variant, activations)``: its artifact, compiled once, with rings of a few rows.

    With float32 activations, caches are f32 too: rounding them to f16 would hide mistakes a hundred times as large.
    It does not depend on the backend's parameter, whose changes would make an end of what is compiled.
    """
    folder = tmp_path_factory.mktemp("tiny-artifacts")

    def compiled(backend: BackendName, name: str, activations: str) -> Path:
        path = folder / f"{backend}-{name}-{activations}.rlx"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rlxc.lowering.MAX_STEP", 16)
            options: Any = {"activations": activations, "rollback": 8}
            options["kv_cache"] = "f32" if activations == "float32" else "auto"
            rlxc.compile(tiny_gguf(name), path, backend=backend, **options)
        return path

    return cache(compiled)


@pytest.fixture(scope="session")
def tiny_artifact(backend: BackendName, compile_tiny: Compile) -> Callable[..., Path]:
    """``tiny_artifact(variant, activations)``: as of `compile_tiny`, for this backend."""
    return partial(compile_tiny, backend)


@pytest.fixture(scope="session")
def score_tiny(compile_tiny: Compile) -> Callable[..., Floats]:
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
