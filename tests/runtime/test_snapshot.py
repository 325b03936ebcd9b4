"""Snapshots in memory and in files; damaged and foreign files are refused as a whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize, safe_open

from rlxc.artifact import AdapterEntry, Artifact, FileEntry, KvLayer, KvPlan, LoraPlan, Manifest, WeightEntry
from rlxc.dtypes import DType
from rlxc.errors import RlxcError, SessionError, SnapshotError
from rlxc.runtime.engines import KvRows
from rlxc.runtime.identity import identity
from rlxc.runtime.model import Model
from rlxc.runtime.sequence import LoadedAdapter, TokenSequence
from rlxc.runtime.snapshot import KvSnapshot, load_snapshot

CALL = (7, 8)
LINE = 400  # the longest that an error may be


# --- a model with one layer, whose logits are known ---------------------------------------------------------------

MakeModel = Callable[..., Model]


@pytest.fixture
def make_model(split_manifest: Manifest, tmp_path: Path) -> Iterator[MakeModel]:
    """``make_model(engine, **changes)``: a model on an engine, with these fields of its manifest changed."""
    artifact = Artifact(tmp_path, replace(split_manifest, lora=None))
    verification = artifact.start_verification()

    def make(engine: Any, **changes: Any) -> Model:
        manifest = replace(artifact.manifest, **changes)
        return Model(replace(artifact, manifest=manifest), engine, verification)

    yield make
    verification.close()


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


# --- a model with a layer of each kind ----------------------------------------------------------------------------

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


def in_float64(layer: KvLayer, stored: Any, scales: Any) -> Any:
    """What stored numbers mean, decoded one by one."""
    if layer.dtype is DType.BF16:
        each = [struct.unpack("<f", struct.pack("<I", int(bits) << 16))[0] for bits in stored.ravel()]
        return np.array(each, np.float64).reshape(stored.shape)
    if layer.dtype is DType.INT8:
        return stored.astype(np.float64) * np.repeat(scales.astype(np.float64), layer.head_dim, axis=1)
    return stored.astype(np.float64)


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


@pytest.fixture
def every(make_model: MakeModel) -> Model:
    """A model with a layer of each kind."""
    return make_model(RowsEngine(), kv_cache=PLAN)


def snapshot_of(model: Model, count: int = HELD) -> KvSnapshot:
    held = [rows_of(layer, count) for layer in model.manifest.kv_cache.layers]
    sequence = TokenSequence(RowsCache(count, held))  # type: ignore[arg-type]
    sequence.tokens.extend(range(100, 100 + count))
    if count:
        sequence.readings = [(0, ()), (5, (("ab" * 32, 0.5), ("cd" * 32, -1.0)))]
        sequence.invoked = {"ab" * 32: 5}
    return KvSnapshot.take(model, sequence)


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


def test_place_that_a_failed_prompt_named_is_no_part_of_a_snapshot(model: Model, tmp_path: Path) -> None:
    sequence = read(model, [3, 4])
    sequence.invoked = {"ab" * 32: 7, "cd" * 32: 1}
    KvSnapshot.take(model, sequence).save(tmp_path / "a")
    assert load_snapshot(tmp_path / "a", model).begin(model).invoked == {"cd" * 32: 1}


# --- damage -------------------------------------------------------------------------------------------------------


def refused(path: Path, model: Model, match: str = "is damaged: |is no snapshot, ") -> None:
    """Loading fails with one clear line, before the engine hears of it."""
    engine: Any = model.engine
    loaded = len(engine.loaded)
    with pytest.raises(SnapshotError, match=match) as caught:
        load_snapshot(path, model)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) - len(str(path)) < LINE and "\n" not in str(caught.value)
    assert len(engine.loaded) == loaded


@pytest.fixture
def saved(every: Model, tmp_path: Path) -> Path:
    path = tmp_path / "a.snapshot"
    snapshot_of(every).save(path)
    return path


def test_any_flipped_byte_is_noticed(every: Model, saved: Path) -> None:
    whole = saved.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(flipped)
        refused(saved, every)


def test_any_missing_end_is_noticed(every: Model, saved: Path) -> None:
    whole = saved.read_bytes()
    for size in [*range(0, len(whole), 17), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        refused(saved, every)
    saved.write_bytes(whole + b"\0")
    refused(saved, every, "damaged")


def test_letters_of_the_digest_may_not_change_their_case(every: Model, saved: Path) -> None:
    whole = saved.read_bytes()
    digest = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["sha256"]
    saved.write_bytes(whole.replace(digest.encode(), digest.upper().encode()))
    refused(saved, every)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "name", "weights"])
def test_what_is_no_snapshot_is_refused(every: Model, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "name":
        path = tmp_path / "a\0b"
    elif kind == "weights":
        text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    match = {"missing": "No such file", "name": "null", "weights": "is no snapshot"}.get(kind, "plain file")
    refused(path, every, match)


def test_file_that_is_too_large_is_not_read(every: Model, tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    refused(tmp_path / "a", every, "1099511627776 bytes, more than a snapshot of this artifact can have")


# --- files with a right digest and wrong fields -------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, str], bytearray], None]


def forge(path: Path, edit: Edit, padding: int = 0) -> None:
    """Change tensors' entries, metadata or data, and sign the file as the format says."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    tree, data = json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length :])
    metadata = tree["__metadata__"]
    metadata["sha256"] = "0" * 64
    edit(tree, metadata, data)
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 + padding)
    unsigned = len(text).to_bytes(8, "little") + text + data
    digest = hashlib.sha256(unsigned).hexdigest().encode()
    path.write_bytes(unsigned.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest, 1))


def entry(name: str, **fields: Any) -> Edit:
    return lambda tree, metadata, data: tree[name].update(fields)


def text(name: str, value: Any) -> Edit:
    return lambda tree, metadata, data: metadata.update({name: value})


def without(name: str) -> Edit:
    return lambda tree, metadata, data: tree.pop(name)


def without_text(name: str) -> Edit:
    return lambda tree, metadata, data: metadata.pop(name)


def number(name: str, value: int) -> Edit:
    """Change the first number of the tokens."""

    def edit(tree: dict[str, Any], metadata: dict[str, str], data: bytearray) -> None:
        begin = tree[name]["data_offsets"][0]
        data[begin : begin + 8] = value.to_bytes(8, "little", signed=True)

    return edit


def test_forging_without_a_change_gives_a_good_file_unless_it_is_padded_badly(
    every: Model, saved: Path
) -> None:
    forge(saved, lambda tree, metadata, data: None)
    assert load_snapshot(saved, every).seq_len == HELD
    forge(saved, lambda tree, metadata, data: None, padding=1)
    refused(saved, every, "is no snapshot")  # its numbers would lie at odd places


FORGED: dict[str, tuple[Edit, str]] = {
    "format": (text("format", "pt"), "its format is not rlxc-snapshot; give a file that snapshot.save"),
    "version": (
        text("version", "2"),
        "its version is '2', this rlxc reads version 1; make the snapshot again",
    ),
    "version type": (text("version", 1), "its version is 1, this rlxc"),
    "identity": (text("identity", "0" * 64), "another version"),
    "no parts": (
        lambda tree, metadata, data: metadata.update({"identity": "", "parts": "[]"}),
        "parts must be an object",
    ),
    "metadata": (
        lambda tree, metadata, data: tree.update({"__metadata__": ['{"sha256":"', metadata["sha256"]]}),
        "is no snapshot",
    ),
    "first of a shared layer": (text("first", "[0,7,0,8,0,0,0]"), r"first\[5\] must be null, got 0"),
    "first of a linear layer": (
        text("first", "[1,7,0,8,0,null,0]"),
        r"first\[0\] must be an integer in 0..0, got 1",
    ),
    "first of a linear window": (
        text("first", "[0,7,0,8,0,null,7]"),
        r"first\[6\] must be an integer in 0..0",
    ),
    "first behind the window": (
        text("first", "[0,11,0,8,0,null,0]"),
        r"first\[1\] must be an integer in 3..10",
    ),
    "first before the ring": (
        text("first", "[0,2,0,8,0,null,0]"),
        r"first\[1\] must be an integer in 3..10, got 2",
    ),
    "first as a float": (
        text("first", "[0,7.0,0,8,0,null,0]"),
        r"first\[1\] must be an integer in 3..10, got 7.0",
    ),
    "first as a truth": (text("first", "[false,7,0,8,0,null,0]"), r"first\[0\] must be an integer"),
    "first too short": (text("first", "[0]"), r"first must be a list of 7, got \[0\]"),
    "first elsewhere": (text("first", "[0,8,0,8,0,null,0]"), "'data_offsets' of|'shape' of"),
    "first not JSON": (text("first", "[0,"), "first must be JSON"),
    "first missing": (without_text("first"), "first is missing"),
    "deep JSON": (text("first", "[" * 100_000), "first must be JSON"),
    "long integer": (text("first", "9" * 100_000), "first must be"),
    "type": (entry("layers.2.keys", dtype="BF16"), "'dtype' of layers.2.keys must be F16, got 'BF16'"),
    "shape": (
        entry("layers.0.keys", shape=[HELD, 5]),
        r"'shape' of layers.0.keys must be \[13, 9\], got \[13, 5\]",
    ),
    "shape type": (entry("layers.0.keys", shape="all"), "'shape' of layers.0.keys must be .* got 'all'"),
    "offsets": (entry("layers.0.keys", data_offsets=[0, 312]), "'data_offsets' of layers.0.keys must be"),
    "offsets outside": (
        entry("layers.4.values", data_offsets=[0, 1 << 70]),
        "'data_offsets' of layers.4.values",
    ),
    "field of an entry": (entry("layers.0.keys", colour=3), "'colour' of layers.0.keys must be None, got 3"),
    "entry": (
        lambda tree, metadata, data: tree.update({"layers.0.keys": [1]}),
        r"layers.0.keys must be an object, got \[1\]",
    ),
    "missing tensor": (without("layers.4.key_scales"), "layers.4.key_scales must be an object, got None"),
    "unknown tensor": (
        lambda tree, metadata, data: tree.update({"layers.9.keys": tree["tokens"]}),
        r"tensor \['layers.9.keys'\] is none of a snapshot",
    ),
    "tokens missing": (without("tokens"), "tokens must be an object"),
    "tokens' shape": (
        entry("tokens", shape=[HELD, 1]),
        r"shape of tokens must be a list of 1, got \[13, 1\]",
    ),
    "tokens' count": (entry("tokens", shape=[-1]), r"number of tokens must be an integer in 0..\d+, got -1"),
    "too many tokens": (
        entry("tokens", shape=[21]),
        "holds 21 tokens, which do not fit the context of 20; compile with",
    ),
    "very many tokens": (
        entry("tokens", shape=[10**4000]),
        r"number of tokens must be an integer in 0..\d+, got 1000",
    ),
    "token too large": (number("tokens", VOCAB), r"tokens must be in the vocabulary of 258, got \[258\]"),
    "token below zero": (number("tokens", -1), r"tokens must be in the vocabulary of 258, got \[-1\]"),
    "more data": (lambda tree, metadata, data: data.extend(bytes(8)), "data must have .* bytes, got"),
    "less data": (lambda tree, metadata, data: data.__delitem__(slice(-8, None)), "must end in the file"),
    "readings type": (text("readings", "{}"), "readings must be a list, got {}"),
    "no readings": (text("readings", "[]"), "readings must begin with the first token"),
    "late readings": (text("readings", "[[1,[]]]"), r"readings\[0\] must be an integer in 0..0, got 1"),
    "readings behind the end": (
        text("readings", "[[0,[]],[13,[]]]"),
        r"readings\[1\] must be an integer in 1..12",
    ),
    "unordered readings": (
        text("readings", "[[0,[]],[5,[]],[5,[]]]"),
        r"readings\[2\] must be an integer in 6..12",
    ),
    "reading of three": (text("readings", "[[0,[],1]]"), r"readings\[0\] must be a list of 2"),
    "reading's adapters": (text("readings", "[[0,5]]"), r"readings\[0\] must be a list, got 5"),
    "reading's scale": (
        text("readings", f'[[0,[["{"ab" * 32}",NaN]]]]'),
        r"must have finite scales, got nan",
    ),
    "reading's integer": (text("readings", f'[[0,[["{"ab" * 32}",1]]]]'), r"must have finite scales, got 1"),
    "reading's name": (
        text("readings", '[[0,[["me",1.0]]]]'),
        "must name adapters by 64 hexadecimal digits, got 'me'",
    ),
    "invoked type": (text("invoked", "[]"), r"invoked must be an object, got \[\]"),
    "invoked's name": (
        text("invoked", '{"x":1}'),
        "invoked must name adapters by 64 hexadecimal digits, got 'x'",
    ),
    "invoked's place": (
        text("invoked", f'{{"{"ab" * 32}":13}}'),
        "invoked must be an integer in 0..12, got 13",
    ),
    "invoked as text": (text("invoked", 5), "invoked is missing"),
}


@pytest.mark.parametrize("name", FORGED)
def test_wrong_field_is_named(every: Model, saved: Path, name: str) -> None:
    edit, match = FORGED[name]
    forge(saved, edit)
    refused(saved, every, match)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"__metadata__":5}'],
    ids=["list", "cut", "bytes", "deep", "5"],
)
def test_header_that_is_none_is_refused(every: Model, tmp_path: Path, header: bytes) -> None:
    """It has a right digest, in a place that the reader finds."""
    header += b'"sha256":"' + b"0" * 64 + b'"'
    header += b" " * (-len(header) % 8)
    unsigned = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(unsigned).hexdigest().encode()
    (tmp_path / "a").write_bytes(unsigned.replace(b"0" * 64, digest))
    refused(tmp_path / "a", every, "the header must be JSON")


def test_snapshot_longer_than_the_context_is_refused(
    every: Model, saved: Path, make_model: MakeModel
) -> None:
    small = make_model(RowsEngine(), kv_cache=replace(PLAN, context=HELD - 1))
    refused(saved, small, "holds 13 tokens, which do not fit the context of 12; compile with")
    large = make_model(RowsEngine(), kv_cache=replace(PLAN, context=CONTEXT * 2))
    assert load_snapshot(saved, large).seq_len == HELD


# --- another model or plan ----------------------------------------------------------------------------------------


def changed_layer(manifest: Manifest, index: int, **changes: Any) -> Manifest:
    layers = list(manifest.kv_cache.layers)
    layers[index] = replace(layers[index], **changes)
    return replace(manifest, kv_cache=replace(manifest.kv_cache, layers=tuple(layers)))


FOLDED = AdapterEntry("a", "1" * 64, 1.0, ("blk.0.attn_q.weight",), None)
WEIGHT = WeightEntry("w", DType.F32, (4, 4), "", 64)

DIFFERENT: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "model": (lambda m: replace(m, model=replace(m.model, fingerprint="1" * 64)), "is of another model"),
    "backend": (lambda m: replace(m, target=replace(m.target, backend="tvm")), "with another backend"),
    "activations": (
        lambda m: replace(m, options=replace(m.options, activations="float32")),
        "other activations",
    ),
    "adapters' type": (lambda m: replace(m, lora=LoraPlan(DType.F16, 16, ())), "another type of adapters"),
    "weights": (lambda m: replace(m, weights=(WEIGHT,)), "with other weights"),
    "folded": (lambda m: replace(m, adapters=(FOLDED,)), "with other adapters in the weights"),
    "rollback": (
        lambda m: replace(m, kv_cache=replace(m.kv_cache, rollback=3)),
        "another plan of the KV cache",
    ),
    "dtype": (lambda m: changed_layer(m, 0, dtype=DType.F16), "another plan of the KV cache"),
    "heads": (lambda m: changed_layer(m, 0, heads=1, head_dim=9), "another plan of the KV cache"),
    "window": (lambda m: changed_layer(m, 3, window=5), "another plan of the KV cache"),
    "layout": (lambda m: changed_layer(m, 0, layout="paged"), "another plan of the KV cache"),
    "ring": (lambda m: changed_layer(m, 1, capacity=11), "another plan of the KV cache"),
    "shared": (lambda m: changed_layer(m, 5, shares=None), "another plan of the KV cache"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_snapshot_of_something_else_is_refused(
    every: Model, saved: Path, make_model: MakeModel, name: str
) -> None:
    change, match = DIFFERENT[name]
    other = make_model(RowsEngine(), **vars(change(every.manifest)))
    refused(saved, other, f"{match}.* \\(it was made with 'tiny'\\); ")


def test_each_difference_gives_another_identity(every: Model) -> None:
    found = {identity(change(every.manifest)) for change, _ in DIFFERENT.values()}
    assert len(found | {identity(every.manifest)}) == len(DIFFERENT) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, rlxc="9.9.9"),
        lambda m: replace(m, model=replace(m.model, name="other")),
        lambda m: replace(m, target=replace(m.target, runs_on="elsewhere")),
        lambda m: replace(m, options=replace(m.options, context=7)),
        lambda m: replace(m, kv_cache=replace(m.kv_cache, context=7, max_step=2, page_size=16)),
        lambda m: changed_layer(m, 0, capacity=99),
        lambda m: replace(m, tokenizer=replace(m.tokenizer, eos_ids=())),
        lambda m: replace(m, adapters=(replace(FOLDED, folded=(), file="a.gguf"),)),
        lambda m: replace(m, files={"weights.bin": FileEntry(1, "1" * 64)}),
    ],
)
def test_identity_leaves_out_what_keys_and_values_do_not_depend_on(every: Model, change: Any) -> None:
    assert change(every.manifest) != every.manifest
    assert identity(change(every.manifest)) == identity(every.manifest)


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
