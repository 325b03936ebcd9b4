"""Native kernels as an engine: an object file loaded as it is, weights mapped and used in place.

TVM's runtime library gives the thread pool; the compiler, and TVM's Python package, are not needed and not imported.
Nothing is linked: the loader places the object file in memory like a linker would.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi
import tvm_ffi_orcjit

from rlxc.artifact import Artifact, KvPlan
from rlxc.dtypes import DType
from rlxc.errors import ArtifactError, SessionError
from rlxc.runtime.cpu import choose_library
from rlxc.runtime.engines import Mix, Pairs
from rlxc.runtime.engines.memory import align, aligned, private_memory
from rlxc.runtime.engines.pool import pool_of
from rlxc.runtime.engines.tvm_adapters import Stacks, TvmAdapter
from rlxc.runtime.logits import StepLogits, block_count

Int64s = npt.NDArray[np.int64]

WEIGHTS = "weights.safetensors"
_STEP = "rlxc_step"
_ELEMENT_BYTES = {DType.F32: 4, DType.F16: 2}


class TvmCache:
    """Keys and values of one sequence: every layer's, one after the other. Untouched pages take no memory."""

    def __init__(self, plan: KvPlan) -> None:
        self.position = 0
        size = sum(2 * align(_cache_bytes(layer)) for layer in plan.layers)
        self._memory = private_memory(size)
        self.address = self._memory.ctypes.data


def _cache_bytes(layer: Any) -> int:
    return int(layer.heads * layer.capacity * layer.head_dim * _ELEMENT_BYTES[layer.dtype])


class TvmEngine:
    """Runs an artifact's kernels on the CPU with this many threads.

    Raises:
        ArtifactError: the weights file is not what it should be.
        SessionError: no library of the artifact is for this CPU, or it cannot be loaded.
    """

    def __init__(self, artifact: Artifact, threads: int) -> None:
        manifest = artifact.manifest
        self.vocab_size = manifest.model.vocab_size
        self.context = manifest.kv_cache.context
        self.max_step = manifest.kv_cache.max_step
        self._plan = manifest.kv_cache
        library = choose_library(artifact)
        self._threads = threads
        pool_of(threads)
        self._weights = _map_tensors(artifact.file(WEIGHTS))
        self._workspace = private_memory(library.workspace)
        self.ticks: Int64s = np.zeros(library.calls + 1, np.int64)
        self._anchor = self._workspace[:1]
        self._lora = manifest.lora
        self._stacks = Stacks(manifest.lora, self._anchor.ctypes.data)
        self._module, self._step = _load_object(artifact.file(library.file))
        self._fixed = [tvm_ffi.from_dlpack(array) for array in (self._weights, self._workspace, self._anchor)]

    def new_cache(self) -> TvmCache:
        """Memory for one sequence."""
        return TvmCache(self._plan)

    def prepare(self, pairs: Pairs) -> TvmAdapter:
        """An adapter's memory.

        Raises:
            SessionError: the artifact takes no adapters, or not for one of the matrices; or a number is too large.
        """
        if self._lora is None:
            raise SessionError(
                "the artifact takes no adapters", remedy="compile the model with one, or for some"
            )
        return TvmAdapter(self._lora, pairs)

    def step(
        self,
        caches: Sequence[TvmCache],
        ids: Int64s,
        rows: Int64s,
        mixes: Sequence[Mix[TvmAdapter]] = (),
    ) -> StepLogits:
        """Run tokens ``[B, S]`` after those that each cache holds, in one call.

        Raises:
            SessionError: stacks do not fit the sequences, the model or the room that there is for them.
        """
        sequences, step = ids.shape
        count, blocks, anchor = len(rows), block_count(self.vocab_size), self._anchor.ctypes.data
        values, maxima, sums = (
            aligned(sequences, count, width) for width in (self.vocab_size, blocks, blocks)
        )
        stacks = self._stacks.tensors(sequences, mixes)
        tensors: tuple[npt.NDArray[Any], ...] = (
            np.array([cache.address - anchor for cache in caches], np.int64),
            np.array([cache.position for cache in caches], np.int32),
            ids.reshape(-1),
            rows,
            *(array.reshape(-1) for array in (values, maxima, sums)),
            self.ticks,
        )
        # Without rows, nothing is written where there is no room; but a tensor must have an element.
        passed = [tvm_ffi.from_dlpack(array if array.size else np.zeros(1, array.dtype)) for array in tensors]

        def run() -> None:
            self._step(*self._fixed, *stacks, *passed, sequences, step, count)
            for cache in caches:
                cache.position += step

        pool_of(self._threads).call(run)
        return StepLogits(values, maxima, sums)

    def close(self) -> None:
        """Release the model's memory."""
        del self._step, self._module, self._fixed, self._weights, self._stacks


def _map_tensors(path: Path) -> npt.NDArray[np.int8]:
    """The data of a safetensors file, mapped; changes, which nothing makes, would stay in this process.

    The digest may not be compared yet, and kernels do not look where the data ends: so this does.
    """
    try:
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(mapping[:8], "little")
        header = json.loads(mapping[8:start])
        end = start + max(
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        )
        if end != len(mapping):
            raise ValueError(f"it has {len(mapping)} bytes, its header says {end}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"not a safetensors file ({error})", source=path, remedy="compile the model again"
        ) from error
    return np.frombuffer(mapping, np.int8, offset=start)


def _load_object(path: Path) -> tuple[Any, Any]:
    """The module of an object file, and its step function."""
    # Neither constructors nor C++ are in it: no start-up code is needed, and no compiler is asked where its own is.
    session = tvm_ffi_orcjit.ExecutionSession(orc_rt=None)
    try:
        module = session.load_module(str(path), cxx="none")
        return module, module.get_function(_STEP)
    except (RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0].rpartition("failed: ")[2]
        raise SessionError(
            f"cannot be loaded as machine code ({reason})", source=path, remedy="compile the model again"
        ) from error
