"""Writes a graph's weights to the weights file, tensor by tensor, and remembers where each came to lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rlxc.backends.onnx.external import Region, WeightsFile
from rlxc.backends.onnx.storage import Storage, pack_indices, unpacked_rows
from rlxc.backends.recipes import Losses, ReadBytes, packed_rows
from rlxc.dtypes import DType
from rlxc.ir import Graph, Weight
from rlxc.ir.ops import Embed
from rlxc.weights.formats import FORMATS

_FLOAT_TYPES = {
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class StoredFloat:
    """A weight in a float format."""

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


@dataclass(frozen=True)
class StoredIndices:
    """A weight ``[rows, columns]`` of indices into a codebook, with an f32 scale for each ``block``."""

    dtype: DType
    rows: int
    columns: int
    block: int
    codes: Region
    scales: Region

    @property
    def blocks(self) -> int:
        """Scales in a row."""
        return self.columns // self.block


Stored = StoredFloat | StoredPacked | StoredIndices


def write_weights(
    graph: Graph,
    read: ReadBytes,
    file: WeightsFile,
    progress: Callable[[str], None],
    losses: Losses | None = None,
) -> dict[str, Stored]:
    """Write every weight of the graph.

    Args:
        graph: the graph.
        read: gives the bytes of the model file's tensors.
        file: where they go.
        progress: told each weight's name when it is written.
        losses: told what encoding weights cost.
    """
    stored: dict[str, Stored] = {}
    gathered = {node.inputs[1] for node in graph.nodes if isinstance(node.op, Embed)}
    for weight in graph.weights:
        fmt = FORMATS[weight.type.dtype]
        if fmt.is_float:
            region = file.add(packed_rows(weight, read, losses))
            stored[weight.name] = StoredFloat(_FLOAT_TYPES[weight.type.dtype], region)
        elif fmt.codebook:
            stored[weight.name] = _write_indices(weight, read, file, losses)
        else:
            stored[weight.name] = _write_packed(weight, read, file, losses, weight.name in gathered)
        progress(weight.name)
    return stored


def _write_indices(
    weight: Weight, read: ReadBytes, file: WeightsFile, losses: Losses | None
) -> StoredIndices:
    rows, columns = map(int, weight.type.shape)
    scales: list[npt.NDArray[np.float32]] = []

    def codes() -> Iterator[npt.NDArray[np.uint8]]:
        for planes in unpacked_rows(weight, read, losses):
            scales.append(planes.scales)
            yield pack_indices(planes.codes)

    region = file.add(codes())
    block = FORMATS[weight.type.dtype].block_size
    return StoredIndices(weight.type.dtype, rows, columns, block, region, file.add(scales))


def _write_packed(
    weight: Weight, read: ReadBytes, file: WeightsFile, losses: Losses | None, gathered: bool
) -> StoredPacked:
    storage = Storage.of(weight.type.dtype)
    rows, columns = map(int, weight.type.shape)
    scales: list[npt.NDArray[np.float32]] = []
    mins: list[npt.NDArray[np.float32]] = []

    def codes() -> Iterator[npt.NDArray[np.uint8]]:
        # Scales and minimums are small: they wait here while the codes stream out.
        for planes in unpacked_rows(weight, read, losses):
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
