"""ONNX Runtime as an engine: caches stay in one place, logits arrive in one buffer, nothing else is copied."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from rlxc.artifact import Artifact, KvPlan
from rlxc.errors import SessionError
from rlxc.runtime.engines.residency import release_mapped

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_CPU = ("cpu", 0)

# GroupQueryAttention's window changed meaning in between: a model for the one must not run on the other.
_IS_CURRENT = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 31)
_RUNS = "onnxruntime>=1.31" if _IS_CURRENT else "onnxruntime<1.24"

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
        if manifest.target.runs_on != _RUNS:
            raise SessionError(
                f"compiled for {manifest.target.runs_on}, this is onnxruntime {ort.__version__}",
                source=artifact.path,
                remedy="compile the model again here, or install that version",
            )
        self.vocab_size = manifest.model.vocab_size
        self.context = manifest.kv_cache.context
        self.max_step = manifest.kv_cache.max_step
        self._plan = manifest.kv_cache
        self._mask = np.ones((1, self.context), np.int64)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = (
            False  # an arena keeps what a long prompt needed, and is no faster here
        )
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

    def step(self, cache: OnnxCache, ids: Int64s, rows: Int64s) -> Floats:
        """Run tokens ``[S]`` after those that the cache holds; the logits of ``rows [R]``: ``f32 [R, vocab]``."""
        total = cache.position + len(ids)
        binding = cache.binding
        binding.bind_cpu_input("input_ids", ids[None])
        binding.bind_cpu_input("attention_mask", self._mask[:, :total])
        # Binding a value rather than an array, because this input has a default and is not among the model's inputs.
        binding.bind_ortvalue_input("logit_rows", ort.OrtValue.ortvalue_from_numpy(rows))
        logits = np.empty((1, len(rows), self.vocab_size), np.float32)
        if len(rows) == 1:
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
