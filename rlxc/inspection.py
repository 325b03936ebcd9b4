"""What model files, adapters and artifacts hold, as plain facts."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlxc.artifact import Activations, Artifact, KvPlan
from rlxc.backends import BACKENDS, default_backend
from rlxc.checking import Checked, CheckOptions, Readiness, check
from rlxc.errors import ModelError, OptionError, RlxcError, UnsupportedError
from rlxc.weight_table import WeightRow, WeightTable, of_adapter, of_artifact, of_file, of_graph
from rlxc.weights.adapters import inspect_adapter
from rlxc.weights.gguf import GgufFile
from rlxc.weights.huggingface import survey_folder
from rlxc.weights.source import ModelFile, open_model


@dataclass(frozen=True)
class ModelInfo:
    """What a model, an adapter or an artifact holds.

    ``tensors`` counts tensors per format and ``tensor_bytes`` their bytes; ``parameters`` counts weights.
    ``details`` holds what only that kind of file has. ``readiness`` says of each backend whether it can compile a
    model; ``weights`` lists every one, if that was asked for.
    """

    path: str
    kind: str
    architecture: str
    name: str
    parameters: int
    tensor_bytes: int
    tensors: Mapping[str, int]
    details: Mapping[str, Any]
    readiness: tuple[Readiness, ...] = ()
    weights: WeightTable | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        facts = asdict(self)
        facts["readiness"] = [{"compiles": one.compiles, **asdict(one)} for one in self.readiness]
        return facts


def inspect(
    path: str | os.PathLike[str],
    *,
    batch: int = 1,
    context: int | None = None,
    backend: str | None = None,
    target: str = "native",
    activations: Activations = "int8",
    weights: bool = False,
) -> ModelInfo:
    """What is in a GGUF file, a Hugging Face folder, a LoRA adapter (GGUF or PEFT) or an artifact.

    Of a model, it also says whether it compiles and, if not, everything that is missing. Weights are not read.

    Args:
        path: the file or folder.
        batch: of an artifact, the sequences whose caches' bytes are told.
        context: of an artifact, the tokens that each of them has, by default as many as it can have; of a model, the
            positions to compile it for, as of :func:`rlxc.compile`.
        backend: of a model, the backend that shall compile it; by default, all are looked at.
        target: of a model, as of :func:`rlxc.compile`.
        activations: of a model, likewise.
        weights: list all weights, with their formats and bytes, as an artifact has them or would have them on the
            backend (by default the one that :func:`rlxc.compile` takes).

    Raises:
        RlxcError: it is none of these, or it is damaged.
        OptionError: an option is out of range, or there is nothing that it could be about.
    """
    root = Path(path)
    if backend not in (None, *BACKENDS):
        raise OptionError(f"backend {backend!r} is unknown", remedy=f"choose one of: {', '.join(BACKENDS)}")
    options = CheckOptions((backend,) if backend else BACKENDS, target, activations, context)
    kind = _kind_of_folder(root) if root.is_dir() else "model"
    if kind == "artifact":
        artifact = Artifact.open(root)
        if options != CheckOptions(BACKENDS, context=context):
            raise OptionError("is compiled already", source=path, remedy="name a backend for a model")
        return _inspect_artifact(artifact, batch, context, weights)
    if batch != 1 or (kind == "adapter" and context is not None):
        raise _no_caches(path)
    if kind == "adapter":
        return _inspect_adapter(root, weights)
    try:
        file = open_model(root, allow_foreign=True)
    except (ModelError, UnsupportedError) as error:
        if not root.is_dir():
            raise
        return _inspect_unusable_folder(root, options, weights, error)
    with file:
        if file.metadata.get("general.type") != "adapter":
            return _inspect_model(file, options, weights)
    if context is not None:
        raise _no_caches(path)
    return _inspect_adapter(root, weights)


def _kind_of_folder(root: Path) -> Literal["artifact", "adapter", "model"]:
    if (root / "adapter_config.json").exists():
        return "adapter"
    is_artifact = (root / "manifest.json").exists() or not (root / "config.json").exists()
    return "artifact" if is_artifact else "model"


def _no_caches(path: object) -> OptionError:
    return OptionError(
        "only artifacts have a size of caches, for a batch and a context",
        source=path,
        remedy="compile it first, or leave them out",
    )


def _inspect_model(file: ModelFile, options: CheckOptions, weights: bool) -> ModelInfo:
    foreign = file.foreign if isinstance(file, GgufFile) else ()
    formats = Counter([info.dtype.value for info in file.tensors.values()])
    formats.update(tensor.type.lower() for tensor in foreign)
    shapes = [*(info.shape for info in file.tensors.values()), *(tensor.shape for tensor in foreign)]
    scalars = (int, float, bool, str)
    shown = {
        key: value if isinstance(value, scalars) else f"[{len(value)} values]"
        for key, value in file.metadata.items()
    }
    found = check(file, options)
    return ModelInfo(
        path=str(file.path),
        kind=f"GGUF v{file.version}" if isinstance(file, GgufFile) else "Hugging Face folder",
        architecture=text(file.metadata, "general.architecture"),
        name=text(file.metadata, "general.name"),
        parameters=sum(map(math.prod, shapes)),
        tensor_bytes=sum(info.nbytes for info in file.tensors.values()),
        tensors=dict(formats),
        details={"metadata": shown},
        readiness=tuple(one.readiness for one in found),
        weights=_model_weights(file, found, options) if weights else None,
    )


def _model_weights(file: ModelFile, found: Sequence[Checked], options: CheckOptions) -> WeightTable:
    """The weights as the first backend that is asked for would store them; if it would not, as the file has them."""
    asked = options.backends[0] if len(options.backends) == 1 else default_backend()
    (chosen,) = [one for one in found if one.readiness.backend == asked]
    if chosen.lowered is None:
        return of_file(file)
    return of_graph(chosen.lowered, options.activations)


def _inspect_unusable_folder(root: Path, options: CheckOptions, weights: bool, error: RlxcError) -> ModelInfo:
    """What a Hugging Face folder holds that cannot be read as a model, and why not.

    Raises:
        RlxcError: the error, where nothing but a broken configuration is there.
    """
    survey = survey_folder(root)
    if survey is None:
        raise error
    table = WeightTable.of(
        WeightRow(tensor.name, tensor.shape, tensor.dtype.lower(), tensor.nbytes) for tensor in survey.tensors
    )
    problems = tuple(" ".join(str(part).split()) for part in error.parts)
    return ModelInfo(
        path=str(root),
        kind="Hugging Face folder",
        architecture=survey.model_type,
        name=root.resolve().name,
        parameters=table.total.parameters,
        tensor_bytes=sum(tensor.nbytes for tensor in survey.tensors),
        tensors=dict(Counter(tensor.dtype.lower() for tensor in survey.tensors)),
        details={},
        readiness=tuple(Readiness(name, options.context, problems) for name in options.backends),
        weights=table if weights else None,
    )


def _inspect_adapter(path: Path, weights: bool) -> ModelInfo:
    facts, resolved = inspect_adapter(path), path.resolve()
    name = resolved.name if path.is_dir() else resolved.stem
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
        name=name,
        parameters=facts.parameters,
        tensor_bytes=facts.stored_bytes,
        tensors=dict(facts.formats),
        # A number is a fact even if it is 0: an alpha of 0 means a scale of 1.
        details={key: value for key, value in details.items() if value or isinstance(value, float)},
        weights=of_adapter(facts, name) if weights else None,
    )


def _inspect_artifact(artifact: Artifact, batch: int, context: int | None, weights: bool) -> ModelInfo:
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
        tensor_bytes=sum(weight.stored_bytes for weight in manifest.weights),
        tensors=dict(formats),
        details={
            "rlxc": manifest.rlxc,
            "options": asdict(manifest.options),
            "kv_cache": _cache_facts(artifact, batch, context),
            **lora,
            "files": {name: entry.size for name, entry in manifest.files.items()},
        },
        weights=of_artifact(artifact) if weights else None,
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
