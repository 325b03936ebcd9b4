"""Encodes weights so that what an adapter changed in them outlives the rounding.

A matrix that comes from a packed file lies on its format's grid. What a LoRA adapter adds is mostly smaller than half a
step of that grid, and rounding to nearest takes nearly all of it away again. But the change is of low rank: it acts on
few directions of the input. So the rounding errors that a row has collected in these directions are carried along, and
each code is chosen to bring them back towards zero, as sigma-delta modulation carries its error along time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.weights.encode import encode
from rlxc.weights.formats import FORMATS, BlockFormat

# Less of it keeps the directions more exact, and adds more error in all others. The coarser the steps, the less of it
# they bear: half as much as there are levels, and at 16 a real adapter on a Q4_K_M base diverged least.
_CALMEST = 16

Floats = npt.NDArray[np.float32]


def encode_keeping(dtype: DType, values: Floats, directions: Floats) -> npt.NDArray[np.uint8]:
    """As :func:`rlxc.weights.encode.encode`, with products ``values @ directions.T`` kept as exact as codes allow.

    Scales and minimums are those that ``encode`` chooses; only codes differ. For each row, column by column, the code
    is chosen that minimises ``‖r + e q‖² + w e²``: r is what the errors before it add up to in the directions, q the
    column's share in them, e the column's own error, and w the mean of ``‖q‖²`` times at most 16.

    Args:
        dtype: the format; a float format, whose steps are small, is rounded as always.
        values: f32 ``[rows, in]``.
        directions: f32 ``[rank, in]``, such as an adapter's A.

    Raises:
        WeightError: as ``encode``.
    """
    packed = encode(dtype, values)
    form = FORMATS[dtype]
    basis = orthonormal(directions)
    if form.is_float or not len(basis):
        return packed
    fields, planes = form.fields(packed), form.unpack(packed)
    grid = _Grid.of(form)
    # Columns one after the other: all rows of one lie side by side.
    scales = np.ascontiguousarray(planes.scales.T)
    inverses = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    shifts = np.zeros_like(scales) if planes.mins is None else np.ascontiguousarray(planes.mins.T)
    columns = np.ascontiguousarray(values.T)
    codes = np.empty(columns.shape, np.int8)
    shares = np.ascontiguousarray(basis.T)
    weight = min(_CALMEST, len(grid.levels) / 2) * float(np.mean(np.sum(shares * shares, axis=1)))
    collected = np.zeros((len(basis), len(values)), np.float32)
    for column, (share, wanted) in enumerate(zip(shares, columns)):
        block = column // form.sub_block
        corrected = wanted - share @ collected / np.float32(weight + share @ share)
        codes[column], level = grid.nearest((corrected + shifts[block]) * inverses[block])
        error = level * scales[block] - shifts[block] - wanted
        collected += share[:, None] * error
    return form.pack(replace(fields, codes=np.ascontiguousarray(codes.T)))


@dataclass(frozen=True)
class _Grid:
    """The levels that codes stand for, and for a codebook its levels in order and what lies between."""

    levels: Floats
    order: npt.NDArray[np.intp] | None
    bounds: Floats | None

    @classmethod
    def of(cls, form: BlockFormat) -> _Grid:
        if form.codebook is None:
            return cls(np.arange(form.code_min, form.code_max + 1, dtype=np.float32), None, None)
        levels = np.array(form.codebook, np.float32)
        order = np.argsort(levels, kind="stable")
        ascending = levels[order]
        return cls(levels, order, (ascending[1:] + ascending[:-1]) / np.float32(2))

    def nearest(self, values: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
        """The codes whose levels are nearest, and those levels."""
        if self.order is None or self.bounds is None:
            level: Floats = np.clip(np.rint(values), self.levels[0], self.levels[-1])
            return level.astype(np.int8), level
        codes = self.order[np.searchsorted(self.bounds, values)]
        return codes.astype(np.int8), self.levels[codes]


def orthonormal(directions: Floats) -> Floats:
    """An orthonormal basis ``[rank, in]`` of what the directions span."""
    _, sizes, basis = np.linalg.svd(directions.astype(np.float64), full_matrices=False)
    if not len(sizes) or not sizes[0]:
        return np.zeros((0, directions.shape[1]), np.float32)
    kept: Floats = basis[sizes > 1e-6 * sizes[0]].astype(np.float32)
    return kept
