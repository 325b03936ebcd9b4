"""Snapshots: what a sequence held at one moment, to go back to, to look at, or to keep in a file.

Nobody writes to what a snapshot holds. Taking one, and going back to it, is a fork: the time for it depends neither on
the number of tokens nor on their keys and values.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import numpy.typing as npt

from rlxc.artifact import KvLayer
from rlxc.dtypes import DType
from rlxc.errors import SnapshotError
from rlxc.runtime.engines import KvRows
from rlxc.runtime.identity import difference
from rlxc.runtime.logits import Floats
from rlxc.runtime.model import Model
from rlxc.runtime.sequence import Tokens, TokenSequence
from rlxc.runtime.snapshot_file import Contents, read_contents, write_contents


@dataclass(frozen=True, eq=False)
class LayerKv:
    """The keys and values of one layer: positions ``first`` to ``first + n - 1``.

    Keys have their positions in them already, where the model rotates keys (RoPE).

    Attributes:
        first: 0 where the layer keeps everything; of a sliding-window layer, the oldest position that is held.
        keys: f32 ``[n, kv_dim]``, head after head.
        values: f32 ``[n, kv_dim]``.
    """

    first: int
    keys: Floats
    values: Floats


class KvSnapshot:
    """What a sequence held at one moment: its tokens, their keys and values, and what they were read with.

    ``session.snapshot()`` takes one, and :func:`load_snapshot` reads one from a file. The memory that it
    shares with the sequence stays in use until it is let go.
    """

    def __init__(self, model: Model, sequence: TokenSequence) -> None:
        self._sequence, self._manifest = sequence, model.manifest
        self._engine = ref(model.engine)  # a snapshot that is kept somewhere keeps no model loaded

    @classmethod
    def take(cls, model: Model, sequence: TokenSequence) -> KvSnapshot:
        """A snapshot of a sequence of this model; the sequence goes on as it is."""
        return cls(model, sequence.fork())

    @property
    def seq_len(self) -> int:
        """The number of tokens."""
        return self._sequence.position

    @property
    def tokens(self) -> Tokens:
        """Their ids, ``int64 [seq_len]``; a copy."""
        return self._sequence.ids

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it refers to, whether others share them or not."""
        return sum(self._sequence.cache.memory.values())

    def layers(self) -> list[LayerKv]:
        """The keys and values of each layer as floats, in copies.

        A layer without a window has ``seq_len`` of them, one with a window those that it holds. A layer that reads
        another one's cache has the same arrays as that one.
        """
        plan = self._manifest.kv_cache
        found: list[LayerKv] = []
        for layer, rows in zip(plan.layers, self._sequence.cache.rows()):
            found.append(_decoded(layer, rows) if layer.shares is None else found[layer.shares])
        return found

    def begin(self, model: Model) -> TokenSequence:
        """A sequence that goes on from here.

        On the engine that the snapshot was taken on this copies nothing. Another engine may be given as well, if it
        runs the same model, compiled alike; its context may be another.

        Raises:
            SnapshotError: the model or its compilation is another one, or the tokens do not fit its context.
            SessionError: there is not enough memory.
        """
        if self._engine() is model.engine:
            return self._sequence.fork()
        mismatch = difference(self._manifest, model.manifest)
        if mismatch is not None:
            raise SnapshotError(
                f"a snapshot of {self._manifest.model.name!r:.80} {mismatch.problem}", remedy=mismatch.remedy
            )
        context = model.manifest.kv_cache.context
        if self.seq_len > context:
            raise SnapshotError(
                f"the snapshot holds {self.seq_len} tokens, which do not fit the context of {context}",
                remedy=f"compile with --context {self.seq_len} or more",
            )
        return _loaded(model, self._contents())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which replaces one that is there; see :mod:`rlxc.runtime.snapshot_file`.

        Raises:
            SnapshotError: the file cannot be written; what was there is still there.
        """
        write_contents(Path(path), self._contents(), self._manifest)

    def _contents(self) -> Contents:
        sequence = self._sequence
        return Contents(sequence.ids, sequence.readings, sequence.invoked, sequence.cache.rows())


def load_snapshot(path: str | os.PathLike[str], model: Model) -> KvSnapshot:
    """Read a snapshot that :meth:`KvSnapshot.save` wrote.

    The file is checked as a whole before anything is made of it.

    Raises:
        SnapshotError: it cannot be read, is damaged, or is of another model or another compilation; or it does not
            fit the context.
        SessionError: there is not enough memory.
    """
    return KvSnapshot(model, _loaded(model, read_contents(Path(path), model.manifest)))


def _loaded(model: Model, contents: Contents) -> TokenSequence:
    try:
        cache = model.engine.load_cache(len(contents.tokens), contents.layers)
    except MemoryError as error:
        raise SnapshotError(
            f"not enough memory for a snapshot of {len(contents.tokens)} tokens",
            remedy="let go of other snapshots and sequences, or use a smaller prefix_cache",
        ) from error
    sequence = TokenSequence(cache)
    sequence.tokens = array("q", contents.tokens.tobytes())
    sequence.readings = list(contents.readings)
    sequence.invoked = dict(contents.invoked)
    return sequence


def _decoded(layer: KvLayer, rows: KvRows) -> LayerKv:
    keys = _floats(layer, rows.keys, rows.key_scales)
    return LayerKv(rows.first, keys, _floats(layer, rows.values, rows.value_scales))


def _floats(layer: KvLayer, stored: npt.NDArray[Any], scales: Floats | None) -> Floats:
    """Stored keys or values ``[n, kv_dim]`` as f32."""
    if layer.dtype is DType.BF16:  # the upper half of an f32's bits
        return (stored.astype(np.uint32) << 16).view(np.float32)
    floats = stored.astype(np.float32)
    if scales is None:
        return floats
    by_head = floats.reshape(-1, layer.heads, layer.head_dim) * scales[:, :, None]
    return by_head.reshape(floats.shape)
