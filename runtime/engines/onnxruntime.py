"""ONNX Runtime as an engine: caches stay in one place, logits arrive in the caller's buffer, nothing is copied."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from rlxc.artifact import Artifact, KvPlan
from rlxc.errors import SessionError
from rlxc.runtime.engines.residency import release_mapped
from rlxc.runtime.logits import StepLogits

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_CPU = ("cpu", 0)

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


class OnnxCache:
    """Keys and values of one sequence. Each buffer is bound as both past and present, so steps write in place."""

    def __init__(self, session: ort.InferenceSession, plan: KvPlan) -> None:
        self.position = 0
        self.binding = session.io_binding()
        self._buffers: list[ort.OrtValue] = []
        for layer in plan.layers:
            for part in ("key", "value"):
                # Zeroed pages cost nothing until a step touches them.
                rows = np.zeros((1, layer.heads, layer.capacity, layer.head_dim), np.float32)
                buffer = ort.OrtValue.ortvalue_from_numpy(rows)
                self.binding.bind_ortvalue_input(f"past_key_values.{layer.index}.{part}", buffer)
                self.binding.bind_ortvalue_output(f"present.{layer.index}.{part}", buffer)
                self._buffers.append(buffer)


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

    def step(self, caches: Sequence[OnnxCache], ids: Int64s, rows: Int64s) -> StepLogits:
        """Run tokens ``[B, S]`` after those that each cache holds, one sequence after the other."""
        logits = [self._step(cache, tokens, rows) for cache, tokens in zip(caches, ids)]
        return StepLogits(logits[0][None] if len(logits) == 1 else np.stack(logits))

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


def _is_met(requirement: str) -> bool:
    """Whether this ONNX Runtime is in the range that a model was made for, ``onnxruntime>=1.31`` or ``<1.24``."""
    found = re.fullmatch(r"onnxruntime(>=|<)(\d+)\.(\d+)", requirement)
    if found is None:
        return False
    here = tuple(map(int, ort.__version__.split(".")[:2]))
    bound = (int(found[2]), int(found[3]))
    return here >= bound if found[1] == ">=" else here < bound
