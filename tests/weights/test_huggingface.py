"""Hugging Face folders against Transformers' logits and GGUF's arithmetic."""

from __future__ import annotations

import json
import re
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
from rlxc.errors import WeightError
from rlxc.ir import show
from rlxc.models import ARCHITECTURES
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
    pack_mxfp4,
)
from hf_kinds import EXPERT_FFN
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
        ("llama-longrope", {"max_position_embeddings": 512}),
        ("mistral-window", {"sliding_window": 9}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("qwen2-windows", {"max_window_layers": 2}),
        ("qwen2-windows", {"use_sliding_window": False}),
        ("qwen3", {"rope_scaling": None}),
        ("qwen3-moe", {"num_experts_per_tok": 1}),
        ("gemma2", {"attn_logit_softcapping": 5.1}),
        ("gemma2", {"final_logit_softcapping": 3.1}),
        ("gemma2-new", {"layer_types": None}),
        ("phi3", {"sliding_window": None}),
        ("phi3-long", {"original_max_position_embeddings": 256}),
        ("phi3-short", changed("phi3-short", "rope_scaling", attention_factor=None)),
        ("granite", {"attention_multiplier": 0.25}),
        ("granite", {"embedding_multiplier": 1.6}),
        ("granite", {"logits_scaling": 0.75}),
        ("granite", {"residual_multiplier": 0.65}),
        ("olmo3", {"layer_types": ["full_attention"] * 4}),
        ("starcoder2", {"sliding_window": 10}),
        ("stablelm", {"partial_rotary_factor": 0.5}),
        ("gpt-oss", changed("gpt-oss", "rope_scaling", truncate=True)),
        ("gpt-oss", {"sliding_window": 9}),
    ],
    ids=str,
)
def test_tolerance_notices_mistakes(
    variant: str, mistake: dict[str, Any], tmp_path: Path, transformers_logits: dict[str, Floats]
) -> None:
    found = logits(VARIANTS[variant].write(tmp_path, config=mistake))
    assert np.abs(found - transformers_logits[variant]).max() > 10 * TOLERANCE


ARCHITECTURE = {
    "gemma3_text": "GEMMA3",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "qwen3_moe": "QWEN3MOE",
    "olmo3": "OLMO2",
}
"""What GGUF calls a ``model_type``, where it is not that in capitals."""


def in_gguf_s_terms(variant: HfTiny) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor as llama.cpp's converter writes it: names from its own table, its permutation written out."""
    architecture = ARCHITECTURE.get(variant.model_type, variant.model_type.upper())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], LAYERS[variant.model_type])
    made: dict[str, npt.NDArray[np.float32]] = {}
    stacks: dict[str, list[npt.NDArray[np.float32]]] = {}
    for name, values in variant.arrays().items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if heads and architecture in ("LLAMA", "GRANITE"):
            half = len(values) // heads // 2
            by_head = [
                [h * 2 * half + j * half + i for i in range(half) for j in (0, 1)] for h in range(heads)
            ]
            values = values[np.concatenate(by_head)]
        if architecture.startswith("GEMMA") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if values.ndim == 3:
            values = values.swapaxes(1, 2)  # gpt-oss multiplies with [in, out]
        for whole, part in as_modules(name, values).items():
            found = names.get_name(
                re.sub(r"experts\.\d+", "experts", whole), try_suffixes=(".weight", ".bias")
            )
            if ".experts." in whole and "gpt_oss" not in variant.model_type:
                stacks.setdefault(found, []).append(part)
            else:
                made[found] = part
    return made | {name: np.stack(parts) for name, parts in stacks.items()}


def as_modules(name: str, values: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """Parameters of gpt-oss as if they were weights and biases of modules, gate and up one by one."""
    if name.endswith("sinks"):
        return {f"{name}.weight": values}
    if ".experts." not in name or name.endswith(".weight"):
        return {name: values}
    module, suffix = (name[:-5], "bias") if name.endswith("_bias") else (name, "weight")
    if not module.endswith("gate_up_proj"):
        return {f"{module}.{suffix}": values}
    halves = {"gate_proj": values[:, ::2], "up_proj": values[:, 1::2]}
    return {f"{module[:-12]}{half}.{suffix}": part for half, part in halves.items()}


@pytest.mark.parametrize("variant", [name for name, tiny in VARIANTS.items() if not tiny.four_bit])
def test_tensors_equal_those_of_a_gguf_file(variant: str, tiny_folder: Callable[[str], Path]) -> None:
    tiny = VARIANTS[variant]
    expected = in_gguf_s_terms(tiny)
    with open_folder(tiny_folder(variant)) as file:
        assert {name for name in file.tensors if not name.startswith("rope_")} == expected.keys()
        for name, values in expected.items():
            is_f32 = values.ndim == 1 or name.endswith("bias")
            assert file.tensors[name].dtype == (DType.F32 if is_f32 else DType[tiny.dtype])
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


def test_mxfp4_of_gpt_oss_keeps_every_code_and_exponent(tiny_folder: Callable[[str], Path]) -> None:
    tiny = VARIANTS["gpt-oss-mxfp4"]
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    with open_folder(tiny_folder("gpt-oss-mxfp4")) as file:
        for name, fused, first, step in (
            ("ffn_gate_exps", "gate_up_proj", 0, 2),
            ("ffn_up_exps", "gate_up_proj", 1, 2),
            ("ffn_down_exps", "down_proj", 0, 1),
        ):
            source = f"model.layers.1.mlp.experts.{fused}"
            stored = pack_mxfp4(source, tiny.arrays()[source])
            pairs, scales = (stored[f"{source}_{part}"][1] for part in ("blocks", "scales"))
            codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scales.shape, 32)
            values = np.where(codes < 8, 1, -1) * sizes[codes & 7] * np.exp2(scales[..., None] - 127.0)
            info = file.tensors[f"blk.1.{name}.weight"]
            assert (info.dtype, info.source) == (DType.MXFP4, source)
            expected = values[:, first::step].reshape(info.shape).astype(np.float32)
            np.testing.assert_array_equal(decoded(file, info.name), expected)
            raw = file.data(info.name).reshape(*info.shape[:2], -1)
            judge = gguf.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
            np.testing.assert_array_equal(judge.reshape(info.shape), expected)


def test_packed_experts_become_one_tensor(tmp_path: Path) -> None:
    packed, plain = HfTiny("qwen3_moe", four_bit="nf4", seed=20), HfTiny("qwen3_moe", seed=20)
    folder = packed.write(tmp_path / "packed")
    with open_folder(folder) as file:
        values = {name: decoded(file, name) for name in file.tensors}
        info = file.tensors["blk.1.ffn_down_exps.weight"]
        assert (info.dtype, info.shape) == (DType.NF4, (5, HIDDEN, EXPERT_FFN))
    tensors = {}
    for name in plain.arrays():
        if ".experts." in name:
            _, _, layer, _, _, expert, module, _ = name.split(".")
            stack = values[f"blk.{layer}.ffn_{module[:-5]}_exps.weight"]
            tensors[name] = ("F32", stack[int(expert)])
        elif name.endswith("proj.weight"):
            _, _, layer, _, module, _ = name.split(".")
            part = {"o_proj": "attn_output"}.get(module, f"attn_{module[0]}")
            tensors[name] = ("F32", values[f"blk.{layer}.{part}.weight"])
    # The same values one by one: only sums differ in nothing, so that the logits are equal.
    np.testing.assert_array_equal(logits(folder), logits(plain.write(tmp_path / "plain", tensors=tensors)))


def test_every_architecture_has_a_folder(tiny_folder: Callable[[str], Path]) -> None:
    found = set()
    for variant in VARIANTS:
        with open_folder(tiny_folder(variant)) as file:
            found.add(file.metadata["general.architecture"])
    assert found == set(ARCHITECTURES)


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
