"""Unigram language models (``tokenizer.ggml.model`` = ``t5``): of all ways to cut a text, the most probable one.

Taku Kudo, Subword Regularization (2018). The library's model is the same as llama.cpp's; its normalizers are not, so
the runtime normalizes (``runtime/unigram.py``), by what it reads in the document that is made here.
"""

from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np

from rlxc.errors import FormatError, ModelError, UnsupportedError
from rlxc.vocab.keys import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Keys,
    Vocabulary,
    shown,
)
from rlxc.vocab.parts import Parts, marked_spaces, replace, sequence

_UNKNOWN_PENALTY = 10.0  # how much worse than the worst token an unknown character is


def unigram(vocabulary: Vocabulary, keys: Keys) -> Parts:
    """The parts; refuses scores that the library's model would take otherwise."""
    tokens = vocabulary.tokens
    unknown = keys.token_id("unknown", len(tokens), 2)
    if unknown is None:
        raise ModelError(
            f"{PREFIX}unknown_token_id is missing",
            source=keys.source,
            remedy="a unigram vocabulary needs a token for what it does not know",
        )
    entries = _entries(vocabulary, keys.scores(len(tokens)), keys.source)
    prefix = keys.get("add_space_prefix", bool, False)
    squeeze = keys.get("remove_extra_whitespaces", bool, False)
    steps: list[dict[str, Any]] = _charsmap(keys)
    if squeeze:
        steps += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            replace({"Regex": " {2,}"}, " "),
        ]
    return Parts(
        normalizer=sequence("normalizers", steps),
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "always" if prefix or squeeze else "never",
            "split": False,
        },
        decoder=marked_spaces(strip=prefix),
        model=lambda: {"type": "Unigram", "unk_id": unknown, "vocab": entries, "byte_fallback": False},
        by_runtime=True,
        add_eos=True,
        eos_id=1,
    )


def _entries(vocabulary: Vocabulary, scores: np.ndarray[Any, Any], source: object) -> list[tuple[str, float]]:
    """Every token with the score that makes the library choose as llama.cpp does.

    The library derives an unknown character's score from the worst of all tokens, llama.cpp from the worst normal one:
    so no other may be worse. A control, unknown or byte token is never chosen: what its score is does not matter, and
    the runtime sees to the rest. User-defined tokens count as certain. Fillers of unused ids have scores so low that
    any other way to write their text is better; they get a text that no text has, since spaces are marked.
    """
    types = np.array(vocabulary.types)
    normal = scores[types == NORMAL]
    if not len(normal):
        raise ModelError("the vocabulary has no normal tokens", source=source)
    worst = float(normal.min())
    if worst > 0:
        raise ModelError("scores are no logarithms of probabilities: all are above 0", source=source)
    entries = []
    for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        score = float(scores[i])
        if kind in (CONTROL, UNKNOWN, BYTE, USER_DEFINED):
            score = 0.0
        elif kind not in (NORMAL, UNUSED) or score < len(text) * (worst - _UNKNOWN_PENALTY):
            text, score = f" {text}", 0.0
        elif score < worst:
            raise UnsupportedError(
                f"unused token {i}, {shown(text)}, has a score between those of normal and of unknown tokens",
                source=source,
                remedy="give it the score of a normal token, or -10000",
            )
        entries.append((text, score))
    return entries


def _charsmap(keys: Keys) -> list[dict[str, Any]]:
    """The normalizer for a table of replacements as SentencePiece compiles it, if the file has one."""
    array = keys.array("precompiled_charsmap", "iu")
    if array is None or not len(array):
        return []
    if array.dtype.itemsize != 1:
        raise FormatError(f"{PREFIX}precompiled_charsmap is not an array of bytes", source=keys.source)
    raw = array.tobytes()
    size = struct.unpack_from("<I", raw)[0] if len(raw) >= 4 else 0
    if size % 4 or not size or size + 4 >= len(raw) or raw[-1]:
        raise FormatError(f"{PREFIX}precompiled_charsmap is damaged", source=keys.source)
    return [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}]
