"""Compiling a model: the only place where all stages meet.

weights -> models -> passes -> backend -> artifact
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from rlxc import __version__
from rlxc.artifact import (
    Activations,
    Artifact,
    ArtifactWriter,
    BackendName,
    KvLayer,
    KvPlan,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
    WeightEntry,
)
from rlxc.backends import BuildOptions, default_backend, get_backend
from rlxc.dtypes import DType
from rlxc.errors import ModelError, OptionError, UnsupportedError
from rlxc.ir import Graph, show
from rlxc.ir.target import TargetFeatures
from rlxc.ir.text import show_recipe
from rlxc.models import Config, build_model
from rlxc.passes import PipelineResult, WeightChanges, default_passes, run_passes
from rlxc.vocab import build_tokenizer
from rlxc.weights.gguf import GgufFile, open_gguf
from rlxc.weights.registry import F32, Packed, TiedAlias, WeightRegistry, registry_from_gguf

Progress = Callable[[str, int, int], None]
"""Told a stage's name, and how much of how much of it is done."""

if TYPE_CHECKING:
    from rlxc.backends.tvm.problem import Problem
    from rlxc.backends.tvm.targets import CpuTarget

MAX_STEP = 256
"""Tokens that a step takes at most. Longer prompts go in pieces; see docs/performance.md for why this many."""

DEFAULT_CONTEXT = 4096
"""Positions of an artifact when the user names none and the model was trained for at least as many."""


def compile(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    backend: BackendName | None = None,
    target: str = "native",
    activations: Activations = "int8",
    context: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    trace: Callable[[str], None] | None = None,
) -> Artifact:
    """Compile a model file to an artifact.

    Args:
        model: a GGUF file (of a split model, the first).
        output: the artifact to write, a folder that must not exist yet.
        backend: ``tvm`` or ``onnx``; by default tvm where it is installed.
        target: the CPUs that tvm makes code for: ``native``, or names of :data:`rlxc.backends.tvm.targets.TARGETS`
            with commas between. ONNX Runtime adapts to the CPU it runs on: for onnx there is only ``native``.
        activations: ``int8`` lets matrix products round their inputs to 8 bits per block, as llama.cpp does;
            ``float32`` keeps them exact and is slow.
        context: number of positions, at most what the model was trained for; by default 4096, or that if it is less.
        overwrite: replace an artifact that is there; it stays untouched until the new one is complete.
        progress: called as the work goes on.
        trace: called with each pass's report, which also says what nearly applied.

    Raises:
        RlxcError: the input is damaged or not supported, an option is out of range, or the output cannot be written.
    """
    if activations not in get_args(Activations):
        known = ", ".join(get_args(Activations))
        raise OptionError(f"activations {activations!r} are unknown", remedy=f"choose one of: {known}")
    tell: Progress = progress or (lambda stage, done, total: None)
    engine = get_backend(backend or default_backend())
    with open_gguf(model) as file:
        config, registry, graph = _model(file)
        context = _checked_context(context, config, file.path)
        result = _lower(graph, engine.features, context, trace=trace)
        tokenizer = build_tokenizer(file.metadata, source=file.path)
        if tokenizer.vocab_size > config.vocab:
            raise ModelError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab} rows",
                source=file.path,
            )
        with ArtifactWriter(output, overwrite=overwrite) as writer:
            total = len(result.graph.weights)
            done = 0

            def wrote(name: str) -> None:
                nonlocal done
                done += 1
                tell("weights", done, total)

            options = BuildOptions(activations, context, _max_step(context), target)
            libraries = engine.build(result.graph, file.data, writer, options, wrote)
            with writer.file("tokenizer.json") as sink:
                sink.write(tokenizer.tokenizer_json)
            if tokenizer.chat_template is not None:
                with writer.file("chat_template.jinja") as sink:
                    sink.write(tokenizer.chat_template.encode())
            tell("digests", 0, 1)
            manifest = Manifest(
                rlxc=__version__,
                model=ModelFacts(
                    architecture=result.graph.name,
                    name=_text(file.metadata, "general.name"),
                    fingerprint=file.fingerprint(),
                    layers=config.layers,
                    heads=config.heads,
                    kv_heads=config.kv_heads,
                    vocab_size=config.vocab,
                    trained_context=config.trained_context,
                ),
                target=TargetFacts(engine.name, engine.runs_on, libraries),
                options=Options(activations, context),
                kv_cache=_kv_plan(result.facts["kv_cache"]),
                tokenizer=TokenizerFacts(
                    tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.add_eos
                ),
                weights=_weight_entries(result.graph, registry),
            )
            for name, content in engine.companion_files(manifest).items():
                with writer.file(name) as sink:
                    sink.write(content)
            artifact = writer.commit(manifest)
            tell("digests", 1, 1)
            return artifact


def lower(
    model: str | os.PathLike[str],
    *,
    backend: str | None = None,
    context: int | None = None,
    after: str | None = None,
    trace: Callable[[str], None] | None = None,
) -> str:
    """The text of a model's graph after all passes of a backend, or after the pass named ``after``.

    Raises:
        RlxcError: the input is damaged or not supported, or there is no such pass.
    """
    with open_gguf(model) as file:
        config, _, graph = _model(file)
        context = _checked_context(context, config, file.path)
        features = get_backend(backend or default_backend()).features
        return show(_lower(graph, features, context, after=after, trace=trace).graph)


def tuning_problems(model: str | os.PathLike[str], *, target: CpuTarget) -> list[Problem]:
    """The kernels of a model, or of a compiled one, that can be tuned for a target.

    Raises:
        RlxcError: the input is damaged or not supported, or is an artifact without kernels.
    """
    from rlxc.backends.tvm import TUNING, TvmBackend, tuning_problems
    from rlxc.backends.tvm.families import read_problems

    if Path(model).is_dir():
        artifact = Artifact.open(model)
        return read_problems(artifact.file(TUNING).read_bytes(), target, artifact.path)
    with open_gguf(model) as file:
        config, _, graph = _model(file)
        context = _checked_context(None, config, file.path)
        graph = _lower(graph, TvmBackend.features, context).graph
        options = BuildOptions("int8", context, _max_step(context), target.name)
        return tuning_problems(graph, target, file.data, options)


def _model(file: GgufFile) -> tuple[Config, WeightRegistry, Graph]:
    registry = registry_from_gguf(file)
    _tie_output(file, registry)
    config, graph = build_model(file.metadata, registry, file.path)
    return config, registry, graph


def _checked_context(context: int | None, config: Config, source: Path) -> int:
    if context is None:
        return min(DEFAULT_CONTEXT, config.trained_context)
    if not 1 <= context <= config.trained_context:
        raise OptionError(
            f"context {context} is outside 1..{config.trained_context}, what the model was trained for",
            source=source,
        )
    return context


def _lower(
    graph: Graph,
    features: TargetFeatures,
    context: int,
    *,
    after: str | None = None,
    trace: Callable[[str], None] | None = None,
) -> PipelineResult:
    passes = default_passes(features, context=context, max_step=_max_step(context), changes=WeightChanges())
    return run_passes(graph, passes, trace=trace, stop_after=after)


def _max_step(context: int) -> int:
    return min(MAX_STEP, context)


def _tie_output(file: GgufFile, registry: WeightRegistry) -> None:
    """Declare ``output.weight`` an alias of the embedding where it is absent, or holds the very same bytes.

    Tying two matrices that differ would turn the model's output to gibberish without an error.
    """
    table, output = "token_embd.weight", "output.weight"
    if table not in registry:
        return
    target = registry.resolve(table)
    if output in registry:
        found = registry.resolve(output)
        if (found.dtype, found.shape) != (target.dtype, target.shape):
            return
        if not _equal_bytes(file.data(output), file.data(table)):
            return
        registry.remove(output)
    alias = (
        F32(output, target.shape) if isinstance(target, F32) else Packed(output, target.scheme, target.shape)
    )
    registry.add(alias, TiedAlias(table))


def _equal_bytes(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    step = 1 << 22  # comparing makes a temporary array as large as what is compared
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))


def _kv_plan(facts: Any) -> KvPlan:
    layers = tuple(KvLayer(**{**layer, "dtype": DType(layer["dtype"])}) for layer in facts["layers"])
    return KvPlan(facts["context"], facts["max_step"], facts["bytes_per_token"], layers)


def _weight_entries(graph: Graph, registry: WeightRegistry) -> tuple[WeightEntry, ...]:
    return tuple(
        WeightEntry(
            name=weight.name,
            dtype=weight.type.dtype,
            shape=tuple(int(dim) for dim in weight.type.shape),
            recipe=show_recipe(weight),
            nbytes=sum(registry.resolve(tensor).nbytes for tensor in weight.tensors),
        )
        for weight in graph.weights
    )


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(key, "")
    return value if isinstance(value, str) else ""


# --- inspecting ---------------------------------------------------------------------------------------------------


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
        architecture=_text(file.metadata, "general.architecture"),
        name=_text(file.metadata, "general.name"),
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
