"""Compiling a model: the only place where all stages meet.

weights -> models -> passes -> backend -> artifact
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rlxc import __version__
from rlxc.adapting import Adapted, AdapterArgument, AdapterOptions, adapt, adapter_file, lora_plan
from rlxc.artifact import (
    DEFAULT_MAX_RANK,
    DEFAULT_ROLLBACK,
    Activations,
    Artifact,
    ArtifactWriter,
    BackendName,
    KvCacheType,
    LoraPlan,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
    WeightEntry,
)
from rlxc.backends import Backend, BuildOptions, StoredAs, default_backend, get_backend
from rlxc.backends.recipes import Losses
from rlxc.dtypes import DType
from rlxc.errors import ModelError, OptionError
from rlxc.inspection import text
from rlxc.ir import Graph, show
from rlxc.ir.ops import Route
from rlxc.ir.target import TargetFeatures
from rlxc.ir.text import show_recipe
from rlxc.lowering import LoweringOptions, kv_plan, lower_graph
from rlxc.models import Config
from rlxc.passes import LoraMode, PipelineResult
from rlxc.reading import read_model
from rlxc.vocab import TokenizerFiles, tokenizer_of
from rlxc.weight_table import aliases_of, file_bytes
from rlxc.weights.gguf_writer import adapter_bytes
from rlxc.weights.source import ModelFile, open_model

Progress = Callable[[str, int, int], None]
"""Told a stage's name, and how much of how much of it is done."""

if TYPE_CHECKING:
    from rlxc.backends.tvm.problem import Problem
    from rlxc.backends.tvm.targets import CpuTarget

LOSSES = "losses.json"
"""The artifact's file that says what encoding weights anew cost, if any were."""


def compile(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    backend: BackendName | None = None,
    target: str = "native",
    activations: Activations = "int8",
    context: int | None = None,
    kv_cache: KvCacheType = "auto",
    rollback: int = DEFAULT_ROLLBACK,
    adapters: Sequence[AdapterArgument] = (),
    lora: LoraMode = "auto",
    lora_rank: int = DEFAULT_MAX_RANK,
    fold_to: str | None = None,
    quantize: str = "none",
    overwrite: bool = False,
    progress: Progress | None = None,
    trace: Callable[[str], None] | None = None,
) -> Artifact:
    """Compile a model file to an artifact.

    Args:
        model: a GGUF file (of a split model, the first), or a Hugging Face folder.
        output: the artifact to write, a folder that must not exist yet.
        backend: ``tvm`` or ``onnx``; by default tvm where it is installed.
        target: the CPUs that tvm makes code for: ``native``, or names of :data:`rlxc.backends.tvm.targets.TARGETS`
            with commas between. ONNX Runtime adapts to the CPU it runs on: for onnx there is only ``native``.
        activations: ``int8`` lets matrix products round their inputs to 8 bits per block, as llama.cpp does;
            ``float32`` keeps them exact and is slow.
        context: number of positions, at most what the model was trained for; by default 4096, or that if it is less.
        kv_cache: how keys and values are stored: ``f32``, ``f16``, ``bf16`` or ``int8``, of which each backend has
            some; ``auto`` is ``f16`` on tvm and ``f32`` on onnx.
        rollback: how many of the newest tokens a session can always take back. Layers with a sliding window keep that
            much more than their window.
        adapters: LoRA adapters (GGUF files, PEFT folders), with scales or without. A new session starts with them.
        lora: ``split`` keeps adapters beside the weights: sessions push, pop and rescale them and any others. ``fold``
            makes them part of the weights. ``auto`` folds where that costs little accuracy, and splits else.
        lora_rank: the most ranks that a session's stack of adapters can have, counted in units of 16.
        fold_to: the format of folded matrices, such as ``q8_0``; by default each keeps its own.
        quantize: a format to encode the model's matrices in, such as ``q4_k``; ``none`` keeps what they have.
        overwrite: replace an artifact that is there; it stays untouched until the new one is complete.
        progress: called as the work goes on.
        trace: called with each pass's report, which also says what nearly applied.

    Raises:
        RlxcError: the input is damaged or not supported, an option is out of range, or the output cannot be written.
    """
    if activations not in get_args(Activations):
        known = ", ".join(get_args(Activations))
        raise OptionError(f"activations {activations!r} are unknown", remedy=f"choose one of: {known}")
    wishes = AdapterOptions(adapters, lora, lora_rank, fold_to, quantize)
    tell: Progress = progress or (lambda stage, done, total: None)
    engine = get_backend(backend or default_backend())
    cache_dtype = _cache_dtype(kv_cache, engine)
    if rollback < 0:
        raise OptionError(f"rollback {rollback} is less than 0", remedy="give a number of tokens")
    with ThreadPoolExecutor(1, thread_name_prefix="rlxc-fingerprint") as hasher, open_model(model) as file:
        config, registry, graph, context = read_model(file, context)
        adapted = adapt(wishes, graph, config, registry, trace)
        wanted = LoweringOptions(context, adapted.changes, cache_dtype, rollback)
        features = engine.features_for(target, activations)
        result = lower_graph(graph, features, wanted, trace=trace)
        caches = kv_plan(result)
        plan = _lora_plan(result, features, activations, lora_rank)
        tokenizer = _tokenizer(file, config)
        with ArtifactWriter(output, overwrite=overwrite) as writer:
            # Reading a large file once more takes seconds, so it is done beside the rest; closing the file ends it.
            fingerprint = hasher.submit(file.fingerprint)
            total = len(result.graph.weights)
            done = 0

            def wrote(name: str) -> None:
                nonlocal done
                done += 1
                tell("weights", done, total)

            options = BuildOptions(activations, target, caches, plan)
            losses = Losses()
            libraries = engine.build(result.graph, adapted.read(file.data), writer, options, wrote, losses)
            _write_companions(writer, tokenizer, adapted, losses)
            tell("digests", 0, 1)
            facts = _model_facts(file, result.graph, config, fingerprint.result())
            file.check_unchanged()
            manifest = Manifest(
                rlxc=__version__,
                model=facts,
                target=TargetFacts(engine.name, engine.runs_on, libraries),
                options=Options(activations, context),
                kv_cache=caches,
                tokenizer=TokenizerFacts(
                    tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.add_eos
                ),
                weights=_weight_entries(result.graph, engine.storage(result.graph, activations)),
                aliases=aliases_of(graph, result.graph),
                lora=plan,
                adapters=adapted.entries(),
            )
            for name, content in engine.companion_files(manifest).items():
                _write(writer, name, content)
            artifact = writer.commit(manifest)
            tell("digests", 1, 1)
            return artifact


def read_losses(artifact: Artifact) -> Mapping[str, Mapping[str, float | None]]:
    """What encoding weights anew cost, by weight.

    ``relative`` is the root mean square error over the root mean square of the values; ``of_change`` is the part of
    what adapters changed that is lost (None without any).
    """
    if LOSSES not in artifact.manifest.files:
        return {}
    losses: Mapping[str, Mapping[str, float | None]] = json.loads(artifact.file(LOSSES).read_bytes())
    return losses


def lower(
    model: str | os.PathLike[str],
    *,
    backend: str | None = None,
    context: int | None = None,
    kv_cache: KvCacheType = "auto",
    adapters: Sequence[AdapterArgument] = (),
    lora: LoraMode = "auto",
    fold_to: str | None = None,
    quantize: str = "none",
    after: str | None = None,
    trace: Callable[[str], None] | None = None,
) -> str:
    """The text of a model's graph after all passes of a backend, or after the pass named ``after``.

    With adapters, what becomes of each matrix that they change, and why, stands above it.

    Raises:
        RlxcError: the input is damaged or not supported, or there is no such pass.
    """
    engine = get_backend(backend or default_backend())
    cache_dtype = _cache_dtype(kv_cache, engine)
    with open_model(model) as file:
        config, registry, graph, context = read_model(file, context)
        wishes = AdapterOptions(adapters, lora, fold_to=fold_to, quantize=quantize)
        adapted = adapt(wishes, graph, config, registry, trace)
        decisions = [
            f"# {name}: {'fold' if decision['fold'] else 'split'}, {decision['reason']}\n"
            for name, decision in adapted.decisions.items()
        ]
        options = LoweringOptions(context, adapted.changes, cache_dtype)
        features = engine.features_for("native", "int8")
        result = lower_graph(graph, features, options, after=after, trace=trace)
        return "".join(decisions) + show(result.graph)


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
    with open_model(model) as file:
        _, _, graph, context = read_model(file)
        features = TvmBackend().features_for(target.name, "int8")
        result = lower_graph(graph, features, LoweringOptions(context))
        options = BuildOptions("int8", target.name, kv_plan(result))
        return tuning_problems(result.graph, target, file.data, options)


def _cache_dtype(name: KvCacheType, backend: Backend) -> DType | None:
    """The type that ``kv_cache`` names, None where the backend chooses."""
    known = {dtype.value: dtype for dtype in backend.features.cache_dtypes}
    if name == "auto":
        return None
    if name not in known:
        raise OptionError(
            f"the {backend.name} backend has no kv_cache {name!r}",
            remedy=f"choose one of: auto, {', '.join(known)}",
        )
    return known[name]


def _lora_plan(
    result: PipelineResult, features: TargetFeatures, activations: Activations, max_rank: int
) -> LoraPlan | None:
    if "lora" not in result.facts:
        return None
    dtype = features.rounded_lora if activations == "int8" else DType.F32
    return lora_plan(result.facts["lora"], dtype, max_rank)


def _tokenizer(file: ModelFile, config: Config) -> TokenizerFiles:
    tokenizer = tokenizer_of(file.path, file.metadata, rows=config.vocab)
    if tokenizer.vocab_size > config.vocab:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab} rows",
            source=file.path,
        )
    return tokenizer


def _write_companions(
    writer: ArtifactWriter, tokenizer: TokenizerFiles, adapted: Adapted, losses: Losses
) -> None:
    """What lies beside model and weights: tokenizer, chat template, adapters, and what encoding cost."""
    _write(writer, "tokenizer.json", tokenizer.tokenizer_json)
    if tokenizer.chat_template is not None:
        _write(writer, "chat_template.jinja", tokenizer.chat_template.encode())
    for number, adapter in adapted.split:
        _write(writer, adapter_file(number), adapter_bytes(adapter))
    if losses.by_weight:
        _write(writer, LOSSES, (json.dumps(losses.summary(), indent=1) + "\n").encode())


def _write(writer: ArtifactWriter, name: str, content: bytes) -> None:
    with writer.file(name) as sink:
        sink.write(content)


def _model_facts(file: ModelFile, graph: Graph, config: Config, fingerprint: str) -> ModelFacts:
    routes = [node.op.used for node in graph.nodes if isinstance(node.op, Route)]
    return ModelFacts(
        architecture=graph.name,
        name=text(file.metadata, "general.name"),
        fingerprint=fingerprint,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        vocab_size=config.vocab,
        trained_context=config.trained_context,
        experts_used=max(routes, default=0),
    )


def _weight_entries(graph: Graph, stored: Mapping[str, StoredAs]) -> tuple[WeightEntry, ...]:
    return tuple(
        WeightEntry(
            name=weight.name,
            dtype=weight.type.dtype,
            shape=tuple(map(int, weight.type.shape)),
            recipe=show_recipe(weight),
            nbytes=file_bytes(weight),
            stored_bytes=stored[weight.name].nbytes,
            route=stored[weight.name].route,
        )
        for weight in graph.weights
    )
