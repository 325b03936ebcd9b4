"""Where numbers lie in the bytes of a block: fields of bits, integers made of them, ternary digits, and scales.

Everything here is a declaration that reads and writes whole arrays of blocks, ``uint8 [blocks, block_bytes]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Unsigned = npt.NDArray[np.unsignedinteger[Any]]
Codes = npt.NDArray[np.int8]

ScaleKind = Literal["float16", "float32", "e8m0", "ue4m3"]
"""How a scale is stored: a float, or a byte that stands for one.

``e8m0`` has an exponent, 2^(byte - 127); ``ue4m3`` four bits of exponent, biased by 7, and three of fraction, where
ggml reads 127, the standard's NaN, as 0 and ignores the highest bit but in 255.
"""


@dataclass(frozen=True)
class Bits:
    """A field of unsigned integers of ``width`` bits in ``nbytes`` bytes of a block, from ``offset`` on.

    The bytes form runs of ``run`` bytes, the next of which starts ``stride`` bytes after the last one (at its end, if
    0), and a run consists of little-endian words of ``word`` bytes. A run gives one integer per word at its first
    shift, then one per word at its next shift, and so on: integer ``(r, s, j)`` is the low ``width`` bits of word
    ``j`` of run ``r``, ``>> shifts[s]``.
    """

    offset: int
    nbytes: int
    width: int
    run: int
    shifts: tuple[int, ...]
    word: int = 1
    stride: int = 0

    @property
    def count(self) -> int:
        """How many integers the field holds."""
        return self.nbytes // self.word * len(self.shifts)

    @property
    def columns(self) -> npt.NDArray[np.intp]:
        """Where the field's bytes are in a block."""
        starts = np.arange(self.nbytes // self.run) * (self.stride or self.run)
        return self.offset + np.add.outer(starts, np.arange(self.run)).reshape(-1)

    def read(self, blocks: Bytes, up: int = 0) -> Unsigned:
        """The field's integers, ``[blocks, count]``, from ``[blocks, block_bytes]``; uint8 if they fit.

        They are ``up`` bits to the left of where they would be: above those of another field.
        """
        raw = self._raw(blocks)
        if self.width == 8:
            return raw
        if self.run == 1 and len(self.shifts) > 2:
            return _integers_of_bytes(self.width, self.shifts, up)[raw].view(np.uint8)
        # Whole words at once: bits that a shift brings in from the neighbouring byte are masked away.
        sizes = (8, 4, 2, 1) if self.word == 1 else (self.word,)
        size = next(size for size in sizes if self.run % size == 0)
        words: Unsigned = raw.view(f"<u{size}").reshape(
            len(blocks), self.nbytes // self.run, self.run // size
        )
        kind = words.dtype.type
        mask = ((1 << self.width) - 1) << up
        if self.word == 1:
            mask = int.from_bytes(bytes([mask]) * size, "little")
        out = np.empty((*words.shape[:2], len(self.shifts), words.shape[2]), words.dtype)
        runs = _as_items(out)
        for s, shift in enumerate(self.shifts):
            part = words >> kind(shift - up) if shift >= up else words << kind(up - shift)
            part &= kind(mask)
            runs[:, :, s] = _as_items(part)
        integers: Unsigned = out.view(np.uint8)
        if self.word > 1:
            integers = out.astype(np.uint8 if self.width + up <= 8 else np.uint16)
        return integers.reshape(len(blocks), self.count)

    def write(self, integers: Unsigned, blocks: Bytes) -> None:
        """Sets the field, all zeros so far, to the low bits of ``[blocks, count]``."""
        words = self._raw(blocks).view(f"<u{self.word}").reshape(len(blocks), -1, self.run // self.word)
        kind = words.dtype.type
        by_shift = integers.reshape(len(blocks), -1, len(self.shifts), self.run // self.word)
        for s, shift in enumerate(self.shifts):
            words |= (by_shift[:, :, s].astype(kind) & kind((1 << self.width) - 1)) << kind(shift)
        blocks[:, self.columns] = words.view(np.uint8).reshape(len(blocks), self.nbytes)

    def _raw(self, blocks: Bytes) -> Bytes:
        """The field's bytes, ``[blocks, nbytes]``, in fresh memory."""
        if self.stride:
            return np.take(blocks, self.columns, axis=1)
        field = _as_items(blocks[:, self.offset : self.offset + self.nbytes]).copy()
        return field.view(np.uint8).reshape(len(blocks), self.nbytes)


@cache
def _integers_of_bytes(width: int, shifts: tuple[int, ...], up: int) -> Unsigned:
    """For each byte, its integers at these shifts, ``up`` bits to the left, as the bytes of one word."""
    byte = np.arange(256, dtype=np.uint8)[:, None]
    integers = (byte >> np.array(shifts, np.uint8) & np.uint8((1 << width) - 1)) << np.uint8(up)
    table: Unsigned = integers.view(f"<u{len(shifts)}")[:, 0]
    table.flags.writeable = False
    return table


def _as_items(array: Unsigned) -> npt.NDArray[np.void]:
    """The last dimension as single items, which numpy copies faster than it does several small ones."""
    items: npt.NDArray[np.void] = array.view(f"V{array.shape[-1] * array.itemsize}")[..., 0]
    return items


class CodeReader(Protocol):
    """What holds the codes of a block."""

    @property
    def count(self) -> int:
        """How many codes a block holds."""

    @property
    def low(self) -> int:
        """The least code there can be."""

    @property
    def high(self) -> int:
        """The greatest code there can be."""

    def read(self, blocks: Bytes) -> Codes:
        """The codes, int8 ``[blocks, count]``."""

    def read_above_low(self, blocks: Bytes) -> Bytes:
        """The codes less `low`, ``[blocks, count]``."""

    def write(self, codes: Codes, blocks: Bytes) -> None:
        """Sets the bits of the codes, all zeros so far."""


@dataclass(frozen=True)
class Integers:
    """Integers: ``parts`` one after another, each of fields stacked from the lowest bits up, times step, plus bias.

    Eight bits wide they are two's complement; narrower ones are unsigned before step and bias.
    """

    parts: tuple[tuple[Bits, ...], ...]
    bias: int = 0
    step: int = 1

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
        return self.low + self.step * ((1 << self._width) - 1)

    @property
    def _width(self) -> int:
        return sum(field.width for field in self.parts[0])

    def read(self, blocks: Bytes) -> Codes:
        """The integers, ``[blocks, count]``, from ``[blocks, block_bytes]``."""
        out = self._stored(blocks).view(np.int8)
        if self.step != 1:
            out *= np.int8(self.step)
        if self.bias:
            out += np.int8(self.bias)
        return out

    def read_above_low(self, blocks: Bytes) -> Bytes:
        """The integers less `low`, ``[blocks, count]``, from ``[blocks, block_bytes]``."""
        out = self._stored(blocks)
        if self.step != 1:
            out *= np.uint8(self.step)
        if self._width == 8:
            out ^= np.uint8(0x80)
        return out

    def _stored(self, blocks: Bytes) -> Bytes:
        parts = [stacked(fields, blocks) for fields in self.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def write(self, codes: Codes, blocks: Bytes) -> None:
        """Sets the fields, all zeros so far, to ``[blocks, count]``."""
        unsigned = (codes - np.int8(self.bias)).view(np.uint8) // np.uint8(self.step)
        start = 0
        for fields in self.parts:
            count = fields[0].count
            write_stacked(fields, unsigned[:, start : start + count], blocks)
            start += count


def stacked(fields: tuple[Bits, ...], blocks: Bytes) -> Unsigned:
    """The integers of fields that lie in several places, from the lowest bits up; uint16 above 8 bits."""
    out = fields[0].read(blocks)
    width = fields[0].width
    wide = sum(field.width for field in fields) > 8
    if wide:
        out = out.astype(np.uint16)
    for field in fields[1:]:
        if wide:
            out |= field.read(blocks).astype(np.uint16) << np.uint16(width)
        else:
            out |= field.read(blocks, width)
        width += field.width
    return out


def write_stacked(fields: tuple[Bits, ...], integers: Unsigned, blocks: Bytes) -> None:
    """Sets the fields, all zeros so far, to integers ``[blocks, count]``."""
    shift = 0
    for field in fields:
        field.write(integers >> integers.dtype.type(shift), blocks)
        shift += field.width


@dataclass(frozen=True)
class Trits:
    """Ternary digits, codes -1 to 1: ``parts`` are runs of bytes, ``(offset, nbytes, digits)``.

    A byte is ``ceil(256 v / 243)``, where ``v`` has five digits to base 3, and the first digit is the most significant
    one; a run gives the first digit of all its bytes, then the second, and so on. Any byte can be read; those that no
    number gives read as the number below.
    """

    parts: tuple[tuple[int, int, int], ...]
    low: int = -1
    high: int = 1

    @property
    def count(self) -> int:
        """How many codes a block holds."""
        return sum(nbytes * digits for _, nbytes, digits in self.parts)

    def read(self, blocks: Bytes) -> Codes:
        """The codes, ``[blocks, count]``, from ``[blocks, block_bytes]``."""
        codes = self.read_above_low(blocks).view(np.int8)
        codes += np.int8(self.low)
        return codes

    def read_above_low(self, blocks: Bytes) -> Bytes:
        """The digits 0 to 2, ``[blocks, count]``, from ``[blocks, block_bytes]``."""
        out = np.empty((len(blocks), self.count), np.uint8)
        start = 0
        for offset, nbytes, digits in self.parts:
            rest = blocks[:, offset : offset + nbytes].copy()
            for _ in range(digits):
                # The byte is a fraction of 256: times 3, its digit is what comes before the point.
                tripled = rest.astype(np.uint16) * np.uint16(3)
                out[:, start : start + nbytes] = tripled >> np.uint16(8)
                rest = tripled.astype(np.uint8)
                start += nbytes
        return out

    def write(self, codes: Codes, blocks: Bytes) -> None:
        """Sets the bytes to those of codes ``[blocks, count]``."""
        start = 0
        for offset, nbytes, digits in self.parts:
            number = np.zeros((len(blocks), nbytes), np.uint16)
            for place in range(5):
                number *= np.uint16(3)
                if place < digits:
                    number += (codes[:, start : start + nbytes] + np.int8(1)).astype(np.uint16)
                    start += nbytes
            blocks[:, offset : offset + nbytes] = (number * np.uint16(256) + np.uint16(242)) // np.uint16(243)


_BASES: Mapping[ScaleKind, np.dtype[Any]] = MappingProxyType(
    {
        "float16": np.dtype("<f2"),
        "float32": np.dtype("<f4"),
        "e8m0": np.dtype(np.uint8),
        "ue4m3": np.dtype(np.uint8),
    }
)


@dataclass(frozen=True)
class Scale:
    """The float at ``offset`` times ``sign`` and ``unit``, and times an integer per sub-block where there are some.

    Attributes:
        kind: how the float is stored.
        unit: a power of two.
        bases: how many floats a block has, one after the other, each of as many sub-blocks.
        pieces: where the float's bits are scattered: integers, of which the first has the lowest bits.
    """

    offset: int
    factors: Integers | None = None
    sign: int = 1
    kind: ScaleKind = "float16"
    unit: float = 1.0
    bases: int = 1
    pieces: Bits | None = None

    @property
    def base(self) -> np.dtype[Any]:
        """The type of the floats as stored; uint8 for those that a byte stands for."""
        return _BASES[self.kind]

    @property
    def table(self) -> npt.NDArray[np.float32] | None:
        """What the 256 bytes stand for, times ``unit``; None where floats are stored."""
        return None if self.base != np.uint8 else _byte_scales(self.kind, self.unit)

    def read(self, blocks: Bytes) -> Scales:
        """The scales of ``[blocks, block_bytes]``."""
        if self.pieces is None:
            raw = blocks[:, self.offset : self.offset + self.bases * self.base.itemsize].copy()
        else:
            raw = self._joined(self.pieces, blocks)
        if self.sign < 0:
            raw[:, -1] ^= np.uint8(0x80)
        factors = self.factors.read(blocks) if self.factors else None
        return Scales(raw.view(self.base), factors, self.unit, self.bases, self.table)

    def write(self, scales: Scales, blocks: Bytes) -> None:
        """Sets the bytes of the scales, all zeros so far, from those of rows."""
        raw = scales.base.astype(self.base).reshape(len(blocks), self.bases).view(np.uint8)
        if self.sign < 0:
            raw[:, -1] ^= np.uint8(0x80)
        if self.pieces is None:
            blocks[:, self.offset : self.offset + raw.shape[1]] = raw
        else:
            shifts = np.arange(self.pieces.count, dtype=np.uint16) * np.uint16(self.pieces.width)
            self.pieces.write(raw.view("<u2") >> shifts, blocks)
        if self.factors is not None and scales.factors is not None:
            self.factors.write(scales.factors.reshape(len(blocks), -1), blocks)

    @staticmethod
    def _joined(pieces: Bits, blocks: Bytes) -> Bytes:
        """The bytes of the f16 whose bits are scattered."""
        shifts = np.arange(pieces.count, dtype=np.uint16) * np.uint16(pieces.width)
        parts = pieces.read(blocks).astype(np.uint16) << shifts
        return np.bitwise_or.reduce(parts, axis=1, keepdims=True).astype("<u2").view(np.uint8)


@cache
def _byte_scales(kind: ScaleKind, unit: float) -> npt.NDArray[np.float32]:
    """The f32 that each byte stands for, times unit; made in f64, since 2^128 is none in f32, but its half is."""
    byte = np.arange(256)
    if kind == "e8m0":
        values = np.exp2(byte - 127.0)
    else:
        exponent, fraction = byte >> 3 & 15, byte & 7
        values = np.where(exponent, np.exp2(exponent - 7.0) * (1 + fraction / 8), fraction * 2.0**-9)
        values[127] = 0
    table: npt.NDArray[np.float32] = (values * unit).astype(np.float32)
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class Scales:
    """Scales (or minimums) as stored.

    Attributes:
        base: ``[rows, blocks * bases]``: f16, f32, or bytes that stand for floats.
        factors: int8 ``[rows, sub_blocks]``.
        unit: what all are multiplied by.
        bases: how many bases a block has.
        table: what the bytes stand for, times ``unit``: f32 ``[256]``.
    """

    base: npt.NDArray[Any]
    factors: Codes | None
    unit: float = 1.0
    bases: int = 1
    table: npt.NDArray[np.float32] | None = None

    def values(self, per_block: int) -> npt.NDArray[np.float32]:
        """The f32 scales, ``[rows, blocks * per_block]``, exact, where a block has ``per_block`` sub-blocks."""
        floats = self.base.astype(np.float32) if self.table is None else self.table[self.base]
        if self.table is None and self.unit != 1:
            floats *= np.float32(self.unit)
        values: npt.NDArray[np.float32] = np.repeat(floats, per_block // self.bases, axis=1)
        if self.factors is not None:
            values *= self.factors
        return values

    def by_rows(self, rows: int, blocks: int) -> Scales:
        """The scales of ``rows * blocks`` single blocks as those of rows."""
        factors = self.factors
        if factors is not None:
            factors = factors.reshape(rows, blocks * factors.shape[1])
        base = self.base.reshape(rows, blocks * self.bases)
        return Scales(base, factors, self.unit, self.bases, self.table)
