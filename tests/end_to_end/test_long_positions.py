"""Scaled RoPE beyond the original context, and past the ends of pages, against llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from long_cases import CASES, POSITIONS, TEXT
from oracle import OpenModel

import rlxc
from rlxc.artifact import BackendName
from rlxc.backends import BACKENDS, default_backend
from rlxc.weights.gguf import open_gguf

Logits = npt.NDArray[Any]

# Logits have a standard deviation of 1; see tests/models/test_reference.py for what is left between two computations.
TOLERANCE = {"llama": 5e-5, "phi3": 5e-5, "gemma3": 5e-3}


@pytest.fixture(scope="module")
def reference() -> dict[str, Logits]:
    """llama.cpp's logits ``f32 [len(POSITIONS), vocab]`` by case; see ``tests/data/README.md``."""
    with np.load(Path(__file__).parents[1] / "data" / "long_logits.npz") as data:
        return dict(data)


def tolerance(name: str) -> float:
    return TOLERANCE[CASES[name].architecture]


# The angles are one input of all kernels: one of these models that TVM compiles says what the others would.
EACH = [
    pytest.param(name, backend, marks=[pytest.mark.slow] if backend == "tvm" and name != "llama-yarn" else [])
    for name in CASES
    for backend in BACKENDS
]


@pytest.mark.parametrize(("name", "backend_name"), EACH)
def test_compiled_logits_equal_llama_cpp_s(
    name: str,
    backend_name: BackendName,
    compile_exact: Callable[..., Path],
    reference: dict[str, Logits],
    tmp_path: Path,
) -> None:
    if backend_name == "tvm" != default_backend():
        pytest.skip("TVM is not installed")
    artifact = compile_exact(CASES[name].write(tmp_path / "model.gguf"), backend_name)
    with rlxc.load(artifact, threads=1) as session:
        logits = session.score(TEXT)[list(POSITIONS)]
    np.testing.assert_allclose(logits, reference[name], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("llama-linear", {"rope.scaling.factor": 3.9}),
        ("llama-yarn", {"rope.scaling.type": "linear"}),
        ("llama-yarn", {"rope.scaling.original_context_length": 200}),
        ("gemma3-linear", {"rope.scaling.factor": 3.9}),
        ("phi3-long", {"rope.scaling.original_context_length": 256}),
        ("phi3-short", {"rope.scaling.original_context_length": 255}),
        ("phi3-short", {"rope.scaling.attn_factor": 1.24}),
    ],
    ids=str,
)
def test_tolerance_notices_mistakes(
    name: str, mistake: dict[str, Any], reference: dict[str, Logits], tmp_path: Path
) -> None:
    with open_gguf(CASES[name].write(tmp_path / "model.gguf", metadata=mistake)) as file:
        logits = OpenModel(file).logits(TEXT)[list(POSITIONS)]
    assert np.abs(logits - reference[name]).max() > 10 * tolerance(name)
