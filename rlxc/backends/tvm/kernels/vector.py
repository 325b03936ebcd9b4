"""Vectors of one register's width, and the few instructions that kernels name themselves.

Everything else is left to LLVM: loads, shifts and conversions of these vectors become single instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tvm.tirx import (
    Broadcast,
    Cast,
    Ramp,
    Select,
    bitwise_and,
    bitwise_xor,
    call_intrin,
    call_llvm_pure_intrin,
    const,
)
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, bind
from rlxc.backends.tvm.targets import CpuTarget, Dot


@dataclass(frozen=True)
class Vectors:
    """Vectors of ``lanes`` 32-bit numbers, or of four times as many 8-bit ones.

    ``dot_kind`` multiplies the latter, and ``lookup`` finds them in a table, if the target has such an instruction.
    """

    lanes: int
    dot_kind: Dot
    lookup: str | None = None

    @classmethod
    def of(cls, target: CpuTarget) -> Vectors:
        """Vectors as wide as the target's registers."""
        return cls(target.lanes, target.dot, target.lookup)

    def load(self, buffer: Buffer, at: Expr) -> Expr:
        """``lanes`` elements from ``at`` on."""
        return buffer[Ramp(at, 1, self.lanes)]

    def store(self, buffer: Buffer, at: Expr, value: Expr) -> None:
        """Write ``lanes`` elements from ``at`` on."""
        T.buffer_store(buffer, value, [Ramp(at, 1, self.lanes)])

    def splat(self, value: Expr | float, dtype: str = "float32") -> Expr:
        """One number in every lane."""
        number = const(value, dtype) if isinstance(value, int | float) else value
        return Broadcast(number, self.lanes)

    def floats(self, value: Expr) -> Expr:
        """The vector, as f32."""
        return Cast(f"float32x{self.lanes}", value)

    def widen_bf16(self, value: Expr) -> Expr:
        """bf16, given as u16, as f32: the upper half of its bits."""
        # TVM's own conversion takes a vector that is bound to a name for integers.
        return self.as_floats(Cast(f"int32x{self.lanes}", value) << self.splat(16, "int32"))

    def round_to_bf16(self, value: Expr) -> Expr:
        """f32 as the nearest bf16, of two the even one, given as u16."""
        bits = bind(self.as_words(value))
        odd = bitwise_and(bits >> self.splat(16, "int32"), self.splat(1, "int32"))
        upper = (bits + self.splat(0x7FFF, "int32") + odd) >> self.splat(16, "int32")
        return Cast(f"uint16x{self.lanes}", upper)

    def ints(self, value: Expr) -> Expr:
        """The vector, as i32."""
        return Cast(f"int32x{self.lanes}", value)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """``a * b + c`` of f32, rounded once, or twice on a CPU without the instruction."""
        return call_llvm_pure_intrin(f"float32x{self.lanes}", f"llvm.fmuladd.v{self.lanes}f32", a, b, c)

    def maximum(self, a: Expr, b: Expr) -> Expr:
        """The larger of each pair of f32."""
        return T.max(a, b)

    def absolute(self, value: Expr) -> Expr:
        """The magnitude of each f32."""
        return call_llvm_pure_intrin(f"float32x{self.lanes}", f"llvm.fabs.v{self.lanes}f32", value)

    def round(self, value: Expr) -> Expr:
        """The nearest integer of each f32, the even one of two."""
        return call_llvm_pure_intrin(f"float32x{self.lanes}", f"llvm.rint.v{self.lanes}f32", value)

    def sqrt(self, value: Expr) -> Expr:
        """The square root of each f32."""
        return call_llvm_pure_intrin(f"float32x{self.lanes}", f"llvm.sqrt.v{self.lanes}f32", value)

    def load_bytes(self, buffer: Buffer, at: Expr) -> Expr:
        """``4 * lanes`` bytes from ``at`` on."""
        return buffer[Ramp(at, 1, 4 * self.lanes)]

    def store_bytes(self, buffer: Buffer, at: Expr, value: Expr) -> None:
        """Write ``4 * lanes`` bytes from ``at`` on."""
        T.buffer_store(buffer, value, [Ramp(at, 1, 4 * self.lanes)])

    def as_words(self, value: Expr) -> Expr:
        """Bytes, seen as i32."""
        return call_intrin(f"int32x{self.lanes}", "tirx.reinterpret", value)

    def as_bytes(self, value: Expr) -> Expr:
        """i32, seen as bytes."""
        return call_intrin(f"int8x{4 * self.lanes}", "tirx.reinterpret", value)

    def as_floats(self, value: Expr) -> Expr:
        """i32, seen as f32."""
        return call_intrin(f"float32x{self.lanes}", "tirx.reinterpret", value)

    def shift(self, top: int) -> int:
        """What :meth:`dot` takes off each code of 0..``top``: 128 where 8-bit codes must become signed, else 0.

        Start the sum with ``shift(top)`` times the sum of the activations, most cheaply together with the zero
        point's share.
        """
        return 128 if top > 127 and self.dot_kind in ("vpmaddubsw", "sdot") else 0

    def dot(self, acc: Expr, codes: Expr, word: Expr, top: int) -> Expr:
        """``acc`` plus, in each lane, the sum of four ``(code - shift(top)) * activation``; always exact.

        Args:
            acc: i32 ``[lanes]``.
            codes: u8 ``[4 * lanes]``, as int8 or uint8: each 0..``top``; four consecutive ones belong to a lane.
            word: four activations of -127..127 as the bytes of an i32, the first in the lowest one; they are the
                same for every lane.
            top: the largest code, at most 255.
        """
        if self.dot_kind == "multiply":
            return self._multiply(acc, codes, word)
        activations = self.as_bytes(self.splat(word))
        if self.shift(top):
            codes = bitwise_xor(self.as_bytes(codes), Broadcast(const(-128, "int8"), 4 * self.lanes))
        if self.dot_kind == "vpmaddubsw":
            return self._vpmaddubsw(acc, codes, activations, signed=bool(self.shift(top)))
        return call_llvm_pure_intrin(
            f"int32x{self.lanes}", _DOT[self.dot_kind, self.lanes], acc, codes, activations
        )

    def _vpmaddubsw(self, acc: Expr, codes: Expr, activations: Expr, signed: bool) -> Expr:
        """Unsigned times signed bytes, added in pairs to 16 bits, where 2 * 128 * 127 just fits, then to 32."""
        if signed:
            zero = Broadcast(const(0, "int8"), 4 * self.lanes)
            if self.lanes == 8:
                activations = call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", activations, codes)
            else:
                activations = Select(codes < zero, zero - activations, activations)
            codes = T.max(codes, zero - codes)  # -128 stays what it is: 128, read as unsigned
        pairs, sums = _MADD[self.lanes]
        products = call_llvm_pure_intrin(f"int16x{2 * self.lanes}", pairs, codes, activations)
        ones = Broadcast(const(1, "int16"), 2 * self.lanes)
        return acc + call_llvm_pure_intrin(f"int32x{self.lanes}", sums, products, ones)

    def _multiply(self, acc: Expr, codes: Expr, word: Expr) -> Expr:
        """Plain multiplications of 32-bit numbers, for LLVM to narrow as it can."""
        words = self.as_words(codes)
        for byte in range(4):
            code = bitwise_and(words >> self.splat(8 * byte, "int32"), self.splat(255, "int32"))
            acc = acc + code * self.splat((word << (24 - 8 * byte)) >> 24)
        return acc


_DOT: Final = {
    ("vpdpbusd", 16): "llvm.x86.avx512.vpdpbusd.512",
    ("vpdpbusd", 8): "llvm.x86.avx512.vpdpbusd.256",
    ("sdot", 4): "llvm.aarch64.neon.sdot.v4i32.v16i8",
}
_MADD: Final = {
    16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
}
