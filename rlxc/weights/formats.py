"""The block formats of GGUF and of QLoRA, as one table that says where every bit of a block lies.

A block holds ``block_size`` weights in ``block_bytes`` bytes: small integer codes, and per sub-block an f32
scale and, in some formats, an f32 minimum, with ``weight = scale * code - minimum``.  A scale (or minimum) is
an f16 of the block, in the K-quants times a small integer of the sub-block.  Both products are exact in f32,
so decoding agrees with ggml bit for bit.  Layouts: ggml's ``ggml-common.h``.

The formats of QLoRA have blocks of 64 weights and an f32 scale for each.  Codes of NF4 and FP4 are indices into
a codebook, ``weight = scale * codebook[code]`` in f32, which is what bitsandbytes computes, and its bytes of codes
are ours.  INT4 has integers, as the K-quants do.

To add a format, add a row to the table: the readers below are driven by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Ggml

from rlxc.dtypes import DType
from rlxc.errors import WeightError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]

_F16 = np.dtype("<f2")
_F32 = np.dtype("<f4")


@dataclass(frozen=True)
class Bits:
    """A field of unsigned integers of ``width`` bits in the bytes ``[offset, offset + nbytes)`` of a block.

    The bytes form runs of ``run`` bytes.  A run gives one integer per byte at its first shift, then one per
    byte at its next shift, and so on: integer ``(r, s, j)`` is the low ``width`` bits of
    ``byte[offset + r * run + j] >> shifts[s]``.
    """

    offset: int
    nbytes: int
    width: int
    run: int
    shifts: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many integers the field holds."""
        return self.nbytes * len(self.shifts)

    def read(self, blocks: Bytes) -> Bytes:
        """The field's integers, ``[blocks, count]``, from ``[blocks, block_bytes]``."""
        # Whole words at once: bits that a shift brings in from the neighbouring byte are masked away.
        word: Any = next(w for w in (np.uint64, np.uint32, np.uint8) if self.run % w().nbytes == 0)
        mask = word(int.from_bytes(bytes([(1 << self.width) - 1]) * word().nbytes, "little"))
        raw = blocks[:, self.offset : self.offset + self.nbytes].copy()
        if self.width == 8:
            return raw
        words = raw.view(word).reshape(len(blocks), self.nbytes // self.run, self.run // word().nbytes)
        out = np.empty((*words.shape[:2], len(self.shifts), words.shape[2]), word)
        for s, shift in enumerate(self.shifts):
            out[:, :, s] = words >> word(shift) & mask
        return out.view(np.uint8).reshape(len(blocks), self.count)

    def write(self, integers: Bytes, blocks: Bytes) -> None:
        """Sets the field, all zeros so far, to the low bits of ``[blocks, count]``."""
        raw = blocks[:, self.offset : self.offset + self.nbytes].reshape(len(blocks), -1, self.run)
        by_shift = integers.reshape(len(blocks), -1, len(self.shifts), self.run)
        mask = np.uint8((1 << self.width) - 1)
        for s, shift in enumerate(self.shifts):
            raw |= (by_shift[:, :, s] & mask) << np.uint8(shift)


@dataclass(frozen=True)
class Integers:
    """Integers: ``parts`` one after another, each of fields stacked from the lowest bits up, plus bias.

    Eight bits wide they are two's complement; narrower ones are unsigned before the bias.
    """

    parts: tuple[tuple[Bits, ...], ...]
    bias: int = 0

    @property
    def count(self) -> int:
        """How many integers a block holds."""
        return sum(fields[0].count for fields in self.parts)

    @property
    def low(self) -> int:
        """The least value an integer can have."""
        return self.bias - (128 if self._width == 8 else 0)

    @property
    def high(self) -> int:
        """The greatest value an integer can have."""
        return self.low + (1 << self._width) - 1

    @property
    def _width(self) -> int:
        return sum(field.width for field in self.parts[0])

    def read(self, blocks: Bytes) -> npt.NDArray[np.int8]:
        """The integers, ``[blocks, count]``, from ``[blocks, block_bytes]``."""
        parts = [_stack(fields, blocks) for fields in self.parts]
        out = (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)).view(np.int8)
        if self.bias:
            out += np.int8(self.bias)
        return out

    def write(self, integers: npt.NDArray[np.int8], blocks: Bytes) -> None:
        """Sets the fields, all zeros so far, to ``[blocks, count]``."""
        unsigned = (integers - np.int8(self.bias)).view(np.uint8)
        start = 0
        for fields in self.parts:
            part = unsigned[:, start : start + fields[0].count]
            for field in fields:
                field.write(part, blocks)
                part = part >> np.uint8(field.width % 8)
            start += fields[0].count


def _stack(fields: tuple[Bits, ...], blocks: Bytes) -> Bytes:
    out = fields[0].read(blocks)
    width = fields[0].width
    for field in fields[1:]:
        high = field.read(blocks)
        high <<= np.uint8(width)
        out |= high
        width += field.width
    return out


@dataclass(frozen=True)
class Scale:
    """The float at ``offset`` times ``sign``, and times an integer per sub-block where a block has several."""

    offset: int
    factors: Integers | None = None
    sign: int = 1
    base: np.dtype[Any] = _F16

    def read(self, blocks: Bytes) -> Scales:
        """The scales of ``[blocks, block_bytes]``."""
        raw = blocks[:, self.offset : self.offset + self.base.itemsize].copy()
        if self.sign < 0:
            raw[:, -1] ^= np.uint8(0x80)
        return Scales(raw.view(self.base), self.factors.read(blocks) if self.factors else None)

    def write(self, scales: Scales, blocks: Bytes) -> None:
        """Sets the bytes of the scales, all zeros so far, from those of rows."""
        raw = scales.base.astype(self.base).reshape(-1, 1).view(np.uint8)
        if self.sign < 0:
            raw[:, -1] ^= np.uint8(0x80)
        blocks[:, self.offset : self.offset + self.base.itemsize] = raw
        if self.factors is not None and scales.factors is not None:
            self.factors.write(scales.factors.reshape(len(blocks), -1), blocks)


@dataclass(frozen=True)
class Scales:
    """Scales (or minimums) as stored.

    ``base`` is f16 (f32 in the formats of QLoRA) ``[rows, blocks]``, ``factors`` int8 ``[rows, sub_blocks]``.
    """

    base: Floats
    factors: npt.NDArray[np.int8] | None

    def values(self, per_block: int) -> npt.NDArray[np.float32]:
        """The f32 scales, ``[rows, blocks * per_block]``, exact, where a block has ``per_block`` sub-blocks."""
        values = np.repeat(self.base.astype(np.float32), per_block, axis=1)
        if self.factors is not None:
            values *= self.factors
        return values

    def by_rows(self, rows: int, blocks: int) -> Scales:
        """The scales of ``rows * blocks`` single blocks as those of rows."""
        factors = self.factors
        if factors is not None:
            factors = factors.reshape(rows, blocks * factors.shape[1])
        return Scales(self.base.reshape(rows, blocks), factors)


@dataclass(frozen=True)
class Fields:
    """The numbers of packed rows as they are stored: int8 codes ``[rows, in]``, scales, minimums if there are any."""

    codes: npt.NDArray[np.int8]
    scale: Scales
    minimum: Scales | None


@dataclass(frozen=True)
class Planes:
    """Unpacked rows: ``weight = scales * codes - mins``, scales and minimums each covering one sub-block.

    In a format with a codebook, ``codes`` are its indices: ``weight = scales * codebook[codes]``.
    ``codes`` is int8 ``[rows, in]``; ``scales`` and ``mins`` are f32 ``[rows, in // sub_block]``.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    mins: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class BlockFormat:
    """How one element type lies in bytes; without ``codes`` it is a float format of one element a block.

    ``codebook`` has the value that a code stands for, where that is not the code itself.
    """

    dtype: DType
    block_size: int
    block_bytes: int
    sub_block: int = 1
    codes: Integers | None = None
    scale: Scale | None = None
    minimum: Scale | None = None
    codebook: tuple[float, ...] | None = None

    @property
    def ggml_type(self) -> Ggml:
        """The number that GGUF files give the type.

        Raises:
            WeightError: GGUF files have no such type; those they have are in :data:`GGML_FORMATS`.
        """
        kind = Ggml.__members__.get(self.dtype.name)
        if kind is None:
            raise WeightError(
                f"GGUF has no type {self.dtype}",
                remedy="choose another format, such as q4_0, for a GGUF file",
            )
        return kind

    @property
    def is_float(self) -> bool:
        """True for F32, F16 and BF16, which have no codes and only decode."""
        return self.codes is None

    @property
    def has_mins(self) -> bool:
        """True if sub-blocks have a minimum."""
        return self.minimum is not None

    @property
    def code_min(self) -> int:
        """The least code; 0 in a float format."""
        return self.codes.low if self.codes else 0

    @property
    def code_max(self) -> int:
        """The greatest code; 0 in a float format."""
        return self.codes.high if self.codes else 0

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row of ``in_features`` weights.

        Raises:
            WeightError: the row is not a whole number of blocks.
        """
        blocks, rest = divmod(in_features, self.block_size)
        if rest or blocks < 1:
            raise WeightError(
                f"a row of {in_features} weights is not whole {self.dtype} blocks of {self.block_size}",
                remedy="choose a format whose block size divides the row",
            )
        return blocks * self.block_bytes

    def fields(self, data: Bytes) -> Fields:
        """The stored numbers of packed rows, ``uint8 [rows, row_bytes]``, in fresh memory.

        Raises:
            WeightError: the bytes are not whole blocks, or this is a float format, which has no codes.
        """
        if self.codes is None or self.scale is None:
            raise WeightError(f"{self.dtype} weights have no codes", remedy="decode them instead")
        blocks = self._blocks(data)
        shape = (len(data), data.shape[1] // self.block_bytes)
        return Fields(
            codes=self.codes.read(blocks).reshape(shape[0], shape[1] * self.block_size),
            scale=self.scale.read(blocks).by_rows(*shape),
            minimum=self.minimum.read(blocks).by_rows(*shape) if self.minimum else None,
        )

    def pack(self, fields: Fields) -> Bytes:
        """Packed rows, ``uint8 [rows, row_bytes]``, that hold these numbers: what :meth:`fields` reads.

        Raises:
            WeightError: the codes are not whole blocks, or this is a float format, which has no codes.
        """
        if self.codes is None or self.scale is None:
            raise WeightError(f"{self.dtype} weights have no codes", remedy="encode values instead")
        rows, columns = fields.codes.shape
        row_bytes = self.row_bytes(columns)
        blocks = np.zeros((rows * columns // self.block_size, self.block_bytes), np.uint8)
        self.codes.write(fields.codes.reshape(len(blocks), self.block_size), blocks)
        self.scale.write(fields.scale, blocks)
        if self.minimum is not None and fields.minimum is not None:
            self.minimum.write(fields.minimum, blocks)
        return blocks.reshape(rows, row_bytes)

    def unpack(self, data: Bytes) -> Planes:
        """Codes, scales and minimums of packed rows, ``uint8 [rows, row_bytes]``, in fresh memory.

        Raises:
            WeightError: as :meth:`fields`.
        """
        fields = self.fields(data)
        per_block = self.block_size // self.sub_block
        # An inf times a code of zero is NaN, and so it is in ggml: no reason to warn.
        with np.errstate(all="ignore"):
            return Planes(
                codes=fields.codes,
                scales=fields.scale.values(per_block),
                mins=fields.minimum.values(per_block) if fields.minimum else None,
            )

    def decode(self, data: Bytes, in_features: int) -> npt.NDArray[np.float32]:
        """The weights ``f32 [rows, in_features]`` of ``uint8 [rows, row_bytes]``, in fresh memory.

        Raises:
            WeightError: ``data`` does not have ``row_bytes(in_features)`` bytes a row.
        """
        if data.ndim != 2 or data.shape[1] != self.row_bytes(in_features):
            raise WeightError(
                f"rows of {in_features} {self.dtype} weights take {self.row_bytes(in_features)} bytes, "
                f"but the data has shape {data.shape}",
                remedy="pass uint8 [rows, row_bytes]",
            )
        if self.is_float:
            return _decode_float(self.dtype, self._blocks(data)).reshape(len(data), in_features)
        planes = self.unpack(data)
        out = self._code_values(planes.codes)
        by_sub_block = out.reshape(*planes.scales.shape, self.sub_block)
        with np.errstate(all="ignore"):
            by_sub_block *= planes.scales[..., None]
            if planes.mins is not None:
                by_sub_block -= planes.mins[..., None]
        return out

    def _code_values(self, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.float32]:
        if self.codebook is None:
            return codes.astype(np.float32)
        return np.array(self.codebook, np.float32)[codes]

    def _blocks(self, data: Bytes) -> Bytes:
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % self.block_bytes:
            raise WeightError(
                f"{self.dtype} data of dtype {data.dtype} and shape {data.shape} "
                f"is not whole blocks of {self.block_bytes} bytes",
                remedy="pass uint8 [rows, row_bytes]",
            )
        return data.reshape(data.size // self.block_bytes, self.block_bytes)


def _decode_float(dtype: DType, blocks: Bytes) -> npt.NDArray[np.float32]:
    blocks = np.ascontiguousarray(blocks)
    if dtype is DType.BF16:
        return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(all="ignore"):  # a signalling NaN
        return blocks.view("<f2" if dtype is DType.F16 else "<f4").astype(np.float32)


def _bits(width: int, offset: int, nbytes: int, run: int) -> Bits:
    """A field that fills its bytes."""
    return Bits(offset, nbytes, width, run, tuple(range(0, 8, width)))


def _ints(*fields: Bits, bias: int = 0) -> Integers:
    """Integers of one part."""
    return Integers((fields,), bias)


# Q2_K: sixteen scales in the low nibbles of the bytes at 0, sixteen minimums in the high ones.
_Q2_SCALES = _ints(Bits(0, 16, 4, 16, (0,)))
_Q2_MINS = _ints(Bits(0, 16, 4, 16, (4,)))
# Q3_K: sixteen 6-bit scales, their low nibbles in eight bytes and their high two bits in four.
_Q3_SCALES = _ints(_bits(4, 96, 8, 8), _bits(2, 104, 4, 4), bias=-32)
# Q4_K, Q5_K: twelve bytes at 4 hold eight 6-bit scales and eight 6-bit minimums, the first four of each whole
# in the low bits of a byte, the others as a nibble and the two bits left above the first four.
_K_SCALES = Integers(((Bits(4, 4, 6, 4, (0,)),), (Bits(12, 4, 4, 4, (0,)), Bits(4, 4, 2, 4, (6,)))))
_K_MINS = Integers(((Bits(8, 4, 6, 4, (0,)),), (Bits(12, 4, 4, 4, (4,)), Bits(8, 4, 2, 4, (6,)))))
_Q6_SCALES = _ints(_bits(8, 192, 16, 16))

_Q2_CODES = _ints(_bits(2, 16, 64, 32))
_Q3_CODES = _ints(_bits(2, 32, 64, 32), _bits(1, 0, 32, 32), bias=-4)
_Q4_CODES = _ints(_bits(4, 16, 128, 32))
_Q5_CODES = _ints(_bits(4, 48, 128, 32), _bits(1, 16, 32, 32))
_Q6_CODES = _ints(_bits(4, 0, 128, 64), _bits(2, 128, 64, 32), bias=-32)

# The formats of QLoRA: an f32 and 64 codes of 4 bits; bitsandbytes has the first of a pair in the high nibble.
_F32_SCALE = Scale(0, base=_F32)
_HIGH_FIRST = _ints(Bits(4, 32, 4, 1, (4, 0)))
# Quantiles of the normal distribution (Dettmers et al. 2023, "QLoRA", appendix E), as rounded in bitsandbytes.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent, one of fraction; divided by the greatest value, 12.
_FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))

# dtype, block size, block bytes, sub-block; then codes, scale and minimum. Q4_1 and Q5_1 store the minimum
# with the opposite sign: weight = d * code + m. A sub-block is never more than 32 weights, since that is what
# kernels read at a time: the two of a block of 64 have the same scale.
_TABLE = (
    BlockFormat(DType.F32, 1, 4),
    BlockFormat(DType.F16, 1, 2),
    BlockFormat(DType.BF16, 1, 2),
    BlockFormat(DType.Q4_0, 32, 18, 32, _ints(_bits(4, 2, 16, 16), bias=-8), Scale(0)),
    BlockFormat(DType.Q4_1, 32, 20, 32, _ints(_bits(4, 4, 16, 16)), Scale(0), Scale(2, sign=-1)),
    BlockFormat(DType.Q5_0, 32, 22, 32, _ints(_bits(4, 6, 16, 16), _bits(1, 2, 4, 1), bias=-16), Scale(0)),
    BlockFormat(
        DType.Q5_1, 32, 24, 32, _ints(_bits(4, 8, 16, 16), _bits(1, 4, 4, 1)), Scale(0), Scale(2, sign=-1)
    ),
    BlockFormat(DType.Q8_0, 32, 34, 32, _ints(_bits(8, 2, 32, 32)), Scale(0)),
    BlockFormat(DType.Q2_K, 256, 84, 16, _Q2_CODES, Scale(80, _Q2_SCALES), Scale(82, _Q2_MINS)),
    BlockFormat(DType.Q3_K, 256, 110, 16, _Q3_CODES, Scale(108, _Q3_SCALES)),
    BlockFormat(DType.Q4_K, 256, 144, 32, _Q4_CODES, Scale(0, _K_SCALES), Scale(2, _K_MINS)),
    BlockFormat(DType.Q5_K, 256, 176, 32, _Q5_CODES, Scale(0, _K_SCALES), Scale(2, _K_MINS)),
    BlockFormat(DType.Q6_K, 256, 210, 16, _Q6_CODES, Scale(208, _Q6_SCALES)),
    BlockFormat(DType.NF4, 64, 36, 32, _HIGH_FIRST, _F32_SCALE, codebook=_NF4),
    BlockFormat(DType.FP4, 64, 36, 32, _HIGH_FIRST, _F32_SCALE, codebook=_FP4),
    BlockFormat(DType.INT4, 64, 36, 32, _ints(_bits(4, 4, 32, 1), bias=-8), _F32_SCALE),
)

FORMATS: Mapping[DType, BlockFormat] = MappingProxyType({row.dtype: row for row in _TABLE})
GGML_FORMATS: Mapping[Ggml, BlockFormat] = MappingProxyType(
    {row.ggml_type: row for row in _TABLE if row.dtype.name in Ggml.__members__}
)
"""The formats that GGUF files hold, by the number they have there."""
