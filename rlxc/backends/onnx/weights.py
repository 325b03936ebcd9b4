"""Writes a graph's weights to the weights file, tensor by tensor, and remembers where each came to lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rlxc.backends.onnx.external import Region, WeightsFile
from rlxc.backends.onnx.storage import Storage, has_integers, pack_indices, unpacked_rows
from rlxc.backends.recipes import Losses, ReadBytes, packed_rows
from rlxc.dtypes import DType
from rlxc.ir import Graph, Weight
from rlxc.ir.ops import Embed
from rlxc.weights.formats import FORMATS

FLOAT_TYPES = {
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
}
"""The types of weights that are floats."""


@dataclass(frozen=True)
class StoredFloat:
    """A weight in a float format."""

    data_type: int
    shape: tuple[int, ...]
    region: Region

    def expert(self, number: int) -> StoredFloat:
        """One of the weights that this one holds along its first dimension."""
        return replace(self, shape=self.shape[1:], region=self.region.part(number, self.shape[0]))


@dataclass(frozen=True)
class StoredPacked:
    """A packed weight ``[rows, columns]``: numbers, f32 scales, and what is to be subtracted, if anything.

    Of ``[experts, out, in]``, the rows are all experts' rows, one expert after the other. Lookups need zero points and
    the minimums themselves. Products need what they leave out of each block, ``centre * scale - minimum``: made at load
    where a table serves both, so that it is stored once.
    """

    storage: Storage
    rows: int
    columns: int
    codes: Region
    scales: Region
    zero_points: Region | None
    mins: Region | None
    offsets: Region | None

    @property
    def blocks(self) -> int:
        """Scales in a row."""
        return self.columns // self.storage.block

    def expert(self, number: int, experts: int) -> StoredPacked:
        """The rows of one of so many experts, which are only multiplied."""
        codes, scales = (region.part(number, experts) for region in (self.codes, self.scales))
        offsets = self.offsets and self.offsets.part(number, experts)
        return replace(self, rows=self.rows // experts, codes=codes, scales=scales, offsets=offsets)


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

    def expert(self, number: int, experts: int) -> StoredIndices:
        """The rows of one of so many experts, whose rows lie one after the other."""
        codes, scales = (region.part(number, experts) for region in (self.codes, self.scales))
        return replace(self, rows=self.rows // experts, codes=codes, scales=scales)


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
            shape = tuple(map(int, weight.type.shape))
            stored[weight.name] = StoredFloat(FLOAT_TYPES[weight.type.dtype], shape, region)
        elif has_integers(weight.type.dtype):
            stored[weight.name] = _write_packed(weight, read, file, losses, weight.name in gathered)
        else:
            stored[weight.name] = _write_indices(weight, read, file, losses)
        progress(weight.name)
    return stored


def _write_indices(
    weight: Weight, read: ReadBytes, file: WeightsFile, losses: Losses | None
) -> StoredIndices:
    rows, columns = _rows(weight)
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
    storage = Storage.of(weight.type.dtype, weight.layout)
    rows, columns = _rows(weight)
    scales: list[npt.NDArray[np.float32]] = []
    subtracted: list[npt.NDArray[np.float32]] = []

    def codes() -> Iterator[npt.NDArray[np.uint8]]:
        # Scales and minimums are small: they wait here while the codes stream out.
        for planes in unpacked_rows(weight, read, losses):
            scales.append(storage.repeated(planes.scales * np.float32(storage.step), columns))
            if planes.mins is not None:
                mins = storage.repeated(planes.mins, columns)
                with np.errstate(all="ignore"):  # scales may be infinite
                    centres = scales[-1] * np.float32(storage.centre)
                    subtracted.append(mins if gathered else centres - mins)
            yield storage.pack(planes.codes)

    region = file.add(codes())
    zero_points = None
    if gathered and storage.zero_point != storage.default_zero_point:
        zero_points = file.add([storage.zero_points(rows, columns // storage.block)])
    scale_region = file.add(scales)
    rest = file.add(subtracted) if storage.has_mins else None
    return StoredPacked(
        storage,
        rows,
        columns,
        codes=region,
        scales=scale_region,
        zero_points=zero_points,
        mins=rest if gathered else None,
        offsets=None if gathered else rest,
    )


def _rows(weight: Weight) -> tuple[int, int]:
    """Rows and columns, where every expert's rows count."""
    *rows, columns = map(int, weight.type.shape)
    return prod(rows), columns
