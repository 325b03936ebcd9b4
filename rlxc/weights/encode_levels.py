"""Values to formats with few levels: IQ4_NL, by search, and MXFP4, ternary and binary ones, by their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.weights.bnb import nearest
from rlxc.weights.formats import BlockFormat, Fields, Scales

F32 = npt.NDArray[np.float32]

_TRIALS = np.arange(-7, 8)
"""Trial scales map the weight of the greatest size to one of the outmost levels, plus one of these."""


def encode_iq4_nl(form: BlockFormat, values: F32) -> Fields:
    """The numbers to store for ``f32 [rows, in]``.

    Of many trial scales, each fitted to the levels that it chooses by linear least squares, a block gets the best; a
    large weight's error counts more than a small one's.
    """
    levels = _Levels(form)
    blocks = values.reshape(-1, form.block_size)
    size = np.abs(blocks)
    extreme = np.take_along_axis(blocks, size.argmax(axis=1)[:, None], axis=1)
    typical = np.sqrt(np.mean(blocks * blocks, axis=1, keepdims=True))
    # As in K-quants: with so much of the typical size the plain and the weighted error are below llama.cpp's.
    weight = size + np.float32(0.1) * typical
    wx = weight * blocks
    best, scale = np.zeros(len(blocks), np.float32), np.zeros(len(blocks), np.float32)
    per_level = _inverse(extreme)
    for trial in np.concatenate([levels.low + _TRIALS, levels.high + _TRIALS]):
        chosen = levels.values[levels.nearest(blocks * (np.float32(trial) * per_level))]
        along = np.einsum("ij,ij->i", wx, chosen)
        length = np.einsum("ij,ij,ij->i", weight, chosen, chosen)
        gain = along * along / length  # how much less the squared error is than with a scale of 0
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, along / length, scale)
    # Sums of squares may be beyond f32 where the scale is beyond f16.
    too_large = np.abs(extreme[:, 0]) > -levels.low * np.float32(np.finfo(np.float16).max)
    stored: npt.NDArray[np.float16] = np.where(too_large, np.inf, scale).astype(np.float16)
    codes = levels.nearest(blocks * _inverse(stored.astype(np.float32)[:, None]))
    return _fields(codes, stored, values)


def encode_mxfp4(form: BlockFormat, values: F32) -> Fields:
    """The numbers to store for ``f32 [rows, in]``: OCP's rule, as in ggml.

    The scale is the power of two that gives the greatest size the greatest exponent that E2M1 has, and 12, the doubled
    codebook's end, takes what lies above it.
    """
    assert form.codebook is not None and form.scale is not None and form.scale.table is not None
    blocks = values.reshape(-1, form.block_size)
    size = np.abs(blocks)
    _, exponent = np.frexp(size.max(axis=1))  # size = fraction * 2^exponent, fraction below 1
    base: npt.NDArray[np.uint8] = np.where(size.any(axis=1), np.clip(exponent - 3 + 127, 0, 254), 0).astype(
        np.uint8
    )
    scale = form.scale.table[base].astype(np.float64)[:, None]
    positive = len(form.codebook) // 2
    codes = nearest(np.array(form.codebook[:positive], np.float32), (size / scale).astype(np.float32))
    codes += np.uint8(positive) * ((blocks < 0) & (codes > 0))
    return _fields(codes, base, values)


def encode_binary(form: BlockFormat, values: F32) -> Fields:
    """The numbers to store for ``f32 [rows, in]`` in Q1_0: signs, and the mean size of a block."""
    blocks = values.reshape(-1, form.block_size)
    mean = np.abs(blocks).sum(axis=1, dtype=np.float64) / form.block_size
    return _fields((blocks >= 0).astype(np.uint8), mean.astype(np.float32).astype(np.float16), values)


def encode_ternary(form: BlockFormat, values: F32) -> Fields:
    """The numbers to store for ``f32 [rows, in]`` in TQ1_0 or TQ2_0: a block's greatest size, its negative, or 0."""
    blocks = values.reshape(-1, form.block_size)
    largest = np.abs(blocks).max(axis=1)
    ratio = np.divide(blocks, largest[:, None], out=np.zeros_like(blocks), where=largest[:, None] != 0)
    codes = np.sign(ratio) * (np.abs(ratio) >= np.float32(0.5))
    return _fields(codes.astype(np.int8).view(np.uint8), largest.astype(np.float16), values)


class _Levels:
    """Levels that are ascending integers, and the nearest one's code for each half of an integer between them.

    The middle between two levels is such a half; it belongs to the upper one.
    """

    def __init__(self, form: BlockFormat) -> None:
        self.values = np.array(form.codebook, np.float32)
        self.low, self.high = int(self.values[0]), int(self.values[-1])
        halves = np.arange(2 * self.low, 2 * self.high + 1) / 2
        middles = (self.values[1:] + self.values[:-1]) / 2
        self._codes = np.searchsorted(middles, halves, side="right").astype(np.uint8)

    def nearest(self, values: F32) -> npt.NDArray[np.uint8]:
        """The codes of the nearest levels."""
        half = np.floor(values * np.float32(2)) - np.float32(2 * self.low)
        place = np.clip(half, 0, len(self._codes) - 1).astype(np.int16)
        codes: npt.NDArray[np.uint8] = np.take(self._codes, place)
        return codes


def _inverse(values: F32) -> F32:
    """One over each, and 0 where that is beyond f32."""
    inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _fields(codes: npt.NDArray[np.uint8], bases: npt.NDArray[Any], values: F32) -> Fields:
    """A scale a block, and codes that may be unsigned, as rows."""
    return Fields(
        codes.view(np.int8).reshape(values.shape), Scales(bases.reshape(len(values), -1), None), None
    )
