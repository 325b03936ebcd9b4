"""A format's codebook: the numbers, at most sixteen, that codes of up to four bits stand for."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx import Select, Shuffle, call_llvm_pure_intrin, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, local
from rlxc.backends.tvm.kernels.vector import Vectors

_SIZE = 16


def table_of(values: Sequence[float]) -> Buffer:
    """The numbers, f32, in memory of the kernel's own."""
    table = local(_SIZE, "float32")
    for index, value in enumerate(values):
        T.buffer_store(table, const(value, "float32"), [index])
    return table


class Codebook:
    """Looks up a vector of codes at a time: in a register, or in two of eight, where a permutation can do that."""

    def __init__(self, vectors: Vectors, values: Sequence[float]) -> None:
        self._vectors, self._table = vectors, table_of(values)

    def __getitem__(self, codes: Expr) -> Expr:
        """The f32 of codes of 0..15, i32 ``[lanes]``."""
        vectors = self._vectors
        if vectors.lanes == _SIZE:
            name = "llvm.x86.avx512.permvar.sf.512"
            return call_llvm_pure_intrin("float32x16", name, vectors.load(self._table, 0), codes)
        if 2 * vectors.lanes == _SIZE:
            # The instruction looks at the lowest three bits.
            low, high = (
                call_llvm_pure_intrin(
                    "float32x8", "llvm.x86.avx2.permps", vectors.load(self._table, half), codes
                )
                for half in (0, 8)
            )
            return Select(codes > vectors.splat(7, "int32"), high, low)
        return self._table[codes]


class ByteTable:
    """Looks up bytes, a vector of codes at a time: with one instruction where a CPU has it."""

    def __init__(self, vectors: Vectors, numbers: Sequence[int]) -> None:
        """A table of at most 16 numbers of 0..255."""
        self._vectors = vectors
        self._bytes = [number - 256 * (number > 127) for number in numbers] + [0] * (_SIZE - len(numbers))
        self._memory: Buffer | None = None
        if vectors.lookup is None:
            self._memory = local(_SIZE, "int8")
            for index, value in enumerate(self._bytes):
                T.buffer_store(self._memory, const(value, "int8"), [index])

    def __getitem__(self, codes: Expr) -> Expr:
        """The numbers of codes of 0..15, both ``uint8 [4 * lanes]``."""
        if self._memory is not None:
            return self._memory[codes]
        size = 4 * self._vectors.lanes
        # The instruction looks up each 16 bytes in 16 bytes of its own.
        table = Shuffle([const(value, "int8") for value in self._bytes * (size // _SIZE)], list(range(size)))
        return call_llvm_pure_intrin(f"int8x{size}", self._vectors.lookup, table, codes)
