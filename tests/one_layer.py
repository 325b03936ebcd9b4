"""The smallest models that adapters can change, and artifacts of them that compute in f32 throughout."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# The tiny models lie in a folder of their own.
sys.path.insert(0, str(Path(__file__).parent / "models"))

from adapters import Floats, Pairs, random_pairs, write_gguf_adapter
from hf_folders import HfTiny
from oracle import OpenModel
from tiny import TEXT, write_tiny_model

import rlxc
from rlxc.artifact import Artifact, BackendName
from rlxc.weights.source import open_model

TENSORS = [
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
]
LINEAR = {
    "blk.0.attn_q.weight": (256, 256),
    "blk.0.attn_k.weight": (128, 256),
    "blk.0.attn_v.weight": (128, 256),
    "blk.0.attn_output.weight": (256, 256),
    "blk.0.ffn_gate.weight": (512, 256),
    "blk.0.ffn_up.weight": (512, 256),
    "blk.0.ffn_down.weight": (256, 512),
}
"""The matrices ``[out, in]`` of the layer."""

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
EVERY = {**LINEAR, EMBEDDING: (256, 300), OUTPUT: (300, 256)}
"""All that adapters can change; the embedding counts as ``[hidden, vocab]``."""

ALPHA = 8.0
TOKENIZER = Path(__file__).parent / "data" / "peft_tiny" / "base" / "tokenizer.json"


def write_model(path: Path, tensor_types: str | Mapping[str, str] = "F32", **options: Any) -> Path:
    """A tied Llama of one layer; options as of `write_tiny_model`."""
    second = {f"blk.1.{name}.weight": None for name in TENSORS}
    options["tensors"] = {**second, **options.get("tensors", {})}
    return write_tiny_model(
        path, "llama", tensor_types=tensor_types, metadata={"block_count": 1}, seed=1, **options
    )


def write_adapter(
    path: Path,
    targets: Mapping[str, tuple[int, int]] = LINEAR,
    rank: int = 4,
    *,
    seed: int = 0,
    **options: Any,
) -> Path:
    """An adapter of `pairs`; options as of `write_gguf_adapter`."""
    return write_gguf_adapter(path, pairs(targets, rank, seed=seed), alpha=ALPHA, **options)


def pairs(targets: Mapping[str, tuple[int, int]] = LINEAR, rank: int = 4, *, seed: int = 0) -> Pairs:
    """Pairs whose products are about as large as the model's weights."""
    return random_pairs(targets, rank, seed=seed, size=0.15)


def delta(pair: tuple[Floats, Floats], scale: float = 1.0) -> npt.NDArray[np.float64]:
    """What an adapter of `ALPHA` adds to a matrix, by the formula."""
    a, b = (side.astype(np.float64) for side in pair)
    return scale * ALPHA / len(a) * b @ a


def decoded(path: Path) -> dict[str, Floats]:
    """All tensors of a model."""
    with open_model(path) as file:
        model = OpenModel(file)  # type: ignore[arg-type]  # a folder has the same interface
        return {name: model.decode(name) for name in file.tensors}


def interpreted(path: Path, ids: list[int] = TEXT) -> npt.NDArray[Any]:
    """The interpreter's logits of a model, in f64."""
    with open_model(path) as file:
        return OpenModel(file).logits(ids)  # type: ignore[arg-type]


def compile_exact(model: Path, output: Path, *, backend: BackendName = "onnx", **options: Any) -> Artifact:
    """An artifact that rounds nothing to fewer bits than f32's: neither activations nor the cache."""
    return rlxc.compile(model, output, backend=backend, activations="float32", kv_cache="f32", **options)


def score(artifact: Artifact | Path, ids: list[int] = TEXT) -> Floats:
    """An artifact's logits, with the adapters that it was compiled with."""
    path = artifact.path if isinstance(artifact, Artifact) else artifact
    with rlxc.load(path, threads=1) as session:
        return session.score(ids)


def assert_close(found: Floats, expected: npt.NDArray[Any], tolerance: float = 1e-5) -> None:
    """Equal but for the order in which f32 sums are taken, relative to the logits' range."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.ptp(expected))


def write_folder(folder: Path, model: HfTiny, **changes: Any) -> Path:
    """A Hugging Face folder that can be compiled: with a tokenizer."""
    model.write(folder, **changes)
    shutil.copy(TOKENIZER, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
