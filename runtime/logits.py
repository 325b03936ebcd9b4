"""Logits that summarise themselves: choosing a token looks at a few of them, not at a whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

BLOCK = 64
"""Logits that one maximum and one sum stand for."""

_LOWEST = np.finfo(np.float32).min

Number = TypeVar("Number", bound=np.generic)


def block_count(vocab: int) -> int:
    """The blocks of that many logits; the last one may be short."""
    return -(-vocab // BLOCK)


@dataclass(frozen=True)
class Logits:
    """The logits of one position, and a summary of every 64 of them.

    Attributes:
        values: f32 ``[vocab]``, as the model computed them.
        maxima: f32 ``[blocks]``, the largest logit of each block; NaN where a block holds one.
        sums: f32 ``[blocks]``, of e^(x - maximum) over each block; means nothing where the maximum is not finite.
        changed: ids whose logits are others than ``values`` has, ascending, and those logits.
    """

    values: Floats
    maxima: Floats
    sums: Floats
    changed: tuple[Ids, Floats] | None = None

    @classmethod
    def of(cls, values: Floats) -> Logits:
        """The logits f32 ``[vocab]``, summarised here."""
        padding = np.full(-len(values) % BLOCK, -np.inf, np.float32)
        padded = np.concatenate([values, padding]) if len(padding) else values
        starts = np.arange(0, len(padded), BLOCK)  # numpy reduces these faster than the rows of a matrix
        maxima = np.maximum.reduceat(padded, starts)
        with np.errstate(invalid="ignore"):  # infinity less itself
            below = padded.reshape(-1, BLOCK) - np.maximum(maxima, _LOWEST)[:, None]
        sums = np.add.reduceat(np.exp(below, out=below).ravel(), starts)
        return cls(values, maxima, sums)

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return len(self.values)

    def at(self, ids: Ids) -> Floats:
        """The logits of some tokens."""
        found: Floats = self.values[ids]
        if self.changed is not None:
            # Indexing with ids has made a copy.
            others, values = self.changed
            places = np.minimum(np.searchsorted(others, ids), len(others) - 1)
            is_changed = others[places] == ids
            found[is_changed] = values[places[is_changed]]
        return found

    def all(self) -> Floats:
        """The logits of all tokens; to be read, not written."""
        if self.changed is None:
            return self.values
        every = self.values.copy()
        every[self.changed[0]] = self.changed[1]
        return every

    def changing(self, ids: Ids, values: Floats) -> Logits:
        """The same logits but for those of ``ids``, ascending; only the blocks that hold them are read.

        It may be done once.
        """
        assert self.changed is None
        changed = replace(self, maxima=self.maxima.copy(), sums=self.sums.copy(), changed=(ids, values))
        for block in np.unique(ids // BLOCK):
            part = Logits.of(changed.at(self._ids_of(np.array([block]))))
            changed.maxima[block], changed.sums[block] = part.maxima[0], part.sums[0]
        return changed

    def best(self) -> tuple[int, float]:
        """The token with the largest logit, the lowest of equals, and that logit; a NaN counts as the largest."""
        ids = self.block(int(self.maxima.argmax()))
        values = self.at(ids)
        place = values.argmax()
        return int(ids[place]), float(values[place])

    def log_total(self) -> float:
        """The logarithm of the sum of all exponentials, where the largest logit is finite."""
        largest = self.maxima.max()
        return float(largest) + float(np.log(self.shares(largest).sum(dtype=np.float64)))

    def shares(self, largest: np.float32) -> Floats:
        """For each block, the sum of e^(x - largest)."""
        shares: Floats = self.sums * np.exp(self.maxima - largest)
        return shares

    def top(self, k: int) -> Ids:
        """The tokens with the ``k`` largest logits, ascending; the lowest ids where the last ones are equal."""
        # A token outside of the k blocks with the largest maxima has k better ones, or equal ones of lower id.
        ids = self._ids_of(_top(self.maxima, k))
        best: Ids = ids[_top(self.at(ids), k)]
        return best

    def above(self, least: float | np.float32) -> Ids:
        """The tokens whose logits are ``least`` or larger, ascending."""
        bound = np.float32(least)
        ids = self._ids_of(np.flatnonzero(self.maxima >= bound))
        found: Ids = ids[self.at(ids) >= bound]
        return found

    def block(self, index: int) -> Ids:
        """The tokens of a block."""
        return self._ids_of(np.array([index]))

    def _ids_of(self, blocks: npt.NDArray[np.integer]) -> Ids:
        ids = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        found: Ids = ids[ids < len(self.values)]
        return found


@dataclass(frozen=True)
class StepLogits:
    """The logits that a step computed, the caller's to keep.

    Attributes:
        values: f32 ``[B, R, vocab]``: ``R`` rows of each of ``B`` sequences.
        maxima: f32 ``[B, R, blocks]``, and
        sums: f32 ``[B, R, blocks]``, as in :class:`Logits`; None from an engine that does not make them.
    """

    values: Floats
    maxima: Floats | None = None
    sums: Floats | None = None

    def row(self, sequence: int, row: int) -> Logits:
        """One position's logits."""
        values = self.values[sequence, row]
        if self.maxima is None or self.sums is None:
            return Logits.of(values)
        return Logits(values, self.maxima[sequence, row], self.sums[sequence, row])


def _top(values: npt.NDArray[Number], k: int) -> Ids:
    """The places of the ``k`` largest values, ascending; the first ones where the last are equal."""
    if k >= len(values):
        return np.arange(len(values))
    least = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))
