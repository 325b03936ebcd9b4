"""What will be written of each weight, without reading it: the bytes of every region, and what reads them, in words."""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt

from rlxc.backends import StoredAs
from rlxc.backends.onnx.external import Region
from rlxc.backends.onnx.storage import Storage, has_integers
from rlxc.backends.onnx.weights import FLOAT_TYPES, Stored, StoredFloat, StoredIndices, StoredPacked
from rlxc.ir import Graph, Weight
from rlxc.ir.ops import Embed
from rlxc.weights.formats import FORMATS

_SCALE_BYTES = 4


class Nowhere:
    """A file that keeps nothing of what is written but how much it was."""

    def __init__(self) -> None:
        self._size = 0

    def write(self, data: bytes | npt.NDArray[np.generic]) -> None:
        """Count bytes."""
        self._size += len(data) if isinstance(data, bytes) else data.nbytes

    def tell(self) -> int:
        """Bytes counted so far."""
        return self._size

    def align(self, multiple: int) -> None:
        """Round up to a multiple."""
        self._size += -self._size % multiple


def plan_weights(graph: Graph) -> dict[str, Stored]:
    """What `write_weights` will return for a graph, but for the places: all regions start at 0."""
    return {weight.name: _plan(weight, _is_gathered(graph, weight)) for weight in graph.weights}


def describe_weights(graph: Graph) -> dict[str, StoredAs]:
    """How each weight of a graph is stored, and the operators that read it."""
    plan = plan_weights(graph)
    return {
        weight.name: StoredAs(_nbytes(plan[weight.name]), _route(graph, weight, plan[weight.name]))
        for weight in graph.weights
    }


def _plan(weight: Weight, gathered: bool) -> Stored:
    dtype, shape = weight.type.dtype, tuple(map(int, weight.type.shape))
    fmt = FORMATS[dtype]
    if fmt.is_float:
        return StoredFloat(FLOAT_TYPES[dtype], shape, Region(0, prod(shape) * fmt.block_bytes))
    rows, columns = prod(shape[:-1]), shape[-1]
    if not has_integers(dtype):
        scales = Region(0, rows * columns // fmt.block_size * _SCALE_BYTES)
        return StoredIndices(dtype, rows, columns, fmt.block_size, Region(0, rows * columns // 2), scales)
    storage = Storage.of(dtype, weight.layout)
    blocks = columns // storage.block
    floats = Region(0, rows * blocks * _SCALE_BYTES)
    zero_points = None
    if gathered and storage.zero_point != storage.default_zero_point:
        zero_points = Region(0, storage.zero_points(rows, blocks).nbytes)
    return StoredPacked(
        storage,
        rows,
        columns,
        codes=Region(0, rows * columns * storage.bits // 8),
        scales=floats,
        zero_points=zero_points,
        mins=floats if storage.has_mins and gathered else None,
        offsets=floats if storage.has_mins and not gathered else None,
    )


def _nbytes(stored: Stored) -> int:
    if isinstance(stored, StoredFloat):
        return stored.region.length
    regions = [stored.codes, stored.scales]
    if isinstance(stored, StoredPacked):
        optional = (stored.zero_points, stored.mins, stored.offsets)
        regions += [region for region in optional if region is not None]
    return sum(region.length for region in regions)


def _route(graph: Graph, weight: Weight, stored: Stored) -> str:
    gathered, multiplied = _is_gathered(graph, weight), _is_multiplied(graph, weight)
    if isinstance(stored, StoredFloat):
        if len(stored.shape) == 1:
            return str(weight.type.dtype)
        names, how = ("MatMul", "Gather"), f" {weight.type.dtype}"
    elif isinstance(stored, StoredIndices):
        names, how = ("MatMulBnb4", "Gather"), f" 4 bits, blocks of {stored.block}"
    else:
        apart = ", minimums apart" if stored.storage.has_mins else ""
        names = ("MatMulNBits", "GatherBlockQuantized")
        how = f" {stored.storage.bits} bits, blocks of {stored.storage.block}{apart}"
    used = [name for name, is_used in zip(names, (multiplied, gathered)) if is_used]
    return " and ".join(used) + how


def _is_gathered(graph: Graph, weight: Weight) -> bool:
    return any(isinstance(node.op, Embed) for node in graph.users.get(weight.name, ()))


def _is_multiplied(graph: Graph, weight: Weight) -> bool:
    return any(not isinstance(node.op, Embed) for node in graph.users.get(weight.name, ()))
