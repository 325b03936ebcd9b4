"""Adapters that PEFT saved for a Hugging Face folder, beside the weights and folded, against PEFT's own logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from interpreted import Interpreted

import rlxc
from rlxc.artifact import Artifact, BackendName
from rlxc.weights.adapters import AdapterBase, open_adapter

PEFT = Path(__file__).parent.parent / "data" / "peft_tiny"
CompileExact = Callable[..., Path]
Floats = npt.NDArray[np.floating]
Stack = Sequence[tuple[str, float]]

# Logits have a standard deviation of 1 and adapters move them by as much and more. PEFT computes in f32 from the same
# weights in another order of sums, which comes to 7e-6.
TOLERANCE = 5e-5

ONE_FOR_ALL: dict[str, Stack] = {
    "base": [],
    "plain": [("plain", 1.0)],
    "plain-half": [("plain", 0.5)],
    "rslora": [("rslora", 1.0)],
    "rslora-half": [("rslora", 0.5)],
    "patterns": [("patterns", 1.0)],
}
"""What an artifact that was compiled with no adapter at all runs, by what PEFT's logits are called."""

FOLDED: dict[str, tuple[str, float]] = {
    "plain": ("plain", 1.0),
    "plain-half": ("plain", 0.5),
    "rslora": ("rslora", 1.0),
    "patterns": ("patterns", 1.0),
    "dora": ("dora", 1.0),
    "embedding": ("embedding", 1.0),
    "saved": ("saved", 1.0),
}


@pytest.fixture(scope="module")
def peft_logits() -> dict[str, Floats]:
    """PEFT's logits ``f32 [ids, vocab]``; see ``tests/data/README.md``."""
    with np.load(PEFT / "logits.npz") as stored:
        return dict(stored)


def assert_peft_s(artifact: Path, name: str, peft_logits: dict[str, Floats], stack: Stack = ()) -> None:
    with rlxc.load(artifact, threads=1) as session:
        for adapter, scale in stack:
            session.adapters.push(PEFT / adapter, scale)
        logits = session.score(peft_logits["ids"].tolist())
    np.testing.assert_allclose(logits, peft_logits[name], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_split_logits_equal_peft_s(
    name: str, backend: BackendName, compile_exact: CompileExact, peft_logits: dict[str, Floats]
) -> None:
    artifact = compile_exact(PEFT / "base", backend, lora="split")
    assert_peft_s(artifact, name, peft_logits, ONE_FOR_ALL[name])


def test_split_adapter_of_embedding_and_output_equals_peft_s(
    backend: BackendName, compile_exact: CompileExact, peft_logits: dict[str, Floats]
) -> None:
    # A session begins with the adapters that its artifact was compiled with.
    artifact = compile_exact(PEFT / "base", backend, lora="split", adapters=[PEFT / "embedding"])
    assert_peft_s(artifact, "embedding", peft_logits)


@pytest.mark.parametrize("name", FOLDED)
def test_folded_logits_equal_peft_s(
    name: str, compile_exact: CompileExact, peft_logits: dict[str, Floats]
) -> None:
    adapter, scale = FOLDED[name]
    artifact = compile_exact(PEFT / "base", "onnx", lora="fold", adapters=[(PEFT / adapter, scale)])
    assert_peft_s(artifact, name, peft_logits)


def test_folded_dora_on_tvm_equals_peft_s(
    compile_exact: CompileExact, peft_logits: dict[str, Floats]
) -> None:
    pytest.importorskip("tvm")
    artifact = compile_exact(PEFT / "base", "tvm", lora="fold", adapters=[PEFT / "dora"])
    assert_peft_s(artifact, "dora", peft_logits)


@pytest.mark.parametrize("adapter", ["plain", "rslora", "patterns"])
def test_folding_equals_splitting(adapter: str, compile_exact: CompileExact) -> None:
    made = {
        lora: compile_exact(PEFT / "base", "onnx", lora=lora, adapters=[PEFT / adapter])
        for lora in ("fold", "split")
    }
    logits = {}
    for lora, artifact in made.items():
        with rlxc.load(artifact, threads=1) as session:
            logits[lora] = session.score([1, 50, 60, 70, 80])
    # W + s b a is rounded to f32 once, W x + s b (a x) in the course of its sums.
    np.testing.assert_allclose(logits["fold"], logits["split"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["", "-plain"])
def test_packed_base_with_an_adapter_equals_peft_s(
    kind: str, name: str, backend: BackendName, compile_exact: CompileExact, peft_logits: dict[str, Floats]
) -> None:
    artifact = compile_exact(PEFT / kind, backend, lora="split")
    assert_peft_s(artifact, kind + name, peft_logits, [("plain", 1.0)] if name else [])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_of_bitsandbytes_stay_packed(
    kind: str, backend: BackendName, compile_exact: CompileExact
) -> None:
    manifest = Artifact.open(compile_exact(PEFT / kind, backend, lora="split")).manifest
    tables = ("token_embd.weight", "output.weight")
    matrices = [each for each in manifest.weights if len(each.shape) == 2 and each.name not in tables]
    assert {str(weight.dtype) for weight in matrices} == {kind}
    # 64 weights are an f32 scale and 32 bytes of codes.
    per_layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert sum(weight.nbytes for weight in matrices) == 2 * per_layer * 36 // 64


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_adapter_folds_into_a_packed_base_that_is_unpacked(
    kind: str, compile_exact: CompileExact, peft_logits: dict[str, Floats]
) -> None:
    options = {"lora": "fold", "adapters": [PEFT / "plain"], "fold_to": "f32"}
    assert_peft_s(compile_exact(PEFT / kind, "onnx", **options), f"{kind}-plain", peft_logits)


@pytest.mark.parametrize("name", [*ONE_FOR_ALL, "embedding"])
def test_interpreted_logits_equal_peft_s(name: str, peft_logits: dict[str, Floats]) -> None:
    model = Interpreted(PEFT / "base")
    stack = ONE_FOR_ALL.get(name, [(name, 1.0)])
    logits = model.logits(
        peft_logits["ids"].tolist(), [(model.open(PEFT / adapter), scale) for adapter, scale in stack]
    )
    np.testing.assert_allclose(logits, peft_logits[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("adapter", ["plain", "rslora", "patterns"])
def test_tolerance_notices_rows_in_the_order_of_hugging_face(
    adapter: str, peft_logits: dict[str, Floats]
) -> None:
    model = Interpreted(PEFT / "base")
    # Gemma's rows are not permuted: so are Llama's when they are taken for Gemma's.
    wrong = open_adapter(PEFT / adapter, AdapterBase("gemma3", 2, 4, 2))
    logits = model.logits(peft_logits["ids"].tolist(), [(wrong, 1.0)])
    assert np.abs(logits - peft_logits[adapter]).max() > 100 * TOLERANCE


def test_adapters_differ_by_far_more_than_the_tolerance(peft_logits: dict[str, Floats]) -> None:
    names = [name for name in peft_logits if name not in ("ids", "nf4-plain", "fp4-plain")]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    apart = {(a, b): np.abs(peft_logits[a] - peft_logits[b]).max() for a, b in pairs}
    assert min(apart.values()) > 100 * TOLERANCE, apart
