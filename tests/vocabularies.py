"""Small vocabularies as the metadata of a GGUF file, to be changed by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from rlxc.vocab import TokenizerFiles, build_tokenizer

DATA = Path(__file__).parent / "data"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

Metadata = dict[str, Any]


def sentence_piece(**changes: Any) -> Metadata:
    """A vocabulary for words of a, b, c: the better the score, the earlier a merge."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    scores = [0.0] * len(tokens)
    pieces = {
        "\u2581": -9,
        "a": -9,
        "b": -9,
        "c": -9,
        "bc": -1,
        "ab": -2,
        "abc": -3,
        "\u2581a": -4,
        "\u2581abc": -5,
    }
    tokens += [*pieces, "<html>"]
    types += [NORMAL] * len(pieces) + [USER_DEFINED]
    scores += [*map(float, pieces.values()), -1000.0]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def byte_level(**changes: Any) -> Metadata:
    """The vocabulary that ``make_tokens.py`` made."""
    made = json.loads((DATA / "byte_level_tokens.json").read_text())
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": made["tokens"],
        "token_type": np.array(made["types"], np.int32),
        "merges": made["merges"],
        "bos_token_id": made["tokens"].index("<bos>"),
        "eos_token_id": made["tokens"].index("<eos>"),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def with_tokens(metadata: Metadata, **types: int) -> Metadata:
    """Appends tokens of the given types."""
    changed = dict(metadata)
    changed["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *types]
    kinds = [*metadata["tokenizer.ggml.token_type"], *types.values()]
    changed["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    if "tokenizer.ggml.scores" in metadata:
        scores = [*metadata["tokenizer.ggml.scores"], *[-2000.0] * len(types)]
        changed["tokenizer.ggml.scores"] = np.array(scores, np.float32)
    return changed


def load(files: TokenizerFiles) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(files.tokenizer_json.decode())


def pieces(metadata: Metadata, text: str, add_special_tokens: bool = False) -> list[str]:
    tokens: list[str] = (
        load(build_tokenizer(metadata, source="test"))
        .encode(text, add_special_tokens=add_special_tokens)
        .tokens
    )
    return tokens


def tied(*tokens: str) -> Metadata:
    """Tokens of equal score, and the characters that they are made of."""
    texts = ["<unk>", "<s>", "</s>", "a", "b", "c", *reversed(tokens)]
    types = np.array([UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(texts) - 3))
    return sentence_piece(tokens=texts, token_type=types, scores=np.array([-9.0] * 6 + [-1.0] * len(tokens)))


def unigram(**changes: Any) -> Metadata:
    metadata = {
        "model": "t5",
        "tokens": ["<pad>", "</s>", "<unk>", "a", "b", "ab"],
        "token_type": np.array([CONTROL, CONTROL, UNKNOWN, NORMAL, NORMAL, NORMAL]),
        "scores": np.array([0, 0, 0, -1, -2, -2.5], np.float32),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def word_piece(**changes: Any) -> Metadata:
    tokens = ["[UNK]", "[CLS]", "[SEP]", "\u2581hello", "ing", "\u2581a"]
    metadata = {
        "model": "bert",
        "tokens": tokens,
        "token_type": np.array([UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL]),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "seperator_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}
