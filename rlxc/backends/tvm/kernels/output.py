"""Where a matrix product puts its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Register, bind, when
from rlxc.backends.tvm.kernels.math import soft_cap
from rlxc.backends.tvm.kernels.rope import digits
from rlxc.backends.tvm.kernels.vector import Vectors


@dataclass(frozen=True)
class TileRows:
    """Rows of a tile of ``size`` rows, from ``first`` on: of the results' tile, and the one stored for it."""

    tile: Expr
    first: int
    stored: Expr
    size: int


@dataclass(frozen=True)
class OutputRows:
    """f32 ``[tokens, rows]``; a token's results begin ``stride`` elements after those of the token before.

    ``rows`` need not be whole tiles: nothing is written beyond them. A ``cap`` c makes c tanh(y / c) of y.
    """

    rows: int
    stride: int
    cap: float | None = None

    @property
    def name(self) -> str:
        """What of it a kernel's name says: all but the rows."""
        return f"{self.stride}{'' if self.cap is None else f'_cap_{digits(self.cap)}'}"

    def finish(
        self,
        vectors: Vectors,
        sums: Sequence[Register],
        bias: Buffer | None,
        out: Buffer,
        tokens: Sequence[Expr],
        place: TileRows,
    ) -> None:
        """Write the sums of tokens, for a tile's rows, with the bias of the stored tile if there is one."""
        if bias is not None:
            biases = bind(vectors.load(bias, place.stored * place.size + place.first))
            for total in sums:
                total.set(total.get() + biases)
        if self.cap is not None:
            for total in sums:
                total.set(soft_cap(vectors, total.get(), self.cap))
        for token, total in zip(tokens, sums):
            self._store(vectors, out, token, place, total)

    def _store(self, vectors: Vectors, out: Buffer, token: Expr, place: TileRows, value: Register) -> None:
        row = place.tile * place.size + place.first
        at = T.cast(token, "int64") * self.stride + row
        last, rest = divmod(self.rows, place.size)
        if not rest:
            vectors.store(out, at, value.get())
            return
        with when(place.tile < last):
            vectors.store(out, at, value.get())
        with when(place.tile == last):
            for lane in range(min(vectors.lanes, rest - place.first)):
                T.buffer_store(out, value.lane(lane), [at + lane])
