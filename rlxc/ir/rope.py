"""Rotary position embedding: its parameters and its table of angles.

Sources: Su et al. 2021 (RoFormer); Peng et al. 2023 (YaRN), section 3 for the ramp between interpolated and
extrapolated frequencies; Ding et al. 2024 (LongRoPE) for factors of single frequencies, which Llama 3.1's files have,
too, as ``rope_freqs.weight``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlxc.errors import ModelError


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters; ``original_context`` is the context length that the model was trained at."""

    original_context: int
    extrapolation: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class RopeSpec:
    """How one kind of layer rotates its queries and keys.

    ``dim`` of the head's channels are rotated, the rest passes through. ``interleaved`` pairs channels
    (0, 1), (2, 3), ... (Llama in GGUF); otherwise (0, dim/2), (1, dim/2 + 1), ... (NeoX). ``factor`` > 1 stretches
    the context: positions are divided by it, or, with ``yarn``, only the low frequencies are. ``attention`` multiplies
    cosines and sines, besides what YaRN multiplies them with: LongRoPE's correction for long contexts.
    """

    theta: float
    dim: int
    interleaved: bool = False
    factor: float = 1.0
    yarn: Yarn | None = None
    attention: float = 1.0

    def angles(
        self, positions: npt.NDArray[np.int64], factors: npt.NDArray[np.float32] | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Cosines and sines ``[..., dim/2]`` for integer ``positions`` ``[...]``, times the magnitude."""
        angle = np.asarray(positions, np.float64)[..., None] * self.frequencies(factors)
        return np.cos(angle) * self.magnitude, np.sin(angle) * self.magnitude

    def frequencies(self, factors: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float64]:
        """Radians per position of each pair, ``[dim/2]``; ``factors`` ``[dim/2]`` divide them one by one.

        Raises:
            ModelError: a factor is not a positive finite number.
        """
        frequencies: npt.NDArray[np.float64]
        frequencies = self.theta ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        if factors is not None:
            wrong = factors[~((factors > 0) & np.isfinite(factors))]
            if len(wrong):
                raise ModelError(f"a factor of the rope's frequencies is {wrong[0]}, not a positive number")
            frequencies = frequencies / factors.astype(np.float64)
        if self.yarn is None:
            return frequencies / self.factor
        ramp = self._extrapolated_share(self.yarn) * self.yarn.extrapolation
        return frequencies / self.factor * (1 - ramp) + frequencies * ramp

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with."""
        stretched = self.yarn is not None and self.yarn.extrapolation and self.factor > 1
        return self.attention * (1 + 0.1 * math.log(self.factor) if stretched else 1.0)

    def _extrapolated_share(self, yarn: Yarn) -> npt.NDArray[np.float64]:
        def channel_of(rotations: float) -> float:
            wavelength = yarn.original_context / (rotations * 2 * math.pi)
            return self.dim * math.log(wavelength) / (2 * math.log(self.theta))

        low = max(0.0, math.floor(channel_of(yarn.beta_fast)))
        high = min(self.dim - 1.0, math.ceil(channel_of(yarn.beta_slow)))
        ramp = (np.arange(self.dim // 2) - low) / max(0.001, high - low)
        share: npt.NDArray[np.float64] = 1 - np.clip(ramp, 0, 1)
        return share
