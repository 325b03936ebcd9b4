"""Encodes weights so that what an adapter changed in them outlives the rounding.

A matrix that comes from a packed file lies on its format's grid. What a LoRA adapter adds is mostly smaller than half a
step of that grid, and rounding to nearest takes nearly all of it away again. But the change is of low rank: it acts on
few directions of the input. So the rounding errors that a row has collected in these directions are carried along, and
each code is chosen to bring them back towards zero, as sigma-delta modulation carries its error along time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.weights.encode import encode
from rlxc.weights.formats import FORMATS

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
    basis = _orthonormal(directions)
    if form.is_float or not len(basis):
        return packed
    fields, planes = form.fields(packed), form.unpack(packed)
    steps = np.arange(form.code_min, form.code_max + 1)
    levels = np.array(form.codebook or steps, np.float32)
    codes = fields.codes.copy()
    bounds, order = _between(levels)
    shares = np.ascontiguousarray(basis.T)
    weight = min(_CALMEST, len(levels) / 2) * float(np.mean(np.sum(shares * shares, axis=1)))
    collected = np.zeros((len(values), len(basis)), np.float32)
    for column in range(values.shape[1]):
        share, block = shares[column], column // form.sub_block
        scale = planes.scales[:, block]
        shift = planes.mins[:, block] if planes.mins is not None else np.float32(0)
        wanted = values[:, column] - collected @ share / np.float32(weight + share @ share)
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.nan_to_num((wanted + shift) / scale)
        chosen = order[np.searchsorted(bounds, level)]
        codes[:, column] = steps[chosen]
        error = levels[chosen] * scale - shift - values[:, column]
        collected += error[:, None] * share
    return form.pack(replace(fields, codes=codes))


def _orthonormal(directions: Floats) -> Floats:
    """An orthonormal basis ``[rank, in]`` of what the directions span."""
    _, sizes, basis = np.linalg.svd(directions.astype(np.float64), full_matrices=False)
    if not len(sizes) or not sizes[0]:
        return np.zeros((0, directions.shape[1]), np.float32)
    kept: Floats = basis[sizes > 1e-6 * sizes[0]].astype(np.float32)
    return kept


def _between(levels: Floats) -> tuple[Floats, npt.NDArray[np.intp]]:
    """The bounds between neighbouring levels, and the levels' numbers in ascending order."""
    order = np.argsort(levels, kind="stable")
    ascending = levels[order]
    return ((ascending[1:] + ascending[:-1]) / 2).astype(np.float32), order
