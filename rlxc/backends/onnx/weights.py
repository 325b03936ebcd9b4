"""Writes a graph's weights to the weights file, tensor by tensor, and remembers where each came to lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rlxc.backends.onnx.external import Region, WeightsFile
from rlxc.backends.onnx.storage import ReadBytes, Storage, float_rows, unpacked_rows
from rlxc.dtypes import DType
from rlxc.ir import Graph, Weight
from rlxc.ir.ops import Embed

_FLOAT_TYPES = {
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class StoredFloat:
    """A weight in a float format, as it is in the model file."""

    data_type: int
    region: Region


@dataclass(frozen=True)
class StoredPacked:
    """A packed weight ``[rows, columns]``: codes, f32 scales, zero points and minimums if it has them."""

    storage: Storage
    rows: int
    columns: int
    codes: Region
    scales: Region
    zero_points: Region | None
    mins: Region | None

    @property
    def blocks(self) -> int:
        """Scales in a row."""
        return self.columns // self.storage.block


Stored = StoredFloat | StoredPacked


def write_weights(
    graph: Graph, read: ReadBytes, file: WeightsFile, progress: Callable[[str], None]
) -> dict[str, Stored]:
    """Write every weight of the graph; ``progress`` is told each weight's name when it is written."""
    stored: dict[str, Stored] = {}
    gathered = {node.inputs[1] for node in graph.nodes if isinstance(node.op, Embed)}
    for weight in graph.weights:
        stored[weight.name] = (
            _write_packed(weight, read, file, weight.name in gathered)
            if weight.type.dtype.is_packed
            else _write_float(weight, read, file)
        )
        progress(weight.name)
    return stored


def _write_float(weight: Weight, read: ReadBytes, file: WeightsFile) -> StoredFloat:
    return StoredFloat(_FLOAT_TYPES[weight.type.dtype], file.add(float_rows(weight, read)))


def _write_packed(weight: Weight, read: ReadBytes, file: WeightsFile, gathered: bool) -> StoredPacked:
    storage = Storage.of(weight.type.dtype)
    rows, columns = weight.type.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    scales: list[npt.NDArray[np.float32]] = []
    mins: list[npt.NDArray[np.float32]] = []

    def codes() -> Iterator[npt.NDArray[np.uint8]]:
        # Scales and minimums are small: they wait here while the codes stream out.
        for planes in unpacked_rows(weight, read):
            scales.append(planes.scales)
            if planes.mins is not None:
                mins.append(planes.mins)
            yield storage.pack(planes.codes)

    region = file.add(codes())
    zero_points = None
    if gathered and storage.centre:
        zero_points = file.add([storage.zero_points(rows, columns // storage.block)])
    return StoredPacked(
        storage,
        rows,
        columns,
        codes=region,
        scales=file.add(scales),
        zero_points=zero_points,
        mins=file.add(mins) if mins else None,
    )
