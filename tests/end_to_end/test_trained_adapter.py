"""A trained adapter on the real model: logits against those of PyTorch and PEFT, and text before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import rlxc
from rlxc.artifact import Artifact
from rlxc.backends import default_backend
from rlxc.runtime import Request, Session

DATA = Path(__file__).parent.parent / "data"
ADAPTER = DATA / "gemma_adapter"
SCALES = {"base": None, "half": 0.5, "full": 1.0}
SENTENCE, LABEL = (
    "A green linen apron for 24 euros.\n",
    "item: apron; color: green; material: linen; price: 24 EUR",
)
"""A sentence of a kind, but not one, that the adapter learned from; and what it shall make of it."""

# Logits reach 30, and the adapter moves them by as much. 18 layers in f32, in another order of sums, are 1e-4 apart.
TOLERANCE = 1e-3

CompileExact = Callable[..., Path]
Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def torch_logits() -> Arrays:
    """See ``tests/data/README.md``."""
    with np.load(DATA / "gemma_adapter_logits.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def artifact(compile_exact: CompileExact, gemma_gguf: Path) -> Path:
    return compile_exact(gemma_gguf, default_backend(), lora="split")


@pytest.fixture(scope="module")
def session(artifact: Path) -> Iterator[Session]:
    with rlxc.load(artifact, threads=2) as session:
        session.adapters.load(ADAPTER, name="labels")
        yield session


def put(session: Session, scale: float | None) -> None:
    """The adapter alone on the stack, or nothing."""
    session.adapters.clear()
    if scale is not None:
        session.adapters.push("labels", scale)


def assert_torch_s(logits: npt.NDArray[np.float32], name: str, expected: Arrays) -> None:
    kept = logits[expected["positions"]]
    likely = kept[:, expected["vocab"]]
    np.testing.assert_allclose(likely, expected[f"{name}_logits"], rtol=0, atol=TOLERANCE)
    sums = np.logaddexp.reduce(kept.astype(np.float64), axis=1)
    np.testing.assert_allclose(sums, expected[f"{name}_log_sum"], rtol=0, atol=TOLERANCE)
    assert expected[f"{name}_gap"].min() > 10 * TOLERANCE  # no near tie
    np.testing.assert_array_equal(logits.argmax(axis=1), expected[f"{name}_best"])


@pytest.mark.parametrize("name", SCALES)
def test_logits_equal_torch_s(name: str, session: Session, torch_logits: Arrays) -> None:
    put(session, SCALES[name])
    assert_torch_s(session.score(torch_logits["ids"].tolist()), name, torch_logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALES)
def test_logits_on_onnx_equal_torch_s(
    name: str, compile_exact: CompileExact, gemma_gguf: Path, torch_logits: Arrays
) -> None:
    with rlxc.load(compile_exact(gemma_gguf, "onnx", lora="split"), threads=2) as session:
        session.adapters.load(ADAPTER, name="labels")
        put(session, SCALES[name])
        assert_torch_s(session.score(torch_logits["ids"].tolist()), name, torch_logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "full"])
def test_folded_logits_equal_torch_s(
    name: str, compile_exact: CompileExact, gemma_gguf: Path, torch_logits: Arrays
) -> None:
    scale = SCALES[name]
    options = {"lora": "fold", "adapters": [(ADAPTER, scale)], "fold_to": "f32"}
    with rlxc.load(compile_exact(gemma_gguf, default_backend(), **options), threads=2) as session:
        assert_torch_s(session.score(torch_logits["ids"].tolist()), name, torch_logits)


def test_scale_is_noticed(session: Session, torch_logits: Arrays) -> None:
    put(session, 0.98)
    logits = session.score(torch_logits["ids"].tolist())[torch_logits["positions"]][:, torch_logits["vocab"]]
    assert np.abs(logits - torch_logits["full_logits"]).max() > 100 * TOLERANCE


def test_text_before_and_after(session: Session) -> None:
    put(session, None)
    before = session.generate(SENTENCE, max_tokens=24)
    session.adapters.push("labels")
    after = session.generate(SENTENCE, max_tokens=32)
    session.adapters.pop()
    assert "item:" not in before.text
    assert (after.text, after.stop_reason) == (LABEL, "eos")
    assert session.generate(SENTENCE, max_tokens=24).ids == before.ids


def test_text_in_a_batch_is_that_of_its_adapter_alone(session: Session) -> None:
    put(session, None)
    requests = [
        Request(SENTENCE, adapters=stack, max_tokens=10)
        for stack in ([("labels", 1.0)], [], [("labels", 0.25)], [("labels", 0.75), ("labels", 0.25)], None)
    ]
    texts = session.generate_batch(requests)
    quarter = session.generate(SENTENCE, max_tokens=10, adapter="labels", scale=0.25)
    plain = session.generate(SENTENCE, max_tokens=10)
    assert [text.ids for text in texts] == [texts[3].ids, plain.ids, quarter.ids, texts[0].ids, plain.ids]
    assert LABEL.startswith(texts[0].text) and texts[0].ids != plain.ids


def test_weights_keep_their_formats_and_the_adapter_is_small(
    artifact: Path, session: Session, gemma_gguf: Path
) -> None:
    weights = Artifact.open(artifact).manifest.weights
    # Beside packed weights, not in them: the artifact has the bytes of the file.
    assert sum(weight.nbytes for weight in weights) == rlxc.inspect(gemma_gguf).tensor_bytes
    assert session.adapters.nbytes < sum(weight.nbytes for weight in weights) / 10
