"""Engines run a compiled model step by step; each is imported only when an artifact needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from rlxc.artifact import Artifact, Verification
from rlxc.errors import SessionError
from rlxc.runtime.cpu import choose_library


class Cache(Protocol):
    """The keys and values of one sequence, in buffers that the engine owns."""

    @property
    def position(self) -> int:
        """The number of tokens held."""


C = TypeVar("C", bound=Cache)


class Engine(Protocol[C]):
    """A loaded model, with its own kind of cache."""

    @property
    def vocab_size(self) -> int:
        """The number of logits of a row."""

    @property
    def context(self) -> int:
        """The most tokens that a cache can hold."""

    @property
    def max_step(self) -> int:
        """The most tokens that one step can add."""

    def new_cache(self) -> C:
        """An empty cache."""

    def step(
        self, cache: C, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Run ``ids`` ``[S]`` after what ``cache`` holds, and append them to it.

        Args:
            cache: has room for the ids.
            ids: 1 ... ``max_step`` tokens of the vocabulary.
            rows: ``[R]``, the positions in ``ids`` whose logits are wanted; maybe none.

        Returns:
            Logits ``[R, vocab]``, the caller's to keep.
        """

    def close(self) -> None:
        """Release the model and all caches."""


MakeEngine = Callable[[Artifact, int], Engine[Any]]
"""Loads the model of an artifact, to run with so many threads."""


def _import_onnxruntime() -> MakeEngine:
    from rlxc.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine


def _import_tvm() -> MakeEngine:
    from rlxc.runtime.engines.tvm import TvmEngine

    return TvmEngine


@dataclass(frozen=True)
class _Entry:
    """How a backend's engine is imported, the packages that it needs, and the file that it loads as code."""

    load: Callable[[], MakeEngine]
    packages: tuple[str, ...]
    install: str
    code: Callable[[Artifact], str]


_ENGINES = {
    "onnx": _Entry(
        _import_onnxruntime, ("onnxruntime",), "pip install onnxruntime", lambda artifact: "model.onnx"
    ),
    "tvm": _Entry(
        _import_tvm,
        ("tvm", "tvm_ffi", "tvm_ffi_orcjit"),
        "pip install 'rlxc[tvm]'",
        lambda artifact: choose_library(artifact).file,
    ),
}


def find_engine(artifact: Artifact, verification: Verification) -> MakeEngine:
    """The engine for the artifact's backend, imported, once the compiled code is known to be intact.

    Raises:
        SessionError: no engine runs this backend, or its package is not installed.
        ArtifactError: the compiled code is damaged.
    """
    backend = artifact.manifest.target.backend
    if backend not in _ENGINES:
        raise SessionError(
            f"compiled for {backend!r}, which this rlxc cannot run",
            source=artifact.path,
            remedy="upgrade: pip install --upgrade rlxc",
        )
    entry = _ENGINES[backend]
    code = entry.code(artifact)
    artifact.file(code)
    verification.wait(code)
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        if error.name not in entry.packages:
            raise
        raise SessionError(
            f"the artifact runs on {error.name}, which is not installed",
            source=artifact.path,
            remedy=entry.install,
        ) from error
