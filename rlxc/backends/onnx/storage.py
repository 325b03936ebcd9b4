"""How ONNX Runtime stores a packed weight: the very same codes, in the layout that ``MatMulNBits`` multiplies fast.

Every block format decodes to small integers times an f32 scale per sub-block, less an f32 minimum per sub-block.
The integers become unsigned codes of 4 or 8 bits with one zero point for the whole weight (a float zero point, or
one per sub-block that holds the minimum, would fall off the fast path); the minimums become a small second matrix
over the sub-blocks' sums of x. Codes of a format with minimums start at 0, but the product takes their middle, the
``centre``, for zero, and the second matrix gives it back:

    y = sum_b scale_b * (codes_b - centre) . x_b  +  sum_b (centre * scale_b - min_b) * sum(x_b)

The error of rounding x to int8 grows with what multiplies x: about zero, that is the weight's own size, and not the
several times larger distance from its minimum.

Codes of NF4 and FP4 are no integers but indices into a codebook: ``MatMulBnb4`` multiplies them, always in f32. It
decodes the whole matrix in each call, and so it is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rlxc.backends.recipes import Bytes, Losses, ReadBytes, packed_rows
from rlxc.dtypes import DType
from rlxc.ir import Concat, Weight
from rlxc.weights.formats import FORMATS, BlockFormat, Planes

CHUNK_BYTES = 4 << 20
"""Unpacking works on this many packed bytes at a time, so that memory stays flat whatever the tensor's size."""


@dataclass(frozen=True)
class Storage:
    """The layout of codes: ``bits`` each, ``block`` of them a scale, decoded as ``code - zero_point``."""

    bits: int
    block: int
    zero_point: int
    has_mins: bool

    @staticmethod
    def of(dtype: DType) -> Storage:
        """The narrowest layout that holds every code of a packed format."""
        fmt = FORMATS[dtype]
        bits = 4 if fmt.code_max - fmt.code_min < 16 else 8
        centre = (fmt.code_min + fmt.code_max + 1) // 2
        return Storage(bits, _scale_block(fmt), (1 << (bits - 1)) - centre, fmt.has_mins)

    @property
    def name(self) -> str:
        """A name by which equal layouts are recognised."""
        return f"u{self.bits}x{self.block}-{self.zero_point}{'-min' if self.has_mins else ''}"

    @property
    def centre(self) -> int:
        """The code that ``MatMulNBits`` takes for zero when it is given no zero points; 0 without minimums."""
        return (1 << (self.bits - 1)) - self.zero_point

    def pack(self, codes: npt.NDArray[np.int8]) -> Bytes:
        """Codes ``int8 [rows, in]`` as bytes ``[rows, in * bits / 8]``, the first of a pair in the low bits."""
        unsigned = codes.view(np.uint8) + np.uint8(self.zero_point)
        if self.bits == 8:
            return unsigned
        packed: Bytes = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
        return packed

    def zero_points(self, rows: int, blocks: int) -> Bytes:
        """The zero point of every block, packed like codes: ``[rows, ceil(blocks * bits / 8)]``."""
        value = self.zero_point if self.bits == 8 else self.zero_point * 0x11
        return np.full((rows, -(-blocks * self.bits // 8)), value, np.uint8)


def storage_name(dtype: DType) -> str:
    """A name by which formats that are stored alike are recognised."""
    return str(dtype) if FORMATS[dtype].codebook else Storage.of(dtype).name


def pack_indices(codes: npt.NDArray[np.int8]) -> Bytes:
    """Indices ``int8 [rows, in]`` for ``MatMulBnb4``: ``[rows, in / 2]``, the first of a pair in the high bits."""
    indices = codes.view(np.uint8)
    packed: Bytes = (indices[:, 0::2] << np.uint8(4)) | indices[:, 1::2]
    return packed


def unpacked_rows(weight: Weight, read: ReadBytes, losses: Losses | None) -> Iterator[Planes]:
    """A packed weight's planes, a few rows at a time, following its recipe. Sub-blocks do not repeat a shared scale."""
    if isinstance(weight.recipe, Concat):
        # Part by part, as their formats may differ where their storage does not.
        for part in weight.recipe.parts:
            yield from unpacked_rows(part, read, losses)
        return
    fmt = FORMATS[weight.type.dtype]
    every = _scale_block(fmt) // fmt.sub_block
    for rows in packed_rows(weight, read, losses):
        step = max(1, CHUNK_BYTES // rows.shape[1])
        for start in range(0, len(rows), step):
            planes = fmt.unpack(rows[start : start + step])
            yield planes if every == 1 else replace(planes, scales=planes.scales[:, ::every].copy())


def _scale_block(fmt: BlockFormat) -> int:
    """How many weights have a scale of their own: a sub-block, or the whole block where its sub-blocks share one."""
    assert fmt.scale is not None
    return fmt.sub_block if fmt.scale.factors else fmt.block_size
