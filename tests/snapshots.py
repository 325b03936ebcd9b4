"""Snapshots of a model with a layer of each kind, whose rows are known, and models that take them or do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlxc.artifact import Artifact, KvLayer, KvPlan, Manifest
from rlxc.dtypes import DType
from rlxc.errors import SnapshotError
from rlxc.runtime.engines import KvRows
from rlxc.runtime.model import Model
from rlxc.runtime.sequence import TokenSequence
from rlxc.runtime.snapshot import KvSnapshot, load_snapshot

LINE = 400  # the longest that an error may be

MakeModel = Callable[..., Model]


def model_maker(manifest: Manifest, folder: Path) -> Iterator[MakeModel]:
    """``make_model(engine, **changes)``: a model on an engine, with these fields of its manifest changed."""
    artifact = Artifact(folder, replace(manifest, lora=None))
    verification = artifact.start_verification()

    def make(engine: Any, **changes: Any) -> Model:
        changed = replace(artifact.manifest, **changes)
        return Model(replace(artifact, manifest=changed), engine, verification)

    yield make
    verification.close()


CONTEXT, HELD, WINDOW, VOCAB = 20, 13, 4, 258
HEADS = (3, 3)  # of each layer, and their size: codes take an odd number of bytes
KV_DIM = 9


def layer(index: int, layout: Any, dtype: DType, window: int | None = None, **more: Any) -> KvLayer:
    capacity = CONTEXT if window is None else 10
    return KvLayer(index, layout, capacity, window, *HEADS, dtype, 48, **more)


PLAN = KvPlan(
    CONTEXT,
    4,
    2,
    None,
    300,
    (
        layer(0, "linear", DType.F32),
        layer(1, "ring", DType.F32, WINDOW),
        layer(2, "paged", DType.F16),
        layer(3, "paged", DType.BF16, WINDOW),
        layer(4, "paged", DType.INT8),
        layer(5, "paged", DType.INT8, shares=4),
        layer(6, "linear", DType.F32, WINDOW),
    ),
)
FIRSTS = [0, 7, 0, 8, 0, 0, 0]
NUMPY = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: np.uint16, DType.INT8: np.int8}


def rows_of(layer: KvLayer, count: int = HELD) -> KvRows:
    if layer.shares is not None:
        nothing, scales = np.zeros((0, KV_DIM), np.int8), np.zeros((0, HEADS[0]), np.float32)
        return KvRows(count, nothing, nothing, scales, scales)
    rng = np.random.default_rng(layer.index)
    first = min(FIRSTS[layer.index], max(0, count - WINDOW + 1))
    shape = (2, count - first, KV_DIM)
    if layer.dtype is DType.INT8:
        scales = rng.uniform(0.01, 1, (2, count - first, HEADS[0])).astype(np.float32)
        return KvRows(first, *rng.integers(-127, 128, shape, np.int8), *scales)
    numbers = rng.standard_normal(shape).astype(np.float32)
    if layer.dtype is DType.BF16:
        return KvRows(first, *(numbers.view(np.uint32) >> 16).astype(np.uint16))
    return KvRows(first, *numbers.astype(NUMPY[layer.dtype]))


@dataclass
class RowsCache:
    """Holds rows; nothing can be computed with it."""

    position: int
    held: list[KvRows]
    oldest: int = 0

    def fork(self) -> RowsCache:
        return replace(self)

    def rows(self) -> list[KvRows]:
        return self.held


class RowsEngine:
    vocab_size, context, max_step = VOCAB, CONTEXT, 4

    def __init__(self) -> None:
        self.loaded: list[RowsCache] = []

    def load_cache(self, position: int, layers: Sequence[KvRows]) -> RowsCache:
        self.loaded.append(RowsCache(position, list(layers)))
        return self.loaded[-1]


def snapshot_of(model: Model, count: int = HELD) -> KvSnapshot:
    held = [rows_of(layer, count) for layer in model.manifest.kv_cache.layers]
    sequence = TokenSequence(RowsCache(count, held))  # type: ignore[arg-type]
    sequence.tokens.extend(range(100, 100 + count))
    if count:
        sequence.readings = [(0, ()), (5, (("ab" * 32, 0.5), ("cd" * 32, -1.0)))]
        sequence.invoked = {"ab" * 32: 5}
    return KvSnapshot.take(model, sequence)


def assert_refused(path: Path, model: Model, match: str = "is damaged: |is no snapshot, ") -> None:
    """Loading fails with one clear line, before the engine hears of it."""
    engine: Any = model.engine
    loaded = len(engine.loaded)
    with pytest.raises(SnapshotError, match=match) as caught:
        load_snapshot(path, model)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) - len(str(path)) < LINE and "\n" not in str(caught.value)
    assert len(engine.loaded) == loaded
