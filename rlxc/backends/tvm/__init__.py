"""The TVM backend: our own kernels as machine code, and every quantised weight bit-exact beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rlxc.artifact import ArtifactWriter, Library, Manifest
from rlxc.backends import BuildOptions, StoredAs
from rlxc.backends.recipes import Losses, ReadBytes
from rlxc.backends.tvm.build import build_module, build_object
from rlxc.backends.tvm.database import Database, shipped_folder, user_folder
from rlxc.backends.tvm.families import write_entries
from rlxc.backends.tvm.kernels.kernel import Knobs
from rlxc.backends.tvm.layout_costs import machine
from rlxc.backends.tvm.lower import lower
from rlxc.backends.tvm.problem import Problem
from rlxc.backends.tvm.program import Program, plan_workspace
from rlxc.backends.tvm.routes import storage
from rlxc.backends.tvm.targets import CpuTarget, find_targets
from rlxc.backends.tvm.weights import WeightsFile
from rlxc.dtypes import DType
from rlxc.ir import Graph, Source
from rlxc.ir.target import TargetFeatures

KERNELS = "kernels.json"
"""The artifact's file that lists the calls of each library, for profiles."""

TUNING = "tuning.json"
"""The artifact's file that says which of its kernels can be tuned."""

_PACKED = [dtype for dtype in DType if dtype.is_packed]


class TvmBackend:
    """Writes ``weights.safetensors``, ``model.TARGET.o`` for each target, and what kernels each one calls."""

    name = "tvm"
    runs_on = "apache-tvm>=0.27"
    features = TargetFeatures(
        glu=True,
        group_query_attention=True,
        cache_dtypes=(DType.F16, DType.F32, DType.BF16, DType.INT8),
        page_size=64,
        rounded_lora=DType.F16,
        # Only weights of one format lie in one matrix: widening one would cost what decoding is limited by, bytes.
        storage={dtype: dtype.value for dtype in _PACKED},
        widest={dtype.value: dtype for dtype in _PACKED},
    )

    def features_for(self, target: str, activations: str) -> TargetFeatures:
        """The features, with the layouts that these targets can run.

        Raises:
            OptionError: there is no such target.
        """
        targets = find_targets(target)
        int8 = activations == "int8"
        return replace(self.features, machines=tuple(machine(one, int8=int8) for one in targets))

    def build(
        self,
        graph: Graph,
        read: ReadBytes,
        writer: ArtifactWriter,
        options: BuildOptions,
        progress: Callable[[str], None],
        losses: Losses | None = None,
    ) -> tuple[Library, ...]:
        """Write the graph's machine code and weights into an artifact.

        Args:
            graph: the graph after this backend's passes.
            read: gives the bytes of the model file's tensors.
            writer: the artifact being written.
            options: what the user chose.
            progress: told each weight's name when it is written.
            losses: told what encoding weights costs.
        """
        weights = WeightsFile(graph)
        known = _Known(Database(shipped_folder(), user_folder()))
        targets = find_targets(options.target)
        programs = [_lower(graph, weights, target, read, options, known.best(target)) for target in targets]
        pairs = tuple(zip(programs, targets))
        # Kernels are compiled while weights are written: each takes one thread.
        with ThreadPoolExecutor(1, thread_name_prefix="rlxc-kernels") as pool:
            objects = [pool.submit(_compile, *pair) for pair in pairs]
            with writer.file("weights.safetensors") as sink:
                weights.write(read, sink, progress, losses)
            libraries = tuple(
                _write_library(*pair, code.result(), known, writer) for pair, code in zip(pairs, objects)
            )
        calls = {library.file: program.facts() for library, program in zip(libraries, programs)}
        with writer.file(KERNELS) as sink:
            sink.write((json.dumps(calls, indent=1) + "\n").encode())
        with writer.file(TUNING) as sink:
            sink.write(write_entries(programs[0].entries))
        return libraries

    def check(self, graph: Graph, read: ReadBytes, options: BuildOptions) -> None:
        """Raise what `build` would raise for such a graph and such options, before it compiles kernels."""
        for target in find_targets(options.target):
            _lower(graph, WeightsFile(graph), target, read, options, lambda problem: None)

    def storage(self, graph: Graph, activations: str) -> dict[str, StoredAs]:
        """How each weight of a graph is stored and used."""
        return storage(WeightsFile(graph), int8=activations == "int8")

    def companion_files(self, manifest: Manifest) -> dict[str, bytes]:
        """None: only our own engine loads such an artifact."""
        return {}


class _Known:
    """What was measured, and how many of the problems asked for that were."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.found: dict[str, dict[str, bool]] = {}

    def best(self, target: CpuTarget) -> Callable[[Problem], Knobs | None]:
        """Looks a problem up for a target."""
        found = self.found.setdefault(target.name, {})

        def look_up(problem: Problem) -> Knobs | None:
            knobs = self._database.best(problem, target.name)
            found[problem.name] = knobs is not None
            return knobs

        return look_up


def _lower(
    graph: Graph,
    weights: WeightsFile,
    target: CpuTarget,
    read: ReadBytes,
    options: BuildOptions,
    find_knobs: Callable[[Problem], Knobs | None],
) -> Program:
    def read_floats(name: str) -> npt.NDArray[np.float32]:
        recipe = graph.weight[name].recipe
        assert isinstance(recipe, Source)
        return read(recipe.tensor).view("<f4")

    return lower(
        graph,
        weights,
        target,
        int8=options.activations == "int8",
        kv=options.kv,
        read_floats=read_floats,
        find_knobs=find_knobs,
        lora=options.lora,
    )


def tuning_problems(graph: Graph, target: CpuTarget, read: ReadBytes, options: BuildOptions) -> list[Problem]:
    """What of a graph's kernels can be tuned for a target."""
    program = _lower(graph, WeightsFile(graph), target, read, options, lambda problem: None)
    return [entry.problem(target) for entry in program.entries]


def _compile(program: Program, target: CpuTarget) -> bytes:
    return build_object(build_module(program, plan_workspace(program), target), target)


def _write_library(
    program: Program, target: CpuTarget, code: bytes, known: _Known, writer: ArtifactWriter
) -> Library:
    name = f"model.{target.name}.o"
    with writer.file(name) as sink:
        sink.write(code)
    found = known.found[target.name]
    return Library(
        file=name,
        target=target.name,
        machine=target.machine,
        needs=target.needs,
        workspace=plan_workspace(program).nbytes,
        calls=len(program.calls),
        problems=len(found),
        tuned=sum(found.values()),
    )
