"""Small vocabularies of every kind whose ids show how a text was cut: tokens are arbitrary parts of arbitrary texts.

`CASES` are metadata of GGUF files without their prefix, except ``name``, which is ``general.name``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any

from tokenizer_texts import OVERLAPPING, SPECIAL, USER_DEFINED, texts

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
PRE_TOKENIZERS = (
    *(
        "default",
        "gpt-2",
        "smollm",
        "falcon",
        "llama-bpe",
        "minicpm5",
        "dbrx",
        "glm4",
        "qwen2",
        "qwen35",
        "ufakzeka",
    ),
    *("laguna", "seed-coder", "bailingmoe", "exaone-moe", "tekken", "gpt-4o", "granite-embed-multi-97m"),
    *("deepseek-coder", "deepseek-v3", "spark2_5", "bloom", "viking"),
)

Case = dict[str, Any]


class _Tokens:
    """Tokens as they are added, each once."""

    def __init__(self) -> None:
        self.types: dict[str, int] = {}
        self.scores: list[float] = []

    def add(self, text: str, kind: int = NORMAL, score: float = 0.0) -> None:
        if text not in self.types:
            self.types[text] = kind
            self.scores.append(score)

    def case(self, *, scored: bool = True, **keys: Any) -> Case:
        case = {"tokens": [*self.types], "token_type": [*self.types.values()]}
        return case | ({"scores": self.scores} if scored else {}) | keys


def _number(text: str, modulus: int) -> int:
    """Arbitrary, and the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") % modulus


def _shuffled(items: Iterable[str]) -> list[str]:
    return sorted(items, key=lambda text: (_number(text, 2**48), text))


def byte_alphabet() -> list[str]:
    """The character that byte-level vocabularies write for each byte (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@cache
def _merges() -> list[tuple[str, str]]:
    """Every pair of bytes that comes up in some texts, in any order; then many pairs of these."""
    alphabet = byte_alphabet()
    corpus = ["".join(alphabet[byte] for byte in text.encode()) for text in texts(1, 1500)]
    pairs = {a + b: (a, b) for word in corpus for a, b in pairwise(word)}
    longer = {}
    for word in corpus:
        for i in range(0, len(word) - 3, 3):
            left, right = word[i : i + 2], word[i + 2 : i + 4]
            longer[left + right] = (left, right)
    return [pairs[text] for text in _shuffled(pairs)] + [longer[text] for text in _shuffled(longer)[:3000]]


def _byte_level(pre: str, *, overlapping: bool = False, missing: str = "", **keys: Any) -> Case:
    tokens = _Tokens()
    gone = {byte_alphabet()[byte] for byte in missing.encode()}
    merges = [(a, b) for a, b in _merges() if not gone & {*a, *b}]
    for text in [*byte_alphabet(), *(left + right for left, right in merges)]:
        if text not in gone:
            tokens.add(text)
    for text in SPECIAL + (OVERLAPPING if overlapping else []):
        tokens.add(text, CONTROL)
    for text in USER_DEFINED:
        tokens.add(text, USER)
    ids = list(tokens.types)
    ends = {"bos_token_id": ids.index("<s>"), "eos_token_id": ids.index("</s>")}
    return tokens.case(
        scored=False, model="gpt2", pre=pre, merges=[f"{a} {b}" for a, b in merges], **ends, **keys
    )


@cache
def _parts() -> tuple[list[str], list[str], list[str]]:
    """Most characters of some texts, and pairs and fours of them, with spaces marked."""
    # llama.cpp reads no token beyond a NUL.
    corpus = [text.replace(" ", SPACE).replace("\0", "") for text in texts(2, 600)]
    characters = {char for text in corpus for char in text if _number(char, 8) or char == SPACE}
    pairs = {
        a + b for text in corpus for a, b in pairwise(text) if {a, b} <= characters and not _number(a + b, 3)
    }
    fours = {
        text[i : i + 4]
        for text in corpus
        for i in range(len(text) - 3)
        if text[i : i + 2] in pairs and text[i + 2 : i + 4] in pairs
    }
    return _shuffled(characters), _shuffled(pairs), _shuffled(fours)


def _sentence_piece(**keys: Any) -> Case:
    tokens = _Tokens()
    for text, kind in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        tokens.add(text, kind)
    for byte in range(256):
        tokens.add(f"<0x{byte:02X}>", BYTE, -1e6 - byte)
    spelt = ["<0", "x4", "1>", "<0x4", "<0x41>", "x0", "A>", "<0x0"]  # leads to byte tokens
    made = _shuffled({*(text for parts in _parts() for text in parts), *spelt, *"".join(spelt)})
    for i, text in enumerate(made):
        tokens.add(text, UNUSED if _number("unused" + text, 40) == 0 else NORMAL, -1.0 - i)
    for text in [*SPECIAL, *OVERLAPPING[:1], "<|endoftext|>"]:
        tokens.add(text, CONTROL, -1000000.5)
    for text in [*USER_DEFINED, SPACE * 3]:
        tokens.add(text, USER, -1000000.75)
    return tokens.case(
        model="llama", pre="default", unknown_token_id=0, bos_token_id=1, eos_token_id=2, **keys
    )


def _word_piece(**keys: Any) -> Case:
    tokens = _Tokens()
    for text in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        tokens.add(text, UNKNOWN if text == "[UNK]" else CONTROL)
    for part in (part.replace(SPACE, "") for parts in _parts() for part in parts):
        for text in (part, part.lower(), part.upper()):
            if text and _number("in" + text, 4):
                tokens.add(text)
            if text and _number("begins" + text, 3):
                tokens.add(SPACE + text)
    ids = {"unknown_token_id": 1, "bos_token_id": 2, "seperator_token_id": 3, "mask_token_id": 4}
    return tokens.case(scored=False, model="bert", **ids, **keys)


REPLACEMENTS = {
    **dict.fromkeys("\t\n\r\u00a0\u3000\u2003\u2028\u200b", " "),
    **dict.fromkeys("\x01\x7f\ufeff\u00ad", ""),
    "\ufb01": "fi",
    "\u212b": "\u00c5",
    "\u2026": "...",
    "\u00bd": "1\u20442",
    "\u338f": "kg",
    "\u216b": "XII",
    "\uff1c": "<",
    "\uff53": "s",
    "\uff1e": ">",
    "\uff48": "h",
    "\uff10": "0",
    "\uff11": "1",
    "\u0130": "i\u0307",
    "e\u0301": "\u00e9",
    "e\u0323": "\u1eb9",
    "e\u0323\u0302": "\u1ec7",
    "a\u0301": "\u00e1",
    "<\u0338": "\u226e",
    "\u1100\u1161": "\uac00",
    "\u1100\u1161\u11a8": "\uac01",
    "A": "a",
    "\ufdfa": "\u0635\u0644\u0649 \u0627",
}


def charsmap(replacements: Mapping[str, str]) -> bytes:
    """The table as SentencePiece compiles it: a double array from bytes to texts (Darts-clone), then the texts."""
    texts_at, offsets = bytearray(), {}
    for text in dict.fromkeys(replacements.values()):
        offsets[text] = len(texts_at)
        texts_at += text.encode() + b"\0"
    entries = {key.encode(): offsets[text] for key, text in replacements.items()}
    nodes = {0: 0}  # by place; a leaf has its value and the highest bit
    waiting = [(0, b"")]
    while waiting:
        place, prefix = waiting.pop()
        labels = {key[len(prefix)] for key in entries if key.startswith(prefix) and len(key) > len(prefix)}
        leaf = {0} if prefix in entries else set()
        places = range(1, 1 << 21)
        offset = next(
            o for o in places if all((at := place ^ o ^ c) and at not in nodes for c in labels | leaf)
        )
        nodes[place] |= offset << 10 | (256 if leaf else 0)
        if leaf:
            nodes[place ^ offset] = 1 << 31 | entries[prefix]
        for label in sorted(labels):
            nodes[place ^ offset ^ label] = label
            waiting.append((place ^ offset ^ label, prefix + bytes([label])))
    size = max(nodes) // 256 * 256 + 256
    array = struct.pack(f"<{size}I", *(nodes.get(i, 0) for i in range(size)))
    return struct.pack("<I", len(array)) + array + bytes(texts_at)


def _unigram(*, user: Iterable[str] = (), **keys: Any) -> Case:
    tokens = _Tokens()
    for text, kind in (("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN), ("<s>", CONTROL)):
        tokens.add(text, kind)
    for parts, weight in zip(_parts(), (9.0, 11.0, 13.0), strict=True):
        for text in parts:
            score = -weight - _number(text, 4000) / 1000
            tokens.add(text, UNUSED if score > -9.2 else NORMAL, score)
    for text in user:
        tokens.add(text, USER, -1000.0)
    for byte in (0x41, 0x0A):
        tokens.add(f"<0x{byte:02X}>", BYTE)
    for i in range(3):
        tokens.add(f"[PAD{i}]", UNUSED, -10000.0)
    ids = {"padding_token_id": 0, "eos_token_id": 1, "unknown_token_id": 2, "bos_token_id": 3}
    return tokens.case(model="t5", pre="default", **ids, **keys)


CASES: dict[str, Callable[[], Case]] = {
    **{f"gpt2 {pre}": partial(_byte_level, pre) for pre in PRE_TOKENIZERS},
    "gpt2 overlapping": partial(_byte_level, "qwen2", overlapping=True, add_eos_token=True),
    "gpt2 missing bytes": partial(_byte_level, "gpt-2", missing="é7"),
    "llama": _sentence_piece,
    "llama no prefix": partial(
        _sentence_piece, add_space_prefix=False, add_bos_token=False, add_eos_token=True
    ),
    "llama phi-3": partial(_sentence_piece, name="Phi-3 mini"),
    "bert": _word_piece,
    "bert cased": partial(_word_piece, **{"normalizer.lowercase": False}),
    "bert accents": partial(_word_piece, **{"normalizer.strip_accents": False}),
    "t5": partial(
        _unigram,
        add_space_prefix=True,
        remove_extra_whitespaces=True,
        user=["<h1>", "eng_Latn"],
        precompiled_charsmap=charsmap(REPLACEMENTS),
    ),
    "t5 plain": _unigram,
    "t5 prefix": partial(
        _unigram, add_space_prefix=True, add_bos_token=True, user=["\u00e9t\u00e9", "\u4f60\u597d"]
    ),
    "t5 squeezed": partial(
        _unigram, remove_extra_whitespaces=True, precompiled_charsmap=charsmap(REPLACEMENTS)
    ),
}
