"""Prompts that begin alike: what was read for one is not read again for the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest

import numpy as np

from rlxc.runtime.logits import StepLogits
from rlxc.runtime.model import Model
from rlxc.runtime.sequence import Reading, Stack, Tokens, TokenSequence

POINT_EVERY = 512
"""Tokens between the points of a long prompt that another one can go on from, where layers have sliding windows."""

Readings = Sequence[tuple[int, Reading]]
"""What tokens were read with, each from that token on; one follows another only if they differ."""


class PrefixCache:
    """Sequences that were read before, so that a prompt goes on from the longest beginning that it shares with one.

    A beginning counts as shared as far as its tokens and the adapters that they were read with agree. A sequence with
    sliding windows can be cut back by a few tokens only: of a long prompt there are points in between, so that another
    one that leaves it early has not far to go.

    Entries are forks. They share memory with one another and with the sequences that go on from them, and hold no
    adapters. The least recently used go first when they take more than ``budget`` bytes together; none is kept that
    takes as much alone, or that a newer one makes needless.
    """

    def __init__(self, model: Model, budget: int) -> None:
        self._model, self._budget = model, budget
        self._entries: list[_Entry] = []  # the most recently used one last
        layers = model.manifest.kv_cache.layers
        self._loses_tokens = any(layer.window is not None and layer.layout != "linear" for layer in layers)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all entries take together; what they share counts once."""
        pieces: dict[int, int] = {}
        for entry in self._entries:
            pieces |= entry.memory
        return sum(pieces.values())

    def begin(self, tokens: Tokens, stack: Stack) -> TokenSequence:
        """A sequence that holds the longest beginning of a prompt that is known, or nothing.

        It leaves one token at least, because the logits after the last one are wanted. What activated adapters of the
        stack were invoked by is what it would be, had all of the prompt been read.

        Raises:
            SessionError: there is not enough memory for a new sequence.
        """
        fresh = self._model.new_sequence()
        if not self._entries:
            return fresh
        spans = groupby(fresh.spans(tokens, stack), key=lambda span: span.reading)
        readings = [(next(group).begin, reading) for reading, group in spans]
        entry, count = self._longest(tokens[:-1], readings)
        if entry is None:
            return fresh
        self._touch(entry)
        fresh.invoke(tokens, stack)
        sequence = entry.sequence.fork()
        sequence.truncate(count)
        sequence.invoked = {name: start for name, start in fresh.invoked.items() if start < count}
        return sequence

    def keep(self, sequence: TokenSequence) -> None:
        """Remember what a sequence holds now; the sequence may go on."""
        if not self._budget or not sequence.position:
            return
        new = _Entry(sequence.fork())
        if sum(new.memory.values()) > self._budget:
            return
        rollback = self._model.rollback
        known = next((entry for entry in reversed(self._entries) if entry.covers(new, rollback)), None)
        if known is not None:
            self._touch(known)
            return
        self._entries = [entry for entry in self._entries if not new.covers(entry, rollback)]
        self._entries.append(new)
        self._drop_oldest()

    def keep_point(self, sequence: TokenSequence, before: int) -> None:
        """Remember a prompt that is being read, every 512 tokens, where layers have sliding windows.

        Args:
            sequence: what holds it.
            before: how many tokens it held when this was called last.
        """
        if self._loses_tokens and sequence.position // POINT_EVERY > before // POINT_EVERY:
            self.keep(sequence)

    def read(self, tokens: Tokens, stack: Stack) -> tuple[TokenSequence, StepLogits, int]:
        """Read a whole prompt, as far as it is not known, and remember it.

        Returns:
            A sequence that holds it, the logits after its last token, as the only row, and how many tokens were known.

        Raises:
            ContextError: the prompt does not fit.
            SessionError: there is not enough memory.
        """
        self._model.check_room(len(tokens))
        sequence = self.begin(tokens, stack)
        known = before = sequence.position

        def after_step() -> None:
            nonlocal before
            self.keep_point(sequence, before)
            before = sequence.position

        logits = self._model.prefill(sequence, tokens[known:], stack, after_step)
        self.keep(sequence)
        return sequence, logits, known

    def clear(self) -> None:
        """Forget everything; sequences that went on from here stay as they are."""
        self._entries.clear()

    def _longest(self, tokens: Tokens, readings: Readings) -> tuple[_Entry | None, int]:
        """The entry with the longest usable beginning of these tokens, and how long it is.

        The whole prompt, which is one token longer, must be as free to be cut back as if it had been read anew.
        """
        best, most, free = None, 0, max(0, len(tokens) + 1 - self._model.rollback)
        for entry in reversed(self._entries):
            if entry.oldest > free:
                continue
            limit = min(len(entry.tokens), len(tokens))
            # One that is no better than the best usually differs where a better one would have to agree.
            if limit <= most or entry.tokens[most] != tokens[most]:
                continue
            count = _agreement(entry.tokens[:limit], tokens[:limit], entry.readings, readings)
            if count > most and count >= entry.oldest:
                best, most = entry, count
        return best, most

    def _touch(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)

    def _drop_oldest(self) -> None:
        """Drop the least recently used entries, so many that the others hold the budget."""
        pieces: dict[int, int] = {}
        total, place = 0, len(self._entries)
        while place:
            memory = self._entries[place - 1].memory
            total += sum(nbytes for name, nbytes in memory.items() if name not in pieces)
            if total > self._budget:
                break
            pieces |= memory
            place -= 1
        del self._entries[:place]


class _Entry:
    """A sequence that nobody writes to, with what is asked of it often."""

    def __init__(self, sequence: TokenSequence) -> None:
        self.sequence = sequence
        self.tokens: Tokens = np.frombuffer(sequence.tokens, np.int64)  # in place: they never change
        self.readings = sequence.readings
        self.oldest = sequence.cache.oldest

    @property
    def memory(self) -> Mapping[int, int]:
        """See `Cache.memory`. A piece of it grows where a sequence that shares it goes on in place."""
        return self.sequence.cache.memory

    def covers(self, other: _Entry, rollback: int) -> bool:
        """Whether this serves every prompt that the other one serves; one that goes on has a token more at least."""
        count = len(other.tokens)
        if count > len(self.tokens) or self.oldest > max(0, count + 1 - rollback):
            return False
        if self.tokens[count - 1] != other.tokens[-1]:
            return False
        return _agreement(self.tokens[:count], other.tokens, self.readings, other.readings) == count


def _agreement(tokens: Tokens, others: Tokens, readings: Readings, other_readings: Readings) -> int:
    """How many tokens, of as many here as there, are the same and were read with the same."""
    differ = tokens != others
    first = int(differ.argmax())
    count = first if differ[first] else len(tokens)
    for here, there in zip_longest(readings, other_readings, fillvalue=(count, ())):
        if here != there:  # they were the same up to where the first of the two begins
            return min(count, here[0], there[0])
    return count
