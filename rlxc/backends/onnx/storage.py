"""How ONNX Runtime stores a packed weight: the very same codes, in the layout that ``MatMulNBits`` multiplies fast.

Every block format decodes to small integers times an f32 scale per sub-block, less an f32 minimum per sub-block.
The integers become unsigned codes of 4 or 8 bits with one zero point for the whole weight (a float zero point, or
one per sub-block that holds the minimum, would fall off the fast path); the minimums become a small second matrix
over the sub-blocks' sums of x. Codes of a format with minimums start at 0, but the product takes their middle, the
``centre``, for zero, and the second matrix gives it back:

    y = sum_b scale_b * (codes_b - centre) . x_b  +  sum_b (centre * scale_b - min_b) * sum(x_b)

The error of rounding x to int8 grows with what multiplies x: about zero, that is the weight's own size, and not the
several times larger distance from its minimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.errors import UnsupportedError
from rlxc.ir import Concat, Source, Weight
from rlxc.weights.formats import FORMATS, Planes

Bytes = npt.NDArray[np.uint8]
ReadBytes = Callable[[str], Bytes]
"""Gives a tensor of the model file, still packed, as bytes ``[nbytes]``, by its name."""

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
        return Storage(bits, fmt.sub_block, (1 << (bits - 1)) - centre, fmt.has_mins)

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


def unpacked_rows(weight: Weight, read: ReadBytes) -> Iterator[Planes]:
    """A packed weight's planes, a few rows at a time, following its recipe."""
    match weight.recipe:
        case Source(tensor):
            rows = rows_of(weight, read(tensor))
            step = max(1, CHUNK_BYTES // rows.shape[1])
            for start in range(0, len(rows), step):
                yield FORMATS[weight.type.dtype].unpack(rows[start : start + step])
        case Concat(parts):
            for part in parts:
                yield from unpacked_rows(part, read)
        case _:
            raise UnsupportedError(f"recipe {weight.recipe} of @{weight.name} cannot be stored")


def float_rows(weight: Weight, read: ReadBytes) -> Iterator[Bytes]:
    """The bytes of a weight in a float format, following its recipe."""
    match weight.recipe:
        case Source(tensor):
            yield read(tensor)
        case Concat(parts):
            for part in parts:
                yield from float_rows(part, read)
        case _:
            raise UnsupportedError(f"recipe {weight.recipe} of @{weight.name} cannot be stored")


def rows_of(weight: Weight, data: Bytes) -> Bytes:
    """A packed tensor's bytes as ``[rows, row_bytes]``."""
    out, in_ = weight.type.shape
    assert isinstance(out, int) and isinstance(in_, int)
    return data.reshape(out, FORMATS[weight.type.dtype].row_bytes(in_))
