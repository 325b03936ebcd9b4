"""A session's LoRA adapters: those that are loaded, and those that its steps run with."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlxc.artifact import UNIT_RANK, AdapterEntry, Artifact, LoraPlan, Verification
from rlxc.errors import OptionError, SessionError
from rlxc.runtime.adapters import ScaledStack, checked_scale
from rlxc.runtime.engines import Engine, Pairs, Prepared
from rlxc.runtime.logits import Floats
from rlxc.runtime.sequence import LoadedAdapter, Stack

if TYPE_CHECKING:
    from rlxc.weights.adapters import Adapter, LoraPair

AdapterName = str | os.PathLike[str]
"""The name of a loaded adapter, or the path of one: a GGUF file or a PEFT folder."""

_FOLD = "compile the model with it: adapters=[...], lora='fold'"


class SessionAdapters:
    """The adapters of a session, as ``session.adapters``.

    They lie on a stack, and their changes add up: ``y = W x + Σ sᵢ · (αᵢ / rᵢ) · Bᵢ (Aᵢ x)``. A change of the stack
    takes effect with the next step, and copies nothing. What the session has read before keeps the keys and values that
    it got then; to have it read anew, ``session.reset()`` and prefill it again.

    An adapter may lie on the stack twice: its scales add up, and it costs no more than once. The adapters that the
    artifact was compiled with are there from the start. Those that are folded into weights, wholly or in part, lie
    below the others, always at work.

    An adapter with invocation tokens (an activated LoRA) takes part from the first token of their last occurrence in
    a prompt on, which is looked for in each ``prefill``, ``generate`` and ``score``. In a sequence in which they never
    came, it does nothing. Tokens that the model generates do not invoke it, and ``reset`` makes it wait again.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine[Any, Any],
        verification: Verification,
        using: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._artifact, self._engine, self._using = artifact, engine, using
        self._loaded: dict[str, LoadedAdapter] = {}
        self._folded: dict[str, float] = {}
        self._below: Stack = ()  # what of the folded ones is not in weights
        self._entries: ScaledStack[LoadedAdapter] = ScaledStack()
        for entry in artifact.manifest.adapters:
            self._add_compiled(entry, verification)
        self._stack = self._with_below(self._entries.entries())

    def __len__(self) -> int:
        return len(self._folded) + len(self._entries)

    def entries(self) -> list[tuple[str, float]]:
        """The names and scales of all that is at work, the lowest first."""
        return [*self._folded.items(), *((adapter.name, scale) for adapter, scale in self._entries.entries())]

    @property
    def loaded(self) -> list[str]:
        """The names of the adapters that can be pushed without reading a file."""
        return list(self._loaded)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all loaded adapters take, pushed or not, beside the model's own."""
        below = {adapter for adapter, _ in self._below}
        return sum(adapter.prepared.nbytes for adapter in below.union(self._loaded.values()))

    @property
    def stack(self) -> Stack:
        """What the session's next step runs with."""
        return self._stack

    def load(self, path: AdapterName, name: str | None = None) -> str:
        """Read an adapter and keep it ready, so that :meth:`push` takes no time.

        Args:
            path: a GGUF file or a PEFT folder. One that is loaded already, under this name, is not loaded again.
            name: what to call it; by default what the file or folder is called, without its suffix.

        Returns:
            Its name.

        Raises:
            SessionError: the artifact takes no adapters, or not this one; another one has the name.
            RlxcError: it cannot be read; see :func:`rlxc.weights.adapters.open_adapter`.
        """
        with self._using():
            return self._load(_checked_path(path), name).name

    def unload(self, name: str) -> None:
        """Free the memory of an adapter that is not on the stack.

        Raises:
            SessionError: it is on the stack, or there is none of this name.
        """
        with self._using():
            self._refuse_folded(name, "unloaded")
            if name not in self._loaded:
                raise SessionError(
                    f"no adapter called {name!r} is loaded",
                    remedy=f"loaded: {', '.join(self._loaded) or 'none'}",
                )
            if any(adapter.name == name for adapter, _ in self._entries.entries()):
                raise SessionError(f"adapter {name!r} is on the stack", remedy="pop it first")
            del self._loaded[name]

    def push(self, name_or_path: AdapterName, scale: float = 1.0) -> None:
        """Put an adapter on top of the stack, from the next step on.

        Args:
            name_or_path: of a loaded adapter, or of one to load; see :meth:`load`.
            scale: what its change is multiplied by, besides its own alpha / rank. 0 is as if it were not there.

        Raises:
            OptionError: the scale is not a finite number.
            SessionError: the stack would have more ranks than the artifact was compiled for.
            RlxcError: as :meth:`load`.
        """
        with self._using():
            scale = checked_scale(scale)
            adapter = self._find(name_or_path)
            self._check_rank([*self._below, *self._entries.entries(), (adapter, scale)])
            self._entries.push(adapter, scale)
            self._changed()

    def pop(self) -> tuple[str, float] | None:
        """Take the top adapter off, from the next step on; it stays loaded.

        Returns:
            Its name and scale, or None from an empty stack.

        Raises:
            SessionError: only folded ones are left.
        """
        with self._using():
            if self._entries.is_empty and self._folded:
                self._refuse_folded(next(reversed(self._folded)), "popped")
            popped = self._entries.pop()
            self._changed()
            return None if popped is None else (popped[0].name, popped[1])

    def set_scale(self, name: str, scale: float) -> None:
        """Give an adapter of the stack another scale, from the next step on; if it lies there twice, the upper one.

        Raises:
            OptionError: the scale is not a finite number.
            SessionError: it is not on the stack, or folded.
        """
        with self._using():
            self._refuse_folded(name, "rescaled")
            self._entries.set_scale(name, scale)
            self._changed()

    def clear(self) -> None:
        """Take all adapters off, from the next step on; they stay loaded.

        Raises:
            SessionError: one is folded; the stack is unchanged.
        """
        with self._using():
            for name in self._folded:
                self._refuse_folded(name, "cleared")
            self._entries.clear()
            self._changed()

    def stack_of(self, entries: Iterable[tuple[AdapterName, float]]) -> Stack:
        """What steps run with if these adapters take the place of the session's stack; the caller holds the session.

        Raises:
            RlxcError: as :meth:`push`.
        """
        stack = self._with_below([(self._find(name), checked_scale(scale)) for name, scale in entries])
        self._check_rank(stack)
        return stack

    def find(self, fingerprint: str) -> LoadedAdapter:
        """The adapter with this fingerprint; the caller holds the session.

        Raises:
            SessionError: it is not loaded.
        """
        for adapter in [*self._loaded.values(), *(adapter for adapter, _ in self._below)]:
            if adapter.fingerprint == fingerprint:
                return adapter
        raise SessionError(
            f"an adapter that tokens were read with, of fingerprint {fingerprint[:12]}, is not loaded",
            remedy="load it again with session.adapters.load",
        )

    def fork(self, using: Callable[[], AbstractContextManager[None]]) -> SessionAdapters:
        """The same adapters on a stack of its own, for a fork of the session; the caller holds the session."""
        fork = SessionAdapters.__new__(SessionAdapters)
        vars(fork).update(vars(self))
        fork._using, fork._loaded, fork._entries = using, dict(self._loaded), self._entries.copy()
        fork._folded = dict(self._folded)
        return fork

    def release(self) -> None:
        """Let go of all adapters."""
        self._loaded.clear()
        self._folded.clear()
        self._entries.clear()
        self._below = self._stack = ()

    # --- the stack ------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self._stack = self._with_below(self._entries.entries())

    def _with_below(self, entries: Iterable[tuple[LoadedAdapter, float]]) -> Stack:
        return (*self._below, *entries)

    def _check_rank(self, entries: Iterable[tuple[LoadedAdapter, float]]) -> None:
        units = sum(adapter.prepared.units for adapter in {adapter for adapter, _ in entries})
        if units and units > self._plan().max_units:
            raise self._too_many(units, "the stack would have")

    def _too_many(self, units: int, what: str) -> SessionError:
        most, needed = self._plan().max_rank, units * UNIT_RANK
        return SessionError(
            f"{what} {needed} ranks, counted in units of {UNIT_RANK}; the artifact takes {most}",
            source=self._artifact.path,
            remedy=f"use fewer adapters at once, or compile with --lora-rank {needed}",
        )

    def _refuse_folded(self, name: str, what: str) -> None:
        if name in self._folded:
            raise SessionError(
                f"adapter {name!r} is folded into the weights and cannot be {what}",
                source=self._artifact.path,
                remedy="compile with lora='split' to change it while the model runs",
            )

    # --- loading --------------------------------------------------------------------------------------------------

    def _find(self, name_or_path: AdapterName) -> LoadedAdapter:
        """The loaded adapter of this name or path; a path that is not loaded is."""
        if isinstance(name_or_path, str):
            if name_or_path in self._loaded:
                return self._loaded[name_or_path]
            self._refuse_folded(name_or_path, "pushed")
        return self._load(_checked_path(name_or_path), None)

    def _load(self, path: Path, name: str | None) -> LoadedAdapter:
        plan = self._plan()
        if not os.path.exists(path):
            raise SessionError(
                f"no adapter called {str(path)!r} is loaded, and there is no such file",
                remedy=f"loaded: {', '.join(self._loaded) or 'none'}",
            )
        source = _resolved(path)
        for adapter in self._loaded.values():
            if adapter.source == source and name in (None, adapter.name):
                return adapter
        opened = self._open(path, name)
        known = self._loaded.get(opened.name)
        if known is not None and known.fingerprint == opened.fingerprint:
            return known  # it was compiled in, or the file was copied
        if opened.name in self._loaded or opened.name in self._folded:
            raise SessionError(
                f"another adapter is called {opened.name!r}",
                source=path,
                remedy="load this one with name=...",
            )
        loaded = self._prepared(opened, opened.fingerprint, plan, folded=())
        self._loaded[loaded.name] = loaded
        return loaded

    def _add_compiled(self, entry: AdapterEntry, verification: Verification) -> None:
        """Load an adapter that the artifact has with it, and put it where it belongs."""
        if entry.folded:
            self._folded[entry.name] = entry.scale
        if entry.file is None:
            return
        path = self._artifact.file(entry.file)
        verification.wait(entry.file)
        loaded = self._prepared(self._open(path, entry.name), entry.fingerprint, self._plan(), entry.folded)
        if entry.folded:
            self._below = (*self._below, (loaded, entry.scale))
        else:
            self._loaded[entry.name] = loaded
            self._entries.push(loaded, entry.scale)
        self._check_rank([*self._below, *self._entries.entries()])

    def _open(self, path: Path, name: str | None) -> Adapter:
        # Imported here because reading files is not needed to run a model, nor are the packages that it takes.
        from rlxc.weights.adapters import AdapterBase, open_adapter

        model = self._artifact.manifest.model
        base = AdapterBase(model.architecture, model.layers, model.heads, model.kv_heads)
        return open_adapter(path, base, name=name)

    def _prepared(
        self, adapter: Adapter, fingerprint: str, plan: LoraPlan, folded: Collection[str]
    ) -> LoadedAdapter:
        """An adapter in the engine's memory, without the matrices that are folded.

        Raises:
            SessionError: it changes something that the artifact cannot change while it runs.
        """
        outside = [t for t in adapter.invocation_tokens if t >= self._engine.vocab_size]
        if outside:
            raise SessionError(
                f"invocation token {outside[0]} is not in the vocabulary of {self._engine.vocab_size}",
                source=adapter.source,
                remedy="use an adapter of this model",
            )
        for tensor in adapter.replacements:
            if tensor not in folded:
                raise SessionError(
                    f"replaces {tensor}, which cannot be done while the model runs",
                    source=adapter.source,
                    remedy=_FOLD,
                )
        shapes = {part.tensor: (part.rows, part.columns) for part in plan.parts}
        pairs: Pairs = {
            tensor: _factors(adapter, tensor, pair, shapes.get(tensor))
            for tensor, pair in adapter.pairs.items()
            if tensor not in folded
        }
        units = max((-(-len(a) // UNIT_RANK) for a, _ in pairs.values()), default=0)
        if units > plan.max_units:
            raise self._too_many(units, f"adapter {adapter.name!r} has")
        try:
            prepared: Prepared = self._engine.prepare(pairs)
        except MemoryError as error:
            raise SessionError(
                "not enough memory for the adapter", source=adapter.source, remedy="unload another one"
            ) from error
        source = _resolved(adapter.source)
        return LoadedAdapter(adapter.name, source, fingerprint, prepared, adapter.invocation_tokens)

    def _plan(self) -> LoraPlan:
        plan = self._artifact.manifest.lora
        if plan is None:
            raise SessionError(
                "takes no adapters while it runs",
                source=self._artifact.path,
                remedy="compile the model with lora='split'",
            )
        return plan


def _factors(
    adapter: Adapter, tensor: str, pair: LoraPair, shape: tuple[int, int] | None
) -> tuple[Floats, Floats]:
    """A, and B times the pair's scale, of a matrix that the artifact can change; its shape is None if it cannot."""
    if pair.magnitude is not None:
        raise SessionError(
            f"is a DoRA for {tensor}, which cannot be added while the model runs",
            source=adapter.source,
            remedy=_FOLD,
        )
    if shape is None:
        raise SessionError(
            f"changes {tensor}, which the artifact cannot change while it runs",
            source=adapter.source,
            remedy="compile the model with this adapter and lora='split'",
        )
    found = (pair.b.shape[0], pair.a.shape[1])
    if found != shape:
        raise SessionError(
            f"{tensor} is {list(shape)} in the model, the adapter is for one of {list(found)}",
            source=adapter.source,
            remedy="use an adapter of this model",
        )
    with np.errstate(over="ignore"):
        b: Floats = pair.b * np.float32(pair.scale)
    if not np.isfinite(b).all():
        raise SessionError(f"B of {tensor} times its scale {pair.scale:g} overflows", source=adapter.source)
    return pair.a, b


def _checked_path(path: AdapterName) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise OptionError(f"an adapter is given by its name or path, got {path!r}")
    return Path(path)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))
