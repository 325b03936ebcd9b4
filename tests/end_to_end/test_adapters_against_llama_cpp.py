"""Models with GGUF adapters against llama.cpp, which ran both, with ``--lora``, on the weights decoded to f32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from adapter_cases import CASES, LAST, TEXT, VARIANTS, Files, Stack
from interpreted import Interpreted

import rlxc
from rlxc.artifact import BackendName
from rlxc.weights.adapters import Adapter

DATA = Path(__file__).parent.parent / "data"
Floats = npt.NDArray[np.floating]
Reference = dict[str, Floats]
TinyFiles = Callable[[str], Files]

# Logits have a standard deviation of 1, and adapters move them by more than that. Two f32 computations in different
# order are 1e-5 apart. llama.cpp looks GELU up in a table with f16 arguments and values, 5e-4 off each, which the seven
# layers of Gemma carry on: with and without adapters, that is 2.5e-3.
TOLERANCE = {"llama": 5e-5, "gemma3": 5e-3}


@pytest.fixture(scope="session")
def reference() -> Reference:
    """llama.cpp's logits ``f32 [LAST, vocab]`` by model and case; see ``tests/data/README.md``."""
    with np.load(DATA / "tiny_adapter_logits.npz") as stored:
        return dict(stored)


def stack_of(model: Interpreted, files: Files, stack: Stack) -> list[tuple[Adapter, float]]:
    return [(model.open(files.adapters[name]), scale) for name, scale in stack]


def error(variant: str, case: str, logits: Floats, reference: Reference) -> float:
    """The largest difference, in units of the tolerance."""
    difference = np.abs(logits[-LAST:] - reference[f"{variant}/{case}"]).max()
    return float(difference) / TOLERANCE[VARIANTS[variant].architecture]


EVERY = [(variant, case) for variant, stacks in CASES.items() for case in stacks]


@pytest.mark.parametrize(("variant", "case"), EVERY)
def test_interpreted_logits_equal_llama_cpp_s(
    variant: str, case: str, tiny_files: TinyFiles, reference: Reference
) -> None:
    files = tiny_files(variant)
    model = Interpreted(files.model)
    logits = model.logits(TEXT, stack_of(model, files, CASES[variant][case]))
    assert error(variant, case, logits, reference) < 1


@pytest.fixture(scope="session")
def scores(
    backend: BackendName, tiny_files: TinyFiles, compile_exact: Callable[..., Path]
) -> Callable[[str, str], dict[str, Floats]]:
    """``scores(variant, activations)``: the logits of every case, by one session, which pushes and clears adapters."""

    def scores_(variant: str, activations: str) -> dict[str, Floats]:
        files = tiny_files(variant)
        # Matrices outside the layers take adapters only if one that changes them is there when the model is compiled.
        known = [files.adapters["vocab"]] if "vocab" in files.adapters else []
        artifact = compile_exact(files.model, backend, lora="split", adapters=known, activations=activations)
        found = {}
        with rlxc.load(artifact, threads=1) as session:
            for case, stack in CASES[variant].items():
                session.adapters.clear()
                for name, scale in stack:
                    loaded = name in session.adapters.loaded
                    session.adapters.push(name if loaded else files.adapters[name], scale)
                found[case] = session.score(TEXT)
        return found

    return scores_


@pytest.mark.parametrize("variant", CASES)
def test_compiled_logits_equal_llama_cpp_s(
    variant: str, scores: Callable[[str, str], dict[str, Floats]], reference: Reference
) -> None:
    found = scores(variant, "float32")
    errors = {case: error(variant, case, logits, reference) for case, logits in found.items()}
    assert max(errors.values()) < 1, errors


def test_int8_activations_stay_close(
    scores: Callable[[str, str], dict[str, Floats]], reference: Reference
) -> None:
    found = scores("llama-k-m", "int8")
    divergence = {
        case: mean_divergence(reference[f"llama-k-m/{case}"], logits[-LAST:])
        for case, logits in found.items()
    }
    # What rounding may cost without adapters, too (tests/models): beside it, numbers in f16 are nothing.
    assert max(divergence.values()) < 5e-4, divergence


def mean_divergence(reference: Floats, logits: Floats) -> float:
    """Kullback-Leibler divergence of next-token distributions ``[n, vocab]``, in nats."""
    p, q = (
        rows - np.logaddexp.reduce(rows, -1, keepdims=True)
        for rows in (reference.astype(float), logits.astype(float))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def rescaled(adapter: Adapter, factor: float) -> Adapter:
    return with_pairs(adapter, lambda a, b: (a, b * np.float32(factor)))


def swapped(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """B for A and A for B, where the matrix is square."""
    return (b.T, a.T) if a.shape[1] == b.shape[0] else (a, b)


def permuted(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Rows of heads from Hugging Face's order to GGUF's: none of a GGUF file's own."""
    rows = np.arange(len(b)).reshape(-1, 2, 32).transpose(0, 2, 1).ravel()
    return a, b[rows]


def with_pairs(
    adapter: Adapter, change: Callable[[Floats, Floats], tuple[Floats, Floats]], kind: str = "attn_q"
) -> Adapter:
    """The adapter with other pairs for one kind of matrices."""
    pairs = dict(adapter.pairs)
    for name, pair in adapter.pairs.items():
        if kind in name:
            a, b = change(pair.a, pair.b)
            pairs[name] = replace(pair, a=a, b=b)
    return replace(adapter, pairs=pairs)


MISTAKES: dict[str, tuple[str, Callable[[Adapter], Adapter]]] = {
    "rank padded before the scale is taken": ("rank-5", lambda adapter: rescaled(adapter, 5 / 16)),
    "alpha left out": ("rank-16", lambda adapter: rescaled(adapter, 16 / 24)),
    "alpha over the root of the rank": ("q-and-v", lambda adapter: rescaled(adapter, 8**0.5)),
    "scale off by a twentieth": ("q-and-v", lambda adapter: rescaled(adapter, 1.05)),
    "no alpha taken for no effect": ("no-alpha", lambda adapter: rescaled(adapter, 0)),
    "a and b swapped": ("rank-5", lambda adapter: with_pairs(adapter, swapped)),
    "rows permuted": ("q-and-v", lambda adapter: with_pairs(adapter, permuted)),
    "a matrix left out": (
        "rank-5",
        lambda adapter: with_pairs(adapter, lambda a, b: (a, 0 * b), "blk.1.ffn_up"),
    ),
}


@pytest.mark.parametrize("variant", ["llama-k-m", "gemma3-window"])
@pytest.mark.parametrize(("case", "mistake"), MISTAKES.values(), ids=MISTAKES)
def test_tolerance_notices_mistakes(
    variant: str,
    case: str,
    mistake: Callable[[Adapter], Adapter],
    tiny_files: TinyFiles,
    reference: Reference,
) -> None:
    files = tiny_files(variant)
    model = Interpreted(files.model)
    ((adapter, scale),) = stack_of(model, files, CASES[variant][case])
    logits = model.logits(TEXT, [(mistake(adapter), scale)])
    assert error(variant, case, logits, reference) > 10


def test_scales_and_order_of_a_stack_matter(tiny_files: TinyFiles, reference: Reference) -> None:
    files = tiny_files("llama-k-m")
    model = Interpreted(files.model)
    (first, one), (second, two) = stack_of(model, files, CASES["llama-k-m"]["two"])
    for wrong in ([(first, one)], [(first, two), (second, one)], [(first, one), (second, -two)]):
        assert error("llama-k-m", "two", model.logits(TEXT, wrong), reference) > 10
