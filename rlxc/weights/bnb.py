"""Scales in 8 bits, as bitsandbytes stores them: the double quantisation of QLoRA (Dettmers et al. 2023, section 3).

The absmax of 256 blocks of weights share one f32. Of each, less the mean of all, 8 bits are kept: an index into the
dynamic map, whose 256 values lie densest near zero (Dettmers 2015, "8-bit approximations for parallelism in deep
learning").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rlxc.errors import WeightError

F32 = npt.NDArray[np.float32]

BLOCK = 256
"""How many absmax share one f32."""

_TINY = np.float32(1e-38)  # bitsandbytes' stand-in for the absmax of zeros: its inverse is finite


@dataclass(frozen=True)
class NestedAbsmax:
    """Absmax in 8 bits: ``map[codes] * absmax + offset``, where 256 codes share an ``absmax``.

    ``codes`` is uint8 ``[n]``, ``absmax`` f32 ``[ceil(n / 256)]``, and ``map`` f32 ``[256]``.
    """

    codes: npt.NDArray[np.uint8]
    absmax: F32
    map: F32
    offset: float

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of what they share; the map is the same for all weights and does not count."""
        return self.codes.nbytes + self.absmax.nbytes + 4

    def values(self) -> F32:
        """The absmax, f32 ``[n]``."""
        return dequantize_absmax(self.codes, self.absmax, self.map, self.offset)


def quantize_absmax(absmax: F32) -> NestedAbsmax:
    """Absmax f32 ``[n]`` in 8 bits each."""
    offset = absmax.mean(dtype=np.float64).astype(np.float32) if absmax.size else np.float32(0)
    blocks = np.zeros((-(-absmax.size // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: absmax.size] = absmax - offset
    scaled, nested = over_absmax(blocks)
    codes = nearest(dynamic_map(), scaled.reshape(-1)[: absmax.size])
    return NestedAbsmax(codes, nested, dynamic_map(), float(offset))


def dequantize_absmax(
    codes: npt.NDArray[np.uint8],
    nested_absmax: F32,
    nested_quant_map: F32,
    offset: float,
    blocksize: int = BLOCK,
) -> F32:
    """The absmax f32 ``[n]`` of nested codes, in f32 as bitsandbytes computes it.

    Args:
        codes: uint8 ``[n]``, bitsandbytes' ``absmax``.
        nested_absmax: f32 ``[ceil(n / blocksize)]``.
        nested_quant_map: f32 ``[256]``, the value of each code.
        offset: the mean that was taken from every absmax.
        blocksize: how many codes share a nested absmax.

    Raises:
        WeightError: arrays of other types or lengths.
    """
    if codes.dtype != np.uint8 or codes.ndim != 1:
        raise WeightError(
            f"nested absmax are {codes.dtype} of shape {list(codes.shape)}", remedy="they must be uint8 [n]"
        )
    if nested_quant_map.shape != (256,) or nested_quant_map.dtype != np.float32:
        raise WeightError(
            f"the map of nested absmax is {nested_quant_map.dtype} of shape {list(nested_quant_map.shape)}",
            remedy="it must be float32 [256]",
        )
    if blocksize < 1:
        raise WeightError(
            f"{blocksize} nested absmax share a scale", remedy="the block size must be positive"
        )
    blocks = -(-codes.size // blocksize)
    if nested_absmax.shape != (blocks,) or nested_absmax.dtype != np.float32:
        raise WeightError(
            f"the scales of {codes.size} nested absmax are {nested_absmax.dtype} of shape "
            f"{list(nested_absmax.shape)}",
            remedy=f"they must be float32 [{blocks}], one for {blocksize} codes",
        )
    with np.errstate(all="ignore"):
        values: F32 = nested_quant_map[codes]
        values *= np.repeat(nested_absmax, blocksize)[: codes.size]
        values += np.float32(offset)
    return values


def over_absmax(blocks: F32) -> tuple[F32, F32]:
    """Blocks f32 ``[n, size]`` over their absmax, -1 to 1, and the absmax f32 ``[n]``; rounded as in bitsandbytes."""
    absmax = np.abs(blocks).max(axis=1)
    return np.clip(blocks * (1 / np.maximum(absmax, _TINY))[:, None], -1, 1), absmax


def nearest(codebook: F32, values: F32) -> npt.NDArray[np.uint8]:
    """The code of the nearest value of a codebook for each of ``values``; the lower value's of two as near.

    Of two equal values of the codebook the first has its code used.
    """
    ascending, codes = np.unique(codebook, return_index=True)
    return codes.astype(np.uint8)[np.searchsorted((ascending[:-1] + ascending[1:]) / 2, values)]


@lru_cache(maxsize=1)
def dynamic_map() -> F32:
    """The signed dynamic map, f32 ``[256]``, ascending from -0.993 to 1.

    A decade below 1 has 64 values of each sign, evenly spaced, the decade below that 32, and so on to one value
    in the seventh; then there are 0 and 1.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for decade in range(7):
        edges = _linspace(0.1, 1, 2**decade + 1)
        centres = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [centres, -centres]
    codebook = np.sort(np.concatenate(values))
    codebook.flags.writeable = False
    return codebook


def _linspace(start: float, stop: float, count: int) -> F32:
    """Evenly spaced f32, reckoned from both ends to the middle with a step that is f32.

    That is how torch does it, so that the map is that of bitsandbytes to the last bit.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    ascending, descending = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, ascending, descending).astype(np.float32)
