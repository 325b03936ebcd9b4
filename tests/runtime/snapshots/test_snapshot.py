"""Snapshots in memory and in files: what they hold, and how sequences go on from them."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize, safe_open
from snapshots import FIRSTS, HELD, KV_DIM, PLAN, MakeModel, rows_of, snapshot_of

from rlxc.artifact import KvLayer
from rlxc.dtypes import DType
from rlxc.errors import RlxcError, SessionError, SnapshotError
from rlxc.runtime.engines import KvRows
from rlxc.runtime.identity import identity
from rlxc.runtime.model import Model
from rlxc.runtime.sequence import LoadedAdapter, TokenSequence
from rlxc.runtime.snapshot import KvSnapshot, load_snapshot

CALL = (7, 8)


@pytest.fixture
def model(make_model: MakeModel, engine: Any) -> Model:
    return make_model(engine)


def read(model: Model, tokens: Sequence[int], stack: Any = ()) -> TokenSequence:
    sequence = model.new_sequence()
    model.prefill(sequence, np.array(tokens, np.int64), stack)
    return sequence


def after(model: Model, sequence: TokenSequence, token: int, stack: Any = ()) -> Any:
    return model.decode([sequence], [token], [stack]).values[0, 0]


def activated(model: Model) -> LoadedAdapter:
    factors = np.ones((2, 4, 4), np.float32)
    prepared = model.engine.prepare({"blk.0.attn_q.weight": (factors[0], factors[1])})
    return LoadedAdapter("a", Path("a"), "ab" * 32, prepared, CALL)


def test_snapshot_stays_as_it_was_when_its_sequences_go_on(model: Model, engine: Any) -> None:
    sequence = read(model, [3, 4, 5])
    snapshot = KvSnapshot.take(model, sequence)
    after(model, sequence, 6)
    first, second = snapshot.begin(model), snapshot.begin(model)
    np.testing.assert_array_equal(after(model, first, 9), engine.logits([3, 4, 5, 9]))
    np.testing.assert_array_equal(after(model, second, 8), engine.logits([3, 4, 5, 8]))
    np.testing.assert_array_equal(after(model, sequence, 7), engine.logits([3, 4, 5, 6, 7]))
    assert (snapshot.seq_len, snapshot.tokens.tolist()) == (3, [3, 4, 5])


def test_snapshot_of_one_engine_goes_on_on_another(model: Model, make_model: MakeModel, engine: Any) -> None:
    stack = ((activated(model), 0.5),)
    snapshot = KvSnapshot.take(model, read(model, [3, 7, 8, 5], stack))
    other = make_model(type(engine)())
    sequence = snapshot.begin(other)
    assert sequence.ids.tolist() == [3, 7, 8, 5]
    assert sequence.readings == [(0, ()), (1, (("ab" * 32, 0.5),))]
    assert sequence.invoked == {"ab" * 32: 1}
    assert snapshot.begin(other).cache is not sequence.cache


def test_snapshot_needs_the_same_model_and_room(model: Model, make_model: MakeModel, engine: Any) -> None:
    snapshot = KvSnapshot.take(model, read(model, range(10, 40)))
    manifest = model.manifest
    other = make_model(type(engine)(), model=replace(manifest.model, fingerprint="1" * 64))
    with pytest.raises(SnapshotError, match="a snapshot of 'tiny' is of another model; use an artifact of"):
        snapshot.begin(other)
    small = make_model(type(engine)(), kv_cache=replace(manifest.kv_cache, context=29))
    with pytest.raises(
        SnapshotError, match="holds 30 tokens, which do not fit the context of 29; compile with"
    ):
        snapshot.begin(small)
    large = make_model(type(engine)(), kv_cache=replace(manifest.kv_cache, context=80))
    assert snapshot.begin(large).position == 30


def test_snapshot_keeps_no_engine_alive(make_model: MakeModel, engine: Any) -> None:
    model = make_model(type(engine)())
    snapshot = KvSnapshot.take(model, read(model, [3, 4]))
    gone = weakref.ref(model.engine)
    del model
    assert gone() is None
    assert snapshot.tokens.tolist() == [3, 4]


def test_snapshot_counts_the_memory_that_it_refers_to(model: Model) -> None:
    assert KvSnapshot.take(model, read(model, range(10, 19))).nbytes == 3 * 64  # pages of four tokens


def test_no_memory_for_another_cache_is_an_error_of_the_session(
    model: Model, make_model: MakeModel, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = KvSnapshot.take(model, read(model, [3, 4]))
    other = make_model(type(engine)())

    def load_cache(position: int, layers: Sequence[KvRows]) -> Any:
        raise MemoryError

    monkeypatch.setattr(other.engine, "load_cache", load_cache)
    with pytest.raises(SessionError, match="not enough memory for a snapshot of 2 tokens"):
        snapshot.begin(other)


# --- what is in it ------------------------------------------------------------------------------------------------


def in_float64(layer: KvLayer, stored: Any, scales: Any) -> Any:
    """What stored numbers mean, decoded one by one."""
    if layer.dtype is DType.BF16:
        each = [struct.unpack("<f", struct.pack("<I", int(bits) << 16))[0] for bits in stored.ravel()]
        return np.array(each, np.float64).reshape(stored.shape)
    if layer.dtype is DType.INT8:
        return stored.astype(np.float64) * np.repeat(scales.astype(np.float64), layer.head_dim, axis=1)
    return stored.astype(np.float64)


def assert_same_rows(one: Sequence[KvRows], other: Sequence[KvRows]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.first == theirs.first
        for name in ("keys", "values", "key_scales", "value_scales"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_layers_are_decoded_to_floats(every: Model) -> None:
    """Exact, but for codes: code times scale is rounded once, to f32."""
    layers = snapshot_of(every).layers()
    assert [kv.first for kv in layers] == FIRSTS
    for kv, layer in zip(layers, PLAN.layers, strict=True):
        rows = rows_of(PLAN.layers[layer.shares] if layer.shares is not None else layer)
        for found, stored, scales in (
            (kv.keys, rows.keys, rows.key_scales),
            (kv.values, rows.values, rows.value_scales),
        ):
            assert found.dtype == np.float32
            assert found.shape == (HELD - kv.first, KV_DIM)
            rounding = 2.0**-24 if layer.dtype is DType.INT8 else 0.0
            np.testing.assert_allclose(found, in_float64(layer, stored, scales), rtol=rounding, atol=0)
    assert layers[5].keys is layers[4].keys


@pytest.mark.parametrize("count", [0, 6, HELD])
def test_saved_snapshot_is_loaded_as_it_was(every: Model, tmp_path: Path, count: int) -> None:
    snapshot = snapshot_of(every, count)
    snapshot.save(tmp_path / "a.snapshot")
    loaded = load_snapshot(tmp_path / "a.snapshot", every)
    sequence, original = loaded.begin(every), snapshot.begin(every)
    assert loaded.tokens.tolist() == list(range(100, 100 + count))
    assert (sequence.readings, sequence.invoked) == (original.readings, original.invoked)
    assert_same_rows(sequence.cache.rows(), [rows_of(layer, count) for layer in PLAN.layers])
    assert os.listdir(tmp_path) == ["a.snapshot"]


def test_same_snapshot_gives_the_same_bytes(every: Model, tmp_path: Path) -> None:
    for name in "ab":
        snapshot_of(every).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_file_is_one_that_the_safetensors_library_reads(every: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.snapshot"
    snapshot_of(every).save(path)
    tensors = dict(deserialize(path.read_bytes()))
    names = {DType.F32: "F32", DType.F16: "F16", DType.BF16: "BF16", DType.INT8: "I8"}
    assert tensors.pop("tokens") == {
        "dtype": "I64",
        "shape": [HELD],
        "data": bytearray(np.arange(100, 100 + HELD, dtype="<i8").tobytes()),
    }
    for layer in PLAN.layers:
        if layer.shares is not None:
            continue
        rows = rows_of(layer)
        arrays = {"keys": rows.keys, "values": rows.values}
        if layer.dtype is DType.INT8:
            arrays |= {"key_scales": rows.key_scales, "value_scales": rows.value_scales}
        for kind, array in arrays.items():
            assert tensors.pop(f"layers.{layer.index}.{kind}") == {
                "dtype": "F32" if kind.endswith("scales") else names[layer.dtype],
                "shape": list(array.shape),
                "data": bytearray(array.tobytes()),
            }
    assert not tensors
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        assert file.get_tensor("layers.0.keys").tolist() == rows_of(PLAN.layers[0]).keys.tolist()
    assert (metadata["format"], metadata["version"]) == ("rlxc-snapshot", "1")
    assert metadata["identity"] == identity(every.manifest)
    digest = metadata["sha256"].encode()
    zeroed = path.read_bytes().replace(b'"sha256":"' + digest, b'"sha256":"' + b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest().encode() == digest


def test_numbers_in_the_file_lie_at_multiples_of_their_size(every: Model, tmp_path: Path) -> None:
    snapshot_of(every).save(tmp_path / "a")
    load_snapshot(tmp_path / "a", every)
    engine: Any = every.engine
    for rows in engine.loaded[0].held:
        assert rows.keys.flags.aligned and rows.values.flags.aligned
        assert rows.key_scales is None or rows.key_scales.flags.aligned


# --- writing ------------------------------------------------------------------------------------------------------


def test_saving_takes_the_place_of_another_snapshot(every: Model, saved: Path) -> None:
    snapshot_of(every, 6).save(saved)
    assert load_snapshot(saved, every).seq_len == 6


def test_link_is_followed(every: Model, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    snapshot_of(every, 6).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_snapshot(saved, every).seq_len == 6


def test_file_that_cannot_be_finished_leaves_the_old_one(
    every: Model, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, names = saved.read_bytes(), sorted(os.listdir(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        SnapshotError, match=r"cannot be written \(No space left on device\); give another path"
    ):
        snapshot_of(every, 6).save(saved)
    assert saved.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("where", ["folder", "missing/a", "a\0b", "pipe"])
def test_path_that_cannot_be_written_is_refused(every: Model, tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(SnapshotError, match=r"plain file|cannot be written") as caught:
        snapshot_of(every).save(tmp_path / where)
    assert isinstance(caught.value, RlxcError) and "; give another path" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == names


def test_more_readings_than_a_header_can_hold_are_refused(
    every: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlxc.runtime.snapshot_file._LARGEST_HEADER", 1000)
    with pytest.raises(SnapshotError, match="more than a file can tell"):
        snapshot_of(every).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
