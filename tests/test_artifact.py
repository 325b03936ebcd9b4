"""Artifacts: what is written is whole and repeatable, and what is not whole is refused by name."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlxc.artifact.write
from rlxc.artifact import (
    VERSION,
    AdapterEntry,
    Artifact,
    ArtifactWriter,
    FileEntry,
    KvLayer,
    KvPlan,
    Library,
    LoraGroup,
    LoraPart,
    LoraPlan,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
    WeightEntry,
)
from rlxc.dtypes import DType
from rlxc.errors import ArtifactError

DIGEST = "0123456789abcdef" * 4
MANIFEST = Manifest(
    rlxc="0.1.0",
    model=ModelFacts(
        "gemma3", "tiny", DIGEST, layers=2, heads=4, kv_heads=2, vocab_size=32, trained_context=1024
    ),
    target=TargetFacts("onnx", "onnxruntime>=1.31"),
    options=Options("int8", context=64),
    kv_cache=KvPlan(
        context=64,
        max_step=16,
        rollback=5,
        page_size=None,
        bytes_per_token=64,
        layers=(
            KvLayer(0, "linear", 64, None, 1, 4, DType.F32, 32),
            KvLayer(1, "ring", 29, 8, 1, 4, DType.F32, 32),
        ),
    ),
    tokenizer=TokenizerFacts(bos_id=2, eos_ids=(1, 3), add_bos=True, add_eos=False),
    weights=(
        WeightEntry(
            "token_embd.weight", DType.Q8_0, (32, 64), "source(token_embd.weight)", 2176, 2176, "f32"
        ),
    ),
)
TABLE = LoraPart("token_embd.weight", 64, 32, "table.up", 0, 64)
Q = LoraPart("blk.0.attn_q.weight", 40, 64, "qk.up", 0, 60)
K = LoraPart("blk.0.attn_k.weight", 20, 64, "qk.up", 40, 60)
FULL = replace(
    MANIFEST,
    aliases={"output.weight": "token_embd.weight"},
    target=replace(
        MANIFEST.target,
        libraries=(Library("model.x86-64-v3.o", "x86-64-v3", "x86_64", ("avx2", "fma"), 4096, 7, 5, 3),),
    ),
    lora=LoraPlan(
        DType.F16,
        32,
        (LoraGroup("embedding", "table.down", (TABLE,)), LoraGroup("linear", "qk.down", (Q, K))),
    ),
    adapters=(
        AdapterEntry("style", DIGEST, 0.5, ("blk.0.attn_q.weight",), None),
        AdapterEntry("tone", DIGEST, -1.0, (), "adapter.1.gguf"),
    ),
    files={name: FileEntry(9, DIGEST) for name in ("model.onnx", "model.x86-64-v3.o", "adapter.1.gguf")},
)
TREE = json.loads(FULL.to_json())
FILES = {"model.onnx": b"\x08\x0agraph", "tokenizer.json": b"{}", "weights.bin": bytes(range(256)) * 64}


def write(path: Path, files: dict[str, bytes] = FILES, overwrite: bool = False) -> Artifact:
    with ArtifactWriter(path, overwrite=overwrite) as writer:
        for name, data in files.items():
            with writer.file(name) as file:
                file.write(data)
        return writer.commit(MANIFEST)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write(tmp_path / "out.rlx").path


# ---------------------------------------------------------------------------------------------- manifest


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree, as keys and indices."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*path, key)
        yield from paths(tree[key], (*path, key))


def shown(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def value_at(path: tuple[Any, ...], tree: Any = TREE) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(path: tuple[Any, ...], value: Any) -> bytes:
    tree = copy.deepcopy(TREE)
    value_at(path[:-1], tree)[path[-1]] = value
    return json.dumps(tree).encode()


def removed(path: tuple[Any, ...]) -> bytes:
    tree = copy.deepcopy(TREE)
    del value_at(path[:-1], tree)[path[-1]]
    return json.dumps(tree).encode()


PATHS = list(paths(TREE))
MAPPINGS = (("files",), ("aliases",))
"""The objects whose keys are names that may be any."""
FIELDS = [path for path in PATHS if isinstance(path[-1], str) and path[0] not in ("format", "version")]
OPTIONAL = {
    ("kv_cache", "page_size"): int,
    **{("kv_cache", "layers", i, name): int for i in (0, 1) for name in ("window", "shares", "table")},
    ("tokenizer", "bos_id"): int,
    ("lora",): dict,
    ("adapters", 0, "file"): str,
    ("adapters", 1, "file"): str,
}
"""The fields that may be null, and what they are if they are not."""


def test_manifest_round_trips() -> None:
    assert Manifest.from_json(FULL.to_json()) == FULL


def test_manifest_text_has_sorted_keys_and_a_version() -> None:
    assert list(TREE) == sorted(TREE)
    assert (TREE["format"], TREE["version"]) == ("rlxc-artifact", VERSION)


def test_equal_manifests_give_equal_bytes() -> None:
    turned = {name: FileEntry(1, DIGEST) for name in ("b", "a")}
    straight = {name: FileEntry(1, DIGEST) for name in ("a", "b")}
    texts = [replace(MANIFEST, files=files).to_json() for files in (turned, straight)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("path", [path for path in FIELDS if path[:-1] not in MAPPINGS], ids=shown)
def test_missing_field_is_refused_by_name(path: tuple[Any, ...]) -> None:
    with pytest.raises(ArtifactError) as refused:
        Manifest.from_json(removed(path))
    assert f"{shown(path)} is missing" in str(refused.value)


@pytest.mark.parametrize(
    "path",
    [(), *(path for path in PATHS if type(value_at(path)) is dict and path not in MAPPINGS)],
    ids=shown,
)
def test_unknown_field_is_refused_by_name(path: tuple[Any, ...]) -> None:
    with pytest.raises(ArtifactError, match=r"has an unknown field 'colour'"):
        Manifest.from_json(changed((*path, "colour"), 1))


@pytest.mark.parametrize("path", FIELDS, ids=shown)
def test_field_of_another_type_is_refused_by_name(path: tuple[Any, ...]) -> None:
    allowed = (type(None), OPTIONAL[path]) if path in OPTIONAL else (type(value_at(path)),)
    for value in (None, True, 7, 0.5, "x", [], {}):
        if type(value) in allowed:
            continue
        with pytest.raises(ArtifactError) as refused:
            Manifest.from_json(changed(path, value))
        assert f"{shown(path)} must be " in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "layers"), 0),
        (("model", "vocab_size"), 2**31),
        (("model", "fingerprint"), "ABC"),
        (("target", "backend"), "a/b"),
        (("target", "libraries", 0, "file"), "../x.o"),
        (("target", "libraries", 0, "target"), ""),
        (("target", "libraries", 0, "machine"), "x86 64"),
        (("target", "libraries", 0, "needs", 1), "FMA"),
        (("target", "libraries", 0, "workspace"), 0),
        (("options", "activations"), "int4"),
        (("kv_cache", "layers", 0, "layout"), "spiral"),
        (("kv_cache", "layers", 0, "shares"), -1),
        (("kv_cache", "layers", 0, "table"), 0.0),
        (("kv_cache", "rollback"), -1),
        (("kv_cache", "page_size"), 0),
        (("kv_cache", "layers", 0, "dtype"), "f31"),
        (("kv_cache", "layers", 1, "window"), 0),
        (("weights", 0, "shape", 1), -1),
        (("tokenizer", "eos_ids", 0), -1),
        (("files", "model.onnx", "size"), -1),
        (("lora", "dtype"), "f31"),
        (("lora", "max_rank"), 0),
        (("lora", "groups", 0, "kind"), "norm"),
        (("lora", "groups", 0, "parts", 0, "rows"), 0),
        (("lora", "groups", 0, "parts", 0, "columns"), 2**31),
        (("lora", "groups", 0, "parts", 0, "first_row"), -1),
        (("lora", "groups", 0, "parts", 0, "up_rows"), 0),
        (("adapters", 0, "scale"), float("nan")),
        (("adapters", 0, "fingerprint"), "ABC"),
        (("adapters", 1, "file"), "../adapter.gguf"),
        (("files", "model.onnx", "sha256"), DIGEST[1:]),
    ],
)
def test_value_out_of_range_is_refused_by_name(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ArtifactError) as refused:
        Manifest.from_json(changed(path, value))
    assert f"{shown(path)} must be " in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("kv_cache", "layers", 1, "index"), 0, "layers 0..1 in order"),
        (("model", "layers"), 3, "layers 0..2 in order"),
        (("options", "context"), 65, "options.context is 65"),
        (("kv_cache", "max_step"), 65, "kv_cache.max_step is 65"),
        (("kv_cache", "layers", 0, "capacity"), 63, r"kv_cache.layers\[0\].capacity is 63, it needs 64"),
        (
            ("target", "libraries", 0, "file"),
            "other.o",
            r"libraries\[0\].file is 'other.o', which is not among",
        ),
        (("lora", "dtype"), "bf16", "lora.dtype must be f32 or f16, got bf16"),
        (("lora", "max_rank"), 40, "lora.max_rank must be a multiple of 16, got 40"),
        (("lora", "groups", 1, "parts", 1, "first_row"), 41, r"attn_k.weight does not fit into the 60 rows"),
        (
            ("lora", "groups", 1, "parts", 1, "columns"),
            63,
            r"lora.groups\[1\].parts must be some, and read one",
        ),
        (("lora", "groups", 1, "parts"), [], r"lora.groups\[1\].parts must be some, and read one"),
        (("lora", "groups", 1, "kind"), "embedding", r"lora.groups\[1\].parts must be one table, got 2"),
        (
            ("lora", "groups", 1, "parts", 1, "tensor"),
            "token_embd.weight",
            "lora names 'token_embd.weight' twice",
        ),
        (("lora",), None, r"adapters\[1\].file is 'adapter.1.gguf', but lora is missing"),
        (("adapters", 1, "name"), "style", "adapters names 'style' twice"),
        (("adapters", 1, "file"), None, r"adapters\[1\] is neither folded nor in a file"),
        (("adapters", 1, "file"), "other.gguf", r"adapters\[1\].file is 'other.gguf', which is not among"),
        (
            ("aliases", "output.weight"),
            "blk.0.up.weight",
            "says that 'output.weight' is 'blk.0.up.weight', which",
        ),
        (("aliases", "token_embd.weight"), "token_embd.weight", "which the weights do not allow"),
        (("tokenizer", "bos_id"), 32, "token 32"),
        (("tokenizer", "eos_ids"), [32], "token 32"),
    ],
)
def test_contradiction_between_fields_is_refused(path: tuple[Any, ...], value: Any, problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem):
        Manifest.from_json(changed(path, value))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "a\0", "a\n", "C:x", "é"]
)
def test_file_name_that_could_leave_the_artifact_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="must be a plain file name"):
        Manifest.from_json(changed(("files", name), TREE["files"]["model.onnx"]))


def test_newer_format_asks_for_an_upgrade() -> None:
    newer = json.dumps({"format": "rlxc-artifact", "version": VERSION + 1, "rlxc": "9.0", "new": {}}).encode()
    with pytest.raises(ArtifactError, match=r"made by a newer rlxc \('9.0'\).*upgrade: pip install"):
        Manifest.from_json(newer)


@pytest.mark.parametrize("version", [0, True, "1", None])
def test_impossible_version_is_refused(version: Any) -> None:
    with pytest.raises(ArtifactError, match=f"version must be {VERSION}"):
        Manifest.from_json(changed(("version",), version))


@pytest.mark.parametrize(
    "text", [b'{"name": "left-pad", "version": "1.0"}', b"[]", b"null", b'"rlxc-artifact"', b"{}"]
)
def test_foreign_json_is_refused_as_such(text: bytes) -> None:
    with pytest.raises(ArtifactError, match="not that of an rlxc artifact"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"a": NaN}x'], ids=len
)
def test_text_that_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_other_value_is_accepted_as_it_is_or_refused_in_one_line(
    path: tuple[Any, ...], value: Any
) -> None:
    text = changed(path, value)
    try:
        manifest = Manifest.from_json(text, source="out.rlx")
    except ArtifactError as refused:
        lines = str(refused).splitlines()
        assert len(lines) == 1
    else:
        assert json.loads(manifest.to_json()) == json.loads(text)


# ---------------------------------------------------------------------------------------------- writing


def test_written_artifact_opens_and_verifies(tmp_path: Path) -> None:
    written = write(tmp_path / "out.rlx")
    opened = Artifact.open(tmp_path / "out.rlx")
    opened.verify()
    assert opened == written
    assert contents(opened.path) == {**FILES, "manifest.json": opened.manifest.to_json()}


def test_same_input_gives_same_bytes(tmp_path: Path) -> None:
    turned = dict(reversed(FILES.items()))
    assert contents(write(tmp_path / "a.rlx").path) == contents(write(tmp_path / "b.rlx", turned).path)


def test_arrays_are_written_at_the_alignment_asked_for(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float16).reshape(2, 3)
    with ArtifactWriter(tmp_path / "out.rlx") as writer:
        with writer.file("weights.bin") as file:
            file.write(b"abc")
            file.align(8)
            offset = file.tell()
            file.write(matrix)
            file.write(np.empty((0, 3), np.float32))
        artifact = writer.commit(MANIFEST)
    assert offset == 8
    assert artifact.file("weights.bin").read_bytes() == b"abc" + bytes(5) + matrix.tobytes()


def test_commit_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out.rlx")
    assert names(tmp_path) == ["out.rlx"]


def test_everything_is_on_disk_before_the_artifact_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "rename", lambda *names: (calls.append("rename"), rename(*names)))
    write(tmp_path / "out.rlx")
    files_and_folder = len(FILES) + 2
    assert calls == ["fsync"] * files_and_folder + ["rename", "fsync"]


def write_half(path: Path, error: type[BaseException], overwrite: bool = False) -> None:
    with ArtifactWriter(path, overwrite=overwrite) as writer, writer.file("weights.bin") as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_half(tmp_path / "out.rlx", error)
    assert names(tmp_path) == []


def test_write_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out.rlx") as writer, writer.file("weights.bin") as file:
        file.write(b"half")
    assert names(tmp_path) == []


def test_invalid_manifest_is_not_committed(tmp_path: Path) -> None:
    wrong = replace(MANIFEST, options=Options("int8", context=65))
    with (
        ArtifactWriter(tmp_path / "out.rlx") as writer,
        pytest.raises(ArtifactError, match=r"options\.context"),
    ):
        writer.commit(wrong)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "artifact", "broken link"])
def test_existing_output_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.rlx"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    elif kind == "artifact":
        write(path)
    else:
        (tmp_path / "there").symlink_to(path)
        path.symlink_to(tmp_path / "there")
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match=r"out\.rlx"):
        ArtifactWriter(path)
    assert contents(tmp_path) == before


def test_overwrite_replaces_an_artifact(artifact: Path) -> None:
    write(artifact, {"model.onnx": b"new"}, overwrite=True)
    assert names(artifact) == ["manifest.json", "model.onnx"]
    assert names(artifact.parent) == ["out.rlx"]


def test_overwrite_replaces_a_damaged_artifact(artifact: Path) -> None:
    (artifact / "weights.bin").unlink()
    write(artifact, overwrite=True)
    Artifact.open(artifact).verify()


def test_failed_overwrite_keeps_the_old_artifact(artifact: Path) -> None:
    before = contents(artifact.parent)
    with pytest.raises(ValueError):  # noqa: PT011 - raised by write_half itself, without a message
        write_half(artifact, ValueError, overwrite=True)
    assert contents(artifact.parent) == before


def test_failed_swap_keeps_the_old_artifact(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = contents(artifact), os.rename

    def fail_for_the_new_one(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    with pytest.raises(ArtifactError, match="Permission denied"):
        write(artifact, overwrite=True)
    assert contents(artifact) == before


def test_overwrite_of_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text('{"name": "photos"}')
    with pytest.raises(ArtifactError, match="is no artifact; remove it by hand"):
        write(tmp_path / "photos", overwrite=True)
    assert names(tmp_path / "photos") == ["manifest.json"]


def test_overwrite_keeps_files_that_are_not_the_artifact_s(artifact: Path) -> None:
    (artifact / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds 'notes.txt'"):
        write(artifact, overwrite=True)
    assert (artifact / "notes.txt").read_text() == "mine"


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out.rlx") as writer:
        (tmp_path / "out.rlx").write_text("mine")
        with pytest.raises(ArtifactError, match="exists already"):
            writer.commit(MANIFEST)
    assert contents(tmp_path) == {"out.rlx": b"mine"}


def test_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is not a folder; create it first"):
        ArtifactWriter(tmp_path / "nowhere" / "out.rlx")


def test_unwritable_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refuse)  # the superuser may write anywhere: permissions would not do
    with pytest.raises(ArtifactError, match=r"Permission denied.*give another output path"):
        ArtifactWriter(tmp_path / "out.rlx")


class FullDisk(io.FileIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["buffered", "unbuffered"])
def test_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def open_full(path: Path, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(FullDisk(path, mode))

    monkeypatch.setattr(rlxc.artifact.write, "open", open_full, raising=False)
    with pytest.raises(ArtifactError, match=r"No space left on device.*free some space"):
        write(tmp_path / "out.rlx", {"weights.bin": bytes(size)})
    assert names(tmp_path) == []


KILLED_COMPILE = """
import sys
from rlxc.artifact import ArtifactWriter
with ArtifactWriter(sys.argv[1]) as writer:
    with writer.file("model.onnx") as file:
        file.write(b"graph")
    with writer.file("weights.bin") as file:
        file.write(bytes(1 << 20))
        print("half way", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def killed_compile(tmp_path: Path) -> Path:
    """The output path of a compile that was killed half way."""
    command = [sys.executable, "-c", KILLED_COMPILE, str(tmp_path / "out.rlx")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    return tmp_path / "out.rlx"


def test_killed_compile_leaves_nothing_that_loads(killed_compile: Path) -> None:
    left = [killed_compile, *killed_compile.parent.iterdir()]
    assert len(left) == 2
    for path in left:
        with pytest.raises(ArtifactError):
            Artifact.open(path)


def test_compile_after_a_killed_one_succeeds_and_cleans_up(killed_compile: Path) -> None:
    write(killed_compile)
    assert names(killed_compile.parent) == ["out.rlx"]


def test_second_compile_to_the_same_path_keeps_out_of_the_first_one_s_way(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out.rlx") as slow:
        write(tmp_path / "out.rlx")
        with pytest.raises(ArtifactError, match="exists already"):
            slow.commit(MANIFEST)
    Artifact.open(tmp_path / "out.rlx").verify()


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", FILES)
def test_changed_byte_is_found_by_its_file(artifact: Path, name: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} does not have the sha256"):
        Artifact.open(artifact).verify()


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_size_is_refused(artifact: Path, name: str) -> None:
    with open(artifact / name, "ab") as file:
        file.write(b"x")
    with pytest.raises(
        ArtifactError, match=f"{name} has {len(FILES[name]) + 1} bytes.*says {len(FILES[name])}"
    ):
        Artifact.open(artifact)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_missing_file_is_refused(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        Artifact.open(artifact)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_file_that_is_not_a_plain_file_is_refused(artifact: Path, name: str, kind: str) -> None:
    moved = (artifact / name).rename(artifact.parent / "moved")
    if kind == "link":
        (artifact / name).symlink_to(moved)
    elif kind == "folder":
        (artifact / name).mkdir()
    else:
        os.mkfifo(artifact / name)
    with pytest.raises(ArtifactError, match=f"{name} is not a plain file"):
        Artifact.open(artifact)


def test_absurdly_large_manifest_is_refused_unread(artifact: Path) -> None:
    with open(artifact / "manifest.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match=f"has {1 << 40} bytes"):
        Artifact.open(artifact)


def test_missing_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact; compile a model"):
        Artifact.open(tmp_path / "out.rlx")


def test_model_file_is_refused_with_the_way_to_compile_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match=r"not an artifact.*rlxc compile"):
        Artifact.open(tmp_path / "model.gguf")


def test_file_that_the_manifest_does_not_name_is_refused(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no model\.so"):
        Artifact.open(artifact).file("model.so")


def test_named_file_is_verified_on_its_own(artifact: Path) -> None:
    (artifact / "weights.bin").write_bytes(bytes(len(FILES["weights.bin"])))
    with Artifact.open(artifact).start_verification() as verification:
        verification.wait("model.onnx", "tokenizer.json")
        with pytest.raises(ArtifactError, match=r"weights\.bin"):
            verification.wait("weights.bin")


def test_failed_verification_fails_every_time(artifact: Path) -> None:
    (artifact / "tokenizer.json").write_bytes(b"[]")
    with Artifact.open(artifact).start_verification() as verification:
        for _ in range(2):
            with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
                verification.wait()


def test_closing_a_verification_ends_its_thread_at_once(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    os.truncate(artifact / "weights.bin", 1 << 40)  # would take minutes
    before = threading.active_count()
    opened.start_verification().close()
    assert threading.active_count() == before


def test_file_removed_after_opening_is_reported(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    (artifact / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.bin is missing"):
        opened.verify()


def test_verification_takes_little_memory_whatever_the_size(tmp_path: Path) -> None:
    artifact = write(tmp_path / "out.rlx", {"weights.bin": bytes(32 << 20)})
    tracemalloc.start()
    try:
        artifact.verify()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # one buffer of a MiB, and Python's own objects
