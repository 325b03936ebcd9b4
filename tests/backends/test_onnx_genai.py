"""The files that let onnxruntime-genai load an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlxc.artifact import Artifact


@pytest.fixture
def gemma_artifact(compile_gemma: Callable[[str, str], Path]) -> Path:
    return compile_gemma("onnx", "int8")


def test_config_describes_the_caches_as_they_were_planned(gemma_artifact: Path) -> None:
    plan = Artifact.open(gemma_artifact).manifest.kv_cache
    model = json.loads((gemma_artifact / "genai_config.json").read_text())["model"]
    decoder = model["decoder"]
    rings = [layer.index for layer in plan.layers if layer.layout == "ring"]
    assert (decoder["num_hidden_layers"], decoder["head_size"], decoder["num_key_value_heads"]) == (
        18,
        256,
        1,
    )
    assert model["context_length"] == plan.context
    assert decoder.get("sliding_window", {"layers": []})["layers"] == rings


def test_every_file_that_the_config_needs_is_there(gemma_artifact: Path) -> None:
    model = json.loads((gemma_artifact / "genai_config.json").read_text())["model"]
    names = [model["decoder"]["filename"], "tokenizer.json", "tokenizer_config.json"]
    assert [name for name in names if name not in Artifact.open(gemma_artifact).manifest.files] == []


def test_tokens_are_those_of_the_manifest(gemma_artifact: Path) -> None:
    tokens = Artifact.open(gemma_artifact).manifest.tokenizer
    model = json.loads((gemma_artifact / "genai_config.json").read_text())["model"]
    assert (model["bos_token_id"], tuple(model["eos_token_id"])) == (tokens.bos_id, tokens.eos_ids)


def test_type_is_the_one_that_fits_every_architecture(gemma_artifact: Path) -> None:
    assert json.loads((gemma_artifact / "genai_config.json").read_text())["model"]["type"] == "decoder"
