"""Damaged and foreign files are refused as a whole, before anything is made of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from snapshots import (
    CONTEXT,
    HELD,
    PLAN,
    VOCAB,
    MakeModel,
    RowsEngine,
    assert_refused,
)

from rlxc.runtime.model import Model
from rlxc.runtime.snapshot import load_snapshot


def test_any_flipped_byte_is_noticed(every: Model, saved: Path) -> None:
    whole = saved.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(flipped)
        assert_refused(saved, every)


def test_any_missing_end_is_noticed(every: Model, saved: Path) -> None:
    whole = saved.read_bytes()
    for size in [*range(0, len(whole), 17), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        assert_refused(saved, every)
    saved.write_bytes(whole + b"\0")
    assert_refused(saved, every, "damaged")


def test_letters_of_the_digest_may_not_change_their_case(every: Model, saved: Path) -> None:
    whole = saved.read_bytes()
    digest = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["sha256"]
    saved.write_bytes(whole.replace(digest.encode(), digest.upper().encode()))
    assert_refused(saved, every)


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
    assert_refused(path, every, match)


def test_file_that_is_too_large_is_not_read(every: Model, tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    assert_refused(
        tmp_path / "a", every, "1099511627776 bytes, more than a snapshot of this artifact can have"
    )


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
    assert_refused(saved, every, "is no snapshot")  # its numbers would lie at odd places


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
    assert_refused(saved, every, match)


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
    assert_refused(tmp_path / "a", every, "the header must be JSON")


def test_snapshot_longer_than_the_context_is_refused(
    every: Model, saved: Path, make_model: MakeModel
) -> None:
    small = make_model(RowsEngine(), kv_cache=replace(PLAN, context=HELD - 1))
    assert_refused(saved, small, "holds 13 tokens, which do not fit the context of 12; compile with")
    large = make_model(RowsEngine(), kv_cache=replace(PLAN, context=CONTEXT * 2))
    assert load_snapshot(saved, large).seq_len == HELD
