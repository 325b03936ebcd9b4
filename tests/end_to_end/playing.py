"""Random use of sessions that hold, take back, share, keep and reload what they have read.

A `Player` uses a session and its forks in random ways, and compares logits with those of a fresh run of the same
tokens. What must be possible it knows from the plan alone: see `Held`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from small_model import VOCAB

from rlxc.artifact import KvPlan
from rlxc.errors import RollbackError
from rlxc.runtime import KvSnapshot, Session

Logits = npt.NDArray[np.float32]
Tokens = tuple[int, ...]

_MOST_SESSIONS, _MOST_SNAPSHOTS = 3, 4
_MOST_ACTIONS = 16


class Fresh:
    """Logits of an artifact after tokens that are read from an empty sequence on, with nothing kept of others."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.after: Callable[[Tokens], Logits] = lru_cache(4096)(self._after)

    def _after(self, tokens: Tokens) -> Logits:
        self._session.reset()
        return self._session.prefill(tokens)


@dataclass(frozen=True)
class Held:
    """What a sequence must hold, and how far its windows have moved on: at least and at most to so many tokens."""

    tokens: Tokens = ()
    least: int = 0
    most: int = 0

    def grown(self, tokens: Sequence[int]) -> Held:
        count = len(self.tokens) + len(tokens)
        return Held((*self.tokens, *tokens), max(self.least, count), max(self.most, count))

    def cut(self, position: int) -> Held:
        return replace(self, tokens=self.tokens[:position])


class Rollback:
    """How far back a sequence can go, as far as the plan says so.

    The newest ``rollback`` tokens can be taken back. Where a windowed layer has no row for what would be seen, they
    cannot: it holds its ``capacity`` at most. In between, it depends on how pages or jumps fell.
    """

    def __init__(self, plan: KvPlan) -> None:
        limited = [layer for layer in plan.layers if layer.window and layer.capacity < plan.context]
        self.forgets = bool(limited)
        self._least = plan.rollback
        self._most = min(
            (layer.capacity - (layer.window or 0) + 1 for layer in limited), default=plan.context
        )

    def must_work(self, held: Held, position: int) -> bool:
        return not self.forgets or held.most - position <= self._least

    def must_fail(self, held: Held, position: int) -> bool:
        return self.forgets and position > 0 and held.least - position > self._most


@dataclass
class _Sequence:
    session: Session
    held: Held = field(default_factory=Held)


class Player:
    """Uses a session at random; the same seed does the same.

    Args:
        session: it keeps prefixes.
        fresh: of the same artifact.
        folder: for a snapshot's file.
        tolerance: how far logits may be from a fresh run's.

    Attributes:
        worst: the largest difference so far.
        done: how often each action was taken.
        refused: how often a sequence could not go back.
    """

    def __init__(self, session: Session, fresh: Fresh, folder: Path, tolerance: float) -> None:
        self.session, self.fresh, self.folder, self.tolerance = session, fresh, folder, tolerance
        self.context = session.context
        self.rollback = Rollback(session.artifact.manifest.kv_cache)
        self.worst, self.refused = 0.0, 0
        self.done: dict[str, int] = dict.fromkeys(ACTIONS, 0)

    def play(self, seed: int) -> None:
        """One random sequence of actions, after each of which everything that is held can be told."""
        self.rng = np.random.default_rng(seed)
        self.session.reset()
        self.sequences = [_Sequence(self.session)]
        self.snapshots: list[tuple[KvSnapshot, Held]] = []
        self.saved: Held | None = None
        self.known: list[Tokens] = [()]  # what was held at some time, to begin alike
        self.log = [f"seed {seed}"]
        names, weights = list(ACTIONS), np.array(list(ACTIONS.values()), float)
        try:
            self.current = self.sequences[0]
            if self.rng.random() < 0.5:  # so long that windows have moved on
                self.read(self.rng.integers(3, VOCAB, self.rng.integers(70, 110)).tolist())
            for _ in range(self.rng.integers(4, _MOST_ACTIONS)):
                self.current = self.sequences[self.rng.integers(len(self.sequences))]
                name = str(self.rng.choice(names, p=weights / weights.sum()))
                getattr(self, name)()
                self.done[name] += 1
                self.check()
            for sequence in self.sequences:  # what nobody has looked at since the last change
                self.current = sequence
                self.decode()
            for snapshot, held in self.snapshots:
                self.note("last restore", held)
                self.session.restore(snapshot)
                self.sequences[0].held = held
                self.current = self.sequences[0]
                self.decode()
        except Exception as error:
            raise AssertionError("\n".join(self.log)) from error
        finally:
            for sequence in self.sequences[1:]:
                sequence.session.close()

    def check(self) -> None:
        for sequence in self.sequences:
            assert sequence.session.position == len(sequence.held.tokens)
        for snapshot, held in self.snapshots:
            assert tuple(snapshot.tokens.tolist()) == held.tokens

    def note(self, *words: Any) -> None:
        self.log.append(" ".join(map(str, words)))

    def new_tokens(self, most: int) -> list[int]:
        """Up to so many, or as many as there is room for but for one."""
        room = self.context - 1 - len(self.current.held.tokens)
        count = min(int(self.rng.integers(1, most + 1)), room)
        return self.rng.integers(3, VOCAB, max(count, 0)).tolist()

    def read(self, tokens: Sequence[int]) -> None:
        held = self.current.held.grown(tokens)
        self.note("read", len(self.current.held.tokens), "+", tokens)
        self.compare(self.current.session.prefill(tokens), held)

    def compare(self, logits: Logits, held: Held) -> None:
        self.current.held = held
        self.known.append(held.tokens)
        difference = float(np.abs(logits - self.fresh.after(held.tokens)).max())
        self.worst = max(self.worst, difference)
        assert difference <= self.tolerance, f"{difference} off after {len(held.tokens)} tokens"

    # --- actions ----------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        tokens = self.new_tokens(int(self.rng.choice([3, 20, 90])))
        if tokens:
            self.read(tokens)

    def decode(self) -> None:
        for token in self.new_tokens(3):
            self.note("decode", token)
            self.compare(self.current.session.decode(token), self.current.held.grown([token]))

    def snapshot(self) -> None:
        self.note("snapshot of", len(self.current.held.tokens))
        self.snapshots.append((self.current.session.snapshot(), self.current.held))
        del self.snapshots[:-_MOST_SNAPSHOTS]

    def restore(self) -> None:
        if self.snapshots:
            snapshot, held = self.snapshots[self.rng.integers(len(self.snapshots))]
            self.note("restore", len(held.tokens))
            self.current.session.restore(snapshot)
            self.current.held = held

    def truncate(self) -> None:
        """By a few tokens, or to anywhere; where that cannot be, nothing has changed."""
        session, held = self.current.session, self.current.held
        position = self._earlier()
        self.note("truncate", len(held.tokens), "to", position)
        try:
            session.truncate(position)
        except RollbackError:
            assert not self.rollback.must_work(held, position), "it should have gone back"
            self.note("refused")
            self.refused += 1
            assert tuple(session.snapshot().tokens.tolist()) == held.tokens
            self.decode()
            return
        assert not self.rollback.must_fail(held, position), "it should not have gone back"
        self.current.held = held.cut(position)

    def replay(self) -> None:
        session, held = self.current.session, self.current.held
        position = self._earlier()
        self.note("truncate", len(held.tokens), "to", position, "with replay")
        session.truncate(position, replay=True)
        self.current.held = replace(held.cut(position), least=position)  # it may have been read again

    def fork(self) -> None:
        if len(self.sequences) < _MOST_SESSIONS:
            self.note("fork at", len(self.current.held.tokens))
            self.sequences.append(_Sequence(self.current.session.fork(), self.current.held))

    def leave(self) -> None:
        """A fork ends, and what it shared with others is theirs alone."""
        if self.current.session is not self.session:
            self.note("close a fork of", len(self.current.held.tokens))
            self.current.session.close()
            self.sequences.remove(self.current)

    def save(self) -> None:
        self.note("save", len(self.current.held.tokens))
        self.current.session.snapshot().save(self.folder / "saved")
        self.saved = self.current.held

    def load(self) -> None:
        if self.saved is not None:
            self.note("load", len(self.saved.tokens))
            self.current.session.restore(self.current.session.load_snapshot(self.folder / "saved"))
            self.current.held = self.saved

    def begin_alike(self) -> None:
        """Another prompt, which begins as something that was held at some time."""
        known = self.known[self.rng.integers(len(self.known))]
        shortest = max(0, len(known) - 40) if self.rng.random() < 0.5 else 0
        tokens = known[: self.rng.integers(shortest, len(known) + 1)]
        self.current.session.reset()
        self.current.held = Held()
        prompt = [*tokens, *self.new_tokens(4)]
        self.note("begin", len(tokens), "alike, then", prompt[len(tokens) :])
        self.compare(self.current.session.prefill(prompt), Held().grown(prompt))

    def _earlier(self) -> int:
        length = len(self.current.held.tokens)
        if self.rng.random() < 0.6:
            return max(0, length - int(self.rng.integers(0, 12)))
        return int(self.rng.integers(0, length + 1))


ACTIONS: Mapping[str, int] = {
    "prefill": 5,
    "decode": 4,
    "snapshot": 3,
    "restore": 3,
    "truncate": 5,
    "replay": 1,
    "fork": 2,
    "leave": 1,
    "save": 1,
    "load": 1,
    "begin_alike": 2,
}
"""The player's methods, and how often each is taken."""
