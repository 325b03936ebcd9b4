"""Graphs on random packed tensors, run through the ONNX backend and by the interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from rlxc.backends import BuildOptions
from rlxc.backends.onnx import OnnxBackend
from rlxc.ir import Graph, interp, parse

# What the tests of all backends share lies beside this file.
sys.path.insert(0, str(Path(__file__).parent))

from random_tensors import RandomTensors

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class FolderWriter:
    """An artifact writer's part that backends use, on a plain folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> FolderFile:
        return FolderFile(self.folder / name)


class FolderFile:
    def __init__(self, path: Path) -> None:
        self.stream = path.open("wb")

    def __enter__(self) -> FolderFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()

    def write(self, data: Array) -> None:
        self.stream.write(np.ascontiguousarray(data).tobytes())

    def tell(self) -> int:
        return self.stream.tell()

    def align(self, multiple: int) -> None:
        self.stream.write(b"\0" * (-self.stream.tell() % multiple))


@dataclass(frozen=True)
class Built:
    """A graph built by the ONNX backend, beside its tensors."""

    graph: Graph
    tensors: RandomTensors
    folder: Path

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.folder / "model.onnx", load_external_data=False)

    def region(self, initializer: str) -> Array:
        """An initializer's values, read from the weights file with numpy alone."""
        tensor = next(t for t in self.model.graph.initializer if t.name == initializer)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count, offset = int(entries["length"]) // dtype.itemsize, int(entries["offset"])
        return np.fromfile(self.folder / entries["location"], dtype, count, offset=offset).reshape(
            tensor.dims
        )

    def open(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return ort.InferenceSession(self.folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Arrays, session: ort.InferenceSession | None = None) -> dict[str, Array]:
        """The graph's outputs by name; ``past_length`` becomes the mask that stands for it."""
        fed = {name: array for name, array in feeds.items() if name != "past_length"}
        if "past_length" in feeds:
            total = int(feeds["past_length"]) + next(a.shape[1] for a in fed.values() if a.ndim in (2, 3))
            fed["attention_mask"] = np.ones((1, total), np.int64)
        outputs = list(self.graph.outputs)
        return dict(zip(outputs, (session or self.open()).run(outputs, fed)))

    def interpret(self, feeds: Arrays) -> dict[str, Array]:
        """The oracle's outputs for the same tensors."""
        return interp.run(self.graph, feeds, self.tensors.decoded.__getitem__)


Build = Callable[..., Built]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """``build(ir_text, activations="float32", context=64, folder="built")``."""

    def build_(text: str, activations: str = "float32", context: int = 64, folder: str = "built") -> Built:
        graph = parse(text)
        built = Built(graph, RandomTensors(graph, seed=0), tmp_path / folder)
        built.folder.mkdir()
        options = BuildOptions(activations, context, max_step=context, target="native")
        read = built.tensors.packed.__getitem__
        OnnxBackend().build(graph, read, FolderWriter(built.folder), options, lambda name: None)
        return built

    return build_
