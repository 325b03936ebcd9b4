"""Unigram vocabularies: a text is normalized here and cut by the ``tokenizers`` library's model.

The library's normalizers go by characters as they are seen, SentencePiece and llama.cpp by the longest replacement that
fits, byte by byte; so this is done as they do it.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import models

from rlxc.errors import ArtifactError
from rlxc.runtime.utf8 import leading_length, sequence_length

_SPACE = "\u2581".encode()
_REPLACEMENT = "\ufffd".encode()


class Unigram:
    """From the bytes of a text without added tokens to ids."""

    def __init__(self, document: Mapping[str, Any], byte_token: Callable[[str], object]) -> None:
        """Reads a ``tokenizer.json`` as rlxc writes it; ``byte_token`` says whether a text is that of a byte token."""
        model, added = document["model"], document["added_tokens"]
        certain = {token["id"] for token in added if not token["special"]}
        # A token with a raw space is never met, since spaces are marked.
        hidden = {token["id"] for token in added} - certain
        vocab = [
            (f" {text}" if i in hidden or byte_token(text) else text, score)
            for i, (text, score) in enumerate(model["vocab"])
        ]
        self._model = models.Unigram(vocab, model["unk_id"], False)
        known = {char for text, _ in vocab for char in text}
        self._stranger = next(chr(c) for c in range(0x10FFFF, 0, -1) if chr(c) not in known)
        texts = [token["content"].encode() for token in added if token["id"] in certain]
        self._begun = {text[:n] for text in texts for n in range(1, len(text) + 1)}
        steps = (document.get("normalizer") or {}).get("normalizers", [])
        tables = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
        self._charsmap = _Charsmap(base64.b64decode(tables[0])) if tables else None
        self._squeeze = any(step["type"] == "Strip" for step in steps)
        self._prefix = document["pre_tokenizer"]["prepend_scheme"] == "always"

    def encode(self, text: bytes) -> list[int]:
        """Returns the ids of a text; what is no UTF-8 is unknown."""
        normalized = self._normalized(text)
        if not normalized:
            return []
        return [token.id for token in self._model.tokenize(self._characters(normalized))]

    def _normalized(self, text: bytes) -> bytes:
        made = bytearray()
        at, in_word, begun = 0, False, False
        while at < len(text):
            piece, used = self._replaced(text, at)
            at += used
            for byte in piece:
                if byte == 0x20:
                    in_word = False
                    if not self._squeeze:
                        made += _SPACE
                    continue
                if not in_word:
                    in_word = True
                    if self._squeeze or (self._prefix and not begun):
                        made += _SPACE
                        begun = True
                made.append(byte)
        return bytes(made)

    def _replaced(self, text: bytes, at: int) -> tuple[bytes, int]:
        """What comes of the text from a place on, and how many bytes of it that takes."""
        end = at
        while end < len(text) and text[at : end + 1] in self._begun:
            end += 1
        if end > at:  # what may become a user-defined token stays as it is
            return text[at:end], end - at
        if self._charsmap is not None:
            used, piece = self._charsmap.longest(text, at)
            if used:
                return piece, used
        length = sequence_length(text, at)
        return (text[at : at + length], length) if length else (_REPLACEMENT, 1)

    def _characters(self, text: bytes) -> str:
        """Text for the library; whatever is no character becomes one that no token has."""
        try:
            return text.decode()
        except UnicodeDecodeError:
            pass
        characters = []
        at = 0
        while at < len(text):
            length = leading_length(text[at])
            piece = text[at : at + length]
            try:
                characters.append(piece.decode())
            except UnicodeDecodeError:
                characters.append(self._stranger)
            at += length
        return "".join(characters)


class _Charsmap:
    """SentencePiece's table of replacements: a double array that leads from bytes to texts.

    Susumu Yata, Darts-clone: a node holds in its lowest 8 bits the byte that leads to it, in bit 8 whether a
    replacement ends there, and from bit 10 the distance to its successors, in 256s if bit 9 is set.
    """

    def __init__(self, raw: bytes) -> None:
        (size,) = struct.unpack_from("<I", raw)
        self._nodes = struct.unpack_from(f"<{size // 4}I", raw, 4)
        self._texts = raw[4 + size :]

    def longest(self, text: bytes, at: int) -> tuple[int, bytes]:
        """How many bytes the longest entry at a place has, and its replacement; 0 for none."""
        try:
            used, where = self._find(text, at)
            return used, self._texts[where : self._texts.index(0, where)] if used else b""
        except (IndexError, ValueError) as error:
            raise ArtifactError("its table of replacements is damaged", source="tokenizer.json") from error

    def _find(self, text: bytes, at: int) -> tuple[int, int]:
        used = where = 0
        index = self._successors(0)
        for n in range(at, len(text)):
            byte = text[n]
            index ^= byte
            if not byte or self._nodes[index] & 0x800000FF != byte:
                break
            ends = self._nodes[index] >> 8 & 1
            index ^= self._successors(index)
            if ends:
                used, where = n - at + 1, self._nodes[index] & 0x7FFFFFFF
        return used, where

    def _successors(self, index: int) -> int:
        node: int = self._nodes[index]
        return node >> 10 << (8 if node & 0x200 else 0)
