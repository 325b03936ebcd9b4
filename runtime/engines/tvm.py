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
from rlxc.errors import ArtifactError, SessionError
from rlxc.runtime.cpu import choose_library
from rlxc.runtime.engines import KvRows, Mix, Pairs
from rlxc.runtime.engines.memory import aligned, private_memory
from rlxc.runtime.engines.pages import PagedCache, PagePool
from rlxc.runtime.engines.pool import pool_of
from rlxc.runtime.engines.tvm_adapters import Stacks, TvmAdapter
from rlxc.runtime.logits import StepLogits, block_count

Int64s = npt.NDArray[np.int64]

WEIGHTS = "weights.safetensors"
_STEP = "rlxc_step"


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
        self._plan = _paged(manifest.kv_cache, artifact)
        library = choose_library(artifact)
        self._threads = threads
        pool_of(threads)
        self._weights = _map_tensors(artifact.file(WEIGHTS))
        self._workspace = private_memory(library.workspace)
        self.ticks: Int64s = np.zeros(library.calls + 1, np.int64)
        self._anchor = self._workspace[:1]
        self._lora = manifest.lora
        self._address: int = self._anchor.ctypes.data
        self._pools = [PagePool(layout) for layout in self._plan.pages]
        self._stacks = Stacks(manifest.lora, self._address)
        self._module, self._step = _load_object(artifact.file(library.file))
        self._fixed = [tvm_ffi.from_dlpack(array) for array in (self._weights, self._workspace, self._anchor)]

    def new_cache(self) -> PagedCache:
        """A sequence without tokens, which has no pages yet."""
        return PagedCache(self._plan, self._pools, self._address)

    def load_cache(self, position: int, layers: Sequence[KvRows]) -> PagedCache:
        """A sequence of ``position`` tokens.

        Raises:
            MemoryError: there is none for its pages.
        """
        cache = self.new_cache()
        cache.load(position, layers)
        return cache

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
        caches: Sequence[PagedCache],
        ids: Int64s,
        rows: Int64s,
        mixes: Sequence[Mix[TvmAdapter]] = (),
    ) -> StepLogits:
        """Run tokens ``[B, S]`` after those that each cache holds, in one call.

        Raises:
            MemoryError: there is none for the logits, or for more tokens; the caches are unchanged.
            SessionError: stacks do not fit the sequences, the model or the room that there is for them.
        """
        sequences, step = ids.shape
        count, blocks = len(rows), block_count(self.vocab_size)
        values, maxima, sums = (
            aligned(sequences, count, width) for width in (self.vocab_size, blocks, blocks)
        )
        stacks = self._stacks.tensors(sequences, mixes)
        tables = np.empty(sequences, np.int64)
        tensors: tuple[npt.NDArray[Any], ...] = (
            tables,
            np.array([cache.position for cache in caches], np.int32),
            ids.reshape(-1),
            rows,
            *(array.reshape(-1) for array in (values, maxima, sums)),
            self.ticks,
        )
        # Without rows, nothing is written where there is no room; but a tensor must have an element.
        passed = [tvm_ffi.from_dlpack(array if array.size else np.zeros(1, array.dtype)) for array in tensors]

        def run() -> None:  # all of it where no Ctrl-C comes between
            _reserve(caches, step)
            tables[:] = [cache.tables - self._address for cache in caches]  # where they are by now
            self._step(*self._fixed, *stacks, *passed, sequences, step, count)
            for cache in caches:
                cache.advance(step)

        pool_of(self._threads).call(run)
        return StepLogits(values, maxima, sums)

    def close(self) -> None:
        """Release the model's memory; a cache that somebody still has keeps its pages."""
        del self._step, self._module, self._fixed, self._weights, self._stacks, self._pools


def _paged(plan: KvPlan, artifact: Artifact) -> KvPlan:
    """The plan, if it is one that kernels can follow."""
    if plan.page_size is None or any(layer.layout != "paged" for layer in plan.layers):
        raise ArtifactError(
            "kv_cache: there are layers without pages, which no compiled kernel reads",
            source=artifact.path,
            remedy="compile the model again",
        )
    return plan


def _reserve(caches: Sequence[PagedCache], count: int) -> None:
    """Make room for so many tokens in each cache, or in none."""
    try:
        for cache in caches:
            cache.reserve(count)
    except MemoryError:
        for cache in caches:
            cache.truncate(cache.position)
        raise


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
