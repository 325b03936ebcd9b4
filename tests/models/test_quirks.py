"""What single keys and tensors mean: logits of the interpreter against llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Floats, OpenModel
from quirks import QUIRKS, ROWS, Quirk
from tiny import TEXT, Tiny

from rlxc.models import gemma2, gemma3
from rlxc.weights.gguf import open_gguf

DATA = Path(__file__).parent.parent / "data"


def tolerance(model: Tiny) -> float:
    """As in ``test_reference.py``: what the order of f32 sums leaves, or llama.cpp's table of GELU in every layer."""
    return 5e-3 * max(1, model.layer_count / 10) if model.architecture.startswith("gemma") else 5e-5


@pytest.fixture(scope="module")
def reference() -> dict[str, Floats]:
    """llama.cpp's logits ``f32 [3, vocab]`` of the last positions; see ``tests/data/README.md``."""
    with np.load(DATA / "quirk_logits.npz") as stored:
        return dict(stored)


def logits(quirk: Quirk, path: Path, metadata: dict[str, Any] | None = None) -> Floats:
    with open_gguf(quirk.write(path, metadata)) as file:
        return OpenModel(file).logits(TEXT)[ROWS]


@pytest.mark.parametrize("name", QUIRKS)
def test_a_file_is_read_as_llama_cpp_reads_it(
    name: str, tmp_path: Path, reference: dict[str, Floats]
) -> None:
    found = logits(QUIRKS[name], tmp_path / "model.gguf")
    np.testing.assert_allclose(found, reference[name], rtol=0, atol=tolerance(QUIRKS[name].model))


@pytest.mark.parametrize("name", QUIRKS)
def test_another_reading_is_noticed(name: str, tmp_path: Path, reference: dict[str, Floats]) -> None:
    quirk = QUIRKS[name]
    found = logits(quirk, tmp_path / "model.gguf", quirk.mistake)
    assert np.abs(found - reference[name]).max() > 10 * tolerance(quirk.model)


@pytest.mark.parametrize(("architecture", "layers"), [(gemma2, 46), (gemma3, 62)])
def test_the_usual_scale_of_scores_is_noticed(
    architecture: Any,
    layers: int,
    tmp_path: Path,
    reference: dict[str, Floats],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (name,) = (name for name, quirk in QUIRKS.items() if quirk.model.layers == layers)
    monkeypatch.setattr(architecture, "LAYERS_OF_27B", 0)
    found = logits(QUIRKS[name], tmp_path / "model.gguf")
    assert np.abs(found - reference[name]).max() > 10 * tolerance(QUIRKS[name].model)
