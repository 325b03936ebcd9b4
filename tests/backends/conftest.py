"""Packed tensors with sane random values, and a graph run through the ONNX backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from rlxc.dtypes import DType
from rlxc.ir import Graph, Source, interp
from rlxc.weights.formats import FORMATS

Arrays = Mapping[str, npt.NDArray[Any]]


class RandomTensors:
    """A model file in memory: a random tensor, packed and decoded, for every source in a graph."""

    def __init__(self, graph: Graph, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.packed: dict[str, npt.NDArray[np.uint8]] = {}
        self.decoded: dict[str, npt.NDArray[np.float32]] = {}
        pending = list(graph.weights)
        while pending:
            weight = pending.pop()
            if not isinstance(weight.recipe, Source):
                pending += getattr(weight.recipe, "parts", ())
                continue
            shape = tuple(map(int, weight.type.shape))
            data = random_bytes(weight.type.dtype, shape, rng)
            rows = data.reshape(-1, FORMATS[weight.type.dtype].row_bytes(shape[-1]))
            self.packed[weight.recipe.tensor] = data
            self.decoded[weight.recipe.tensor] = FORMATS[weight.type.dtype].decode(rows, shape[-1]).reshape(shape)


def random_bytes(dtype: DType, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Any codes and sub-scales, but f16 scales and minimums of a sane size."""
    fmt = FORMATS[dtype]
    if fmt.is_float:
        values = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        if dtype is DType.BF16:
            return np.ascontiguousarray(values.view(np.uint16)[..., 1::2]).view(np.uint8).ravel()
        return values.astype(np.float16 if dtype is DType.F16 else np.float32).view(np.uint8).ravel()
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    for scale in (fmt.scale, fmt.minimum):
        if scale is not None:
            size = rng.uniform(0.0005, 0.002, (len(blocks), 1)).astype(np.float16)
            blocks[:, scale.offset : scale.offset + 2] = size.view(np.uint8)
    return blocks.ravel()


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

    def write(self, data: npt.NDArray[Any]) -> None:
        self.stream.write(np.ascontiguousarray(data).tobytes())

    def tell(self) -> int:
        return self.stream.tell()

    def align(self, multiple: int) -> None:
        self.stream.write(b"\0" * (-self.stream.tell() % multiple))


RunOnnx = Callable[..., dict[str, npt.NDArray[Any]]]


@pytest.fixture
def run_onnx(tmp_path: Path) -> RunOnnx:
    """``run_onnx(graph, tensors, feeds, activations="float32", context=64)``: the graph's outputs by name."""

    def run(
        graph: Graph, tensors: RandomTensors, feeds: Arrays, activations: str = "float32", context: int = 64
    ) -> dict[str, npt.NDArray[Any]]:
        options = BuildOptions(activations, context)
        OnnxBackend().build(graph, tensors.packed.__getitem__, FolderWriter(tmp_path), options, lambda name: None)
        onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
        session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        fed = {name: array for name, array in feeds.items() if name != "past_length"}
        if "past_length" in feeds:
            total = int(feeds["past_length"]) + feeds["input_ids"].shape[1]
            fed["attention_mask"] = np.ones((1, total), np.int64)
        return dict(zip(graph.outputs, session.run(list(graph.outputs), fed)))

    return run


def interpret(graph: Graph, tensors: RandomTensors, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
    """The oracle's outputs for the same graph and tensors."""
    return interp.run(graph, feeds, tensors.decoded.__getitem__)
