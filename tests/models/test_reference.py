"""Logits of every tiny model against llama.cpp, which computed them in f32 from the same decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from divergence import mean_divergence
from oracle import Floats, OpenModel, tolerance
from tiny import CONTEXT, INT8, ROWS, TEXT, VARIANTS

from rlxc.artifact import BackendName
from rlxc.models import gpt_oss
from rlxc.weights.gguf import open_gguf

Open = Callable[[str], OpenModel]
Score = Callable[..., Floats]
Reference = dict[str, Floats]


def assert_equal_logits(variant: str, logits: Floats, reference: Reference) -> None:
    expected = reference[variant]
    np.testing.assert_allclose(logits[ROWS], expected, rtol=0, atol=tolerance(variant, expected))


def test_interpreted_logits_equal_llama_cpp_s(
    variant: str, open_tiny: Open, llama_cpp_logits: Reference
) -> None:
    assert_equal_logits(variant, open_tiny(variant).logits(TEXT), llama_cpp_logits)


def test_compiled_logits_equal_llama_cpp_s(
    variant: str, backend: BackendName, score_tiny: Score, llama_cpp_logits: Reference
) -> None:
    assert_equal_logits(variant, score_tiny(backend, variant, "float32"), llama_cpp_logits)


@pytest.mark.parametrize("variant", INT8)
def test_int8_activations_stay_as_close_as_llama_cpp_s(
    variant: str, backend: BackendName, score_tiny: Score, llama_cpp_logits: Reference
) -> None:
    found = mean_divergence(llama_cpp_logits[variant], score_tiny(backend, variant, "int8")[ROWS])
    # llama.cpp rounds activations as coarsely. Both are draws of one size, and ours is often the smaller; codes that
    # were not centred on zero would cost twice as much in the formats with minimums.
    of_llama_cpp = float(llama_cpp_logits[f"{variant}, divergence of int8"])
    assert found < 1.25 * of_llama_cpp, (found, of_llama_cpp)


@pytest.mark.parametrize("variant", INT8)
def test_int8_activations_differ_from_float32(variant: str, backend: BackendName, score_tiny: Score) -> None:
    logits = [score_tiny(backend, variant, activations) for activations in ("int8", "float32")]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("variant", "mistake"),
    [
        ("llama-linear", {"rope.scaling.factor": None}),
        ("llama-yarn", {"rope.scaling.type": "linear"}),
        ("llama-yarn", {"rope.scaling.original_context_length": CONTEXT}),
        ("gemma3-window", {"attention.sliding_window": 9}),
        ("gemma3-window", {"attention.sliding_window_pattern": 7}),
        ("gemma3-window", {"rope.freq_base_swa": 1e6}),
        ("gemma3-linear", {"rope.scaling.factor": None}),
        ("gpt-oss-formats", {"rope.scaling.type": "linear"}),
        ("gpt-oss-odd", {"attention.sliding_window": 9}),
        ("gpt-oss-odd", {"attention.sliding_window_pattern": 3}),
        ("gpt-oss-odd", {"expert_used_count": 2}),
        ("qwen3moe-odd", {"expert_used_count": 2}),
        ("stablelm-odd", {"rope.dimension_count": 32}),
        ("starcoder2-odd", {"attention.layer_norm_epsilon": 0.1}),
    ],
    ids=str,
)
def test_tolerance_notices_mistakes(
    variant: str, mistake: dict[str, Any], tmp_path: Path, llama_cpp_logits: Reference
) -> None:
    path = VARIANTS[variant].write(tmp_path / "model.gguf", metadata=mistake)
    with open_gguf(path) as file:
        logits = OpenModel(file).logits(TEXT)
    expected = llama_cpp_logits[variant]
    assert np.abs(logits[ROWS] - expected).max() > 10 * tolerance(variant, expected)


@pytest.mark.parametrize("change", [{"limit": 8.0}, {"alpha": 1.6}])
def test_tolerance_notices_other_gates_of_gpt_oss(
    change: dict[str, float],
    tiny_gguf: Callable[[str], Path],
    llama_cpp_logits: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpt_oss, "ACTIVATION", replace(gpt_oss.ACTIVATION, **change))
    with open_gguf(tiny_gguf("gpt-oss-odd")) as file:
        logits = OpenModel(file).logits(TEXT)
    expected = llama_cpp_logits["gpt-oss-odd"]
    assert np.abs(logits[ROWS] - expected).max() > 10 * tolerance("gpt-oss-odd", expected)
