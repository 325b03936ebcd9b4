"""From the bytes of a text to ids, where the ``tokenizers`` library cannot go from the text itself.

That is where added tokens are cut out of a text by rules of their own (`rlxc.vocab.added_tokens`), where bytes are no
UTF-8, and for unigram vocabularies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import tokenizers
from tokenizers import models

from rlxc.errors import SessionError
from rlxc.runtime.unigram import Unigram
from rlxc.runtime.utf8 import SURROGATES, code_points, leading_length
from rlxc.runtime.word_piece import WordPiece

MARK = b'"cut":"longest first"'  # what rlxc writes into a document whose rules the library does not know

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581".encode()  # what SentencePiece vocabularies write for a space
_BLANKS = b" \t\n\v\f\r"
_EACH_BLANK = [bytes([blank]) for blank in _BLANKS]
_STAND_INS = (*range(0xFDD0, 0xFDF0), *range(0x10F000, 0x10FFFE))  # no characters, or private ones


def byte_of(token: str) -> int | None:
    """The byte that a byte token stands for; None for another token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte, as GPT-2 defined it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_CHARACTERS = {byte: char for char, byte in byte_alphabet().items()}


def _spelt(data: bytes) -> str:
    """Bytes as byte-level vocabularies write them."""
    return "".join(_CHARACTERS[byte] for byte in data)


def _scalars(text: bytes) -> str:
    return "".join("\ufffd" if c in SURROGATES else chr(c) for c in code_points(text))


@dataclass(frozen=True)
class _Added:
    """An added token, and whether it swallows ASCII white space on its left and right."""

    id: int
    text: bytes
    lstrip: bool
    rstrip: bool

    def cut(self, text: bytes) -> Iterator[int | bytes]:
        """Yields the token wherever it stands in a text, and what is between."""
        at = 0
        while (found := text.find(self.text, at)) >= 0:
            yield text[at:found].rstrip(_BLANKS) if self.lstrip else text[at:found]
            yield self.id
            at = found + len(self.text)
            while self.rstrip and text[at : at + 1] in _EACH_BLANK:
                at += 1
        yield text[at:]


class Pieces:
    """Cuts added tokens out of a text, and encodes what is left by its kind of vocabulary."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, raw: bytes, *, byte_level: bool) -> None:
        """Takes the library's tokenizer and the document that it comes from."""
        self._tokenizer = tokenizer
        self.needed = MARK in raw
        added = tokenizer.get_added_tokens_decoder().items()
        longest_first = sorted(added, key=lambda entry: (-len(entry[1].content.encode()), entry[0]))
        self._added = [
            _Added(i, token.content.encode(), token.lstrip, token.rstrip) for i, token in longest_first
        ]
        self._encode = self._rule(raw, byte_level)

    def _rule(self, raw: bytes, byte_level: bool) -> Callable[[bytes], list[int]]:
        kind = type(self._tokenizer.model)
        if self.needed and kind is models.Unigram:
            document: dict[str, Any] = json.loads(raw)
            return Unigram(document, lambda text: byte_of(text) is not None).encode
        if self.needed and kind is models.WordPiece:
            encode = WordPiece(self._tokenizer).encode
            return lambda text: encode(_scalars(text))
        if byte_level:
            return self._byte_level
        if kind is models.BPE and self._tokenizer.model.byte_fallback:
            return self._byte_fallback
        return self._replacing

    def encode(self, text: bytes) -> list[int]:
        """Returns the ids of a text, without those that begin and end it."""
        ids: list[int] = []
        for part in self._parts(text):
            ids += [part] if isinstance(part, int) else self._encode(part)
        return ids

    def _parts(self, text: bytes) -> list[int | bytes]:
        """The added tokens of a text, and what is between them."""
        parts: list[int | bytes] = [text]
        for added in self._added:
            if added.text in text:
                parts = [
                    piece
                    for part in parts
                    for piece in ([part] if isinstance(part, int) else added.cut(part))
                ]
        return [part for part in parts if part != b""]

    def _library(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _replacing(self, text: bytes) -> list[int]:
        return self._library(_scalars(text))

    def _byte_level(self, text: bytes) -> list[int]:
        points = code_points(text)
        before = self._tokenizer.pre_tokenizer
        if before is None or not any(c in SURROGATES for c in points):
            return self._replacing(text)
        # The library takes no half of a surrogate pair: it cuts the words around a character of the same class, whose
        # bytes are then exchanged.
        stand_in = self._stand_in(text)
        given = "".join(stand_in if c in SURROGATES else chr(c) for c in points)
        if self._tokenizer.normalizer is not None:
            given = self._tokenizer.normalizer.normalize_str(given)
        halves = iter(_spelt(chr(c).encode("utf-8", "surrogatepass")) for c in points if c in SURROGATES)
        no_tokens = {char for char in _CHARACTERS.values() if self._tokenizer.token_to_id(char) is None}
        ids: list[int] = []
        for word, _ in before.pre_tokenize_str(given):
            exchanged = re.sub(_spelt(stand_in.encode()), lambda _: next(halves), word)
            for inside, run in groupby(exchanged, key=lambda char: char not in no_tokens):
                ids += [token.id for token in self._tokenizer.model.tokenize("".join(run))] if inside else []
        return ids

    def _byte_fallback(self, text: bytes) -> list[int]:
        """Has a character stand in for what is none: it falls back to bytes of its own, which are then exchanged."""
        stand_in = self._stand_in(text)
        # A space counts as its mark, three bytes that may complete a character, but must not spell an added token.
        spaces = {found.start() + n * (len(_SPACE) - 1) for n, found in enumerate(re.finditer(b" ", text))}
        text = text.replace(b" ", _SPACE)
        characters, strange = [], []
        at = 0
        while at < len(text):
            length = leading_length(text[at])
            piece = text[at : at + length]
            try:
                characters.append(" " if at in spaces else piece.decode())
            except UnicodeDecodeError:
                characters.append(stand_in)
                strange.append(piece)
            at += length
        return self._exchanged(self._library("".join(characters)), stand_in, strange)

    def _stand_in(self, text: bytes) -> str:
        """A character of no class that is neither in the text nor a token."""
        free = (char for char in map(chr, _STAND_INS) if self._tokenizer.token_to_id(char) is None)
        found = next((char for char in free if char.encode() not in text), None)
        if found is None:
            raise SessionError(
                "the prompt has bytes that are no UTF-8, and every character that could stand in for them",
                remedy="leave out one or the other",
            )
        return found

    def _exchanged(self, ids: list[int], stand_in: str, strange: list[bytes]) -> list[int]:
        mark = self._byte_ids(stand_in.encode())
        left = iter(strange)
        made: list[int] = []
        at = 0
        while at < len(ids):
            if ids[at : at + len(mark)] == mark:
                made += self._byte_ids(next(left))
                at += len(mark)
            else:
                made.append(ids[at])
                at += 1
        return made

    def _byte_ids(self, data: bytes) -> list[int]:
        ids = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data)
        return [i for i in ids if i is not None]
