"""Typed access to the ``tokenizer.ggml.*`` keys of a GGUF file, and the list of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlxc.errors import FormatError, ModelError

PREFIX = "tokenizer.ggml."

# Token types of the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# What SentencePiece writes for a space.
SPACE = "\u2581"

# Tokens that end a turn wherever they occur, whatever type the file gives them.
END_TEXTS = frozenset(
    [
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "[e~["),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
        *("<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "[EOS]"),
        *("<EOT>", "_<EOT>", "[EOT]", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ]
)

# Marks of messages and channels, which a reader of the text needs to see.
_SHOWN_TEXTS = frozenset(["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"])


class Keys:
    """The values, with errors that name the key."""

    def __init__(self, metadata: Mapping[str, Any], source: object) -> None:
        self.metadata = metadata
        self.source = source

    def get(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value, or the default; FormatError if it is of another kind."""
        value = self.metadata.get(PREFIX + name, default)
        if value is default:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{PREFIX}{name} has type {type(value).__name__}", source=self.source)
        return value

    def token_id(self, name: str, size: int, default: int | None = None) -> int | None:
        """The token of a role; ModelError if it is outside the vocabulary, None if there is none."""
        value: int | None = self.get(f"{name}_token_id", int, None)
        if value is None:
            return default if default is not None and default < size else None
        if not 0 <= value < size:
            raise ModelError(
                f"{PREFIX}{name}_token_id is {value}, but the vocabulary has {size} tokens",
                source=self.source,
            )
        return value

    def strings(self, name: str) -> list[str]:
        """An array of strings, which must be there."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            raise ModelError(f"{PREFIX}{name} is missing", source=self.source)
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise FormatError(f"{PREFIX}{name} is not an array of strings", source=self.source)
        strings = list(value)
        if not all(isinstance(text, str) for text in strings):
            raise FormatError(f"{PREFIX}{name} is not an array of strings", source=self.source)
        return strings

    def numbers(self, name: str, size: int, kinds: str) -> np.ndarray[Any, Any]:
        """As :meth:`array`, which must be there with ``size`` entries."""
        array = self.array(name, kinds)
        if array is None:
            raise ModelError(f"{PREFIX}{name} is missing", source=self.source)
        if len(array) != size:
            raise ModelError(f"{PREFIX}{name} has {len(array)} entries for {size} tokens", source=self.source)
        return array

    def array(self, name: str, kinds: str) -> np.ndarray[Any, Any] | None:
        """An array of numbers of any length, whose numpy kind is one of ``kinds``; None if there is none."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return None
        array = np.asarray(value)
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise FormatError(f"{PREFIX}{name} is not an array of numbers", source=self.source)
        return array

    def scores(self, size: int) -> np.ndarray[Any, Any]:
        """Every token's score, in float64."""
        scores = self.numbers("scores", size, "fiu").astype(np.float64)
        if np.isnan(scores).any():
            raise ModelError(
                f"{PREFIX}scores holds NaN for token {int(np.isnan(scores).argmax())}", source=self.source
            )
        return scores


@dataclass(frozen=True)
class Vocabulary:
    """Every token by id, its type, and its id by text."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, keys: Keys) -> Vocabulary:
        """The tokens, none of them empty, with the types that llama.cpp gives them by their text."""
        tokens = keys.strings("tokens")
        if not tokens:
            raise ModelError(f"{PREFIX}tokens is empty", source=keys.source)
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        types = keys.numbers("token_type", len(tokens), "iu").tolist()
        ids = by_text(tokens, keys.source)
        shown = set(_SHOWN_TEXTS) | not_ends(ids)
        for text in (END_TEXTS | shown) & ids.keys():
            types[ids[text]] = USER_DEFINED if text in shown else CONTROL
        return cls(tokens, types, ids)

    def is_added(self, i: int) -> bool:
        """Whether the token is cut out of a text before anything else happens to it."""
        return self.types[i] in (UNKNOWN, CONTROL, USER_DEFINED)


def by_text(tokens: Sequence[str], source: object) -> dict[str, int]:
    """Every token's id; refuses a text that two tokens have."""
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        i, text = next((i, text) for i, text in enumerate(tokens) if ids[text] != i)
        raise ModelError(f"tokens {i} and {ids[text]} are both {shown(text)}", source=source)
    return ids


def not_ends(texts: Mapping[str, int]) -> set[str]:
    """``<|end|>``, where it ends only one message of several: other tokens there end the turn."""
    several = {"<|return|>", "<|call|>"} <= texts.keys() or {"<|flush|>", "<|calls|>"} <= texts.keys()
    return {"<|end|>"} if several else set()


def shown(text: str) -> str:
    """A token's text for an error message, cut where it would fill the line."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
