"""How ONNX Runtime stores a packed weight: the very same integers, in the layout that ``MatMulNBits`` multiplies fast.

Every block format but two decodes to small integers (its codes, or the values of its codebook) times an f32 scale per
sub-block, less an f32 minimum per sub-block. The integers become unsigned numbers of 4 or 8 bits with one zero point
for the whole weight (a float zero point, or one per sub-block that holds the minimum, would fall off the fast path);
the minimums become a small second matrix over the sub-blocks' sums of x. Codes of a format with minimums start at 0,
but the product takes their middle, the ``centre``, for zero, and the second matrix gives it back:

    y = sum_b scale_b * (codes_b - centre) . x_b  +  sum_b (centre * scale_b - min_b) * sum(x_b)

The error of rounding x to int8 grows with what multiplies x: about zero, that is the weight's own size, and not the
several times larger distance from its minimum.

Where all values are odd and at most 16 of them (IQ3_S, IQ1), the number n of 4 bits stands for 2 n + 1: the stored
scale is twice the format's, and the centre is a half. Other codebooks take 8 bits. A chosen layout may have 2 bits, for
what is ternary or binary, and blocks that are parts of what shares a scale: see :mod:`rlxc.backends.onnx.layout_costs`.

NF4 and FP4 have indices into a codebook of fractions: ``MatMulBnb4`` multiplies them, always in f32. It decodes the
whole matrix in each call, and so it is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import numpy.typing as npt

from rlxc.backends.recipes import Bytes, Losses, ReadBytes, packed_rows
from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import Concat, Weight, WeightLayout
from rlxc.weights.formats import FORMATS, BlockFormat, Planes

CHUNK_BYTES = 1 << 20
"""Unpacking works on this many packed bytes at a time, so that memory stays flat whatever the tensor's size."""


@dataclass(frozen=True)
class Storage:
    """The layout of numbers: ``bits`` each, ``block`` of them a scale.

    A number n stands for the integer ``step * (n - zero_point) + rest``, and the stored scale is ``step`` times the
    format's.
    """

    bits: int
    block: int
    zero_point: int
    step: int
    rest: int
    has_mins: bool

    @staticmethod
    def of(dtype: DType, chosen: WeightLayout | None = None) -> Storage:
        """A layout that holds every integer of a packed format: the narrowest of 4 or 8 bits, or the one chosen.

        Raises:
            GraphError: the chosen one cannot hold them.
        """
        fmt = FORMATS[dtype]
        integers = fmt.integers or tuple(range(fmt.code_min, fmt.code_max + 1))
        low, high = min(integers), max(integers)
        step = 1 if high - low < 16 else gcd(*(integer - low for integer in integers))
        if high - low >= 16 * step:
            step = 1
        bits, block = 4 if high - low < 16 * step else 8, scale_block(fmt)
        if chosen is not None:
            if high - low >= step << chosen.bits or block % chosen.block or chosen.tile != 1:
                raise GraphError(f"the onnx backend cannot store {dtype} in {chosen}")
            bits, block = chosen.bits, chosen.block
        if high - low < 1 << bits:
            step = 1
        rest, middle = low % step, 1 << (bits - 1)
        low, high = (low - rest) // step, (high - rest) // step
        # Without minimums, the middle stands for zero: then there is nothing to give back.
        centre = (low + high + 1) // 2 if fmt.has_mins or low < -middle or high >= middle else 0
        return Storage(bits, block, middle - centre, step, rest, fmt.has_mins)

    @property
    def name(self) -> str:
        """A name by which equal layouts are recognised."""
        odd = f"*{self.step}+{self.rest}" if self.step > 1 else ""
        return f"u{self.bits}x{self.block}-{self.zero_point}{odd}{'-min' if self.has_mins else ''}"

    @property
    def default_zero_point(self) -> int:
        """What ONNX Runtime takes for the zero point when it is given none."""
        return 1 << (self.bits - 1)

    @property
    def remainder(self) -> float:
        """What :meth:`zero_points` leave out of every weight, in stored scales."""
        return self.rest / self.step

    @property
    def centre(self) -> float:
        """What ``MatMulNBits`` leaves out of every weight, in stored scales, when it is given no zero points."""
        return self.default_zero_point - self.zero_point + self.remainder

    def pack(self, integers: npt.NDArray[np.int8]) -> Bytes:
        """Integers ``int8 [rows, in]`` as bytes ``[rows, in * bits / 8]``, the first ones in the lowest bits."""
        if self.step > 1:
            integers = (integers - np.int8(self.rest)) // np.int8(self.step)
        packed = integers.view(np.uint8)
        if self.zero_point:
            packed = packed + np.uint8(self.zero_point)
        width = self.bits
        while width < 8:  # two become one
            pairs = packed.view("<u2")
            packed = (pairs | pairs >> np.uint16(8 - width)).astype(np.uint8)
            width *= 2
        return packed

    def repeated(self, scales: npt.NDArray[np.float32], columns: int) -> npt.NDArray[np.float32]:
        """Scales, or minimums, of rows as often as there are blocks: ``[rows, in / block]``."""
        return np.repeat(scales, columns // self.block // scales.shape[1], axis=1)

    def zero_points(self, rows: int, blocks: int) -> Bytes:
        """The zero point of every block, packed like numbers: ``[rows, ceil(blocks * bits / 8)]``."""
        value = sum(self.zero_point << place for place in range(0, 8, self.bits))
        return np.full((rows, -(-blocks * self.bits // 8)), value, np.uint8)


def storage_name(dtype: DType) -> str:
    """A name by which formats that are stored alike are recognised."""
    return Storage.of(dtype).name if has_integers(dtype) else str(dtype)


def has_integers(dtype: DType) -> bool:
    """Whether a packed format decodes to integers times scales, and not to a codebook of fractions."""
    fmt = FORMATS[dtype]
    return fmt.codebook is None or fmt.integers is not None


def pack_indices(codes: npt.NDArray[np.int8]) -> Bytes:
    """Indices ``int8 [rows, in]`` for ``MatMulBnb4``: ``[rows, in / 2]``, the first of a pair in the high bits."""
    indices = codes.view(np.uint8)
    packed: Bytes = (indices[:, 0::2] << np.uint8(4)) | indices[:, 1::2]
    return packed


def unpacked_rows(weight: Weight, read: ReadBytes, losses: Losses | None) -> Iterator[Planes]:
    """A packed weight's planes, a few rows at a time, following its recipe.

    Sub-blocks do not repeat a shared scale, and codes are the integers that they stand for, where there are any.
    """
    if isinstance(weight.recipe, Concat):
        # Part by part, as their formats may differ where their storage does not.
        for part in weight.recipe.parts:
            yield from unpacked_rows(part, read, losses)
        return
    fmt = FORMATS[weight.type.dtype]
    every = scale_block(fmt) // fmt.sub_block
    integers = None if fmt.integers is None else np.array(fmt.integers, np.int8)
    for rows in packed_rows(weight, read, losses):
        step = max(1, CHUNK_BYTES // rows.shape[1])
        for start in range(0, len(rows), step):
            planes = fmt.unpack(rows[start : start + step])
            if every > 1:
                planes = replace(planes, scales=planes.scales[:, ::every].copy())
            yield planes if integers is None else replace(planes, codes=integers[planes.codes])


def scale_block(fmt: BlockFormat) -> int:
    """How many weights have a scale of their own: a sub-block, or more where its sub-blocks share one."""
    assert fmt.scale is not None
    return fmt.sub_block if fmt.scale.factors else fmt.block_size // fmt.scale.bases
