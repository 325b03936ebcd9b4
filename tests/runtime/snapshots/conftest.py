"""Models whose snapshots are taken, and a file of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from snapshots import PLAN, MakeModel, RowsEngine, model_maker, snapshot_of

from rlxc.artifact import Manifest
from rlxc.runtime.model import Model


@pytest.fixture
def make_model(split_manifest: Manifest, tmp_path: Path) -> Iterator[MakeModel]:
    yield from model_maker(split_manifest, tmp_path)


@pytest.fixture
def every(make_model: MakeModel) -> Model:
    """A model with a layer of each kind."""
    return make_model(RowsEngine(), kv_cache=PLAN)


@pytest.fixture
def saved(every: Model, tmp_path: Path) -> Path:
    """A file of it."""
    path = tmp_path / "a.snapshot"
    snapshot_of(every).save(path)
    return path
