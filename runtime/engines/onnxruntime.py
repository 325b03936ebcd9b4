"""ONNX Runtime as an engine: caches stay in one place, logits arrive in the caller's buffer, nothing is copied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from rlxc.artifact import UNIT_RANK, Artifact, KvPlan, LoraGroup, LoraPlan
from rlxc.dtypes import DType
from rlxc.errors import SessionError
from rlxc.runtime.engines import Mix, Pairs
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


class OnnxCache:
    """Keys and values of one sequence. Each buffer is bound as both past and present, so steps write in place.

    The adapters of its last step stay bound too: a step with the same ones binds nothing.
    """

    def __init__(self, session: ort.InferenceSession, plan: KvPlan) -> None:
        self.position = 0
        self.mix: OnnxMix = ()
        self.binding = session.io_binding()
        self._buffers: list[ort.OrtValue] = []
        self.stack: OnnxAdapter | None = None
        self._scales: ort.OrtValue | None = None
        for layer in plan.layers:
            for part in ("key", "value"):
                # Zeroed pages cost nothing until a step touches them.
                rows = np.zeros((1, layer.heads, layer.capacity, layer.head_dim), np.float32)
                buffer = ort.OrtValue.ortvalue_from_numpy(rows)
                self.binding.bind_ortvalue_input(f"past_key_values.{layer.index}.{part}", buffer)
                self.binding.bind_ortvalue_output(f"present.{layer.index}.{part}", buffer)
                self._buffers.append(buffer)

    def bind_adapters(self, stack: OnnxAdapter, mix: OnnxMix) -> None:
        """Let the next steps use these adapters, which ``stack`` holds all together."""
        if stack is not self.stack:
            for name, value in stack.values.items():
                self.binding.bind_ortvalue_input(name, value)
        each = [scale for adapter, scale in mix for _ in range(adapter.rank)]
        scales = np.array([each or [0.0] * stack.rank], np.float32)
        self._scales = ort.OrtValue.ortvalue_from_numpy(scales)
        self.binding.bind_ortvalue_input(_SCALES, self._scales)
        self.mix, self.stack = mix, stack


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
        self._plan = manifest.kv_cache
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
        """Buffers for one sequence."""
        return OnnxCache(self._session, self._plan)

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
        """Run tokens ``[B, S]`` after those that each cache holds, one sequence after the other."""
        for cache, mix in zip(caches, mixes or [()] * len(caches)):
            self._mix(cache, tuple((adapter, scale) for adapter, scale in mix if adapter.rank))
        logits = [self._step(cache, tokens, rows) for cache, tokens in zip(caches, ids)]
        return StepLogits(logits[0][None] if len(logits) == 1 else np.stack(logits))

    def _mix(self, cache: OnnxCache, mix: OnnxMix) -> None:
        """Bind a stack of adapters, unless it is the one of the cache's last step."""
        if mix == cache.mix:
            return
        adapters = tuple(adapter for adapter, _ in mix)
        if len(adapters) < 2:
            cache.bind_adapters(adapters[0] if adapters else self._none, mix)
            return
        stack = self._stacks.get(adapters)
        if stack is None:
            stack = self._stacks[adapters] = _stacked(self._lora, adapters)
        cache.bind_adapters(stack, mix)

    def _step(self, cache: OnnxCache, ids: Int64s, rows: Int64s) -> Floats:
        """Logits f32 ``[R, vocab]``."""
        total = cache.position + len(ids)
        binding = cache.binding
        binding.bind_cpu_input("input_ids", ids[None])
        binding.bind_cpu_input("attention_mask", self._mask[:, :total])
        # Binding a value rather than an array, because this input has a default and is not among the model's inputs.
        binding.bind_ortvalue_input("logit_rows", ort.OrtValue.ortvalue_from_numpy(rows))
        if len(rows) == 1:
            logits = np.empty((1, 1, self.vocab_size), np.float32)
            binding.bind_output("logits", *_CPU, np.float32, logits.shape, logits.ctypes.data)
        else:  # The model declares one row, and takes no buffer of another shape.
            binding.bind_output("logits", *_CPU)
        self._session.run_with_iobinding(binding)
        cache.position = total
        if len(rows) != 1:
            logits = binding.get_outputs()[-1].numpy()
        result: Floats = logits[0]
        return result

    def close(self) -> None:
        """Release the session's memory and threads."""
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


def _is_met(requirement: str) -> bool:
    """Whether this ONNX Runtime is in the range that a model was made for, ``onnxruntime>=1.31`` or ``<1.24``."""
    found = re.fullmatch(r"onnxruntime(>=|<)(\d+)\.(\d+)", requirement)
    if found is None:
        return False
    here = tuple(map(int, ort.__version__.split(".")[:2]))
    bound = (int(found[2]), int(found[3]))
    return here >= bound if found[1] == ">=" else here < bound
