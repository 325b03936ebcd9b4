"""Random weights of every format that GGUF has, packed; and decoded by the ``gguf`` package alone.

Formats that ``gguf`` encodes get normal weights. The others get random codes, with scales of such a size that the
weights have the wanted standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Ggml = gguf.GGMLQuantizationType
Blocks = npt.NDArray[np.uint8]
SetScales = Callable[[Blocks, npt.NDArray[np.float64]], None]
"""Sets the scale of each block ``uint8 [n, bytes]`` to about ``f64 [n, 1]``."""

FORMATS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0"),
)
"""All formats of weights that GGUF files have."""


def random_matrix(
    kind: Ggml, shape: tuple[int, ...], deviation: float, rng: np.random.RandomState
) -> npt.NDArray[Any]:
    """Weights ``[..., out, in]`` of this standard deviation: ``uint8 [..., out, row_bytes]``, or f32."""
    if kind not in _SCALES:
        values = (deviation * rng.standard_normal(shape)).astype(np.float32)
        return values if kind is Ggml.F32 else gguf.quantize(values, kind)
    set_scales = _SCALES[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.randint(0, 256, (prod(shape) // block_size, block_bytes)).astype(np.uint8)
    size = rng.uniform(0.7, 1.3, (len(blocks), 1))
    unit = 2**-6 if kind is Ggml.NVFP4 else 1e-3  # whose scales cannot be much less
    set_scales(blocks, unit * size)
    set_scales(blocks, unit * deviation / float(decode(kind, blocks).std(dtype=np.float64)) * size)
    return blocks.reshape(*shape[:-1], -1)


def decode(kind: Ggml, packed: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The weights of packed rows."""
    if kind is Ggml.Q1_0:  # which `gguf` knows by its size only: an f16 scale, and a sign for each weight
        blocks = packed.reshape(-1, 18)
        signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") * np.float32(2) - np.float32(1)
        weights = blocks[:, :2].copy().view("<f2").astype(np.float32) * signs
        return weights.reshape(*packed.shape[:-1], -1)
    return gguf.dequantize(packed, kind).astype(np.float32)


def _half(scale_at: int, min_at: int | None = None, mean_code: float = 0) -> SetScales:
    """An f16 scale at this offset, and perhaps a minimum, which shall take the mean code away."""

    def put(blocks: Blocks, scales: npt.NDArray[np.float64]) -> None:
        blocks[:, scale_at : scale_at + 2] = scales.astype("<f2").view(np.uint8)
        if min_at is not None:
            blocks[:, min_at : min_at + 2] = (scales * mean_code).astype("<f2").view(np.uint8)

    return put


def _split_half(blocks: Blocks, scales: npt.NDArray[np.float64]) -> None:
    """IQ1_M: the f16 scale's four hexadecimal digits are the highest ones of four 16-bit words."""
    bits = scales[:, 0].astype("<f2").view("<u2")
    for digit in range(4):
        high = blocks[:, 49 + 2 * digit]
        high &= 0x0F
        high |= (bits >> (4 * digit) << 4 & 0xF0).astype(np.uint8)


def _e8m0(blocks: Blocks, scales: npt.NDArray[np.float64]) -> None:
    """MXFP4: a power of two, of which a code's unit is the half."""
    blocks[:, :1] = np.round(np.log2(scales)) + 1 + 127


def _ue4m3(blocks: Blocks, scales: npt.NDArray[np.float64]) -> None:
    """NVFP4: four scales of the same exponent, with any three bits of mantissa."""
    exponent = np.floor(np.log2(scales)) + 1 + 7
    blocks[:, :4] = 8 * exponent.clip(0, 14).astype(np.uint8) + blocks[:, :4] % 8


_SCALES: dict[Ggml, SetScales] = {
    Ggml.Q2_K: _half(80, 82, 1.5),
    Ggml.Q3_K: _half(108),
    Ggml.Q4_K: _half(0, 2, 7.5),
    Ggml.Q5_K: _half(0, 2, 15.5),
    Ggml.Q6_K: _half(208),
    **{
        kind: _half(0)
        for kind in (
            *(Ggml.IQ4_NL, Ggml.IQ4_XS, Ggml.IQ2_XXS, Ggml.IQ2_XS, Ggml.IQ2_S, Ggml.IQ3_XXS, Ggml.IQ3_S),
            *(Ggml.IQ1_S, Ggml.Q1_0),
        )
    },
    Ggml.IQ1_M: _split_half,
    Ggml.MXFP4: _e8m0,
    Ggml.NVFP4: _ue4m3,
}
