"""Adapters of every architecture: PEFT's modules and GGUF's tensors name the same matrices; experts are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from rlxc.errors import UnsupportedError
from rlxc.models import ARCHITECTURES
from rlxc.weights.adapters import AdapterBase, inspect_adapter, open_adapter
from rlxc.weights.huggingface import open_folder
from tests.adapters import Floats, random_pairs, write_gguf_adapter, write_peft_adapter

# What tests share lies in the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_folders import HEADS, KV_HEADS, VARIANTS, linear_modules

MODELS = (
    *(
        "llama-old",
        "mixtral",
        "gemma2",
        "gemma3-old",
        "phi3",
        "granite",
        "olmo2",
        "qwen2",
        "qwen3",
        "qwen3-moe",
    ),
    *("starcoder2", "stablelm", "gpt-oss"),
)


def paired(rows: Floats, heads: int) -> Floats:
    """Rows of heads as GGUF has them for Llama: the halves of each take turns."""
    dim = len(rows) // heads
    return rows[
        [h * dim + half * dim // 2 + j for h in range(heads) for j in range(dim // 2) for half in (0, 1)]
    ]


@pytest.mark.parametrize("variant", MODELS)
def test_peft_and_gguf_adapters_of_a_model_are_the_same(variant: str, tmp_path: Path) -> None:
    tiny = VARIANTS[variant]
    pairs = random_pairs(linear_modules(tiny), 3)
    with open_folder(tiny.write(tmp_path / "model")) as folder:
        architecture = str(folder.metadata["general.architecture"])
        shapes = {name: info.shape for name, info in folder.tensors.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper().replace("-", "_")], 5)
    in_gguf = {}
    for module, (a, b) in pairs.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module.split(".")[-1])
        if heads and architecture in ("llama", "granite"):
            b = paired(b, heads)
        in_gguf[f"{names.get_name(module)}.weight"] = (a, b)
    base = AdapterBase(architecture, 5, HEADS, KV_HEADS)
    peft = open_adapter(write_peft_adapter(tmp_path / "a", pairs), base)
    ours = open_adapter(
        write_gguf_adapter(tmp_path / "a.gguf", in_gguf, architecture=architecture, alpha=6.0), base
    )
    assert list(peft.pairs) == list(ours.pairs) and peft.pairs.keys() == in_gguf.keys()
    for name, pair in peft.pairs.items():
        assert (pair.b.shape[0], pair.a.shape[1]) == shapes[name]
        assert (pair.a == ours.pairs[name].a).all() and (pair.b == ours.pairs[name].b).all()
        assert pair.scale == ours.pairs[name].scale == 2


def test_every_architecture_has_adapters() -> None:
    found = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "gemma3_text": "gemma3"}
    kinds = [VARIANTS[name].model_type for name in MODELS]
    assert {found.get(kind, kind) for kind in kinds} == set(ARCHITECTURES)


A, B = np.ones((3, 64), np.float32), np.ones((64, 3), np.float32)
OF_EXPERTS = {
    "one": ("qwen3moe", "model.layers.1.mlp.experts.4.up_proj"),
    "one of Mixtral": ("llama", "model.layers.0.block_sparse_moe.experts.0.w1"),
    "parameters": ("gpt-oss", "model.layers.0.mlp.experts"),
    "parameters within parameters": ("gpt-oss", "model.layers.0.mlp.experts.base_layer"),
}


@pytest.mark.parametrize(("architecture", "module"), OF_EXPERTS.values(), ids=OF_EXPERTS)
def test_peft_adapters_of_experts_are_refused(architecture: str, module: str, tmp_path: Path) -> None:
    folder = write_peft_adapter(tmp_path / "a", {module: (A, B)})
    with pytest.raises(
        UnsupportedError, match=r"adapts .*, which is of experts; adapters of single"
    ) as caught:
        open_adapter(folder, AdapterBase(architecture, 2, HEADS, KV_HEADS))
    assert str(folder) in str(caught.value)


def test_gguf_adapters_of_experts_are_refused(tmp_path: Path) -> None:
    path = write_gguf_adapter(
        tmp_path / "a.gguf",
        {"blk.0.ffn_up_exps.weight": (np.stack([A] * 5), np.stack([B] * 5))},
        architecture="qwen3moe",
    )
    with pytest.raises(UnsupportedError, match=r"'blk.0.ffn_up_exps.weight', which is of experts"):
        inspect_adapter(path)


def test_peft_parameters_are_refused(tmp_path: Path) -> None:
    config = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    folder = write_peft_adapter(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (A, B)}, config=config)
    with pytest.raises(UnsupportedError, match=r"target_parameters.*not of parameters such as experts"):
        inspect_adapter(folder)
