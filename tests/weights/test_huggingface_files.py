"""The files of Hugging Face folders: which there are, which tensors they hold, shards, and the fingerprint of all."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlxc.errors import FormatError, ModelError, RlxcError, UnsupportedError
from rlxc.weights.huggingface import open_folder
from rlxc.weights.source import open_model

# What tests share lies in the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_folders import VARIANTS, HfTiny, write_json, write_safetensors

V = "model.layers.0.self_attn.v_proj.weight"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_folder(variant)``: its folder, written once."""
    root = tmp_path_factory.mktemp("folders")
    return cache(lambda name: VARIANTS[name].write(root / name))


# --- the folder ---------------------------------------------------------------------------------------------------


def test_a_gguf_file_and_a_folder_are_told_apart(
    write_gguf: Callable[..., Path], tiny_folder: Callable[[str], Path]
) -> None:
    with open_model(write_gguf()) as file, open_model(tiny_folder("llama-old")) as folder:
        assert "norm.weight" in file.tensors
        assert folder.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("adapter_config.json", "is an adapter"), ("manifest.json", "compiled artifact"), ("x", "GGUF file")],
)
def test_a_folder_that_is_no_model_is_refused_with_what_to_do(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(FormatError, match=f"has no config.json; .*{remedy}"):
        open_model(tmp_path)


def test_old_frequencies_are_dropped(tmp_path: Path) -> None:
    frequencies = ("F32", np.ones(8, np.float32))
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    folder = HfTiny().write(tmp_path, tensors=dict.fromkeys(names, frequencies))
    with open_folder(folder) as file:
        assert len(file.tensors) == 3 + 2 * 9


def test_a_tied_output_stored_again_is_dropped(tmp_path: Path) -> None:
    tiny = HfTiny(config={"tie_word_embeddings": True})
    table = tiny.arrays()["model.embed_tokens.weight"]
    with open_folder(tiny.write(tmp_path / "a", tensors={"lm_head.weight": ("F32", table)})) as file:
        assert "output.weight" not in file.tensors
    other = table.copy()
    other[-1, -1] += 1
    with pytest.raises(ModelError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        open_folder(tiny.write(tmp_path / "b", tensors={"lm_head.weight": ("F32", other)}))
    with pytest.raises(ModelError, match=r"lm_head.weight differs"):
        open_folder(tiny.write(tmp_path / "c", tensors={"lm_head.weight": ("F16", table.astype(np.float16))}))


TENSORS: dict[str, tuple[HfTiny, dict[str, Any], type[RlxcError], str]] = {
    "missing": (HfTiny(), {V: None}, ModelError, f"{V} is missing"),
    "no output": (HfTiny(), {"lm_head.weight": None}, ModelError, "lm_head.weight is missing"),
    "no bias": (
        HfTiny(config={"attention_bias": True}),
        {},
        ModelError,
        "8 tensors are missing.*q_proj.bias",
    ),
    "unknown": (
        HfTiny(),
        {"score.weight": ("F32", np.ones((2, 64), np.float32))},
        ModelError,
        "score.weight has no place",
    ),
    "unknown bias": (
        HfTiny(),
        {f"{V[:-7]}.bias": ("F32", np.ones(32, np.float32))},
        ModelError,
        "v_proj.bias has no place",
    ),
    "too many layers": (
        HfTiny(config={"num_hidden_layers": 1}),
        {},
        ModelError,
        "9 tensors have no place.*model.layers.1",
    ),
    "shape": (HfTiny(), {V: ("F32", np.ones((64, 32), np.float32))}, ModelError, r"shape \[64, 32\], but"),
    "element type": (HfTiny(), {V: ("F64", np.ones((32, 64)))}, UnsupportedError, "element type F64"),
    "norm of integers": (
        HfTiny(),
        {"model.norm.weight": ("I32", np.ones(64, np.int32))},
        UnsupportedError,
        "element type I32",
    ),
    "packed without config": (
        HfTiny(four_bit="nf4", config={"quantization_config": None}),
        {},
        UnsupportedError,
        "element type U8",
    ),
}


@pytest.mark.parametrize(("tiny", "tensors", "error", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, tiny: HfTiny, tensors: dict[str, Any], error: type[RlxcError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_folder(tiny.write(tmp_path, tensors=tensors))
    assert "\n" not in str(caught.value)


# --- shards -------------------------------------------------------------------------------------------------------

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
ONE = ("F32", np.ones(1, np.float32))


@pytest.fixture
def sharded(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A folder of three shards, to damage."""
    return Path(shutil.copytree(tiny_folder("mistral-shards"), tmp_path / "sharded"))


def remap(folder: Path, **places: object) -> None:
    """Put tensors elsewhere in the index."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= places
    write_json(folder / INDEX, index)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(FormatError, match=f"{SHARDS[1]}: is missing"):
        open_folder(sharded)


def test_a_tensor_that_its_shard_does_not_have_is_refused(sharded: Path) -> None:
    remap(sharded, **{"extra.weight": SHARDS[2]})
    with pytest.raises(FormatError, match=f"{SHARDS[2]}: has no tensor 'extra.weight'"):
        open_folder(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = next(name for name, place in index["weight_map"].items() if place == SHARDS[0])
    more = {tensor: ONE for tensor, place in index["weight_map"].items() if place == SHARDS[1]}
    write_safetensors(sharded / SHARDS[1], {**more, name: ONE})
    with pytest.raises(FormatError, match=f"{SHARDS[1]}: is not where {INDEX} has tensor '{name}'"):
        open_folder(sharded)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "weights.bin", 3, None])
def test_an_index_cannot_lead_elsewhere(sharded: Path, place: object) -> None:
    remap(sharded, **{"model.norm.weight": place})
    with pytest.raises(FormatError, match=r"weight_map puts 'model.norm.weight' into"):
        open_folder(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: object) -> None:
    write_json(sharded / INDEX, {"weight_map": weight_map})
    with pytest.raises(FormatError, match="weight_map is missing"):
        open_folder(sharded)


def test_a_single_file_beside_an_index_is_refused(sharded: Path) -> None:
    write_safetensors(sharded / "model.safetensors", {"a": ONE})
    with pytest.raises(FormatError, match=f"model.safetensors as well as {INDEX}"):
        open_folder(sharded)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = HfTiny().write(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="reading a pickle can run code"):
        open_folder(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = HfTiny().write(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"has no model.safetensors and no"):
        open_folder(folder)


# --- fingerprint --------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    with open_folder(folder) as file:
        return file.fingerprint()


def test_fingerprint_depends_on_content_alone(sharded: Path, tiny_folder: Callable[[str], Path]) -> None:
    assert fingerprint(sharded) == fingerprint(tiny_folder("mistral-shards"))
    (sharded / "README.md").write_text("of no importance")
    assert fingerprint(sharded) == fingerprint(tiny_folder("mistral-shards"))


@pytest.mark.parametrize("name", ["config.json", SHARDS[2], "tokenizer.json", "chat_template.jinja"])
def test_fingerprint_covers_every_file_of_the_model(sharded: Path, name: str) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    before = fingerprint(sharded)
    path = sharded / name
    content = bytearray(path.read_bytes() if path.exists() else b"x")
    content[-1] ^= ord("\n") ^ ord(" ")  # white space stays so, and of a tensor the value changes
    path.write_bytes(content)
    assert fingerprint(sharded) != before


@pytest.mark.parametrize("name", ["config.json", SHARDS[2]])
def test_a_file_changed_meanwhile_is_noticed(sharded: Path, name: str) -> None:
    with open_folder(sharded) as file:
        file.check_unchanged()
        other = sharded / "other"
        other.write_bytes((sharded / name).read_bytes())
        other.replace(sharded / name)
        for look in (file.fingerprint, file.check_unchanged):
            with pytest.raises(FormatError, match=f"{name}: has changed"):
                look()
