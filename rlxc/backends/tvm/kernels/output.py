"""Where a matrix product puts its rows."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Register, when
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import TILE


@dataclass(frozen=True)
class OutputRows:
    """f32 ``[tokens, rows]``; a token's results begin ``stride`` elements after those of the token before.

    ``rows`` need not be a multiple of 16: nothing is written beyond them.
    """

    rows: int
    stride: int

    def store(
        self, vectors: Vectors, out: Buffer, token: Expr, tile: Expr, first: int, value: Register
    ) -> None:
        """Write one token's results for the rows of a tile from ``first`` on, as many as a vector has."""
        row = tile * TILE + first
        at = T.cast(token, "int64") * self.stride + row
        last, rest = divmod(self.rows, TILE)
        if not rest:
            vectors.store(out, at, value.get())
            return
        with when(tile < last):
            vectors.store(out, at, value.get())
        with when(tile == last):
            for lane in range(min(vectors.lanes, rest - first)):
                T.buffer_store(out, value.lane(lane), [at + lane])
