"""Hugging Face folders against Transformers' logits and GGUF's arithmetic, and files that do not fit together."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from rlxc.dtypes import DType
from rlxc.errors import FormatError, ModelError, RlxcError, UnsupportedError, WeightError
from rlxc.ir import show
from rlxc.weights.formats import FORMATS
from rlxc.weights.huggingface import open_folder
from rlxc.weights.source import ModelFile, open_model

# What tests share lies in the folders above and beside this one.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from hf_folders import (
    CODEBOOKS,
    CONTEXT,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TEXT,
    VARIANTS,
    VOCAB,
    HfTiny,
    pack_four_bit,
    write_json,
    write_safetensors,
)
from oracle import Floats, OpenModel

LOGITS = Path(__file__).parent.parent / "data" / "hf_logits.npz"

# Logits have a standard deviation of 1. Transformers computes in f32, which is 5e-6 off at most.
TOLERANCE = 5e-5

V = "model.layers.0.self_attn.v_proj.weight"


@pytest.fixture(scope="session")
def transformers_logits() -> dict[str, Floats]:
    """Transformers' logits ``f32 [len(TEXT), vocab]`` by variant; see ``tests/data/README.md``."""
    with np.load(LOGITS) as stored:
        return dict(stored)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_folder(variant)``: its folder, written once."""
    root = tmp_path_factory.mktemp("folders")
    return cache(lambda name: VARIANTS[name].write(root / name))


def decoded(file: ModelFile, name: str) -> npt.NDArray[np.float32]:
    info = file.tensors[name]
    form = FORMATS[info.dtype]
    data = file.data(name)
    assert data.dtype == np.uint8 and data.shape == (info.nbytes,)
    return form.decode(data.reshape(-1, form.row_bytes(info.shape[-1])), info.shape[-1]).reshape(info.shape)


def logits(folder: Path) -> Floats:
    with open_folder(folder) as file:
        return OpenModel(file).logits(TEXT)


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(
    variant: str, tiny_folder: Callable[[str], Path], transformers_logits: dict[str, Floats]
) -> None:
    found = logits(tiny_folder(variant))
    np.testing.assert_allclose(found, transformers_logits[variant], rtol=0, atol=TOLERANCE)


def changed(variant: str, key: str, **values: Any) -> dict[str, Any]:
    """The object under a key of the variant's configuration, with other values."""
    return {key: {**VARIANTS[variant].config[key], **values}}


@pytest.mark.parametrize(
    ("variant", "mistake"),
    [
        ("llama-old", {"rope_theta": 510.0}),
        ("llama-old", {"rms_norm_eps": 1e-3}),
        ("llama-linear", {"rope_scaling": None}),
        ("llama-yarn", changed("llama-yarn", "rope_parameters", mscale=None)),
        ("llama-yarn", changed("llama-yarn", "rope_parameters", beta_fast=None)),
        ("llama-yarn", changed("llama-yarn", "rope_parameters", original_max_position_embeddings=1024)),
        ("llama-yarn-attention", changed("llama-yarn-attention", "rope_scaling", attention_factor=None)),
        ("llama-llama3", changed("llama-llama3", "rope_scaling", high_freq_factor=3.9)),
        ("llama-llama3", changed("llama-llama3", "rope_scaling", low_freq_factor=1.1)),
        ("gemma3-old", {"sliding_window_pattern": 4}),
        ("gemma3-old", {"rope_local_base_freq": 510.0}),
        ("gemma3-old", {"sliding_window": 9}),
        ("gemma3-new", {"layer_types": ["sliding_attention"] * 5}),
    ],
    ids=str,
)
def test_tolerance_notices_mistakes(
    variant: str, mistake: dict[str, Any], tmp_path: Path, transformers_logits: dict[str, Floats]
) -> None:
    found = logits(VARIANTS[variant].write(tmp_path, config=mistake))
    assert np.abs(found - transformers_logits[variant]).max() > 10 * TOLERANCE


def in_gguf_s_terms(variant: HfTiny) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor as llama.cpp's converter writes it: names from its own table, its permutation written out."""
    arch = gguf.MODEL_ARCH.GEMMA3 if variant.model_type == "gemma3_text" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, LAYERS[variant.model_type])
    made = {}
    for name, values in variant.arrays().items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if heads and arch is gguf.MODEL_ARCH.LLAMA:
            half = len(values) // heads // 2
            by_head = [
                [h * 2 * half + j * half + i for i in range(half) for j in (0, 1)] for h in range(heads)
            ]
            values = values[np.concatenate(by_head)]
        if arch is gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            values = values + np.float32(1)
        made[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return made


@pytest.mark.parametrize("variant", [name for name, tiny in VARIANTS.items() if not tiny.four_bit])
def test_tensors_equal_those_of_a_gguf_file(variant: str, tiny_folder: Callable[[str], Path]) -> None:
    tiny = VARIANTS[variant]
    expected = in_gguf_s_terms(tiny)
    with open_folder(tiny_folder(variant)) as file:
        assert file.tensors.keys() - {"rope_freqs.weight"} == expected.keys()
        for name, values in expected.items():
            assert file.tensors[name].dtype == (DType.F32 if values.ndim == 1 else DType[tiny.dtype])
            np.testing.assert_array_equal(decoded(file, name), values, err_msg=name)


def test_the_graph_equals_that_of_a_gguf_file(tmp_path: Path) -> None:
    eps = 2.0**-20  # GGUF has it in f32
    tiny = HfTiny(config={"rope_theta": 500.0, "rms_norm_eps": eps})
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS["llama"])
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(HEAD_DIM["llama"])
    writer.add_vocab_size(VOCAB)
    for name, values in in_gguf_s_terms(tiny).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_model(tiny.write(tmp_path / "folder")) as folder, open_model(tmp_path / "model.gguf") as file:
        built = [OpenModel(each) for each in (folder, file)]
        assert show(built[0].graph) == show(built[1].graph)
        assert built[0].config == built[1].config


@pytest.mark.parametrize("variant", ["llama-nf4", "llama-fp4"])
def test_packed_weights_keep_their_codes(variant: str, tiny_folder: Callable[[str], Path]) -> None:
    kind, nested = VARIANTS[variant].four_bit, VARIANTS[variant].nested
    assert kind is not None
    stored = pack_four_bit(V, VARIANTS[variant].arrays()[V], kind, nested=nested)
    with open_folder(tiny_folder(variant)) as file:
        info = file.tensors["blk.0.attn_v.weight"]
        blocks = file.data(info.name).reshape(-1, 36)
        assert (info.dtype, info.shape, info.nbytes) == (DType(kind), (32, 64), 32 * 36)
        np.testing.assert_array_equal(blocks[:, 4:].reshape(-1, 1), stored[V][1])
        values = decoded(file, info.name)
    codes = stored[V][1].reshape(-1, 1) >> np.array([4, 0], np.uint8) & 15
    absmax = stored[f"{V}.absmax"][1]
    if nested:
        inner = stored[f"{V}.nested_quant_map"][1][absmax].astype(np.float64)
        offset = json.loads(stored[f"{V}.quant_state.bitsandbytes__{kind}"][1].tobytes())["nested_offset"]
        absmax = inner * np.repeat(stored[f"{V}.nested_absmax"][1], 256)[: len(inner)] + offset
    expected = np.array(CODEBOOKS[kind])[codes].reshape(-1, 64) * absmax[:, None]
    # f32 against float64.
    np.testing.assert_allclose(values, expected.reshape(values.shape), rtol=1e-6, atol=1e-9)


def test_llama_3_factors_equal_their_formula(tiny_folder: Callable[[str], Path]) -> None:
    with open_folder(tiny_folder("llama-llama3")) as file:
        found = decoded(file, "rope_freqs.weight")
    expected = []
    for i in range(0, HEAD_DIM["llama"], 2):
        wavelength = 2 * np.pi * 10000 ** (i / HEAD_DIM["llama"])
        smooth = (128 / wavelength - 1) / (4 - 1)
        ramp = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1.0 if wavelength < 128 / 4 else 8.0 if wavelength > 128 / 1 else ramp)
    assert 1 < expected[2] < 8  # all three cases come up
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_matrices_are_borrowed_unless_their_rows_are_permuted(tiny_folder: Callable[[str], Path]) -> None:
    with open_folder(tiny_folder("llama-bias")) as file:
        for name, borrowed in (("attn_v", True), ("attn_output", True), ("attn_q", False)):
            first, second = (file.data(f"blk.0.{name}.weight") for _ in range(2))
            assert np.shares_memory(first, second) == borrowed
            assert first.flags.writeable != borrowed


def test_data_outlives_the_folder(tiny_folder: Callable[[str], Path]) -> None:
    with open_folder(tiny_folder("llama-old")) as file:
        data = file.data("token_embd.weight")
    assert data.view("<f4").std() == pytest.approx(HIDDEN**-0.5, rel=0.1)
    with pytest.raises(WeightError, match="closed"):
        file.data("token_embd.weight")
    with pytest.raises(WeightError, match="closed"):
        file.fingerprint()


def test_an_unknown_tensor_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    with (
        open_folder(tiny_folder("llama-old")) as file,
        pytest.raises(WeightError, match=r"no tensor 'blk\.9'"),
    ):
        file.data("blk.9")


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


def test_a_file_changed_meanwhile_is_noticed(sharded: Path) -> None:
    with open_folder(sharded) as file:
        (sharded / "config.json").write_text("{}")
        with pytest.raises(FormatError, match=r"config.json: has changed"):
            file.fingerprint()
