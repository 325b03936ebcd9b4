"""Where a matrix product puts its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Register, bind, when
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import TILE


@dataclass(frozen=True)
class OutputRows:
    """f32 ``[tokens, rows]``; a token's results begin ``stride`` elements after those of the token before.

    ``rows`` need not be a multiple of 16: nothing is written beyond them.
    """

    rows: int
    stride: int

    def finish(
        self,
        vectors: Vectors,
        sums: Sequence[Register],
        bias: Buffer | None,
        out: Buffer,
        start: Expr,
        tile: Expr,
        first: int,
    ) -> None:
        """Write the sums of tokens from ``start`` on, for a tile's rows from ``first`` on, with the bias if any."""
        if bias is not None:
            biases = bind(vectors.load(bias, tile * TILE + first))
            for total in sums:
                total.set(total.get() + biases)
        for token, total in enumerate(sums):
            self._store(vectors, out, start + token, tile, first, total)

    def _store(
        self, vectors: Vectors, out: Buffer, token: Expr, tile: Expr, first: int, value: Register
    ) -> None:
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
