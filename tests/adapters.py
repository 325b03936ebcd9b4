"""Tiny LoRA adapters, written with the ``gguf`` and ``safetensors`` packages alone: GGUF files and PEFT folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Floats = npt.NDArray[np.float32]
Pairs = Mapping[str, tuple[Floats, Floats]]
"""By target: a ``[rank, in]`` and b ``[out, rank]``."""


def random_pairs(
    shapes: Mapping[str, tuple[int, int]], rank: int | Mapping[str, int], *, seed: int = 0, size: float = 0.1
) -> dict[str, tuple[Floats, Floats]]:
    """Random pairs for targets of shape ``[out, in]``, with values of standard deviation ``size``."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for target, (out, in_) in shapes.items():
        r = rank if isinstance(rank, int) else rank[target]
        a, b = rng.standard_normal((r, in_)), rng.standard_normal((out, r))
        pairs[target] = (size * a).astype(np.float32), (size * b).astype(np.float32)
    return pairs


def write_gguf_adapter(
    path: Path,
    pairs: Pairs,
    *,
    architecture: str = "llama",
    alpha: float | None = 8.0,
    tensor_type: str = "F32",
    invocation_tokens: Iterable[int] = (),
    metadata: Mapping[str, str | None] | None = None,
    tensors: Mapping[str, Floats] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """Write a GGUF adapter.

    Args:
        path: the file to write.
        pairs: by GGUF tensor; the embedding's a is given as ``[rank, vocab]``, and stored the other way.
        architecture: of the base model.
        alpha: None to leave it out.
        tensor_type: the format of a and b.
        invocation_tokens: of an activated LoRA.
        metadata: strings to add or change; None takes a key away.
        tensors: further f32 tensors.
        without: names of tensors to leave out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    strings = {"general.type": "adapter", "adapter.type": "lora"} | dict(metadata or {})
    for key, value in strings.items():
        if value is None:
            writer.kv_data[0].pop(key, None)
        else:
            writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    tokens = list(invocation_tokens)
    if tokens:
        array, u32 = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        writer.add_key_value("adapter.alora.invocation_tokens", tokens, array, u32)
    kind = gguf.GGMLQuantizationType[tensor_type]
    for target, (a, b) in pairs.items():
        flipped = np.ascontiguousarray(a.T) if target == "token_embd.weight" else a
        for name, array in ((f"{target}.lora_a", flipped), (f"{target}.lora_b", b)):
            if name not in without:
                packed = array if tensor_type == "F32" else gguf.quantize(array, kind)
                writer.add_tensor(name, packed, raw_dtype=kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_peft_adapter(
    folder: Path,
    pairs: Pairs,
    *,
    magnitudes: Mapping[str, Floats] | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """Write a PEFT folder; ``r`` is the first pair's rank and ``lora_alpha`` twice that, unless ``config`` says more.

    Args:
        folder: the folder to make.
        pairs: by Hugging Face module, such as ``model.layers.0.self_attn.q_proj``; one that ends in
            ``embed_tokens`` has a ``[rank, vocab]`` and b ``[hidden, rank]``.
        magnitudes: DoRA's, by module.
        config: keys of ``adapter_config.json`` to add or change; Ellipsis takes a key away.
        tensors: further tensors, named without ``base_model.model.``.
        without: ends of names of tensors to leave out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(pairs.values()))[0].shape[0] if pairs else 8
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in pairs}),
        "use_dora": bool(magnitudes),
        "bias": "none",
        "megatron_core": "megatron.core",
    }
    settings = {key: value for key, value in (settings | dict(config or {})).items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    found: dict[str, npt.NDArray[Any]] = dict(tensors or {})
    for module, (a, b) in pairs.items():
        embedding = module.endswith("embed_tokens")
        found[f"{module}.lora_embedding_A" if embedding else f"{module}.lora_A.weight"] = a
        found[f"{module}.lora_embedding_B" if embedding else f"{module}.lora_B.weight"] = b
    for module, magnitude in (magnitudes or {}).items():
        found[f"{module}.lora_magnitude_vector"] = magnitude
    kept = {
        f"base_model.model.{name}": np.ascontiguousarray(array)
        for name, array in found.items()
        if not name.endswith(tuple(without) or ("\0",))
    }
    save_file(kept, folder / "adapter_model.safetensors")
    return folder
