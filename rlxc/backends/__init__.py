"""Backends: each turns a scheduled graph into the files of an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rlxc.artifact import ArtifactWriter, Manifest
from rlxc.errors import OptionError
from rlxc.ir import Graph
from rlxc.ir.target import TargetFeatures

BACKENDS = ("onnx",)
"""The names of all backends."""


@dataclass(frozen=True)
class BuildOptions:
    """What the user chose: the activations' type in matrix products, and the number of positions."""

    activations: str
    context: int


class Backend(Protocol):
    """What every backend offers."""

    name: str
    runs_on: str
    """What must be there to run the artifact; its engine checks this."""
    features: TargetFeatures

    def build(
        self,
        graph: Graph,
        read: Callable[[str], npt.NDArray[np.uint8]],
        writer: ArtifactWriter,
        options: BuildOptions,
        progress: Callable[[str], None],
    ) -> None:
        """Write the files that the backend's engine will load."""

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
    raise OptionError(f"backend {name!r} is unknown", remedy=f"choose one of: {', '.join(BACKENDS)}")
