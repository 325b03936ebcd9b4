"""What is told of adapters, Hugging Face folders, and artifacts that have to do with adapters."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from adapters import random_pairs, write_gguf_adapter, write_peft_adapter
from hf_folders import HfTiny
from one_layer import LINEAR, compile_exact, write_adapter, write_model

import rlxc
from rlxc.artifact import (
    ArtifactWriter,
    KvLayer,
    KvPlan,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
)
from rlxc.dtypes import DType
from rlxc.errors import FormatError, ModelError, OptionError, RlxcError
from rlxc.inspection import ModelInfo

Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"


def inspected(path: Path, **options: Any) -> ModelInfo:
    """What is told of a path; it can be written as JSON."""
    info = rlxc.inspect(path, **options)
    json.dumps(info.to_dict())
    assert info.path == str(path)
    return info


def test_gguf_adapter(tmp_path: Path) -> None:
    pairs = random_pairs({Q: LINEAR[Q], DOWN: LINEAR[DOWN]}, {Q: 3, DOWN: 16})
    norm = {"blk.0.attn_norm.weight": np.ones(256, np.float32)}
    path = write_gguf_adapter(
        tmp_path / "style.v2.gguf", pairs, alpha=12.0, invocation_tokens=[5, 6], tensors=norm
    )
    info = inspected(path)
    assert (info.kind, info.architecture, info.name) == ("LoRA adapter (GGUF)", "llama", "style.v2")
    assert info.parameters == 3 * (256 + 256) + 16 * (256 + 512) + 256
    assert (info.tensors, info.tensor_bytes) == ({"f32": 5}, 4 * info.parameters)
    assert info.details == {
        "alpha": 12.0,
        "ranks": {3: 1, 16: 1},
        "replaced": ["blk.0.attn_norm.weight"],
        "invocation_tokens": [5, 6],
    }


def test_alpha_of_zero_is_told(tmp_path: Path) -> None:
    path = write_gguf_adapter(tmp_path / "a.gguf", random_pairs({Q: LINEAR[Q]}, 3), alpha=0.0)
    assert inspected(path).details == {"alpha": 0.0, "ranks": {3: 1}}


def test_peft_adapter(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    folder = write_peft_adapter(
        tmp_path / "style.v2",
        random_pairs({module: (64, 64)}, 4),
        magnitudes={module: np.ones(64, np.float32)},
        config={"use_rslora": True, "base_model_name_or_path": "org/base"},
    )
    info = inspected(folder)
    # A folder's name has no suffix: this is what `compile` calls the adapter, too.
    assert (info.kind, info.architecture, info.name) == ("LoRA adapter (PEFT)", "", "style.v2")
    assert info.parameters == 2 * 4 * 64 + 64
    assert info.details == {
        "base_model": "org/base",
        "alpha": 8.0,
        "ranks": {4: 1},
        "dora": True,
        "rank_stabilised": True,
    }


def test_hugging_face_folder(tmp_path: Path) -> None:
    model = HfTiny(dtype="BF16")
    info = inspected(model.write(tmp_path / "model.v2"))
    assert (info.kind, info.architecture, info.name) == ("Hugging Face folder", "llama", "model.v2")
    assert info.parameters == sum(array.size for array in model.arrays().values())
    assert info.tensors == {"bf16": 16, "f32": 5}  # vectors count as f32, as in GGUF files
    assert info.details["metadata"]["llama.block_count"] == 2


def test_packed_hugging_face_folder(tmp_path: Path) -> None:
    info = inspected(HfTiny(four_bit="nf4", nested=True).write(tmp_path / "model"))
    assert info.tensors == {"nf4": 14, "f32": 7}


CompileModel = Callable[..., Path]


@pytest.fixture
def compile_model(tmp_path: Path) -> CompileModel:
    """Compiles a model with an adapter ``style``."""

    def compiled(**options: Any) -> Path:
        model = write_model(tmp_path / "model.gguf", {"default": "Q4_K", "attn_q": "F16"})
        adapters = [(write_adapter(tmp_path / "style.gguf"), 0.5)]
        return compile_exact(model, tmp_path / "out.rlx", adapters=adapters, **options).path

    return compiled


def test_artifact_tells_what_adapters_it_takes_and_has(compile_model: CompileModel) -> None:
    details = inspected(compile_model(lora="split", lora_rank=48)).details
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert details["takes_adapters"] == {"max_rank": 48, "dtype": "f32", "matrices": dict.fromkeys(kinds, 1)}
    (adapter,) = details["adapters"]
    assert (adapter["name"], adapter["scale"], adapter["folded"]) == ("style", 0.5, ())
    assert adapter["file"] in details["files"]


def test_artifact_with_a_folded_adapter_takes_no_others(compile_model: CompileModel) -> None:
    details = inspected(compile_model(lora="fold")).details
    assert "takes_adapters" not in details
    (adapter,) = details["adapters"]
    assert (adapter["folded"], adapter["file"]) == (tuple(sorted(LINEAR)), None)


def test_artifact_without_adapters_says_nothing_of_them(tmp_path: Path) -> None:
    artifact = compile_exact(write_model(tmp_path / "m.gguf"), tmp_path / "m.rlx")
    assert {"takes_adapters", "adapters"}.isdisjoint(inspected(artifact.path).details)


# 64 positions of one head of 4 channels in f32, and a ring of 29 of them; pages of 16 positions in 8 bits.
BUFFERS = KvPlan(
    64,
    16,
    5,
    None,
    64,
    (
        KvLayer(0, "linear", 64, None, 1, 4, DType.F32, 32),
        KvLayer(1, "ring", 29, 8, 1, 4, DType.F32, 32),
    ),
)
PAGES = KvPlan(
    64,
    16,
    5,
    16,
    32,
    (
        KvLayer(0, "paged", 48, 8, 1, 4, DType.INT8, 16, table=0),
        KvLayer(1, "paged", 48, 8, 1, 4, DType.INT8, 0, shares=0, table=0),
        KvLayer(2, "paged", 64, None, 1, 4, DType.INT8, 16, table=1),
        KvLayer(3, "paged", 48, 8, 1, 4, DType.INT8, 0, shares=0, table=0),
    ),
)


def written_with(plan: KvPlan, folder: Path) -> Path:
    """An artifact that has this plan, and nothing else."""
    with ArtifactWriter(folder / "planned.rlx") as writer:
        manifest = Manifest(
            rlxc="0.1.0",
            model=ModelFacts("llama", "planned", "0" * 64, len(plan.layers), 1, 1, 32, plan.context),
            target=TargetFacts("onnx", "onnxruntime"),
            options=Options("int8", plan.context),
            kv_cache=plan,
            tokenizer=TokenizerFacts(None, (), add_bos=False, add_eos=False),
            weights=(),
        )
        return writer.commit(manifest).path


def test_artifact_tells_of_its_caches_in_short_and_in_whole(tmp_path: Path) -> None:
    facts = inspected(written_with(BUFFERS, tmp_path)).details["kv_cache"]
    assert facts["layouts"] == "1 linear, all positions; 1 ring, window 8"
    assert (facts["dtype"], facts["bytes_per_token"], facts["rollback"]) == ("f32", 64, 5)
    assert facts["total"] == {"batch": 1, "context": 64, "bytes": 64 * 32 + 29 * 32}
    assert [layer["capacity"] for layer in facts["layers"]] == [64, 29]


def test_artifact_tells_what_pages_hold_and_who_shares_them(tmp_path: Path) -> None:
    facts = inspected(written_with(PAGES, tmp_path)).details["kv_cache"]
    assert facts["layouts"] == "1 paged, window 8; 1 paged, all positions; 2 paged, shared, window 8"
    assert (facts["dtype"], facts["page_size"]) == ("int8", 16)


@pytest.mark.parametrize(
    ("batch", "context", "nbytes"),
    [(1, 64, 48 * 16 + 64 * 16), (3, 64, 3 * (48 + 64) * 16), (2, 17, 2 * 2 * 32 * 16), (1, 1, 2 * 16 * 16)],
)
def test_bytes_of_caches_are_those_of_the_sequences_asked_for(
    tmp_path: Path, batch: int, context: int, nbytes: int
) -> None:
    path = written_with(PAGES, tmp_path)
    total = inspected(path, batch=batch, context=context).details["kv_cache"]["total"]
    assert total == {"batch": batch, "context": context, "bytes": nbytes}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch": 0}, "batch 0 is less than 1"),
        ({"context": 0}, "context 0 is outside 1..64"),
        ({"context": 65}, "context 65 is outside 1..64, what it was compiled for"),
    ],
    ids=str,
)
def test_sequences_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, int], problem: str) -> None:
    path = written_with(BUFFERS, tmp_path)
    with pytest.raises(OptionError, match=re.escape(problem)):
        rlxc.inspect(path, **options)


@pytest.mark.parametrize("options", [{"batch": 2}, {"context": 5}], ids=str)
def test_what_has_no_caches_is_refused_with_a_size_of_them(tmp_path: Path, options: dict[str, int]) -> None:
    path = write_gguf_adapter(tmp_path / "a.gguf", random_pairs({Q: LINEAR[Q]}, 3), alpha=1.0)
    with pytest.raises(OptionError, match="only artifacts have a size of caches"):
        rlxc.inspect(path, **options)


def test_strange_name_of_a_matrix_is_shown_as_it_is(compile_model: CompileModel) -> None:
    artifact = compile_model(lora="split")
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["lora"]["groups"][0]["parts"][0]["tensor"] = "strange"
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert "strange" in inspected(artifact).details["takes_adapters"]["matrices"]


@pytest.mark.parametrize(
    ("files", "error", "problem"),
    [
        ({"adapter_config.json": b"{}"}, RlxcError, "adapter_config.json"),
        ({"adapter_config.json": b"{"}, FormatError, "adapter_config.json"),
        ({"config.json": b"{}"}, ModelError, "config.json"),
        ({"config.json": b"\xff"}, FormatError, "config.json"),
    ],
)
def test_damaged_folder_is_refused_by_the_file(
    tmp_path: Path, files: dict[str, bytes], error: type[RlxcError], problem: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=re.escape(str(tmp_path / problem))):
        rlxc.inspect(tmp_path)
