"""Engines run a compiled model step by step; each is imported only when an artifact needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from rlxc.artifact import Artifact, Verification
from rlxc.errors import SessionError
from rlxc.runtime.cpu import choose_library
from rlxc.runtime.logits import Floats, StepLogits

C = TypeVar("C", bound="Cache")


@dataclass(frozen=True)
class KvRows:
    """The keys and values that one layer holds, as they are stored: positions ``first`` to ``first + n - 1``.

    Attributes:
        first: the oldest position held; 0 but for layers that a window has moved on in.
        keys: ``[n, kv_dim]``: float32, float16, uint16 (the bits of bf16) or int8 (codes).
        values: alike.
        key_scales: f32 ``[n, heads]``, which codes are multiplied with; None for floats.
        value_scales: alike.
    """

    first: int
    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]
    key_scales: Floats | None = None
    value_scales: Floats | None = None


class Cache(Protocol):
    """The keys and values of one sequence, in buffers that the engine owns.

    A model with recurrent layers would keep checkpoints of their states here: :meth:`fork` copies the newest one, and
    :attr:`oldest` is the oldest one's position.
    """

    @property
    def position(self) -> int:
        """The number of tokens held."""

    @property
    def oldest(self) -> int:
        """The least number of tokens that it can be cut back to; 0 where every layer keeps everything."""

    def truncate(self, position: int) -> None:
        """Forget the tokens from ``position`` on, which is from :attr:`oldest` to :attr:`position`; copies nothing."""

    def fork(self: C) -> C:
        """Another cache with the same tokens. The two share memory until one of them writes; this copies nothing."""

    @property
    def memory(self) -> Mapping[int, int]:
        """The bytes of each piece of memory in use, by what tells it apart: shared pieces have one name in all."""

    def rows(self) -> list[KvRows]:
        """A copy of what each layer of the plan holds, in order; of a layer that shares another's, no rows."""


class Prepared(Protocol):
    """A LoRA adapter in the engine's own memory."""

    @property
    def units(self) -> int:
        """How many units of 16 ranks it takes of a stack."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""


P = TypeVar("P", bound=Prepared)

Mix = Sequence[tuple[P, float]]
"""A sequence's stack of adapters, each with its scale."""

Pairs = Mapping[str, tuple[Floats, Floats]]
"""An adapter's numbers by the matrix that they change: A ``f32 [rank, in]`` and B ``f32 [out, rank]``.

B is multiplied by alpha / rank already. Those of an embedding are A ``f32 [rank, vocab]`` and B ``f32 [N, rank]``.
"""


class Engine(Protocol[C, P]):
    """A loaded model, with its own kind of cache and of adapters. One step at a time."""

    @property
    def vocab_size(self) -> int:
        """The number of logits of a row."""

    @property
    def context(self) -> int:
        """The most tokens that a cache can hold."""

    @property
    def max_step(self) -> int:
        """The most tokens that one step can add, to all its sequences together."""

    def new_cache(self) -> C:
        """An empty cache."""

    def load_cache(self, position: int, layers: Sequence[KvRows]) -> C:
        """A cache of ``position`` tokens with these rows, as :meth:`Cache.rows` gave them; shapes and types fit."""

    @property
    def ticks(self) -> npt.NDArray[np.int64] | None:
        """When each call of a kernel in the last step began, and when the last one ended.

        In ticks of a clock of the CPU's, in the order of the calls in ``kernels.json``; None from an engine that does
        not know.
        """

    def prepare(self, pairs: Pairs) -> P:
        """Lay out an adapter as the model reads it; every matrix is one of the artifact's plan, and shapes fit."""

    def step(
        self,
        caches: Sequence[C],
        ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        mixes: Sequence[Mix[P]] = (),
    ) -> StepLogits:
        """Run tokens after what each cache holds, and append them to it.

        Args:
            caches: ``B`` different ones, each with room for ``S`` more tokens.
            ids: ``[B, S]`` tokens of the vocabulary, 1 ... ``max_step`` in all.
            rows: ``[R]``, the positions in 0 ... S - 1 whose logits are wanted, the same of each sequence; maybe none.
            mixes: ``B`` stacks of adapters, one for each sequence; none at all means that every stack is empty.

        Raises:
            MemoryError: there is none for more tokens; the caches are unchanged.
        """

    def close(self) -> None:
        """Release the model and all caches."""


MakeEngine = Callable[[Artifact, int], Engine[Any, Any]]
"""Loads the model of an artifact, to run with so many threads."""


def _import_onnxruntime() -> MakeEngine:
    from rlxc.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine


def _import_tvm() -> MakeEngine:
    from rlxc.runtime.engines.tvm import TvmEngine

    return TvmEngine


@dataclass(frozen=True)
class _Entry:
    """How a backend's engine is imported, the packages that it needs, and the file that it loads as code.

    One that loads slowly does so without holding the GIL, as it copies the weights: time for other work.
    """

    load: Callable[[], MakeEngine]
    packages: tuple[str, ...]
    install: str
    code: Callable[[Artifact], str]
    loads_slowly: bool


_ENGINES = {
    "onnx": _Entry(
        _import_onnxruntime,
        ("onnxruntime",),
        "pip install onnxruntime",
        lambda artifact: "model.onnx",
        loads_slowly=True,
    ),
    "tvm": _Entry(
        _import_tvm,
        ("tvm", "tvm_ffi", "tvm_ffi_orcjit"),
        "pip install 'rlxc[tvm]'",
        lambda artifact: choose_library(artifact).file,
        loads_slowly=False,
    ),
}


def loads_slowly(artifact: Artifact) -> bool:
    """Whether there is time for other work while the artifact's engine loads; :func:`find_engine` found one."""
    return _ENGINES[artifact.manifest.target.backend].loads_slowly


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
