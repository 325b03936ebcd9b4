"""WordPiece (``tokenizer.ggml.model`` = ``bert``): words from the longest pieces that begin what is left of them.

GGUF files write a piece that begins a word with the mark of a space and others without; here, as in BERT's own files,
pieces that go on have ``##`` and others nothing. What is a word, llama.cpp decides a little differently from BERT:
any mark is an accent, not only one without width; and of a Hangul syllable only the first consonant is left. Where a
text itself has the mark of a space, ``runtime/word_piece.py`` finds the pieces.
"""

from __future__ import annotations

from typing import Any

from rlxc.errors import UnsupportedError
from rlxc.vocab.keys import SPACE, Keys, Vocabulary, by_text, shown
from rlxc.vocab.parts import Parts, replace, sequence, split

_GOES_ON = "##"
_LONGEST_WORD = 2**31  # characters: none is too long

# Dropped: control characters that are no white space, also invisible and private ones, and what could not be decoded.
_DROPPED = r"[[\p{Cc}\p{Cf}\p{Co}\x{FFFD}]&&[^\s]]"
_CHINESE = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}\x{2B740}-\x{2B81F}"
    r"\x{2B920}-\x{2CEAF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}"
)
_ALONE = rf"[\p{{P}}$+<=>^`|~{_CHINESE}]"


def word_piece(vocabulary: Vocabulary, keys: Keys) -> Parts:
    """The parts; refuses tokens that BERT's way of writing cannot tell apart."""
    size = len(vocabulary.tokens)
    unknown = keys.token_id("unknown", size, 100)
    if unknown is None:
        raise UnsupportedError(
            "the vocabulary has no token for unknown words",
            source=keys.source,
            remedy="set tokenizer.ggml.unknown_token_id",
        )
    tokens = [_written(i, vocabulary, keys.source) for i in range(size)]
    ids = by_text(tokens, keys.source)
    return Parts(
        normalizer=_normalizer(keys),
        pre_tokenizer=sequence("pretokenizers", [split(r"\s+", "Removed"), split(_ALONE)]),
        decoder={"type": "WordPiece", "prefix": _GOES_ON, "cleanup": False},
        model=lambda: {
            "type": "WordPiece",
            "unk_token": tokens[unknown],
            "continuing_subword_prefix": _GOES_ON,
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": ids,
        },
        always=True,
        by_runtime=True,
        bos_id=101,
        eos_id=keys.token_id("seperator", size, 102),  # so it is spelt in GGUF
    )


def _written(i: int, vocabulary: Vocabulary, source: object) -> str:
    """A token as BERT writes it."""
    text = vocabulary.tokens[i]
    if vocabulary.is_added(i):
        if text.isalnum():
            raise UnsupportedError(
                f"token {i}, {shown(text)}, is cut out of texts and may be part of a word, too",
                source=source,
                remedy="no other tokens than those with punctuation are supported",
            )
        return text
    if not text.startswith(SPACE):
        return _GOES_ON + text
    if text == SPACE:
        raise UnsupportedError(
            f"token {i} is the beginning of a word alone",
            source=source,
            remedy="no model is known to have it",
        )
    return text[len(SPACE) :]


def _normalizer(keys: Keys) -> dict[str, Any] | None:
    lowercase = keys.get("normalizer.lowercase", bool, True)
    strip_accents = keys.get("normalizer.strip_accents", bool, lowercase)
    steps: list[dict[str, Any]] = []
    if strip_accents:
        steps += [_first_consonant(i) for i in range(19)]
        steps += [{"type": "NFD"}, replace({"Regex": r"\p{M}"}, "")]
    steps.append(replace({"Regex": _DROPPED}, ""))
    if lowercase:
        # The library makes two characters of this one, a letter and a mark.
        steps += [replace({"String": "\u0130"}, "i"), {"type": "Lowercase"}]
    return sequence("normalizers", steps)


def _first_consonant(i: int) -> dict[str, Any]:
    """The Unicode Standard, section 3.12: 588 syllables begin with each of 19 consonants."""
    first = 0xAC00 + 588 * i
    return replace({"Regex": f"[{chr(first)}-{chr(first + 587)}]"}, chr(0x1100 + i))
