"""Texts that the library does not encode as llama.cpp does: bytes that are no UTF-8, and added tokens of all kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenizer_cases import charsmap
from vocabularies import CONTROL, Metadata, byte_level, sentence_piece, unigram, with_tokens, word_piece

from rlxc.errors import ArtifactError, SessionError
from rlxc.runtime.tokenizer import Tokenizer
from rlxc.runtime.utf8 import code_points
from rlxc.vocab import build_tokenizer

KINDS = {"llama": sentence_piece(), "gpt2": byte_level(), "t5": unigram(), "bert": word_piece()}


def load(metadata: Metadata, folder: Path, **changes: Any) -> Tokenizer:
    """A tokenizer whose document is changed first."""
    files = build_tokenizer(metadata, source="test")
    document = json.loads(files.tokenizer_json) | changes
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")))
    return Tokenizer(path, bos_id=files.bos_id, eos_ids=files.eos_ids)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(KINDS[request.param], tmp_path_factory.mktemp("vocab"))


@given(text=st.text(max_size=30))
def test_the_bytes_of_a_text_get_its_ids(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text.encode()) == tokenizer.encode(text)


@given(data=st.binary(max_size=30))
def test_any_bytes_get_ids_of_the_vocabulary(tokenizer: Tokenizer, data: bytes) -> None:
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode(data))


def test_bytes_are_surrounded_as_texts_are(tokenizer: Tokenizer) -> None:
    outer, inner = tokenizer.encode("a"), tokenizer.encode("a", add_special=False)
    start = next(n for n in (0, 1) if outer[n : n + len(inner)] == inner)
    inside = tokenizer.encode(b"a\xff", add_special=False)
    assert tokenizer.encode(b"a\xff") == [*outer[:start], *inside, *outer[start + len(inner) :]]


def test_they_are_where_the_vocabulary_has_no_letters(tmp_path: Path) -> None:
    changes = {"tokens": ["<s>", "</s>", "!"], "token_type": np.array([3, 3, 1]), "merges": []}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True, "add_eos_token": True}
    tokenizer = load(byte_level(**changes, **ends), tmp_path)
    assert tokenizer.encode(b"!\xff") == tokenizer.encode("!") == [0, 2, 1]


@pytest.mark.parametrize("value", [7, None, ["a"], "\ud800"])
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, value: Any) -> None:
    with pytest.raises(SessionError, match="not valid Unicode text"):
        tokenizer.encode(value)


@pytest.mark.parametrize(
    ("data", "points"),
    [
        (b"a\xc3\xa9\xf0\x9f\x98\x80", [0x61, 0xE9, 0x1F600]),
        (b"\x80\xff\xfe", [0xFFFD] * 3),
        (b"\xc3(\xe2\x82", [0xFFFD, 0x28, 0xFFFD, 0xFFFD]),
        (b"\xc0\x80\xe0\x80\xaf", [0, 0x2F]),  # longer than they need be
        (b"\xed\xa0\x80", [0xD800]),
        (b"\xf4\x90\x80\x80", [0xFFFD] * 4),  # beyond Unicode
        (b"\xf8\x88\x80\x80\x80", [0xFFFD] * 5),
    ],
)
def test_characters_of_bytes(data: bytes, points: list[int]) -> None:
    assert code_points(data) == points


def test_bytes_of_no_character_become_byte_tokens(tmp_path: Path) -> None:
    tokenizer = load(sentence_piece(add_space_prefix=False), tmp_path)
    pieces = [
        tokenizer.piece_bytes(i) for i in tokenizer.encode(b"a\xe2\x82 \xf4\x90\x80\x80b", add_special=False)
    ]
    # A space counts as the three bytes of its mark, of which the sequence takes one.
    assert pieces == [
        b"a",
        b"\xe2",
        b"\x82",
        b"\xe2",
        b"\x96",
        b"\x81",
        b"\xf4",
        b"\x90",
        b"\x80",
        b"\x80",
        b"b",
    ]


def test_without_byte_tokens_they_become_unknown(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a"]
    changes = {"tokens": tokens, "token_type": np.array([2, 3, 3, 1]), "scores": np.zeros(4)}
    tokenizer = load(sentence_piece(add_space_prefix=False, **changes), tmp_path)
    assert tokenizer.encode(b"a\xffa", add_special=False) == [3, 0, 3]


def test_bytes_beside_every_character_that_could_stand_in_are_refused(tmp_path: Path) -> None:
    tokenizer = load(sentence_piece(), tmp_path)
    private = "".join(map(chr, [*range(0xFDD0, 0xFDF0), *range(0x10F000, 0x10FFFE)]))
    with pytest.raises(SessionError, match="every character that could stand in"):
        tokenizer.encode(private.encode() + b"\xff")


OVERLAPPING = with_tokens(byte_level(pre="qwen2"), **{"|a|": CONTROL, "|bcd|": CONTROL})


def test_the_longest_of_overlapping_tokens_is_found_first(tmp_path: Path) -> None:
    tokenizer = load(OVERLAPPING, tmp_path)
    assert [tokenizer.piece(i) for i in tokenizer.encode("|a|bcd|")][-1] == "|bcd|"


def test_in_a_document_of_others_the_first_of_overlapping_tokens_is(tmp_path: Path) -> None:
    plain = json.loads(build_tokenizer(OVERLAPPING, source="test").tokenizer_json)["added_tokens"]
    del plain[0]["cut"]
    tokenizer = load(OVERLAPPING, tmp_path, added_tokens=plain)
    assert tokenizer.piece(tokenizer.encode("|a|bcd|")[0]) == "|a|"


PHI_3 = with_tokens(sentence_piece(), **{"<|user|>": CONTROL}) | {"general.name": "phi-3"}


def test_tokens_swallow_white_space_of_ascii(tmp_path: Path) -> None:
    tokenizer = load(PHI_3, tmp_path)
    assert tokenizer.encode("<|user|> \t\n\v\f\r a") == tokenizer.encode("<|user|>a")
    assert tokenizer.encode("<|user|>\u00a0a") != tokenizer.encode("<|user|>a")
    assert tokenizer.encode("<s> a") != tokenizer.encode("<s>a")


def test_in_a_document_of_others_they_swallow_any(tmp_path: Path) -> None:
    plain = json.loads(build_tokenizer(PHI_3, source="test").tokenizer_json)["added_tokens"]
    del plain[0]["cut"]
    tokenizer = load(PHI_3, tmp_path, added_tokens=plain)
    assert tokenizer.encode("<|user|>\u00a0a") == tokenizer.encode("<|user|>a")


def test_the_longest_replacement_counts(tmp_path: Path) -> None:
    metadata = unigram(
        precompiled_charsmap=np.frombuffer(charsmap({"e\u0323": "a", "e\u0323\u0302": "b"}), np.uint8)
    )
    tokenizer = load(metadata, tmp_path)
    assert tokenizer.encode("e\u0323\u0302ae\u0323", add_special=False) == tokenizer.encode(
        "baa", add_special=False
    )


def test_a_damaged_table_of_replacements_is_refused(tmp_path: Path) -> None:
    raw = bytearray(charsmap({"x": "a"}))
    raw[4:8] = (1 << 30).to_bytes(4, "little")  # the root leads beyond the end
    tokenizer = load(unigram(precompiled_charsmap=np.frombuffer(bytes(raw), np.uint8)), tmp_path)
    with pytest.raises(ArtifactError, match="table of replacements is damaged"):
        tokenizer.encode("x")
