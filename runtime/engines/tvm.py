"""Native kernels as an engine: an object file loaded as it is, weights mapped and used in place.

TVM's runtime library gives the thread pool; the compiler, and TVM's Python package, are not needed and not imported.
Nothing is linked: the loader places the object file in memory like a linker would.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi
import tvm_ffi_orcjit

from rlxc.artifact import Artifact, KvPlan
from rlxc.dtypes import DType
from rlxc.errors import SessionError
from rlxc.runtime.cpu import choose_library

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

WEIGHTS = "weights.safetensors"
_STEP = "rlxc_step"
_ALIGNMENT = 64
_ELEMENT_BYTES = {DType.F32: 4, DType.F16: 2}


class TvmCache:
    """Keys and values of one sequence: every layer's, one after the other. Untouched pages take no memory."""

    def __init__(self, plan: KvPlan) -> None:
        self.position = 0
        size = sum(2 * _align(_cache_bytes(layer)) for layer in plan.layers)
        self._memory = mmap.mmap(-1, size)
        self.address = np.frombuffer(self._memory, np.int8).ctypes.data


def _cache_bytes(layer: Any) -> int:
    return int(layer.heads * layer.capacity * layer.head_dim * _ELEMENT_BYTES[layer.dtype])


class TvmEngine:
    """Runs an artifact's kernels on the CPU with this many threads.

    Raises:
        SessionError: no library of the artifact is for this CPU, or it cannot be loaded.
    """

    def __init__(self, artifact: Artifact, threads: int) -> None:
        manifest = artifact.manifest
        self.vocab_size = manifest.model.vocab_size
        self.context = manifest.kv_cache.context
        self.max_step = manifest.kv_cache.max_step
        self._plan = manifest.kv_cache
        library = choose_library(artifact)
        _set_threads(threads)
        self._weights = _map_tensors(artifact.file(WEIGHTS))
        self._workspace = np.frombuffer(mmap.mmap(-1, library.workspace), np.int8)
        self._ticks = np.zeros(library.calls + 1, np.int64)
        self._anchor = self._workspace[:1]
        self._no_rows, self._no_logits = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self._module = _load_object(artifact.file(library.file))
        self._step = self._module.get_function(_STEP)
        self._fixed = [tvm_ffi.from_dlpack(array) for array in (self._weights, self._workspace, self._anchor)]

    def new_cache(self) -> TvmCache:
        """Memory for one sequence."""
        return TvmCache(self._plan)

    def step(self, cache: TvmCache, ids: Int64s, rows: Int64s) -> Floats:
        """Run tokens ``[S]`` after those that the cache holds; the logits of ``rows [R]``: ``f32 [R, vocab]``."""
        logits = np.empty((len(rows), self.vocab_size), np.float32)
        distance = cache.address - self._anchor.ctypes.data
        tensors = (
            np.array([distance], np.int64),
            np.array([cache.position], np.int32),
            ids,
            rows if len(rows) else self._no_rows,
            logits.reshape(-1) if len(rows) else self._no_logits,
            self._ticks,
        )
        self._step(*self._fixed, *map(tvm_ffi.from_dlpack, tensors), 1, len(ids), len(rows))
        cache.position += len(ids)
        return logits

    def close(self) -> None:
        """Release the model's memory."""
        del self._step, self._module, self._fixed, self._weights


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _load_runtime() -> None:
    """Load TVM's runtime library, without TVM's Python package: that would take half a second, and 180 MB."""
    package = importlib.util.find_spec("tvm")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'tvm'", name="tvm")
    ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libtvm_runtime.so"), mode=ctypes.RTLD_GLOBAL)


_load_runtime()


def _set_threads(threads: int) -> None:
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)


def _map_tensors(path: Path) -> npt.NDArray[np.int8]:
    """The data of a safetensors file, mapped; changes, which nothing makes, would stay in this process."""
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(mapping[:8], "little")
    return np.frombuffer(mapping, np.int8, offset=start)


def _load_object(path: Path) -> Any:
    session = tvm_ffi_orcjit.ExecutionSession(orc_rt=None)
    return session.load_module(str(path), cxx="none")
