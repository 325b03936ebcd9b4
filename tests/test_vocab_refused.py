"""Vocabularies that are damaged, or that cannot be encoded exactly, are refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from vocabularies import (
    CONTROL,
    NORMAL,
    Metadata,
    byte_level,
    sentence_piece,
    tied,
    unigram,
    with_tokens,
    word_piece,
)

from rlxc.errors import FormatError, ModelError, RlxcError, UnsupportedError
from rlxc.vocab import build_tokenizer
from rlxc.vocab.build import check_vocabulary

DAMAGE: dict[str, tuple[Metadata, type[RlxcError], str]] = {
    "no model": (sentence_piece(model=None), ModelError, "carries no tokenizer"),
    "unknown model": (sentence_piece(model="rwkv"), UnsupportedError, "known: llama, gpt2, t5, bert"),
    "unknown pre-tokenizer": (byte_level(pre="martian"), UnsupportedError, "'martian'.*known: .*qwen2"),
    "no tokens": (sentence_piece(tokens=None), ModelError, "tokens is missing"),
    "empty tokens": (sentence_piece(tokens=[]), ModelError, "tokens is empty"),
    "tokens not text": (sentence_piece(tokens=[1, 2]), FormatError, "not an array of strings"),
    "tokens one string": (sentence_piece(tokens="abc"), FormatError, "not an array of strings"),
    "token types missing": (sentence_piece(token_type=None), ModelError, "token_type is missing"),
    "token types short": (
        sentence_piece(token_type=np.ones(3, np.int32)),
        ModelError,
        "3 entries for 269 tokens",
    ),
    "token types not numbers": (sentence_piece(token_type=["a"]), FormatError, "not an array of numbers"),
    "scores missing": (sentence_piece(scores=None), ModelError, "scores is missing"),
    "scores short": (sentence_piece(scores=np.zeros(2, np.float32)), ModelError, "2 entries for 269 tokens"),
    "scores NaN": (sentence_piece(scores=np.full(269, np.nan, np.float32)), ModelError, "NaN for token 0"),
    "scores that tie": (
        tied("ab", "bc"),
        UnsupportedError,
        "'ab' and 'bc'|'bc' and 'ab'.*compete at score -1",
    ),
    "scores that tie with a longer token": (tied("ab", "abc"), UnsupportedError, "compete at score -1"),
    "a character that is no token": (
        sentence_piece(
            tokens=["<unk>", "<s>", "</s>", "a", "ab"],
            token_type=np.array([2, 3, 3, 1, 1]),
            scores=np.arange(5.0),
        ),
        UnsupportedError,
        "token 4 is 'ab', but 'b' is no token",
    ),
    "long token": (with_tokens(sentence_piece(), **{"a" * 1025: NORMAL}), ModelError, "1025 characters"),
    "bos out of range": (sentence_piece(bos_token_id=269), ModelError, "bos_token_id is 269"),
    "bos not a number": (sentence_piece(bos_token_id="1"), FormatError, "bos_token_id has type str"),
    "eot out of range": (sentence_piece(eot_token_id=9999), ModelError, "eot_token_id is 9999"),
    "flag not a flag": (sentence_piece(add_bos_token=7), FormatError, "add_bos_token has type int"),
    "bos added but absent": (byte_level(bos_token_id=None, add_bos_token=True), ModelError, "no such token"),
    "eos added but absent": (byte_level(eos_token_id=None, add_eos_token=True), ModelError, "no such token"),
    "merges missing": (byte_level(merges=None), ModelError, "merges is missing"),
    "merge of one part": (byte_level(merges=["ab"]), FormatError, r"merges\[0\] is 'ab'"),
    "merge of three parts": (byte_level(merges=["a b c"]), FormatError, r"merges\[0\] is 'a b c'"),
    "merge makes no token": (byte_level(merges=["Q Q"]), ModelError, "needs 'QQ'"),
    "unigram without unknown token": (
        unigram(unknown_token_id=None, tokens=["a"], token_type=np.ones(1), scores=np.zeros(1)),
        FormatError,
        "token_type is not an array",
    ),
    "unigram of one token": (
        unigram(tokens=["a"], token_type=np.ones(1, np.int32), scores=np.zeros(1)),
        ModelError,
        "unknown_token_id is missing",
    ),
    "unigram without normal tokens": (
        unigram(token_type=np.full(6, CONTROL)),
        ModelError,
        "no normal tokens",
    ),
    "unigram scores above 0": (unigram(scores=np.ones(6)), ModelError, "all are above 0"),
    "unigram filler of middling score": (
        unigram(token_type=np.array([3, 3, 2, 1, 1, 5]), scores=np.array([0, 0, 0, -1, -2, -3.0])),
        UnsupportedError,
        "unused token 5, 'ab'",
    ),
    "charsmap of words": (
        unigram(precompiled_charsmap=np.zeros(9, np.int32)),
        FormatError,
        "not an array of bytes",
    ),
    "charsmap too short": (
        unigram(precompiled_charsmap=np.ones(3, np.uint8)),
        FormatError,
        "charsmap is damaged",
    ),
    "charsmap longer than it is": (
        unigram(precompiled_charsmap=np.array([16, 0, 0, 0, 1, 0], np.uint8)),
        FormatError,
        "charsmap is damaged",
    ),
    "charsmap without end": (
        unigram(precompiled_charsmap=np.array([4, 0, 0, 0, 0, 4, 0, 0, 65], np.uint8)),
        FormatError,
        "charsmap is damaged",
    ),
    "word piece without unknown token": (
        word_piece(unknown_token_id=None),
        UnsupportedError,
        "unknown words",
    ),
    "word piece without separator": (word_piece(seperator_token_id=None), ModelError, "no such token"),
    "word piece of an added word": (
        word_piece(token_type=np.array([2, 3, 3, 1, 4, 1])),
        UnsupportedError,
        "token 4, 'ing', is cut out",
    ),
    "word piece of a mark alone": (
        word_piece(tokens=["[UNK]", "[CLS]", "[SEP]", "\u2581", "ing", "\u2581a"]),
        UnsupportedError,
        "token 3 is the beginning",
    ),
    "word pieces that become one": (
        word_piece(tokens=["[UNK]", "[CLS]", "[SEP]", "\u2581##ing", "ing", "\u2581a"]),
        ModelError,
        "tokens 3 and 4 are both '##ing'",
    ),
    "whole words with a byte that is no token": (
        byte_level(
            pre="llama-bpe",
            tokens=["a", "b", "ax"],
            token_type=np.ones(3, np.int32),
            merges=["a b"][:0],
            bos_token_id=0,
            eos_token_id=1,
        ),
        UnsupportedError,
        "token 2 is 'ax', of which a byte is no token",
    ),
    "half a surrogate": (
        with_tokens(sentence_piece(), **{"\ud800": NORMAL}),
        FormatError,
        "not valid Unicode",
    ),
    "template not text": (sentence_piece() | {"tokenizer.chat_template": 3}, FormatError, "not a string"),
}


@pytest.mark.parametrize(("metadata", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_metadata_is_refused(metadata: Metadata, error: type[RlxcError], message: str) -> None:
    for read in (build_tokenizer, check_vocabulary):
        with pytest.raises(error, match=message) as caught:
            read(metadata, source="broken.gguf")
        assert "\n" not in str(caught.value)


def test_checking_a_vocabulary_counts_its_tokens() -> None:
    assert check_vocabulary(unigram(), source="test") == 6


def test_a_token_twice_is_refused_by_both_ids() -> None:
    metadata = sentence_piece()
    metadata["tokenizer.ggml.tokens"][-1] = "ab"
    with pytest.raises(ModelError, match="tokens 264 and 268 are both 'ab'"):
        build_tokenizer(metadata, source="broken.gguf")
