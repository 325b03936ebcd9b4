"""The distance between two artifacts' predictions, against numpy's own formula."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from hf_folders import HfTiny
from one_layer import compile_exact, write_adapter, write_folder, write_model

import rlxc
from rlxc.comparing import TEXT, Divergence, compare, divergence
from rlxc.errors import ContextError, OptionError
from rlxc.runtime import Session

Floats = npt.NDArray[np.floating[Any]]


@dataclass
class FakeTokenizer:
    ids: list[int]

    def encode(self, text: str) -> list[int]:
        return self.ids


class FakeSession:
    """Gives known logits."""

    def __init__(self, logits: npt.ArrayLike, ids: list[int] | None = None) -> None:
        self.logits = np.asarray(logits, np.float32)
        self.vocab_size = self.logits.shape[1]
        self.tokenizer = FakeTokenizer(list(range(len(self.logits))) if ids is None else ids)

    def score(self, ids: list[int]) -> npt.NDArray[np.float32]:
        return self.logits


def of_fakes(first: FakeSession, second: FakeSession) -> Divergence:
    return divergence(cast(Session, first), cast(Session, second), "text")


def kl(first: Floats, second: Floats) -> Floats:
    """Of each row: the sum of p (log p - log q), with p and q the softmax of the logits."""
    p, q = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in (first, second))
    result: Floats = (p * np.log(p / q)).sum(-1)
    return result


@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 150])
def test_divergence_is_the_formula_s(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    first, second = (rng.standard_normal((tokens, 40)).astype(np.float32) for _ in range(2))
    found = of_fakes(FakeSession(first), FakeSession(second))
    expected = kl(first.astype(np.float64), second.astype(np.float64))
    assert found.tokens == tokens
    assert found.mean_kl == pytest.approx(expected.mean(), rel=1e-9)
    assert found.max_kl == pytest.approx(expected.max(), rel=1e-9)
    assert found.same_top == np.mean(first.argmax(1) == second.argmax(1))


def test_the_first_is_what_is_taken_for_true() -> None:
    sure, unsure = np.log([[0.9, 0.1]] * 2), np.log([[0.5, 0.5]] * 2)
    found = of_fakes(FakeSession(sure), FakeSession(unsure))
    assert found.mean_kl == pytest.approx(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5), rel=1e-6)


def test_constant_added_to_the_logits_changes_nothing_however_large_they_are() -> None:
    logits = np.random.default_rng(0).integers(-9, 9, (5, 30)).astype(np.float32)
    found = of_fakes(FakeSession(logits), FakeSession(logits + 10_000))
    assert (found.mean_kl, found.max_kl, found.same_top) == (0, 0, 1)


def test_vocabularies_of_different_sizes_are_refused() -> None:
    with pytest.raises(OptionError, match="different vocabularies; compare artifacts of one model"):
        of_fakes(FakeSession(np.zeros((3, 8))), FakeSession(np.zeros((3, 9))))


def test_vocabularies_that_cut_a_text_differently_are_refused() -> None:
    with pytest.raises(OptionError, match="different vocabularies"):
        of_fakes(FakeSession(np.zeros((3, 8))), FakeSession(np.zeros((3, 8)), ids=[0, 2, 1]))


def test_text_of_one_token_is_refused() -> None:
    with pytest.raises(OptionError, match="the text has 1 tokens; give a longer one"):
        of_fakes(FakeSession(np.zeros((1, 8))), FakeSession(np.zeros((1, 8))))


# --- artifacts ----------------------------------------------------------------------------------------------------

SAMPLE = "A short text."  # each of its bytes is a token of the tiny vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model compiled without an adapter, with it at two scales, and one with another vocabulary."""
    root = tmp_path_factory.mktemp("comparing")
    model, adapter = write_model(root / "model.gguf"), write_adapter(root / "a.gguf")
    compile_exact(model, root / "base.rlx")
    compile_exact(model, root / "split.rlx", adapters=[(adapter, 0.5)], lora="split")
    compile_exact(model, root / "folded.rlx", adapters=[(adapter, 0.5)], lora="fold")
    compile_exact(write_folder(root / "hf", HfTiny()), root / "other.rlx")
    return root


def test_artifact_does_not_differ_from_itself(folder: Path) -> None:
    found = compare(folder / "split.rlx", folder / "split.rlx", SAMPLE, threads=1)
    assert (found.mean_kl, found.max_kl, found.same_top) == (0, 0, 1)


def test_adapters_that_were_compiled_in_take_part(folder: Path) -> None:
    with (
        rlxc.load(folder / "base.rlx", threads=1) as base,
        rlxc.load(folder / "split.rlx", threads=1) as other,
    ):
        ids = base.tokenizer.encode(SAMPLE)
        expected = kl(*(session.score(ids).astype(np.float64) for session in (base, other)))
    found = compare(folder / "base.rlx", folder / "split.rlx", SAMPLE, threads=1)
    assert found.tokens == len(ids) > 10
    assert found.mean_kl == pytest.approx(expected.mean(), rel=1e-6)
    assert found.mean_kl > 0.01


def test_folding_in_f32_is_no_difference(folder: Path) -> None:
    # Logits differ by the order of f32 sums, 1e-5 of their range: squared, as the divergence of close ones is.
    assert compare(folder / "split.rlx", folder / "folded.rlx", SAMPLE, threads=1).mean_kl < 1e-8


def test_artifacts_of_different_models_are_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="different vocabularies"):
        compare(folder / "base.rlx", folder / "other.rlx", SAMPLE, threads=1)


def test_text_beyond_the_context_is_refused(folder: Path) -> None:
    assert len(TEXT) > 256  # our own text is longer than what the tiny model takes
    with pytest.raises(ContextError, match="do not fit the context of 256"):
        compare(folder / "base.rlx", folder / "split.rlx", threads=1)
