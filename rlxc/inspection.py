"""What model files, adapters and artifacts hold, as plain facts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlxc.artifact import Artifact
from rlxc.errors import UnsupportedError
from rlxc.weights.gguf import GgufFile, open_gguf


@dataclass(frozen=True)
class ModelInfo:
    """What a model file or an artifact holds.

    ``tensors`` counts tensors per format and ``tensor_bytes`` their bytes; ``parameters`` counts weights.
    ``details`` holds what only that kind of file has.
    """

    path: str
    kind: str
    architecture: str
    name: str
    parameters: int
    tensor_bytes: int
    tensors: Mapping[str, int]
    details: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def inspect(path: str | os.PathLike[str]) -> ModelInfo:
    """What is in a GGUF file or an artifact.

    Raises:
        RlxcError: it is neither, or it is damaged.
    """
    root = Path(path)
    if root.is_dir() and (root / "config.json").exists() and not (root / "manifest.json").exists():
        raise UnsupportedError(
            "a Hugging Face folder is not supported yet", source=root, remedy="convert it to GGUF"
        )
    if root.is_dir():
        return _inspect_artifact(Artifact.open(root))
    with open_gguf(root) as file:
        return _inspect_gguf(file)


def _inspect_gguf(file: GgufFile) -> ModelInfo:
    formats: dict[str, int] = {}
    for info in file.tensors.values():
        formats[info.dtype.value] = formats.get(info.dtype.value, 0) + 1
    scalars = (int, float, bool, str)
    shown = {
        key: value if isinstance(value, scalars) else f"[{len(value)} values]"
        for key, value in file.metadata.items()
    }
    return ModelInfo(
        path=str(file.path),
        kind=f"GGUF v{file.version}",
        architecture=text(file.metadata, "general.architecture"),
        name=text(file.metadata, "general.name"),
        parameters=sum(int(np.prod(info.shape)) for info in file.tensors.values()),
        tensor_bytes=sum(info.nbytes for info in file.tensors.values()),
        tensors=formats,
        details={"metadata": shown},
    )


def _inspect_artifact(artifact: Artifact) -> ModelInfo:
    manifest = artifact.manifest
    formats: dict[str, int] = {}
    for weight in manifest.weights:
        formats[weight.dtype.value] = formats.get(weight.dtype.value, 0) + 1
    return ModelInfo(
        path=str(artifact.path),
        kind=f"rlxc artifact ({manifest.target.backend})",
        architecture=manifest.model.architecture,
        name=manifest.model.name,
        parameters=sum(int(np.prod(weight.shape)) for weight in manifest.weights),
        tensor_bytes=sum(weight.nbytes for weight in manifest.weights),
        tensors=formats,
        details={
            "rlxc": manifest.rlxc,
            "options": asdict(manifest.options),
            "kv_cache": asdict(manifest.kv_cache),
            "files": {name: entry.size for name, entry in manifest.files.items()},
        },
    )


def text(metadata: Mapping[str, Any], key: str) -> str:
    """A string of the metadata, empty where there is none."""
    value = metadata.get(key, "")
    return value if isinstance(value, str) else ""
