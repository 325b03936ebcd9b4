"""What Hugging Face folders may not hold: every key and every part of a packed weight is understood or refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxc.dtypes import DType
from rlxc.errors import FormatError, ModelError, RlxcError, UnsupportedError
from rlxc.weights.hf_config import read_config
from rlxc.weights.huggingface import HfFolder, open_folder

# What tests share lies in the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_folders import (
    CONTEXT,
    FFN,
    HEADS,
    HIDDEN,
    VARIANTS,
    VOCAB,
    HfTiny,
    pack_four_bit,
    write_json,
)

Q, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_folder(variant)``: its folder, written once."""
    root = tmp_path_factory.mktemp("folders")
    return cache(lambda name: VARIANTS[name].write(root / name))


# --- config.json --------------------------------------------------------------------------------------------------

GEMMA = HfTiny("gemma3_text")
ROPE = {"rope_type": "linear", "factor": 2.0}
YARN = dict(VARIANTS["llama-yarn"].config["rope_parameters"])

REFUSED: dict[str, tuple[HfTiny, dict[str, Any], type[RlxcError], str]] = {
    "other model": (HfTiny(), {"model_type": "t5"}, UnsupportedError, "model_type = 't5'.*known: llama"),
    "no model type": (HfTiny(), {"model_type": None}, ModelError, "model_type is missing"),
    "classifier": (
        HfTiny(),
        {"architectures": ["LlamaForSequenceClassification"]},
        UnsupportedError,
        "architectures",
    ),
    "images": (
        GEMMA,
        {"model_type": "gemma3", "vision_config": {"layers": 1}},
        UnsupportedError,
        "text and images",
    ),
    "unknown key": (
        HfTiny(),
        {"embedding_multiplier": 12.0},
        UnsupportedError,
        "embedding_multiplier = 12.0",
    ),
    "unknown key that is false": (HfTiny(), {"use_qk_norm": False}, UnsupportedError, "use_qk_norm"),
    "heads that differ": (HfTiny(), {"per_layer_config": {"0": {}}}, UnsupportedError, "per_layer_config"),
    "no size": (HfTiny(), {"hidden_size": None}, ModelError, "hidden_size is missing"),
    "size as text": (HfTiny(), {"hidden_size": "64"}, ModelError, "hidden_size must be an integer"),
    "size as flag": (HfTiny(), {"num_hidden_layers": True}, ModelError, "must be an integer, not True"),
    "no layers": (HfTiny(), {"num_hidden_layers": 0}, ModelError, "num_hidden_layers is 0"),
    "endless layers": (HfTiny(), {"num_hidden_layers": 10**12}, ModelError, "is outside 1..4096"),
    "odd heads": (HfTiny(), {"head_dim": 15}, ModelError, "head_dim is 15"),
    "eps": (HfTiny(), {"rms_norm_eps": -1.0}, ModelError, "rms_norm_eps must be a positive number"),
    "infinite": (HfTiny(), {"rope_theta": float("inf")}, ModelError, "rope_theta must be a positive"),
    "tied as text": (HfTiny(), {"tie_word_embeddings": "no"}, ModelError, "must be true or false"),
    "activation": (HfTiny(), {"hidden_act": "gelu"}, UnsupportedError, "hidden_act = 'gelu'.*'silu'"),
    "window": (HfTiny("mistral"), {"sliding_window": 128}, UnsupportedError, "sliding_window = 128"),
    "layer types": (
        HfTiny("mistral"),
        {"layer_types": ["full_attention", "sliding_attention"]},
        UnsupportedError,
        "layer_types",
    ),
    "interleaved": (HfTiny(), {"rope_interleaved": True}, UnsupportedError, "rope_interleaved = True"),
    "encoder": (HfTiny(), {"is_encoder_decoder": True}, UnsupportedError, "is_encoder_decoder"),
    "partial rotation": (HfTiny(), {"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
    "partial rotation within": (
        HfTiny(),
        {"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}},
        UnsupportedError,
        r"rope_scaling.partial_rotary_factor = 0.5",
    ),
    "scaling": (
        HfTiny(),
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        UnsupportedError,
        "rope_type = 'dynamic'",
    ),
    "two types": (
        HfTiny(),
        {"rope_scaling": {**ROPE, "type": "yarn"}},
        ModelError,
        "rope_type is 'linear', but type is 'yarn'",
    ),
    "two scalings": (
        HfTiny(),
        {"rope_scaling": ROPE, "rope_parameters": {**ROPE, "factor": 3.0}},
        ModelError,
        "rope_scaling differs",
    ),
    "two thetas": (
        HfTiny(),
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
        ModelError,
        "rope_theta is 6.0, but rope_theta is 5.0",
    ),
    "no factor": (HfTiny(), {"rope_scaling": {"type": "linear"}}, ModelError, "rope_scaling.factor is miss"),
    "small factor": (
        HfTiny(),
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        ModelError,
        "can only be stretched",
    ),
    "scaling's unknown key": (
        HfTiny(),
        {"rope_scaling": {**ROPE, "long_factor": [1.0]}},
        UnsupportedError,
        "rope_scaling.long_factor",
    ),
    "yarn not cut off": (
        HfTiny(),
        {"rope_scaling": {**YARN, "truncate": False}},
        UnsupportedError,
        "rope_scaling.truncate = False",
    ),
    "two contexts": (
        HfTiny(),
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        ModelError,
        "is 4096, but outside it is 32",
    ),
    "llama 3's ramp": (
        HfTiny(),
        {"rope_scaling": {**VARIANTS["llama-llama3"].config["rope_scaling"], "high_freq_factor": 1.0}},
        ModelError,
        "high_freq_factor is 1.0",
    ),
    "gemma, llama 3's scaling": (
        GEMMA,
        {"rope_scaling": VARIANTS["llama-llama3"].config["rope_scaling"]},
        UnsupportedError,
        "not implemented for gemma3",
    ),
    "gemma, scaled windows": (
        GEMMA,
        {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
        UnsupportedError,
        "not implemented for gemma3",
    ),
    "gemma, flat parameters": (GEMMA, {"rope_parameters": ROPE}, UnsupportedError, "rope_parameters.factor"),
    "gemma, both ways": (
        GEMMA,
        {"rope_scaling": ROPE, "rope_parameters": {"full_attention": ROPE}},
        ModelError,
        "rope_scaling is given besides",
    ),
    "soft-capping": (GEMMA, {"final_logit_softcapping": 30.0}, UnsupportedError, "final_logit_softcapping"),
    "soft-capped scores": (GEMMA, {"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_soft"),
    "scale": (GEMMA, {"query_pre_attn_scalar": 16}, UnsupportedError, "query_pre_attn_scalar = 16.*32 is"),
    "both ways": (GEMMA, {"use_bidirectional_attention": True}, UnsupportedError, "bidirectional"),
    "gemma's activation": (GEMMA, {"hidden_activation": "gelu"}, UnsupportedError, "hidden_activation"),
    "layers without period": (
        GEMMA,
        {"layer_types": ["full_attention", *["sliding_attention"] * 4]},
        UnsupportedError,
        "layer_types.*one full layer after",
    ),
    "too few layer types": (GEMMA, {"layer_types": ["full_attention"]}, ModelError, "layer_types must say"),
    "strange layer types": (GEMMA, {"layer_types": ["linear"] * 5}, ModelError, "layer_types must say"),
    "layer types no list": (GEMMA, {"layer_types": 5}, ModelError, "layer_types must be a list"),
    "other quantisation": (
        HfTiny(),
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        UnsupportedError,
        "quantization_config.quant_method = 'gptq'",
    ),
    "8 bits": (
        HfTiny(),
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        UnsupportedError,
        "load_in_8bit",
    ),
    "4 bits of another kind": (
        HfTiny(),
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}},
        UnsupportedError,
        "bnb_4bit_quant_type = 'af4'",
    ),
    "other storage": (
        HfTiny(),
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}},
        UnsupportedError,
        "bnb_4bit_quant_storage = 'bfloat16'",
    ),
    "quantisation's unknown key": (
        HfTiny(),
        {"quantization_config": {"load_in_4bit": True, "group_size": 32}},
        UnsupportedError,
        "quantization_config.group_size",
    ),
}


@pytest.mark.parametrize(("tiny", "config", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_configurations_are_refused_by_key(
    tmp_path: Path, tiny: HfTiny, config: dict[str, Any], error: type[RlxcError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_folder(tiny.write(tmp_path, config=config))
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


ACCEPTED: dict[str, tuple[HfTiny, dict[str, Any], dict[str, Any]]] = {
    "as many key heads": (
        HfTiny(config={"num_key_value_heads": 4, "head_dim": 8}),
        {"num_key_value_heads": None},
        {"llama.attention.head_count_kv": 4},
    ),
    "window past the end": (
        HfTiny("mistral"),
        {"sliding_window": CONTEXT},
        {"llama.context_length": CONTEXT},
    ),
    "empty scaling": (HfTiny(), {"rope_scaling": {}}, {"llama.rope.freq_base": 10000.0}),
    "no sliding layers": (
        GEMMA,
        {"layer_types": ["full_attention"] * 5, "sliding_window": None},
        {"gemma3.attention.sliding_window": 0},
    ),
    "no full layers": (
        GEMMA,
        {"layer_types": ["sliding_attention"] * 5, "sliding_window_pattern": 2},
        {"gemma3.attention.sliding_window_pattern": 6, "gemma3.attention.sliding_window": 8},
    ),
    "pattern of Transformers 4.55": (
        GEMMA,
        {"_sliding_window_pattern": 2},
        {"gemma3.attention.sliding_window_pattern": 2},
    ),
    "gemma's own thetas": (
        GEMMA,
        {},
        {"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 10000.0},
    ),
    "yarn by its context": (
        HfTiny(),
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}},
        {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 1.0},
    ),
}


@pytest.mark.parametrize(("tiny", "config", "metadata"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_metadata_of_less_common_configurations(
    tmp_path: Path, tiny: HfTiny, config: dict[str, Any], metadata: dict[str, Any]
) -> None:
    values = {**tiny.config_json(), **config}
    folder = tiny.write(tmp_path)
    write_json(folder / "config.json", values)
    found = read_config(values, folder / "config.json").metadata
    assert {key: found[key] for key in metadata} == metadata


# --- bitsandbytes -------------------------------------------------------------------------------------------------


NF4 = HfTiny(four_bit="nf4", nested=True)


def four_bit(**state: Any) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    """The parts of a packed weight with other JSON."""
    parts = pack_four_bit(UP, NF4.arrays()[UP], "nf4", nested=True)
    name = f"{UP}.quant_state.bitsandbytes__nf4"
    changed = {**json.loads(parts[name][1].tobytes()), **state}
    text = json.dumps({key: value for key, value in changed.items() if value is not None})
    return {**parts, name: ("U8", np.frombuffer(text.encode(), np.uint8))}


U8 = ("U8", np.zeros(4, np.uint8))
PACKED: dict[str, tuple[dict[str, Any], type[RlxcError], str]] = {
    "no state": ({f"{UP}.quant_state.bitsandbytes__nf4": None}, ModelError, "__nf4 is missing"),
    "no absmax": ({f"{UP}.absmax": None}, ModelError, "but absmax is missing"),
    "no map": ({f"{UP}.quant_map": None}, ModelError, "but quant_map is missing"),
    "no nested absmax": ({f"{UP}.nested_absmax": None}, ModelError, "but nested_absmax is missing"),
    "no nested map": ({f"{UP}.nested_quant_map": None}, ModelError, "but nested_quant_map is missing"),
    "other map": (
        {f"{UP}.quant_map": ("F32", np.linspace(-1, 1, 16, dtype=np.float32))},
        UnsupportedError,
        "a quant_map that is not nf4's",
    ),
    "map of another kind": (
        {f"{UP}.quant_map": ("F16", np.ones(16, np.float16))},
        ModelError,
        "quant_map of",
    ),
    "too few codes": ({UP: U8}, ModelError, r"4 bytes of codes; \[128, 64\] weights need 4096"),
    "too few absmax": ({f"{UP}.absmax": U8}, ModelError, r"absmax of U8 \[128\], but it is U8 \[4\]"),
    "plain absmax": (
        {f"{UP}.absmax": ("F32", np.ones(128, np.float32))},
        ModelError,
        r"absmax of U8 \[128\], but it is F32",
    ),
    "nested absmax": (
        {f"{UP}.nested_absmax": ("F32", np.ones(2, np.float32))},
        ModelError,
        r"nested_absmax of F32 \[1\]",
    ),
    "not JSON": (
        {f"{UP}.quant_state.bitsandbytes__nf4": ("U8", np.frombuffer(b"{]", np.uint8))},
        FormatError,
        "__nf4 is not",
    ),
    "block size": (four_bit(blocksize=128), UnsupportedError, "blocksize = 128"),
    "no block size": (four_bit(blocksize=None), ModelError, "blocksize is missing"),
    "shape": (four_bit(shape=[HIDDEN, FFN]), ModelError, r"from shape \[64, 128\], but must be \[128, 64\]"),
    "kind": (four_bit(quant_type="fp4"), UnsupportedError, "quant_type = 'fp4'"),
    "dtype": (four_bit(dtype="int8"), UnsupportedError, "dtype = 'int8'"),
    "offset": (four_bit(nested_offset="x"), ModelError, "nested_offset must be a number"),
    "nested block size": (four_bit(nested_blocksize=0), ModelError, "nested_blocksize is 0"),
    "state without parts": (
        {**four_bit(), f"{UP}.nested_absmax": None, f"{UP}.nested_quant_map": None},
        ModelError,
        "nested_absmax is missing",
    ),
    "packed embedding": ({"model.embed_tokens.weight": U8}, ModelError, "bitsandbytes__nf4 is missing"),
}


@pytest.mark.parametrize(("tensors", "error", "message"), PACKED.values(), ids=PACKED.keys())
def test_packed_weights_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, Any], error: type[RlxcError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_folder(NF4.write(tmp_path, tensors=tensors))
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    tiny = HfTiny(four_bit="nf4", config={"hidden_size": 96})
    values = np.ones((HEADS * 16, 96), np.float32)
    tensors: dict[str, Any] = {**pack_four_bit(Q, values, "nf4", nested=False)}
    tensors["model.embed_tokens.weight"] = ("F32", np.ones((VOCAB, 96), np.float32))
    with pytest.raises(UnsupportedError, match="rows of 96 weights, which are not whole blocks of 64"):
        open_folder(tiny.write(tmp_path, tensors=tensors))


def test_a_weight_left_unpacked_stays_as_it_is(tmp_path: Path) -> None:
    values = NF4.arrays()[V]
    parts = dict.fromkeys(pack_four_bit(V, values, "nf4", nested=True))
    with open_folder(NF4.write(tmp_path, tensors={**parts, V: ("F32", values)})) as file:
        assert file.tensors["blk.0.attn_v.weight"].dtype is DType.F32
        assert file.tensors["blk.0.attn_k.weight"].dtype is DType.NF4
        np.testing.assert_array_equal(file.data("blk.0.attn_v.weight").view("<f4"), values.reshape(-1))


# --- hostile files ------------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def opens_or_raises_ours(folder: Path) -> None:
    try:
        with open_folder(folder) as file:
            assert isinstance(file, HfFolder)
            for name in file.tensors:
                assert file.data(name).nbytes == file.tensors[name].nbytes
    except RlxcError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most examples raise, and all in one line


@settings(max_examples=150)
@given(data=st.data(), variant=st.sampled_from(["llama-yarn", "llama-llama3", "gemma3-new", "llama-nf4"]))
def test_any_value_of_a_key_raises_only_our_errors(
    data: st.DataObject,
    variant: str,
    tiny_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "model.safetensors").symlink_to(tiny_folder(variant) / "model.safetensors")
    config = VARIANTS[variant].config_json()
    place = config
    key = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict) and data.draw(st.booleans()):
        place[key] = dict(place[key])
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(ANYTHING)
    write_json(folder / "config.json", config)
    opens_or_raises_ours(folder)


@settings(max_examples=150)
@given(data=st.data(), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_damaged_bytes_raise_only_our_errors(
    data: st.DataObject,
    name: str,
    tiny_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for file in tiny_folder("llama-nf4").iterdir():
        content = bytearray(file.read_bytes())
        if file.name == name:
            # The header, and the first tensors: JSON about packed weights among them.
            at = data.draw(st.integers(0, min(len(content) - 1, 30000)))
            content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        (folder / file.name).write_bytes(content)
    opens_or_raises_ours(folder)
