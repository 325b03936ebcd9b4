"""What model files, adapters and artifacts hold, as plain facts."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlxc.artifact import Artifact, KvPlan
from rlxc.errors import OptionError
from rlxc.weights.adapters import inspect_adapter
from rlxc.weights.gguf import GgufFile
from rlxc.weights.source import ModelFile, open_model


@dataclass(frozen=True)
class ModelInfo:
    """What a model, an adapter or an artifact holds.

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


def inspect(path: str | os.PathLike[str], *, batch: int = 1, context: int | None = None) -> ModelInfo:
    """What is in a GGUF file, a Hugging Face folder, a LoRA adapter (GGUF or PEFT) or an artifact.

    Args:
        path: the file or folder.
        batch: of an artifact, the sequences whose caches' bytes are told.
        context: the tokens that each of them has; by default as many as it can have.

    Raises:
        RlxcError: it is none of these, or it is damaged.
        OptionError: there are no such sequences, or no caches.
    """
    root = Path(path)
    is_adapter, is_artifact = (root / "adapter_config.json").exists(), (root / "manifest.json").exists()
    if root.is_dir() and not is_adapter and (is_artifact or not (root / "config.json").exists()):
        return _inspect_artifact(Artifact.open(root), batch, context)
    if (batch, context) != (1, None):
        raise OptionError(
            "only artifacts have a size of caches, for a batch and a context",
            source=path,
            remedy="compile it first, or leave them out",
        )
    if is_adapter:
        return _inspect_adapter(root)
    with open_model(root) as file:
        if file.metadata.get("general.type") == "adapter":
            return _inspect_adapter(root)
        return _inspect_model(file)


def _inspect_model(file: ModelFile) -> ModelInfo:
    formats = Counter(info.dtype.value for info in file.tensors.values())
    scalars = (int, float, bool, str)
    shown = {
        key: value if isinstance(value, scalars) else f"[{len(value)} values]"
        for key, value in file.metadata.items()
    }
    return ModelInfo(
        path=str(file.path),
        kind=f"GGUF v{file.version}" if isinstance(file, GgufFile) else "Hugging Face folder",
        architecture=text(file.metadata, "general.architecture"),
        name=text(file.metadata, "general.name"),
        parameters=sum(math.prod(info.shape) for info in file.tensors.values()),
        tensor_bytes=sum(info.nbytes for info in file.tensors.values()),
        tensors=dict(formats),
        details={"metadata": shown},
    )


def _inspect_adapter(path: Path) -> ModelInfo:
    facts, resolved = inspect_adapter(path), path.resolve()
    details: dict[str, Any] = {
        "base_model": facts.base_model,
        "alpha": facts.alpha,
        "ranks": dict(Counter(facts.ranks.values())),
        "replaced": list(facts.replaced),
        "dora": facts.uses_dora,
        "rank_stabilised": facts.rank_stabilised,
        "invocation_tokens": list(facts.invocation_tokens),
        "prompt_prefix": facts.prompt_prefix,
    }
    return ModelInfo(
        path=str(path),
        kind=f"LoRA adapter ({facts.kind.upper()})",
        architecture=facts.architecture or "",
        name=resolved.name if path.is_dir() else resolved.stem,
        parameters=facts.parameters,
        tensor_bytes=facts.stored_bytes,
        tensors=dict(facts.formats),
        # A number is a fact even if it is 0: an alpha of 0 means a scale of 1.
        details={key: value for key, value in details.items() if value or isinstance(value, float)},
    )


def _inspect_artifact(artifact: Artifact, batch: int, context: int | None) -> ModelInfo:
    manifest = artifact.manifest
    formats = Counter(weight.dtype.value for weight in manifest.weights)
    lora: dict[str, Any] = {}
    if manifest.lora is not None:
        plan = manifest.lora
        matrices = Counter(part.tensor.removesuffix(".weight").rpartition(".")[2] for part in plan.parts)
        lora["takes_adapters"] = {
            "max_rank": plan.max_rank,
            "dtype": plan.dtype.value,
            "matrices": dict(matrices),
        }
    if manifest.adapters:
        lora["adapters"] = [asdict(adapter) for adapter in manifest.adapters]
    return ModelInfo(
        path=str(artifact.path),
        kind=f"rlxc artifact ({manifest.target.backend})",
        architecture=manifest.model.architecture,
        name=manifest.model.name,
        parameters=sum(math.prod(weight.shape) for weight in manifest.weights),
        tensor_bytes=sum(weight.nbytes for weight in manifest.weights),
        tensors=dict(formats),
        details={
            "rlxc": manifest.rlxc,
            "options": asdict(manifest.options),
            "kv_cache": _cache_facts(artifact, batch, context),
            **lora,
            "files": {name: entry.size for name, entry in manifest.files.items()},
        },
    )


def _cache_facts(artifact: Artifact, batch: int, context: int | None) -> dict[str, Any]:
    """The plan of caches in short, what so many sequences of so many tokens take, and the plan itself."""
    plan = artifact.manifest.kv_cache
    if batch < 1:
        raise OptionError(f"batch {batch} is less than 1", remedy="give a number of sequences")
    tokens = plan.context if context is None else context
    if not 1 <= tokens <= plan.context:
        raise OptionError(
            f"context {tokens} is outside 1..{plan.context}, what it was compiled for", source=artifact.path
        )
    return {
        "layouts": _layouts(plan),
        "dtype": ", ".join(sorted({layer.dtype.value for layer in plan.layers})),
        "total": {"batch": batch, "context": tokens, "bytes": plan.nbytes(tokens, batch)},
        **asdict(plan),
    }


def _layouts(plan: KvPlan) -> str:
    """Such as ``3 paged, all positions; 15 paged, window 512``."""
    kinds = Counter((layer.layout, layer.window, layer.shares is None) for layer in plan.layers)
    return "; ".join(
        f"{count} {layout}{'' if owns else ', shared'}, "
        f"{'all positions' if window is None else f'window {window}'}"
        for (layout, window, owns), count in sorted(kinds.items(), key=lambda kind: kind[1])
    )


def text(metadata: Mapping[str, Any], key: str) -> str:
    """A string of the metadata, empty where there is none."""
    value = metadata.get(key, "")
    return value if isinstance(value, str) else ""
