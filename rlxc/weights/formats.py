"""The block formats of GGUF and of QLoRA, as one table that says where every bit of a block lies.

A block holds ``block_size`` weights in ``block_bytes`` bytes: small integer codes, and per sub-block an f32
scale and, in some formats, an f32 minimum, with ``weight = scale * code - minimum``. A scale (or minimum) is
a float of the block, in many formats times a small integer of the sub-block. In a format with a codebook, codes are
indices into it: ``weight = scale * codebook[code]``. All products are exact in f32 but the minimum's subtraction, so
decoding agrees with ggml bit for bit. Layouts: ggml's ``ggml-common.h`` and ``ggml-quants.c``.

The formats of QLoRA have blocks of 64 weights and an f32 scale for each. NF4 and FP4 have codebooks whose values are no
integers, and their weights are rounded to f32, as bitsandbytes does it, whose bytes of codes are ours.

To add a format, add a row to the table: the readers of :mod:`rlxc.weights.fields` and :mod:`rlxc.weights.grids` are
driven by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Ggml

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.fields import Bits, Bytes, CodeReader, Integers, Scale, Scales, Trits
from rlxc.weights.grids import GridCodes

__all__ = ["FORMATS", "GGML_FORMATS", "BlockFormat", "Bytes", "Fields", "Planes", "Scales"]


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
    codes: CodeReader | None = None
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
    def integers(self) -> tuple[int, ...] | None:
        """The codebook where all its values are integers of 8 bits, else None."""
        if self.codebook is None or not all(value.is_integer() for value in self.codebook):
            return None
        return tuple(map(int, self.codebook))

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes in a file, its share of the scales with it."""
        return 8 * self.block_bytes / self.block_size

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
        codes = self._packed()[0].read(self._blocks(data))
        return Fields(codes.reshape(self._shape(data)), *self.scales(data))

    def codes_above_min(self, data: Bytes) -> Bytes:
        """The codes of packed rows less `code_min`, uint8 ``[rows, in_features]``, in fresh memory.

        Raises:
            WeightError: as :meth:`fields`.
        """
        return self._packed()[0].read_above_low(self._blocks(data)).reshape(self._shape(data))

    def scales(self, data: Bytes) -> tuple[Scales, Scales | None]:
        """The scales of packed rows, and the minimums if there are any, in fresh memory.

        Raises:
            WeightError: as :meth:`fields`.
        """
        scale, blocks = self._packed()[1], self._blocks(data)
        shape = (len(data), data.shape[1] // self.block_bytes)
        minimum = self.minimum.read(blocks).by_rows(*shape) if self.minimum else None
        return scale.read(blocks).by_rows(*shape), minimum

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

    def _packed(self) -> tuple[CodeReader, Scale]:
        if self.codes is None or self.scale is None:
            raise WeightError(f"{self.dtype} weights have no codes", remedy="decode them instead")
        return self.codes, self.scale

    def _shape(self, data: Bytes) -> tuple[int, int]:
        return len(data), data.shape[1] // self.block_bytes * self.block_size

    def _code_values(self, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.float32]:
        if self.codebook is None:
            return codes.astype(np.float32)
        return np.take(np.array(self.codebook, np.float32), codes)

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


def _odd(field: Bits) -> Integers:
    """Odd integers."""
    return Integers(((field,),), bias=1, step=2)


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

# The formats with grids: codes stand for the grid's values and their negatives. Factors are odd.
_IQ2 = (8.0, 25.0, 43.0, -8.0, -25.0, -43.0)
_IQ3_XXS = tuple(float(sign * value) for sign in (1, -1) for value in (4, 12, 20, 28, 36, 44, 52, 62))
_IQ3_S = tuple(float(sign * value) for sign in (1, -1) for value in range(1, 16, 2))
# Eighths: -1, 0 or 1, and an eighth more or, where the sign is set, less.
_IQ1 = (-7.0, 1.0, 9.0, -9.0, -1.0, 7.0)
# IQ2_XXS, IQ3_XXS: a uint32 of four times seven signs and a factor, after every four bytes of indices or after all.
_IQ2_XXS_CODES = GridCodes(
    "IQ2_XXS", (Bits(2, 32, 8, 4, (0,), stride=8),), Bits(6, 32, 7, 4, (0, 7, 14, 21), word=4, stride=8)
)
_IQ2_XXS_SCALE = Scale(0, _odd(Bits(6, 32, 4, 4, (28,), word=4, stride=8)), unit=1 / 8)
_IQ3_XXS_CODES = GridCodes("IQ3_XXS", (_bits(8, 2, 64, 64),), Bits(66, 32, 7, 4, (0, 7, 14, 21), word=4))
_IQ3_XXS_SCALE = Scale(0, _odd(Bits(66, 32, 4, 4, (28,), word=4)), unit=1 / 4)
# IQ2_XS: uint16 of nine bits of index and seven signs.
_IQ2_XS_CODES = GridCodes("IQ2_XS", (Bits(2, 64, 9, 64, (0,), word=2),), Bits(2, 64, 7, 64, (9,), word=2))
_IQ2_XS_SCALE = Scale(0, _odd(_bits(4, 66, 8, 1)), unit=1 / 8)
_IQ2_S_CODES = GridCodes("IQ2_S", (_bits(8, 2, 32, 32), _bits(2, 66, 8, 1)), _bits(8, 34, 32, 32))
_IQ2_S_SCALE = Scale(0, _odd(_bits(4, 74, 8, 1)), unit=1 / 8)
_IQ3_S_CODES = GridCodes("IQ3_S", (_bits(8, 2, 64, 64), _bits(1, 66, 8, 1)), _bits(8, 74, 32, 32))
_IQ3_S_SCALE = Scale(0, _odd(_bits(4, 106, 4, 1)))
# IQ1_S: uint16 of four times three bits of index, a factor and a sign. IQ1_M: nibbles of three bits of index and a
# sign; uint16 of four factors and a quarter of d.
_IQ1_S_CODES = GridCodes(
    "IQ1_S",
    (_bits(8, 2, 32, 32), Bits(34, 16, 3, 2, (0, 3, 6, 9), word=2)),
    Bits(34, 16, 1, 16, (15,), word=2),
)
_IQ1_S_SCALE = Scale(0, _odd(Bits(34, 16, 3, 16, (12,), word=2)), unit=1 / 8)
_IQ1_M_CODES = GridCodes(
    "IQ1_S", (_bits(8, 0, 32, 32), Bits(32, 16, 3, 1, (0, 4))), Bits(32, 16, 1, 1, (3, 7))
)
_IQ1_M_SCALE = Scale(
    48, _odd(Bits(48, 8, 3, 2, (0, 3, 6, 9), word=2)), unit=1 / 8, pieces=Bits(48, 8, 4, 8, (12,), word=2)
)
# IQ4_XS: 6-bit scales, their low nibbles in four bytes and their high two bits in two.
_IQ4_SCALES = _ints(_bits(4, 4, 4, 1), _bits(2, 2, 2, 1), bias=-32)
# Levels that crowd around zero, as normal weights do; from ggml-common.h.
_IQ4 = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
# E2M1 (a sign, two bits of exponent, one of fraction), doubled to make it integers; ggml reads -0 as 0.
_E2M1 = tuple(float(sign * value) for sign in (1, -1) for value in (0, 1, 2, 3, 4, 6, 8, 12))
_MX_SCALE = Scale(0, kind="e8m0", unit=0.5)
_NV_SCALES = Scale(0, kind="ue4m3", unit=0.5, bases=4)

# The formats of QLoRA: an f32 and 64 codes of 4 bits; bitsandbytes has the first of a pair in the high nibble.
_F32_SCALE = Scale(0, kind="float32")
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
    BlockFormat(DType.IQ1_S, 256, 50, 32, _IQ1_S_CODES, _IQ1_S_SCALE, codebook=_IQ1),
    BlockFormat(DType.IQ1_M, 256, 56, 16, _IQ1_M_CODES, _IQ1_M_SCALE, codebook=_IQ1),
    BlockFormat(DType.IQ2_XXS, 256, 66, 32, _IQ2_XXS_CODES, _IQ2_XXS_SCALE, codebook=_IQ2),
    BlockFormat(DType.IQ2_XS, 256, 74, 16, _IQ2_XS_CODES, _IQ2_XS_SCALE, codebook=_IQ2),
    BlockFormat(DType.IQ2_S, 256, 82, 16, _IQ2_S_CODES, _IQ2_S_SCALE, codebook=_IQ2),
    BlockFormat(DType.IQ3_XXS, 256, 98, 32, _IQ3_XXS_CODES, _IQ3_XXS_SCALE, codebook=_IQ3_XXS),
    BlockFormat(DType.IQ3_S, 256, 110, 32, _IQ3_S_CODES, _IQ3_S_SCALE, codebook=_IQ3_S),
    BlockFormat(DType.IQ4_NL, 32, 18, 32, _ints(_bits(4, 2, 16, 16)), Scale(0), codebook=_IQ4),
    BlockFormat(
        DType.IQ4_XS, 256, 136, 32, _ints(_bits(4, 8, 128, 16)), Scale(0, _IQ4_SCALES), codebook=_IQ4
    ),
    BlockFormat(DType.TQ1_0, 256, 54, 32, Trits(((0, 32, 5), (32, 16, 5), (48, 4, 4))), Scale(52)),
    BlockFormat(DType.TQ2_0, 256, 66, 32, _ints(_bits(2, 0, 64, 32), bias=-1), Scale(64)),
    BlockFormat(DType.Q1_0, 128, 18, 32, _ints(_bits(1, 2, 16, 1)), Scale(0), codebook=(-1.0, 1.0)),
    BlockFormat(DType.MXFP4, 32, 17, 32, _ints(_bits(4, 1, 16, 16)), _MX_SCALE, codebook=_E2M1),
    BlockFormat(DType.NVFP4, 64, 36, 16, _ints(_bits(4, 4, 32, 8)), _NV_SCALES, codebook=_E2M1),
    BlockFormat(DType.NF4, 64, 36, 32, _HIGH_FIRST, _F32_SCALE, codebook=_NF4),
    BlockFormat(DType.FP4, 64, 36, 32, _HIGH_FIRST, _F32_SCALE, codebook=_FP4),
    BlockFormat(DType.INT4, 64, 36, 32, _ints(_bits(4, 4, 32, 1), bias=-8), _F32_SCALE),
)

FORMATS: Mapping[DType, BlockFormat] = MappingProxyType({row.dtype: row for row in _TABLE})
GGML_FORMATS: Mapping[Ggml, BlockFormat] = MappingProxyType(
    {row.ggml_type: row for row in _TABLE if row.dtype.name in Ggml.__members__}
)
"""The formats that GGUF files hold, by the number they have there."""
