"""Backends: each turns a scheduled graph into the files of an artifact."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
import numpy.typing as npt

from rlxc.artifact import ArtifactWriter, BackendName, KvPlan, Library, LoraPlan, Manifest
from rlxc.backends.recipes import Losses
from rlxc.errors import OptionError
from rlxc.ir import Graph
from rlxc.ir.target import TargetFeatures

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
"""The names of all backends."""


def default_backend() -> BackendName:
    """``tvm`` where its packages are installed, else ``onnx``."""
    installed = all(importlib.util.find_spec(name) for name in ("tvm", "tvm_ffi_orcjit"))
    return "tvm" if installed else "onnx"


@dataclass(frozen=True)
class BuildOptions:
    """What was chosen: activations' type in matrix products, CPUs, the plans of caches and of adapters."""

    activations: str
    target: str
    kv: KvPlan
    lora: LoraPlan | None = None

    @property
    def context(self) -> int:
        """The positions of a sequence."""
        return self.kv.context

    @property
    def max_step(self) -> int:
        """The most tokens of a step."""
        return self.kv.max_step


@dataclass(frozen=True)
class StoredAs:
    """How a weight lies in an artifact: the bytes it takes there, and in words what reads it.

    Such as ``int8, 4+2 bits, tiles of 16``: multiplied with activations in int8, its codes in planes of 4 and 2 bits,
    16 rows interleaved.
    """

    nbytes: int
    route: str


class Backend(Protocol):
    """What every backend offers."""

    name: str
    runs_on: str
    """What must be there to run the artifact; its engine checks this."""
    features: TargetFeatures

    def features_for(self, target: str, activations: str) -> TargetFeatures:
        """The features, with the machines that these CPUs stand for and the layouts of weights that they can run.

        Raises:
            OptionError: there is no such target.
        """

    def build(
        self,
        graph: Graph,
        read: Callable[[str], npt.NDArray[np.uint8]],
        writer: ArtifactWriter,
        options: BuildOptions,
        progress: Callable[[str], None],
        losses: Losses | None = None,
    ) -> tuple[Library, ...]:
        """Write the files that the backend's engine will load; returns those that are machine code."""

    def check(
        self, graph: Graph, read: Callable[[str], npt.NDArray[np.uint8]], options: BuildOptions
    ) -> None:
        """Raise what `build` would raise for such a graph and such options, without writing anything.

        Of the model file, it reads small f32 tensors at most.

        Raises:
            UnsupportedError: the backend has no way to run an op, or not at this size.
            OptionError: there is no such target.
        """

    def storage(self, graph: Graph, activations: str) -> Mapping[str, StoredAs]:
        """How each weight of a graph, after this backend's passes, is stored and used."""

    def companion_files(self, manifest: Manifest) -> dict[str, bytes]:
        """Small files that let other software load the artifact, by name."""


def get_backend(name: str) -> Backend:
    """The backend of this name; its libraries are imported only now.

    Raises:
        OptionError: there is none.
    """
    if name == "onnx":
        from rlxc.backends.onnx import OnnxBackend

        return OnnxBackend()
    if name == "tvm":
        try:
            from rlxc.backends.tvm import TvmBackend
        except ModuleNotFoundError as error:
            if error.name not in ("tvm", "tvm_ffi"):
                raise
            raise OptionError(
                "the tvm backend needs TVM, which is not installed", remedy="pip install 'rlxc[tvm]'"
            ) from error
        return TvmBackend()
    raise OptionError(f"backend {name!r} is unknown", remedy=f"choose one of: {', '.join(BACKENDS)}")
