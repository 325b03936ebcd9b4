"""What Hugging Face folders may not hold: parts of packed weights that do not fit together, and hostile files."""

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
from rlxc.reading import read_model
from rlxc.weights.huggingface import HfFolder, open_folder

# What tests share lies in the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_folders import (
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


HOSTILE = (
    *("llama-yarn", "llama-llama3", "llama-nf4", "gemma3-new", "gemma2", "phi3-long", "qwen2-windows"),
    *("qwen3-moe", "gpt-oss", "gpt-oss-mxfp4", "olmo3", "starcoder2", "stablelm-parallel"),
)


def opens_or_raises_ours(folder: Path) -> None:
    try:
        with open_folder(folder) as file:
            assert isinstance(file, HfFolder)
            read_model(file)
            for name in file.tensors:
                assert file.data(name).nbytes == file.tensors[name].nbytes
    except RlxcError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most examples raise, and all in one line


@settings(max_examples=300)
@given(data=st.data(), variant=st.sampled_from(HOSTILE))
def test_any_value_of_a_key_raises_only_our_errors(
    data: st.DataObject,
    variant: str,
    tiny_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for file in tiny_folder(variant).glob("model*"):
        (folder / file.name).symlink_to(file)
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
