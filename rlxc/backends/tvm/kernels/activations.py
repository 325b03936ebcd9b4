"""Activations rounded to int8, as the rows that integer matrix products read."""

from __future__ import annotations

from dataclasses import dataclass

from rlxc.artifact.alignment import align
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, PackedLayout


@dataclass(frozen=True)
class QuantisedRow:
    """One token's activations ``[columns]`` in int8, with what a product with some format needs beside them.

    A row is: ``columns`` int8; f32 ``scales``, one per 32 columns, where ``x = scale * int8``; int32 ``starts``, one
    per sub-block, ``-centre * sum(int8)``, from which a sum over stored numbers starts; and, for formats with
    minimums, f32 ``sums``, one per sub-block, of x as it was before rounding. Where the
    multiplication takes something off the codes itself, ``centre`` is less by that. Offsets and stride are in bytes.
    """

    columns: int
    sub_block: int
    centre: int
    has_sums: bool

    @classmethod
    def of(cls, layout: PackedLayout, vectors: Vectors) -> QuantisedRow:
        """The row that a product with this weight reads."""
        centre = layout.centre - vectors.shift(layout.max_number)
        return cls(layout.columns, layout.format.sub_block, centre, layout.format.has_mins)

    @property
    def blocks(self) -> int:
        """Scales in a row."""
        return self.columns // BLOCK

    @property
    def sub_blocks(self) -> int:
        """Starts, and sums, in a row."""
        return self.columns // self.sub_block

    @property
    def scales(self) -> int:
        """Where the scales begin."""
        return align(self.columns)

    @property
    def starts(self) -> int:
        """Where the starts begin."""
        return self.scales + 4 * self.blocks

    @property
    def sums(self) -> int:
        """Where the sums begin."""
        return self.starts + 4 * self.sub_blocks

    @property
    def stride(self) -> int:
        """From one row to the next."""
        return align(self.sums + 4 * self.sub_blocks * self.has_sums)
