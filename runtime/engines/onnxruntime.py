"""ONNX Runtime as an engine: it writes caches in place, and logits where the caller wants them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from rlxc.artifact import UNIT_RANK, Artifact, LoraGroup, LoraPlan
from rlxc.dtypes import DType
from rlxc.errors import SessionError
from rlxc.runtime.engines import KvRows, Mix, Pairs
from rlxc.runtime.engines.onnx_cache import (
    GroupRows,
    OnnxCache,
    RowGroup,
    Rows,
    empty_cache,
    loaded_cache,
    row_groups,
)
from rlxc.runtime.engines.onnx_lane import Lane
from rlxc.runtime.engines.residency import release_mapped
from rlxc.runtime.logits import StepLogits

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_CPU = ("cpu", 0)
_SCALES = "lora_scales"

# ONNX Runtime's exceptions have no base class of their own.
_LOAD_ERRORS = (
    RuntimeError,
    ValueError,
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class OnnxAdapter:
    """An adapter, or a stack of several, as the model's inputs; ONNX Runtime reads these arrays in place.

    All of them have ``rank`` ranks; ``nbytes`` leaves out the zeros that stand for matrices without an adapter.
    """

    def __init__(self, rank: int, arrays: Mapping[str, Floats], nbytes: int) -> None:
        self.rank, self.arrays, self.nbytes = rank, arrays, nbytes
        self.units = rank // UNIT_RANK
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


OnnxMix = tuple[tuple[OnnxAdapter, float], ...]


class Binding:
    """What one sequence's steps read and write. Caches are bound as both past and present, so steps write in place.

    Caches and adapters stay bound: a step with those of the last one binds its tokens only. Their arrays are kept here
    as long as they are bound, which ONNX Runtime leaves to its caller.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self.io = session.io_binding()
        self.mix: OnnxMix = ()
        self.stack: OnnxAdapter | None = None
        self._caches: list[Rows] = []

    def bind_caches(self, groups: Sequence[RowGroup], caches: Sequence[Rows]) -> None:
        """Let the next run use these buffers, of each group of layers."""
        bound, self._caches = self._caches, list(caches)
        for group, arrays, last in zip_longest(groups, caches, bound):
            if last is not None and _is_same(arrays[0], last[0]):
                continue
            names = [f"{layer.index}.{part}" for layer in group.layers for part in ("key", "value")]
            for name, array in zip(names, arrays):
                value = ort.OrtValue.ortvalue_from_numpy(array)
                self.io.bind_ortvalue_input(f"past_key_values.{name}", value)
                self.io.bind_ortvalue_output(f"present.{name}", value)

    def bind_adapters(self, stack: OnnxAdapter, mix: OnnxMix) -> None:
        """Let the next runs use these adapters, which ``stack`` holds all together."""
        if stack is not self.stack:
            for name, value in stack.values.items():
                self.io.bind_ortvalue_input(name, value)
        each = [scale for adapter, scale in mix for _ in range(adapter.rank)]
        self._scales = np.array([each or [0.0] * stack.rank], np.float32)
        self.io.bind_ortvalue_input(_SCALES, ort.OrtValue.ortvalue_from_numpy(self._scales))
        self.mix, self.stack = mix, stack


@dataclass(frozen=True)
class _Result:
    """What a step made of some of its sequences: what they will hold, and logits ``[members, R, vocab]``."""

    members: list[int]
    groups: list[list[GroupRows]]
    logits: Floats


class OnnxRuntimeEngine:
    """Runs an artifact's ``model.onnx`` on the CPU with this many threads.

    Raises:
        SessionError: ONNX Runtime cannot load the model.
    """

    def __init__(self, artifact: Artifact, threads: int) -> None:
        manifest = artifact.manifest
        if not _is_met(manifest.target.runs_on):
            raise SessionError(
                f"compiled for {manifest.target.runs_on}, this is onnxruntime {ort.__version__}",
                source=artifact.path,
                remedy="compile the model again here, or install that version",
            )
        self.vocab_size = manifest.model.vocab_size
        self.context = manifest.kv_cache.context
        self.ticks = None
        self.max_step = manifest.kv_cache.max_step
        self._groups = row_groups(manifest.kv_cache)
        self.bindings: WeakKeyDictionary[OnnxCache | Lane, Binding] = WeakKeyDictionary()
        self._lanes: dict[OnnxMix, Lane] = {}
        self._lora = manifest.lora or LoraPlan(DType.F32, UNIT_RANK, ())
        self._none = _laid_out(self._lora, {}, rank=1)
        self._stacks: WeakValueDictionary[tuple[OnnxAdapter, ...], OnnxAdapter] = WeakValueDictionary()
        self._mask = np.ones((1, self.context), np.int64)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # An arena keeps what the longest prompt needed, and is no faster here.
        options.enable_cpu_mem_arena = False
        try:
            path = str(artifact.file("model.onnx"))
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except _LOAD_ERRORS as error:
            raise SessionError(
                f"ONNX Runtime {ort.__version__} cannot load the model ({str(error).splitlines()[0]})",
                source=artifact.path,
                remedy="update onnxruntime, or compile the model again",
            ) from None
        release_mapped(artifact.file("weights.bin"))

    def new_cache(self) -> OnnxCache:
        """Buffers for one sequence.

        Raises:
            MemoryError: there is none for them.
        """
        return empty_cache(self._groups)

    def load_cache(self, position: int, layers: Sequence[KvRows]) -> OnnxCache:
        """A cache with these rows, as :meth:`OnnxCache.rows` gave them.

        Raises:
            MemoryError: there is none for its buffers.
        """
        return loaded_cache(self._groups, position, layers)

    def prepare(self, pairs: Pairs) -> OnnxAdapter:
        """Lay out an adapter's matrices as the model's inputs, its ranks padded with zeros to whole units."""
        ranks = max((len(a) for a, _ in pairs.values()), default=0)
        return _laid_out(self._lora, pairs, -(-ranks // UNIT_RANK) * UNIT_RANK)

    def step(
        self,
        caches: Sequence[OnnxCache],
        ids: Int64s,
        rows: Int64s,
        mixes: Sequence[Mix[OnnxAdapter]] = (),
    ) -> StepLogits:
        """Run tokens ``[B, S]`` after those that each cache holds.

        Sequences that add one token each with the same adapters run together, others one after the other.

        Raises:
            MemoryError: there is none for more tokens; the caches are unchanged.
        """
        self._lanes = {mix: lane for mix, lane in self._lanes.items() if lane.is_used}
        alike: dict[OnnxMix, list[int]] = {}
        for i, mix in enumerate(mixes or [()] * len(caches)):
            alike.setdefault(tuple(one for one in mix if one[0].rank), []).append(i)
        results: list[_Result] = []
        for stack, members in alike.items():
            together = None
            if ids.shape[1] == 1 and len(members) > 1:
                together = self._extend_together(stack, [caches[i] for i in members], ids[members], rows)
            if together is not None:
                results.append(replace(together, members=[members[i] for i in together.members]))
            else:
                results += [self._extend(stack, caches[i], ids[i], rows, i) for i in members]
        for result in results:
            for i, groups in zip(result.members, result.groups):
                caches[i].position, caches[i].groups = caches[i].position + ids.shape[1], groups
                if len(result.members) > 1:  # what it wrote to when it ran alone is wanted no more
                    self.bindings.pop(caches[i], None)
        if len(results) == 1 and results[0].members == list(range(len(caches))):
            return StepLogits(results[0].logits)
        logits = np.empty((len(caches), len(rows), self.vocab_size), np.float32)
        for result in results:
            logits[result.members] = result.logits
        return StepLogits(logits)

    def _binding(self, owner: OnnxCache | Lane, mix: OnnxMix) -> Binding:
        binding = self.bindings.get(owner)
        if binding is None:
            binding = self.bindings[owner] = Binding(self._session)
        self._mix(binding, mix)
        return binding

    def _mix(self, binding: Binding, mix: OnnxMix) -> None:
        """Bind a stack of adapters, unless it is the one of the last step."""
        if mix == binding.mix:
            return
        adapters = tuple(adapter for adapter, _ in mix)
        if len(adapters) < 2:
            binding.bind_adapters(adapters[0] if adapters else self._none, mix)
            return
        stack = self._stacks.get(adapters)
        if stack is None:
            stack = self._stacks[adapters] = _stacked(self._lora, adapters)
        binding.bind_adapters(stack, mix)

    def _extend_together(
        self, mix: OnnxMix, caches: Sequence[OnnxCache], ids: Int64s, rows: Int64s
    ) -> _Result | None:
        """Run one token of each sequence; None where there is no memory to have them side by side."""
        lane = self._lanes.get(mix)
        if lane is None or lane.size < len(caches):
            try:
                lane = self._lanes[mix] = Lane(self._groups, 1 << (len(caches) - 1).bit_length())
            except MemoryError:
                return None
        gathered = lane.gather(caches)
        binding = self._binding(lane, mix)
        binding.bind_caches(self._groups, gathered.arrays)
        totals = [caches[i].position + 1 for i in gathered.order]
        mask = (np.arange(max(totals)) < np.array(totals)[:, None]).astype(np.int64)
        logits = self._run(binding, mask, ids[gathered.order], rows)
        return _Result(gathered.order, gathered.groups, logits)

    def _extend(self, mix: OnnxMix, cache: OnnxCache, ids: Int64s, rows: Int64s, member: int) -> _Result:
        """Run tokens of one sequence in as few runs as the rings allow."""
        binding = self._binding(cache, mix)
        groups, start, parts, order = cache.groups, 0, [], []
        while start < len(ids):
            position = cache.position + start
            count = min(each.group.longest(position, len(ids) - start) for each in groups)
            groups = [each.extended(position, position + count) for each in groups]
            binding.bind_caches(self._groups, [each.buffers.arrays for each in groups])
            here = np.flatnonzero((rows >= start) & (rows < start + count))
            mask = self._mask[:, : position + count]
            parts.append(self._run(binding, mask, ids[None, start : start + count], rows[here] - start))
            order.append(here)
            start += count
        if len(parts) == 1:
            return _Result([member], [groups], parts[0])
        logits = np.concatenate(parts, axis=1)[:, np.argsort(np.concatenate(order))]
        return _Result([member], [groups], logits)

    def _run(self, binding: Binding, mask: Int64s, ids: Int64s, rows: Int64s) -> Floats:
        """Run tokens ``[B, S]``, where the mask has ones for all tokens of a sequence; logits ``[B, R, vocab]``."""
        io = binding.io
        io.bind_cpu_input("input_ids", ids)
        io.bind_cpu_input("attention_mask", mask)
        # Binding a value rather than an array, because this input has a default and is not among the model's inputs.
        io.bind_ortvalue_input("logit_rows", ort.OrtValue.ortvalue_from_numpy(rows))
        if len(rows) == 1:
            logits = np.empty((len(ids), 1, self.vocab_size), np.float32)
            io.bind_output("logits", *_CPU, np.float32, logits.shape, logits.ctypes.data)
        else:  # The model declares one row, and takes no buffer of another shape.
            io.bind_output("logits", *_CPU)
        try:
            self._session.run_with_iobinding(io)
        except RuntimeError as error:  # as ONNX Runtime reports what a node threw
            if "bad_alloc" in str(error):
                raise MemoryError(str(error)) from error
            raise
        if len(rows) != 1:
            logits = io.get_outputs()[-1].numpy()
        return logits

    def close(self) -> None:
        """Release the session's memory and threads."""
        self.bindings.clear()
        self._lanes.clear()
        del self._session


def _laid_out(plan: LoraPlan, pairs: Pairs, rank: int) -> OnnxAdapter:
    """The inputs of an adapter with this many ranks, which are at least its own; matrices that it lacks are zeros."""
    arrays: dict[str, Floats] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        downs = [pairs[part.tensor][0] if part.tensor in pairs else None for part in group.parts]
        shapes[group.down] = _down_shape(group, rank)
        if any(a is not None for a in downs):
            down = arrays[group.down] = np.zeros(shapes[group.down], np.float32)
            for i, a in enumerate(downs):
                if a is None:
                    continue
                if group.kind == "embedding":
                    down[0, :, : len(a)] = a.T
                else:
                    down[0, i * rank : i * rank + len(a)] = a
        for part in group.parts:
            name = f"{part.up}.{part.first_row}"
            shapes[name] = (1, part.rows, rank)
            if part.tensor in pairs:
                b = pairs[part.tensor][1]
                up = arrays[name] = np.zeros(shapes[name], np.float32)
                up[0, :, : b.shape[1]] = b
    nbytes = sum(array.nbytes for array in arrays.values())
    missing = shapes.keys() - arrays.keys()
    # All zeros lie in one place, whose pages are never written and so take no memory.
    zeros = np.zeros(max((prod(shapes[name]) for name in missing), default=0), np.float32)
    for name in missing:
        arrays[name] = zeros[: prod(shapes[name])].reshape(shapes[name])
    return OnnxAdapter(rank, arrays, nbytes)


def _stacked(plan: LoraPlan, adapters: Sequence[OnnxAdapter]) -> OnnxAdapter:
    """Several adapters as one: their ranks side by side, in this order."""
    arrays: dict[str, Floats] = {}
    for group in plan.groups:
        parts = [adapter.arrays[group.down] for adapter in adapters]
        if group.kind == "embedding":
            arrays[group.down] = np.concatenate(parts, axis=2)
        else:
            split = [down.reshape(1, len(group.parts), -1, down.shape[2]) for down in parts]
            down = np.concatenate(split, axis=2)
            arrays[group.down] = down.reshape(1, -1, down.shape[3])
        for part in group.parts:
            name = f"{part.up}.{part.first_row}"
            arrays[name] = np.concatenate([adapter.arrays[name] for adapter in adapters], axis=2)
    rank = sum(adapter.rank for adapter in adapters)
    return OnnxAdapter(rank, arrays, sum(array.nbytes for array in arrays.values()))


def _down_shape(group: LoraGroup, rank: int) -> tuple[int, ...]:
    columns = group.parts[0].columns
    if group.kind == "embedding":
        return (1, columns, rank)
    return (1, len(group.parts) * rank, columns)


def _is_same(array: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    return array.shape == other.shape and array.ctypes.data == other.ctypes.data


def _is_met(requirement: str) -> bool:
    """Whether this ONNX Runtime is in the range that a model was made for, ``onnxruntime>=1.31`` or ``<1.24``."""
    found = re.fullmatch(r"onnxruntime(>=|<)(\d+)\.(\d+)", requirement)
    if found is None:
        return False
    here = tuple(map(int, ort.__version__.split(".")[:2]))
    bound = (int(found[2]), int(found[3]))
    return here >= bound if found[1] == ">=" else here < bound
