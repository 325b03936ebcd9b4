"""Whether a model compiles, and if not, everything that is missing: from metadata alone, without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlxc.artifact import Activations, KvPlan
from rlxc.backends import Backend, BuildOptions, get_backend
from rlxc.errors import Problems, RlxcError
from rlxc.ir import Graph
from rlxc.lowering import LoweringOptions, kv_plan, lower_graph
from rlxc.models import build_model
from rlxc.reading import checked_context, tie_output
from rlxc.vocab import check_tokenizer
from rlxc.weights.gguf import GgufFile, foreign_types
from rlxc.weights.registry import F32, base_registry
from rlxc.weights.source import ModelFile


@dataclass(frozen=True)
class Readiness:
    """Whether a model compiles for a backend, for sequences of ``context`` positions.

    ``problems`` are what is missing, in the words of the errors that compiling would raise; none if it compiles. Then
    a sequence's caches take ``cache_bytes``. There is no context where not even the configuration can be read.
    """

    backend: str
    context: int | None
    problems: tuple[str, ...]
    cache_bytes: int | None = None

    @property
    def compiles(self) -> bool:
        """Whether nothing is missing."""
        return not self.problems


@dataclass(frozen=True)
class CheckOptions:
    """What a model is to be compiled for; see :func:`rlxc.compile`. Several backends are each looked at."""

    backends: Sequence[str]
    target: str = "native"
    activations: Activations = "int8"
    context: int | None = None


@dataclass(frozen=True)
class Lowered:
    """A graph as the model's definition emits it, what a backend's passes make of it, its caches, and the backend."""

    model: Graph
    graph: Graph
    caches: KvPlan
    engine: Backend


@dataclass(frozen=True)
class Checked:
    """What was found about one backend; ``lowered`` is what it would build if the model compiles."""

    readiness: Readiness
    lowered: Lowered | None


def check(file: ModelFile, options: CheckOptions) -> list[Checked]:
    """Look for all that keeps a model from being compiled.

    Problems of the model itself are every backend's; if it has none, its graph goes through each backend's passes
    and lowering, which is all of compiling but kernels and weights.

    Args:
        file: the model, perhaps with tensors of foreign types.
        options: what it is to be compiled for.

    Raises:
        OptionError: the context is longer than what the model was trained for.
    """
    context = checked_context(options.context, file)
    problems = Problems()
    if isinstance(file, GgufFile) and file.foreign:
        problems.add(foreign_types(file))
    graph = None
    try:
        graph = _build(file, context)
    except RlxcError as error:
        problems.add(error)
    try:
        check_tokenizer(file.path, file.metadata, rows=_rows(file))
    except RlxcError as error:
        problems.add(error)
    model = None if problems.found else graph
    return [_of_backend(name, file, context, options, model, problems) for name in options.backends]


def _rows(file: ModelFile) -> int | None:
    """The rows of a model's embedding, if it has one."""
    table = file.tensors.get("token_embd.weight")
    return table.shape[0] if table else None


def _build(file: ModelFile, context: int) -> Graph:
    """A model's graph, in which tensors of foreign types are as if they were floats."""
    registry = base_registry(file)
    for tensor in file.foreign if isinstance(file, GgufFile) else ():
        registry.add(F32(tensor.name, tensor.shape))
    tie_output(file, registry)
    return build_model(file.metadata, registry, file.path, context)[1]


def _of_backend(
    name: str, file: ModelFile, context: int, options: CheckOptions, model: Graph | None, problems: Problems
) -> Checked:
    found = Problems()
    for problem in problems.found:
        found.add(problem)
    lowered = None
    try:
        engine = get_backend(name)
        if model is not None:
            features = engine.features_for(options.target, options.activations)
            result = lower_graph(model, features, LoweringOptions(context))
            caches = kv_plan(result)
            engine.check(result.graph, file.data, BuildOptions(options.activations, options.target, caches))
            lowered = Lowered(model, result.graph, caches, engine)
    except RlxcError as error:
        found.add(error)
    said = tuple(_said(problem, file) for problem in found.found)
    held = lowered.caches.nbytes(context) if lowered else None
    return Checked(Readiness(name, context, said, held), lowered)


def _said(problem: RlxcError, file: ModelFile) -> str:
    """An error's line; the file that all are about is not named."""
    if problem.source is not file.path:
        return " ".join(str(problem).split())
    then = f"; {problem.remedy}" if problem.remedy else ""
    return " ".join(f"{problem.problem}{then}".split())
