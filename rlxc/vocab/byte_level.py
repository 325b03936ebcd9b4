"""Byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``): explicit merges, and words cut by regular expressions."""

from __future__ import annotations

import re
from typing import Any

from rlxc.errors import FormatError, ModelError, UnsupportedError
from rlxc.vocab.keys import PREFIX, Keys, Vocabulary, shown
from rlxc.vocab.parts import Parts, bpe, split
from rlxc.vocab.pretokenizers import PRE_TOKENIZERS, PreTokenizer

# Bytes that no UTF-8 text has.
_NEVER = frozenset([0xC0, 0xC1, *range(0xF5, 0x100)])


def byte_level(vocabulary: Vocabulary, keys: Keys) -> Parts:
    """The parts; refuses a pre-tokenizer that is not known by its name, and merges that make no token."""
    pre = _pre_tokenizer(keys)
    merges = _merges(vocabulary, keys)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [
        *(split(pattern) for pattern in pre.patterns),
        byte_level,
        *_missing_bytes(vocabulary, pre, keys),
    ]
    return Parts(
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=byte_level,
        model=lambda: bpe(vocabulary.ids, merges, ignore_merges=pre.ignore_merges),
        add_bos=pre.add_bos,
    )


def _pre_tokenizer(keys: Keys) -> PreTokenizer:
    name = keys.get("pre", str, "default")
    pre = next((entry for entry in PRE_TOKENIZERS if name in entry.names), None)
    if pre is None:
        known = ", ".join(sorted(name for entry in PRE_TOKENIZERS for name in entry.names))
        raise UnsupportedError(
            f"pre-tokenizer {name!r} is not supported", source=keys.source, remedy=f"known: {known}"
        )
    return pre


def _merges(vocabulary: Vocabulary, keys: Keys) -> list[tuple[str, str]]:
    ids = vocabulary.ids
    merges: dict[tuple[str, str], None] = {}  # of a merge that comes twice, the first counts
    for i, line in enumerate(keys.strings("merges")):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise FormatError(f"{PREFIX}merges[{i}] is {shown(line)}, not two symbols", source=keys.source)
        for part in (left, right, left + right):
            if part not in ids:
                raise ModelError(
                    f"{PREFIX}merges[{i}] needs {shown(part)}, which is not in the vocabulary",
                    source=keys.source,
                )
        merges.setdefault((left, right))
    return list(merges)


def _missing_bytes(vocabulary: Vocabulary, pre: PreTokenizer, keys: Keys) -> list[dict[str, Any]]:
    """Drops bytes that are no token, so that what is left of them does not join what is right of them."""
    alphabet = byte_alphabet()
    missing = "".join(
        alphabet[byte] for byte in range(256) if byte not in _NEVER and alphabet[byte] not in vocabulary.ids
    )
    if not missing:
        return []
    pattern = f"[{re.escape(missing)}]"
    whole = re.compile(pattern) if pre.ignore_merges else None
    for i, text in enumerate(vocabulary.tokens if whole else ()):
        if whole and not vocabulary.is_added(i) and whole.search(text):
            raise UnsupportedError(
                f"token {i} is {shown(text)}, of which a byte is no token",
                source=keys.source,
                remedy="use a vocabulary that has all bytes",
            )
    return [split(pattern, "Removed")]


def byte_alphabet() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte, as GPT-2 defined it."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
