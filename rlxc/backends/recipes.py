"""Evaluates weights' recipes, a few rows at a time, while the artifact is written.

Memory stays flat whatever a weight's size: what a recipe makes exists for one chunk of rows only, and what the model
file has is read in place. The small sides of an adapter, A and B, stay in memory while their matrix is folded, and a
vector that is balanced is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.errors import UnsupportedError, WeightError
from rlxc.ir import Balance, Concat, Encode, Fold, Source, Weight
from rlxc.weights.encode import encode
from rlxc.weights.encode_keeping import encode_keeping, orthonormal
from rlxc.weights.formats import FORMATS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ReadBytes = Callable[[str], Bytes]
"""Gives a tensor of the model file, still packed, as bytes ``[nbytes]``, by its name."""

CHUNK_VALUES = 1 << 20
"""How many values are computed at a time: a few megabytes."""

_ReadRows = Callable[[int, int], Floats]
"""Gives the values f32 ``[stop - start, in]`` of a weight's rows ``start`` to ``stop``."""


@dataclass
class Loss:
    """What encoding a weight cost, as sums of squares over all its elements so far.

    ``exact`` are the values that were encoded, ``error`` is what they changed by. ``change`` is what adapters folded
    into them had changed before, and ``lost`` the error in the same directions of the input; 0 where none was.
    """

    exact: float = 0.0
    error: float = 0.0
    change: float = 0.0
    lost: float = 0.0

    @property
    def relative(self) -> float:
        """``||encoded - exact|| / ||exact||``."""
        return sqrt(self.error / self.exact) if self.exact else 0.0

    @property
    def of_change(self) -> float | None:
        """The part of what adapters changed that encoding spoilt; None without an adapter.

        ``||(encoded - exact) A^T|| / ||(exact - base) A^T||``, with the adapters' A made orthonormal.
        """
        return sqrt(self.lost / self.change) if self.change else None


class Losses:
    """Collects what encoding cost, by the names of the weights that were encoded (parts of a stack one by one)."""

    def __init__(self) -> None:
        self.by_weight: dict[str, Loss] = {}

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Each weight's :attr:`Loss.relative` and :attr:`Loss.of_change`, as plain data."""
        return {
            name: {"relative": loss.relative, "of_change": loss.of_change}
            for name, loss in sorted(self.by_weight.items())
        }

    def add(self, name: str, exact: Floats, encoded: Floats) -> Loss:
        """Count some rows of a weight: their values before and after."""
        loss = self.by_weight.setdefault(name, Loss())
        loss.exact += _square_sum(exact)
        loss.error += _square_sum(encoded - exact)
        return loss


def packed_rows(weight: Weight, read: ReadBytes, losses: Losses | None = None) -> Iterator[Bytes]:
    """The rows of a weight in its own format, following its recipe.

    Args:
        weight: a matrix ``[out, in]``; experts' matrices ``[E, out, in]``, which count as ``E * out`` rows; or a
            vector ``[n]``, which counts as ``n`` rows of one element.
        read: gives the bytes of the model file's tensors.
        losses: told what encoding costs.

    Yields:
        ``uint8 [rows, row_bytes]``: a tensor of the file whole and in place, anything else a few rows at a time.

    Raises:
        UnsupportedError: the recipe stacks different formats, or is an alias.
        WeightError: values that folding makes, or that are encoded, are not finite, or too large for the format.
    """
    match weight.recipe:
        case Source(tensor):
            yield _file_rows(weight, read(tensor))
        case Concat(parts):
            for part in parts:
                _require_same_format(weight, part)
                yield from packed_rows(part, read, losses)
        case Encode(part):
            encoder = _Encoder(weight, part, read, losses)
            yield from (encoder.encoded(start, stop) for start, stop in _chunks(weight))
        case Fold() | Balance():
            rows = _reader(weight, read)
            for start, stop in _chunks(weight):
                yield rows(start, stop).view(np.uint8)
        case _:
            raise _no_bytes(weight)


def _reader(weight: Weight, read: ReadBytes) -> _ReadRows:
    """A function that gives the decoded values of any rows of a weight."""
    columns = _shape(weight)[1]
    match weight.recipe:
        case Source(tensor):
            packed, fmt = _file_rows(weight, read(tensor)), FORMATS[weight.type.dtype]
            return lambda start, stop: fmt.decode(packed[start:stop], columns)
        case Concat(parts):
            readers = [_reader(part, read) for part in parts]
            ends = np.cumsum([0, *(_shape(part)[0] for part in parts)]).tolist()

            def stacked(start: int, stop: int) -> Floats:
                pieces = [
                    rows(max(start - first, 0), min(stop, end) - first)
                    for rows, (first, end) in zip(readers, pairwise(ends))
                    if start < end and first < stop
                ]
                return np.concatenate(pieces)

            return stacked
        case Encode(part):
            encoder, fmt = _Encoder(weight, part, read, None), FORMATS[weight.type.dtype]
            return lambda start, stop: fmt.decode(encoder.encoded(start, stop), columns)
        case Fold() as fold:
            return _FoldedReader(weight, fold, read)
        case Balance() as balance:
            vector = _balanced(weight, balance, read)
            return lambda start, stop: vector[start:stop]
        case _:
            raise _no_bytes(weight)


class _FoldedReader:
    """Rows of ``base + scale * B A``, scaled to the magnitude if there is one; a row of zeros stays as it is.

    Attributes:
        base: gives the rows before anything was folded into them.
        directions: what all adapters' products have their rows made of, f32 ``[ranks, in]``.
    """

    def __init__(self, weight: Weight, fold: Fold, read: ReadBytes) -> None:
        self._name = weight.name
        self._inner = _reader(fold.base, read)
        a, b, *self._magnitude = (_reader(part, read)(0, _shape(part)[0]) for part in fold.parts[1:])
        left, self._right = (a.T, b.T) if fold.transposed else (b, a)
        with np.errstate(over="ignore"):  # what is too large is found below
            self._left: Floats = left * np.float32(fold.scale)
        self.base: _ReadRows = self._inner
        self.directions: Floats = self._right
        if isinstance(self._inner, _FoldedReader):
            self.base = self._inner.base
            self.directions = np.concatenate([self._inner.directions, self._right])

    def __call__(self, start: int, stop: int) -> Floats:
        with np.errstate(all="ignore"):
            folded = self._inner(start, stop) + self._left[start:stop] @ self._right
            for magnitude in self._magnitude:
                lengths = np.linalg.norm(folded, axis=1, keepdims=True)
                folded *= np.divide(
                    magnitude[start:stop], lengths, out=np.zeros_like(lengths), where=lengths > 0
                )
        if not np.isfinite(folded).all():
            raise WeightError(
                "folding an adapter into it gives values that are infinite or not a number",
                source=f"@{self._name}",
                remedy="use a model and adapters whose values are finite, and a smaller scale",
            )
        return folded


def _balanced(weight: Weight, balance: Balance, read: ReadBytes) -> Floats:
    """A balanced vector, as a column ``[n, 1]``."""
    own, other = (_reader(part, read)(0, _shape(part)[0])[:, 0] for part in balance.parts)
    if not own.any() or not other.any():
        return own[:, None]
    with np.errstate(all="ignore"):  # what is not finite is found below
        factors = np.sqrt(_sizes(other, balance) / _sizes(own, balance))
        balanced = (own * factors).astype(np.float32)
    if not np.isfinite(balanced).all():
        raise WeightError(
            "balancing it gives values that are infinite or not a number",
            source=f"@{weight.name}",
            remedy="use a model whose values are finite, or another type of KV cache than int8",
        )
    return balanced[:, None]


def _sizes(vector: Floats, balance: Balance) -> npt.NDArray[np.float64]:
    """The size of each channel, or of the pair that it belongs to."""
    sizes = np.abs(vector, dtype=np.float64)
    rotated = sizes[: balance.dim]
    pairs = rotated.reshape(-1, 2).T if balance.interleaved else rotated.reshape(2, -1)
    pairs[:] = np.hypot(*pairs)
    floored: npt.NDArray[np.float64] = np.maximum(sizes, balance.FLOOR * sizes.mean())
    return floored


class _Encoder:
    """Encodes rows of one weight as another, and counts what that costs if somebody wants to know."""

    def __init__(self, weight: Weight, part: Weight, read: ReadBytes, losses: Losses | None) -> None:
        self.weight, self.losses = weight, losses
        self.values = _reader(part, read)
        self.folded = self.values if isinstance(self.values, _FoldedReader) else None

    def encoded(self, start: int, stop: int) -> Bytes:
        """The bytes ``[stop - start, row_bytes]`` of rows ``start`` to ``stop``."""
        dtype, exact = self.weight.type.dtype, self.values(start, stop)
        try:
            if self.folded is None:
                packed = encode(dtype, exact)
            else:
                packed = encode_keeping(dtype, exact, self.folded.directions)
        except WeightError as error:
            raise WeightError(error.problem, source=f"@{self.weight.name}", remedy=error.remedy) from None
        if self.losses is not None:
            decoded = FORMATS[dtype].decode(packed, exact.shape[1])
            loss = self.losses.add(self.weight.name, exact, decoded)
            if self.folded is not None:
                basis = orthonormal(self.folded.directions).T
                loss.change += _square_sum((exact - self.folded.base(start, stop)) @ basis)
                loss.lost += _square_sum((decoded - exact) @ basis)
        return packed


def _file_rows(weight: Weight, data: Bytes) -> Bytes:
    rows, columns = _shape(weight)
    return data.reshape(rows, FORMATS[weight.type.dtype].row_bytes(columns))


def _shape(weight: Weight) -> tuple[int, int]:
    """Rows, those of all experts, and columns; a vector is a column."""
    *rows, columns = map(int, weight.type.shape)
    return (prod(rows), columns) if rows else (columns, 1)


def _chunks(weight: Weight) -> Iterator[tuple[int, int]]:
    rows, columns = _shape(weight)
    step = max(1, CHUNK_VALUES // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _square_sum(values: npt.NDArray[np.floating[Any]]) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _require_same_format(weight: Weight, part: Weight) -> None:
    if part.type.dtype is not weight.type.dtype:
        raise UnsupportedError(f"@{weight.name} stacks {part.type.dtype} and {weight.type.dtype}")


def _no_bytes(weight: Weight) -> UnsupportedError:
    return UnsupportedError(f"recipe {weight.recipe} of @{weight.name} cannot be stored")
