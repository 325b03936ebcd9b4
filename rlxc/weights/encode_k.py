"""Values to K-quants: scales found by search, block by block, in numpy.

A K-quant block is 256 weights in sub-blocks of 16 or 32. Its weights are ``d * factor * code``, less
``dmin * min_factor`` in the formats with minimums: codes and factors are small integers, d and dmin are f16.
What is sought is the block of least squared error, in which a large weight counts more than a small one. In turn:

1. each sub-block alone: codes for many trial scales, for each the scale and minimum that fit the codes best
   (linear least squares), and the best of those;
2. scales and minimums to factors of d and dmin, the greatest to the greatest factor or just below; each factor
   then tries its neighbours, with codes made anew;
3. d and dmin by least squares over the block, codes and factors given; then the factors again, twice.

A block keeps the best that it ever had. ``tests/weights/test_encode.py`` holds the errors against llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.weights.formats import BlockFormat, Fields, Scales

F32 = npt.NDArray[np.float32]

_TRIALS = np.arange(-10, 11) / 10
"""The trial scales of a sub-block map its extreme to the greatest code plus one of these."""

_STARTS = {True: ((0, 0), (1, 0), (0, 1)), False: ((0, 0), (1, 0), (2, 0))}
"""With and without minimums: how far the greatest factors of scales and minimums stay below the greatest possible."""

_STEPS = {True: ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)), False: ((0, 0), (-1, 0), (1, 0))}
"""With and without minimums: the changes of a sub-block's two factors that are tried."""

_REFITS = 2


def encode_k(form: BlockFormat, values: F32) -> Fields:
    """The numbers to store for ``f32 [rows, in]`` in a K-quant; scales are not finite where f16 cannot hold them."""
    with np.errstate(all="ignore"):  # what overflows is for the caller to find, in the scales
        return _Search(form, values).run()


@dataclass(frozen=True)
class _Trial:
    """A way to store some blocks: ``d`` and ``dmin`` f32 ``[B]``, factors f32 ``[B, sub-blocks]``, error ``[B]``."""

    d: F32
    dmin: F32
    factors: F32
    min_factors: F32
    error: F32

    @property
    def scales(self) -> F32:
        """The scale of every sub-block, in one row."""
        return (self.d[:, None] * self.factors).reshape(-1)

    @property
    def minimums(self) -> F32:
        """The minimum of every sub-block, in one row."""
        return (self.dmin[:, None] * self.min_factors).reshape(-1)

    def or_better(self, other: _Trial) -> _Trial:
        """For each block the better of two."""
        better = other.error < self.error
        return _Trial(
            d=np.where(better, other.d, self.d),
            dmin=np.where(better, other.dmin, self.dmin),
            factors=np.where(better[:, None], other.factors, self.factors),
            min_factors=np.where(better[:, None], other.min_factors, self.min_factors),
            error=np.where(better, other.error, self.error),
        )


class _Search:
    """The search for some blocks at once.

    Values lie ``[sub_block, sub-blocks]``: a column is a sub-block, so that sums over one add whole rows.
    """

    def __init__(self, form: BlockFormat, values: F32) -> None:
        assert form.scale is not None and form.scale.factors is not None
        self._form = form
        self._rows = len(values)
        self._factors = form.scale.factors
        self._min_factors = form.minimum.factors if form.minimum else None
        self._x = np.ascontiguousarray(values.reshape(-1, form.sub_block).T)
        size = np.abs(self._x)
        typical = np.sqrt(np.mean(self._x * self._x, axis=0))
        # A large weight's error weighs more. How much more is a compromise: this much, and both the plain error and
        # the error weighted with the weight's square are below llama.cpp's in every format.
        self._weight = size + typical * np.float32(1.0 if form.sub_block == 32 else 0.1)
        self._codes = np.empty_like(self._x)
        self._scratch = np.empty_like(self._x)

    def run(self) -> Fields:
        """The best trial's numbers."""
        scales, minimums = (self._by_block(v) for v in self._fit_each())
        starts = (self._start(scales, minimums, *below) for below in _STARTS[self._form.has_mins])
        best = reduce(_Trial.or_better, map(self._vary, starts))
        for _ in range(_REFITS):
            best = best.or_better(self._vary(self._refit(best)))
        return self._fields(best)

    def _fit_each(self) -> tuple[F32, F32]:
        """The scale and minimum of every sub-block alone; NaN where f32 overflows."""
        x, w, codes, scratch = self._x, self._weight, self._codes, self._scratch
        low, high = self._form.code_min, self._form.code_max
        wx = w * x
        sum_w, sum_wx = w.sum(axis=0), wx.sum(axis=0)
        if self._form.has_mins:
            floor = np.minimum(x.min(axis=0), 0)
            shifted, per_code = x - floor, _inverse(x.max(axis=0) - floor)
            trials = high + _TRIALS
        else:  # either end of the codes may take the weight of the greatest size
            shifted, per_code = x, _inverse(np.abs(x).max(axis=0))
            trials = np.concatenate([low + _TRIALS, -low + _TRIALS])
        best = np.full(x.shape[1], -np.inf, np.float32)
        scale, minimum = np.full_like(best, np.nan), np.full_like(best, np.nan)
        for trial in trials:
            np.multiply(shifted, per_code * np.float32(trial), out=codes)
            np.rint(codes, out=codes)
            np.clip(codes, low, high, out=codes)
            np.multiply(codes, w, out=scratch)
            sum_wc = scratch.sum(axis=0)
            scratch *= codes
            sum_wcc = scratch.sum(axis=0)
            np.multiply(codes, wx, out=scratch)
            sum_wcx = scratch.sum(axis=0)
            # Least squares for x ~ s * code - m, with m >= 0; with m = 0 where that is the best or all there is,
            # and with m alone where every code is 0: of weights that are equal.
            s, m = _solve(sum_wcc, -sum_wc, sum_w, sum_wcx, -sum_wx)
            alone = ~(m > 0) | (not self._form.has_mins)
            s = np.where(alone, sum_wcx * _inverse(sum_wcc), s)
            m = np.where(alone, np.float32(0), m)
            if self._form.has_mins:
                m = np.where(sum_wcc == 0, np.maximum(-sum_wx * _inverse(sum_w), 0), m)
            residue = s * s * sum_wcc - 2 * s * m * sum_wc + m * m * sum_w  # less the sum of w x^2
            gain = 2 * (s * sum_wcx - m * sum_wx) - residue
            better = gain > best
            best = np.where(better, gain, best)
            scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
        return scale, minimum

    def _start(self, scales: F32, minimums: F32, below: int, min_below: int) -> _Trial:
        """Factors for scales and minimums, ``[B, sub-blocks]``: the extreme's are ``below`` their greatest."""
        extreme = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)[:, 0]
        # With factors of both signs, the lower end is the longer one.
        end = self._factors.low + below if self._factors.low < 0 else self._factors.high - below
        d, dmin = _to_f16_up(extreme / np.float32(end)), np.zeros_like(extreme)
        if self._min_factors is not None:
            dmin = _to_f16_up(minimums.max(axis=1) / np.float32(self._min_factors.high - min_below))
        return _Trial(
            d=d,
            dmin=dmin,
            factors=np.rint(scales * _inverse(d)[:, None]),
            min_factors=np.rint(minimums * _inverse(dmin)[:, None]),
            error=np.full_like(d, np.inf),
        )

    def _vary(self, start: _Trial) -> _Trial:
        """The trial with the best factors next to its own, and the error with them."""
        factors, min_factors = start.factors, start.min_factors
        min_high = self._min_factors.high if self._min_factors else 0
        least = np.full(self._x.shape[1], np.inf, np.float32)
        for step, min_step in _STEPS[self._form.has_mins]:
            trial = replace(
                start,
                factors=np.clip(start.factors + step, self._factors.low, self._factors.high),
                min_factors=np.clip(start.min_factors + min_step, 0, min_high),
            )
            error = self._error(trial)
            better = self._by_block(error < least)
            least = np.fmin(error, least)
            factors = np.where(better, trial.factors, factors)
            min_factors = np.where(better, trial.min_factors, min_factors)
        error = self._by_block(least).sum(axis=1)
        return replace(start, factors=factors, min_factors=min_factors, error=error)

    def _refit(self, trial: _Trial) -> _Trial:
        """The trial with the d and dmin that fit its codes and factors best, where there are any."""
        codes, w, x = self._make_codes(trial), self._weight, self._x
        slope, offset = codes * trial.factors.reshape(-1), trial.min_factors.reshape(-1)
        weighted = w * slope
        slope_slope, slope_x = self._block_sums(weighted * slope), self._block_sums(weighted * x)
        if self._min_factors is None:
            d, dmin = slope_x * _inverse(slope_slope), trial.dmin
            fits = d != 0
        else:
            slope_offset = self._block_sums(weighted * offset)
            offset_offset, offset_x = (
                self._block_sums(w * (offset * offset)),
                self._block_sums(w * x * offset),
            )
            d, dmin = _solve(slope_slope, -slope_offset, offset_offset, slope_x, -offset_x)
            fits = np.isfinite(d) & (d > 0) & (dmin >= 0)
        return replace(
            trial, d=np.where(fits, _to_f16(d), trial.d), dmin=np.where(fits, _to_f16(dmin), trial.dmin)
        )

    def _make_codes(self, trial: _Trial) -> F32:
        """The nearest codes, in the shared buffer."""
        codes = np.add(self._x, trial.minimums, out=self._codes)
        codes *= _inverse(trial.scales)
        np.rint(codes, out=codes)
        return np.clip(codes, self._form.code_min, self._form.code_max, out=codes)

    def _error(self, trial: _Trial) -> F32:
        """The weighted squared error of every sub-block."""
        error = np.multiply(self._make_codes(trial), trial.scales, out=self._scratch)
        error -= trial.minimums
        error -= self._x
        error *= error
        error *= self._weight
        return np.asarray(error.sum(axis=0))

    def _fields(self, trial: _Trial) -> Fields:
        rows = self._rows
        codes = self._make_codes(trial).T.astype(np.int8).reshape(rows, -1)

        def stored(base: F32, factors: F32) -> Scales:
            return Scales(
                base.astype(np.float16).reshape(rows, -1), factors.astype(np.int8).reshape(rows, -1)
            )

        minimum = stored(trial.dmin, trial.min_factors) if self._min_factors else None
        return Fields(codes, stored(trial.d, trial.factors), minimum)

    def _by_block(self, per_sub_block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``[sub-blocks of all]`` as ``[B, sub-blocks]``."""
        return per_sub_block.reshape(-1, self._form.block_size // self._form.sub_block)

    def _block_sums(self, values: F32) -> F32:
        return np.asarray(self._by_block(values.sum(axis=0)).sum(axis=1))


def _solve(a: F32, b: F32, c: F32, u: F32, v: F32) -> tuple[F32, F32]:
    """The solution of ``[[a, b], [b, c]] y = [u, v]``; not finite where there is none."""
    det = a * c - b * b
    return np.divide(c * u - b * v, det), np.divide(a * v - b * u, det)


def _inverse(values: F32) -> F32:
    """``1 / values``, 0 where they are 0 or so small that f16 scales have nothing for them."""
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=np.abs(values) > 1e-30)


def _to_f16(values: F32) -> F32:
    """Rounded to f16, still as f32."""
    return values.astype(np.float16).astype(np.float32)


def _to_f16_up(values: F32) -> F32:
    """Rounded away from 0 to f16, still as f32.

    Nearest is not enough: many a model's d is below the normal numbers of f16, where one of two steps may be a
    tenth of d, and with a d too small the greatest factor is too small for its scale.
    """
    nearest = values.astype(np.float16)
    further = np.nextafter(nearest, np.copysign(np.float16(np.inf), nearest))
    return np.where(np.abs(nearest.astype(np.float32)) < np.abs(values), further, nearest).astype(np.float32)
