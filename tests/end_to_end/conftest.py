"""Artifacts of tiny models that compute in f32 throughout: what is left to differ from a judge is the order of sums."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import rlxc
from rlxc.artifact import BackendName

# What tests share, with the scripts that make reference data too, lies beside them and in the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from adapter_cases import Files, write_files

CompileExact = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_exact(tmp_path_factory: pytest.TempPathFactory) -> CompileExact:
    """``compile_exact(model, backend, **options)``: an artifact with float32 activations by default, compiled once.

    Caches are f32 too: rounding them to f16, as TVM does, would hide mistakes a hundred times as large. Steps are so
    short that a text takes several, and that windows become rings.
    """
    folder = tmp_path_factory.mktemp("exact")
    made: dict[str, Path] = {}

    def compiled(model: Path, backend: BackendName, **options: Any) -> Path:
        options = {"activations": "float32", "kv_cache": "f32", "rollback": 0, **options}
        key = repr((model, backend, sorted(options.items())))
        if key not in made:
            path = folder / f"{len(made)}.rlx"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("rlxc.lowering.MAX_STEP", 16)
                rlxc.compile(model, path, backend=backend, **options)
            made[key] = path
        return made[key]

    return compiled


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """``tiny_files(variant)``: a tiny GGUF file and adapters for it, written once."""
    return cache(lambda variant: write_files(variant, tmp_path_factory.mktemp(variant)))
