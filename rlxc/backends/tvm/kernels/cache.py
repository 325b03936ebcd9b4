"""The KV cache: pages that sequences share, where their elements lie, and how those are stored.

A page holds ``page`` positions. In a layer's share of it keys are ``[K][page / 16][D][16]``, 16 positions side by side,
so that scores need no sums across a vector; values are ``[K][page][D]``. Codes of 8 bits have scales ``f32 [K][page]``
for keys, and as many for values: one for each position and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tvm.tirx import Cast, bitwise_and
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Pointer
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.errors import OptionError

TILE = 16
"""Positions whose keys lie side by side."""

CacheType = Literal["float32", "float16", "bfloat16", "int8"]
"""How keys and values are stored: as floats, or as codes of 8 bits with a scale."""

# What kernels load and store, and its bytes.
_ELEMENTS: Final[dict[CacheType, tuple[str, int]]] = {
    "float32": ("float32", 4),
    "float16": ("float16", 2),
    "bfloat16": ("uint16", 2),
    "int8": ("int8", 1),
}


@dataclass(frozen=True)
class CacheShape:
    """One layer's share of a page.

    Raises:
        OptionError: ``page`` is not a power of two of at least 16.
    """

    kv_heads: int
    head_dim: int
    page: int
    dtype: CacheType

    def __post_init__(self) -> None:
        if self.page < TILE or self.page & (self.page - 1):
            raise OptionError(
                f"pages of {self.page} positions",
                source="KV cache",
                remedy=f"take a power of two of at least {TILE}",
            )

    @property
    def name(self) -> str:
        """All of it, as part of a kernel's name."""
        return f"{self.kv_heads}x{self.head_dim}_pages{self.page}_{self.dtype}"

    @property
    def has_scales(self) -> bool:
        """Whether elements are codes."""
        return self.dtype == "int8"

    @property
    def element(self) -> str:
        """The type that kernels load and store; bf16 is its bits."""
        return _ELEMENTS[self.dtype][0]

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return _ELEMENTS[self.dtype][1]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys in a page, or of the values, without scales."""
        return self.kv_heads * self.page * self.head_dim * self.element_bytes

    @property
    def params(self) -> tuple[Pointer, ...]:
        """The parameters of a kernel from which :meth:`Pages.of` makes its view."""
        elements = (Pointer("keys", self.element), Pointer("values", self.element))
        scales = (Pointer("key_scales", "float32"), Pointer("value_scales", "float32"))
        tables = (Pointer("tables", "int64"), Pointer("table", "int64"))
        return (*tables, *elements, *(scales if self.has_scales else ()))

    def floats(self, vectors: Vectors, stored: Expr) -> Expr:
        """A vector of elements as f32; codes as they are."""
        return vectors.widen_bf16(stored) if self.dtype == "bfloat16" else vectors.floats(stored)

    def rounded(self, vectors: Vectors, value: Expr) -> Expr:
        """A vector of f32 as elements that are floats: the nearest ones, of two the even one."""
        if self.dtype == "bfloat16":
            return vectors.round_to_bf16(value)
        return Cast(f"{self.element}x{vectors.lanes}", value)


@dataclass(frozen=True)
class Pages:
    """One layer's keys and values in the pages of all sequences of a step.

    ``tables[s]`` is the distance of sequence s's block tables from an anchor, in bytes; this layer's is found as far
    from ``table``. Entry i of it says how far from the anchor the page of positions ``page * i`` and following is, in
    bytes; its keys, values and scales are as far from ``keys``, ``values``, ``key_scales`` and ``value_scales``.
    """

    shape: CacheShape
    tables: Buffer
    table: Buffer
    keys: Buffer
    values: Buffer
    key_scales: Buffer | None
    value_scales: Buffer | None

    @classmethod
    def of(cls, shape: CacheShape, buffers: Sequence[Buffer]) -> Pages:
        """The view of what a kernel is given for ``shape.params``."""
        tables, table, keys, values, *scales = buffers
        key_scales, value_scales = scales if shape.has_scales else (None, None)
        return cls(shape, tables, table, keys, values, key_scales, value_scales)

    def find(self, sequence: Expr, position: Expr) -> Expr:
        """The page of a position, as its int64 distance from the anchor in bytes."""
        entry = Cast("int64", position >> _log2(self.shape.page))
        return self.table[(self.tables[sequence] >> T.int64(3)) + entry]

    def key(self, page: Expr, kv_head: Expr, position: Expr) -> Expr:
        """Where in ``keys`` the first channel of a position's key is; the next ones lie 16 apart."""
        dim, row = self.shape.head_dim, self._row(position)
        within = (row >> _log2(TILE)) * (TILE * dim) + bitwise_and(row, TILE - 1)
        return self._element(page) + Cast("int64", kv_head * (self.shape.page * dim) + within)

    def value(self, page: Expr, kv_head: Expr, position: Expr) -> Expr:
        """Where in ``values`` a position's value begins; the next position's lies behind it."""
        return self._element(page) + Cast("int64", self._place(kv_head, position) * self.shape.head_dim)

    def scale(self, page: Expr, kv_head: Expr, position: Expr) -> Expr:
        """Where in ``key_scales``, and in ``value_scales``, a position's scale is; the next one lies behind it."""
        return (page >> T.int64(2)) + Cast("int64", self._place(kv_head, position))

    def _element(self, page: Expr) -> Expr:
        return page >> T.int64(_log2(self.shape.element_bytes))

    def _place(self, kv_head: Expr, position: Expr) -> Expr:
        return kv_head * self.shape.page + self._row(position)

    def _row(self, position: Expr) -> Expr:
        return bitwise_and(position, self.shape.page - 1)


def _log2(power: int) -> int:
    return power.bit_length() - 1
