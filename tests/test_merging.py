"""Merged models, judged by the packages that other software reads them with."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from adapters import random_pairs, write_gguf_adapter, write_peft_adapter
from hf_folders import TEXT as HF_TEXT
from hf_folders import HfTiny, as_stored, write_json
from hf_folders import shapes as hf_shapes
from one_layer import (
    ALPHA,
    EMBEDDING,
    LINEAR,
    OUTPUT,
    assert_close,
    compile_exact,
    delta,
    interpreted,
    pairs,
    score,
    write_adapter,
    write_folder,
    write_model,
)

from rlxc.errors import ArtifactError, OptionError, RlxcError, UnsupportedError, WeightError
from rlxc.merging import merge
from rlxc.weights.gguf import open_gguf

Array = npt.NDArray[Any]
Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
FORMATS = {
    "default": "Q4_K",
    "ffn_down": "Q6_K",
    "attn_v": "Q8_0",
    "attn_output": "Q5_0",
    "token_embd": "Q6_K",
}
ADAPTED = {name: shape for name, shape in LINEAR.items() if ".attn_k." not in name and ".ffn_up." not in name}
STACK = [("a", 0.7), ("b", -0.5)]
PAIRS = {"a": pairs(ADAPTED, seed=1), "b": pairs({Q: LINEAR[Q], DOWN: LINEAR[DOWN]}, 20, seed=2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in five formats, and adapters for it, which tests read and leave as they are."""
    root = tmp_path_factory.mktemp("merging")
    write_model(root / "model.gguf", FORMATS)
    write_adapter(root / "a.gguf", ADAPTED, seed=1)
    write_adapter(root / "b.gguf", {Q: LINEAR[Q], DOWN: LINEAR[DOWN]}, 20, seed=2)
    write_adapter(root / "table.gguf", {EMBEDDING: (256, 300)}, seed=3)
    return root


def stack_in(folder: Path) -> list[tuple[Path, float]]:
    return [(folder / f"{name}.gguf", scale) for name, scale in STACK]


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> Array:
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def exact(base: Mapping[str, Any]) -> dict[str, Array]:
    """What the adapted matrices are by the formula: the base as gguf decodes it, and both adapters' products."""
    result: dict[str, Array] = {}
    for name, scale in STACK:
        for tensor, pair in PAIRS[name].items():
            result[tensor] = result.get(tensor, values(base[tensor])) + delta(pair, scale)
    return result


def relative_error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- GGUF ---------------------------------------------------------------------------------------------------------

# Root mean square errors of normally distributed weights: half a step over the square root of 3, with the step that the
# largest of a block leaves; a quarter more for weights that are less even.
ERRORS = {"Q4_K": 0.095, "Q6_K": 0.025, "Q8_0": 0.008, "Q5_0": 0.06, "F16": 3e-4, "BF16": 2.2e-3, "F32": 1e-6}


def test_adapted_tensors_decode_to_the_sum_within_their_format_s_error(folder: Path, tmp_path: Path) -> None:
    merged = merge(folder / "model.gguf", stack_in(folder), tmp_path / "out.gguf")
    before, after = tensors_of(folder / "model.gguf"), tensors_of(merged.path)
    expected = exact(before)
    assert merged.losses.keys() == expected.keys() == ADAPTED.keys()
    for name, array in expected.items():
        assert after[name].tensor_type == before[name].tensor_type
        assert relative_error(values(before[name]), array) > 0.3  # what doing nothing would give
        error = relative_error(values(after[name]), array)
        assert error < ERRORS[after[name].tensor_type.name], name
        assert merged.losses[name]["relative"] == pytest.approx(error, rel=1e-3)


def test_everything_else_is_byte_for_byte_the_same(folder: Path, tmp_path: Path) -> None:
    merged = merge(folder / "model.gguf", stack_in(folder), tmp_path / "out.gguf")
    before, after = tensors_of(folder / "model.gguf"), tensors_of(merged.path)
    assert before.keys() == after.keys()
    assert merged.tensors == len(after)
    untouched = before.keys() - ADAPTED.keys()
    assert len(untouched) == 6
    for name in untouched:
        assert after[name].tensor_type == before[name].tensor_type
        assert after[name].data.tobytes() == before[name].data.tobytes()
    assert metadata(merged.path) == metadata(folder / "model.gguf")


def metadata(path: Path) -> dict[str, bytes]:
    """The bytes of every pair of the metadata, without the reader's own fields for the header."""
    fields = gguf.GGUFReader(path).fields
    return {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in fields.items()
        if not name.startswith("GGUF.")
    }


@pytest.mark.parametrize("fold_to", ["f32", "bf16", "f16", "q8_0"])
def test_adapted_tensors_get_the_format_asked_for(folder: Path, tmp_path: Path, fold_to: str) -> None:
    merged = merge(folder / "model.gguf", stack_in(folder), tmp_path / "out.gguf", fold_to=fold_to)
    before, after = tensors_of(folder / "model.gguf"), tensors_of(merged.path)
    for name, array in exact(before).items():
        assert after[name].tensor_type.name == fold_to.upper()
        assert relative_error(values(after[name]), array) < ERRORS[fold_to.upper()]
    assert after[EMBEDDING].tensor_type.name == "Q6_K"


@pytest.mark.parametrize("fold_to", [None, "q8_0"])
def test_merged_model_runs_as_the_folded_artifact_does(
    folder: Path, tmp_path: Path, fold_to: str | None
) -> None:
    merged = merge(folder / "model.gguf", stack_in(folder), tmp_path / "out.gguf", fold_to=fold_to)
    folded = compile_exact(
        folder / "model.gguf",
        tmp_path / "folded.rlx",
        adapters=stack_in(folder),
        lora="fold",
        fold_to=fold_to,
    )
    assert_close(score(compile_exact(merged.path, tmp_path / "merged.rlx")), score(folded))


def test_table_that_was_tied_keeps_its_output(folder: Path, tmp_path: Path) -> None:
    merged = merge(
        folder / "model.gguf", [(folder / "table.gguf", 0.5)], tmp_path / "out.gguf", fold_to="f32"
    )
    before, after = tensors_of(folder / "model.gguf"), tensors_of(merged.path)
    assert after.keys() - before.keys() == {OUTPUT}
    assert after[OUTPUT].data.tobytes() == before[EMBEDDING].data.tobytes()
    change = delta(pairs({EMBEDDING: (256, 300)}, seed=3)[EMBEDDING], 0.5).T
    assert relative_error(values(after[EMBEDDING]), values(before[EMBEDDING]) + change) < ERRORS["F32"]


def test_shards_become_one_file(folder: Path, tmp_path: Path) -> None:
    whole = merge(folder / "model.gguf", stack_in(folder), tmp_path / "whole.gguf")
    source = gguf.GGUFReader(folder / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=4)
    file = open_gguf(folder / "model.gguf")
    for key, value in file.metadata.items():
        if key != "general.architecture":
            field = source.fields[key]
            kind, *of = field.types
            plain = field.contents() if kind is gguf.GGUFValueType.ARRAY else value
            writer.add_key_value(key, plain, kind, sub_type=of[0] if of else None)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = tmp_path / "model-00001-of-00003.gguf"
    assert "split.count" in metadata(first)
    merge(first, stack_in(folder), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == whole.path.read_bytes()


# --- safetensors --------------------------------------------------------------------------------------------------

MODELS = {
    "llama": HfTiny(config={"tie_word_embeddings": False}, bias=True, seed=3),
    "gemma3": HfTiny(
        "gemma3_text", config={"sliding_window_pattern": 3, "rope_local_base_freq": 500.0}, seed=4
    ),
}


def linear_pairs(model: HfTiny) -> Mapping[str, tuple[Array, Array]]:
    found = {
        name.removesuffix(".weight"): (shape[0], shape[-1])
        for name, shape in hf_shapes(model.model_type, model.tied, model.bias)
        if name.endswith("proj.weight") and ".layers.0." in name
    }
    return random_pairs(found, 3, seed=1, size=0.3)


@pytest.mark.parametrize("name", MODELS)
def test_folder_merges_into_its_own_names_rows_and_norms(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    made = linear_pairs(model)
    adapter = write_peft_adapter(tmp_path / "adapter", made)  # alpha / rank is 2
    source = write_folder(tmp_path / "model", model)
    merged = merge(source, [(adapter, 0.4)], tmp_path / "out.safetensors")
    found, given = load_file(merged.path), model.arrays()
    assert found.keys() == given.keys()
    for tensor, array in given.items():
        pair = made.get(tensor.removesuffix(".weight"))
        if pair is None:
            # Gemma's norms have 1 added and taken away: an f32 near 1 has half a step of 6e-8.
            limit = 6e-8 if name == "gemma3" and tensor.endswith("norm.weight") else 0
            np.testing.assert_allclose(found[tensor], array, rtol=0, atol=limit)
        else:
            change = 0.8 * pair[1].astype(np.float64) @ pair[0]
            np.testing.assert_allclose(found[tensor], array + change, rtol=0, atol=1e-6)
    with safe_open(merged.path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # which Transformers asks for
    folded = compile_exact(source, tmp_path / "f.rlx", adapters=[(adapter, 0.4)], lora="fold")
    shutil.copy(merged.path, source / "model.safetensors")
    merged_artifact = compile_exact(source, tmp_path / "m.rlx")
    assert_close(score(merged_artifact, HF_TEXT), score(folded, HF_TEXT))


@pytest.mark.parametrize(
    ("dtype", "fold_to", "expected"), [("BF16", None, "BF16"), ("F16", None, "F16"), ("BF16", "f32", "F32")]
)
def test_all_tensors_have_one_float_type(
    tmp_path: Path, dtype: str, fold_to: str | None, expected: str
) -> None:
    model = HfTiny(dtype=dtype, seed=5)
    made = linear_pairs(model)
    adapter = write_peft_adapter(tmp_path / "adapter", made)
    merged = merge(
        write_folder(tmp_path / "model", model), [adapter], tmp_path / "m.safetensors", fold_to=fold_to
    )
    header, data = raw_safetensors(merged.path)
    kinds = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert set(kinds.values()) == {expected}
    for name, array in model.arrays().items():
        if name.removesuffix(".weight") not in made:
            start, end = header[name]["data_offsets"]
            assert data[start:end] == as_stored(array, expected).tobytes()


def raw_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def test_gguf_model_merges_into_a_folder_s_weights(folder: Path, tmp_path: Path) -> None:
    adapters = [*stack_in(folder), (folder / "table.gguf", 0.3)]
    (tmp_path / "model").mkdir()
    merge(folder / "model.gguf", adapters, tmp_path / "model" / "model.safetensors", fold_to="f32")
    write_json(
        tmp_path / "model" / "config.json",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "tie_word_embeddings": False,  # the embedding's adapter does not change the output
        },
    )
    folded = compile_exact(
        folder / "model.gguf", tmp_path / "f.rlx", adapters=adapters, lora="fold", fold_to="f32"
    )
    assert_close(score(folded), interpreted(tmp_path / "model"))


def test_packed_model_becomes_f16(folder: Path, tmp_path: Path) -> None:
    merged = merge(folder / "model.gguf", stack_in(folder), tmp_path / "m.safetensors")
    found = load_file(merged.path)
    assert {array.dtype.name for array in found.values()} == {"float16"}
    expected = values(tensors_of(folder / "model.gguf")[EMBEDDING])
    assert relative_error(found["model.embed_tokens.weight"].astype(np.float64), expected) < ERRORS["F16"]


def test_model_of_experts_merges_into_a_gguf_file_only(tmp_path: Path) -> None:
    model = HfTiny("qwen3_moe", seed=6)
    made = {"model.layers.0.self_attn.q_proj": (np.ones((2, 64), np.float32), np.ones((128, 2), np.float32))}
    adapter = write_peft_adapter(tmp_path / "adapter", made)
    with pytest.raises(
        UnsupportedError, match=r"ffn_gate_exps.weight would have to be cut into single experts"
    ):
        merge(write_folder(tmp_path / "model", model), [adapter], tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.gguf", "out.safetensors"])
@pytest.mark.parametrize("at", [1, 7])
def test_interrupted_merge_leaves_no_file(folder: Path, tmp_path: Path, name: str, at: int) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(folder / "model.gguf", stack_in(folder), tmp_path / name, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"old")
    hot = write_gguf_adapter(tmp_path / "hot.gguf", random_pairs({Q: LINEAR[Q]}, 1, size=10), alpha=3e38)
    with pytest.raises(WeightError, match="infinite"):
        merge(folder / "model.gguf", [hot], tmp_path / "out.gguf", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hot.gguf", "out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"old"


def test_model_may_be_replaced_by_its_merge(folder: Path, tmp_path: Path) -> None:
    expected = merge(folder / "model.gguf", stack_in(folder), tmp_path / "out.gguf").path.read_bytes()
    model = shutil.copy(folder / "model.gguf", tmp_path / "model.gguf")
    merge(model, stack_in(folder), model, overwrite=True)
    assert model.read_bytes() == expected


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_file_has_the_permissions_that_the_user_gives_new_ones(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        merge(folder / "model.gguf", stack_in(folder), tmp_path / "out.gguf")
    finally:
        os.umask(before)
    assert (tmp_path / "out.gguf").stat().st_mode & 0o777 == 0o640


def test_progress_counts_every_tensor(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    merged = merge(
        folder / "model.gguf",
        stack_in(folder),
        tmp_path / "m.gguf",
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("weights", i + 1, merged.tensors) for i in range(merged.tensors)]


REFUSED: Mapping[str, tuple[type[RlxcError], str, dict[str, Any], str]] = {
    "another suffix": (OptionError, "out.bin", {}, "out.bin: is neither a .gguf nor a .safetensors file"),
    "no suffix": (OptionError, "out", {}, "is neither a .gguf nor a .safetensors file"),
    "a file that is there": (OptionError, "there.gguf", {}, "there.gguf: exists already; replace it"),
    "a folder that is there": (
        ArtifactError,
        "folder.gguf",
        {"overwrite": True},
        "cannot be written (Is a dir",
    ),
    "no folder": (ArtifactError, "none/out.gguf", {}, "none/out.gguf: cannot be written (No such file"),
    "no adapter": (OptionError, "out.gguf", {"adapters": []}, "model.gguf: there is no adapter to merge"),
    "unknown format": (OptionError, "out.gguf", {"fold_to": "q9"}, "cannot fold to 'q9'"),
    "a format that GGUF lacks": (WeightError, "out.gguf", {"fold_to": "nf4"}, "GGUF has no type nf4"),
    "a packed format for safetensors": (
        OptionError,
        "out.safetensors",
        {"fold_to": "q8_0"},
        "a safetensors file cannot hold q8_0; fold to f16, bf16 or f32",
    ),
    "an adapter with invocation tokens": (
        OptionError,
        "out.gguf",
        {"adapters": ["activated.gguf"]},
        "cannot be folded: it acts only after its invocation tokens",
    ),
    "a folder to GGUF": (
        UnsupportedError,
        "out.gguf",
        {"model": "hf"},
        "hf: a Hugging Face folder cannot become a GGUF file; name a .safetensors file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, case: str
) -> None:
    error, output, options, problem = REFUSED[case]
    (tmp_path / "there.gguf").write_bytes(b"old")
    (tmp_path / "folder.gguf").mkdir()
    write_folder(tmp_path / "hf", MODELS["llama"])
    write_gguf_adapter(tmp_path / "activated.gguf", PAIRS["b"], alpha=ALPHA, invocation_tokens=[5])
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    options = dict(options)
    adapters = [tmp_path / name for name in options.pop("adapters", [])]
    if "adapters" not in REFUSED[case][2]:
        adapters = [folder / "a.gguf"]
    model = tmp_path / options.pop("model") if "model" in options else folder / "model.gguf"
    with pytest.raises(error, match=re.escape(problem)) as refused:
        merge(model, adapters, tmp_path / output, **options)
    assert str(refused.value).count("\n") == 0
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
