"""Tokens that are cut out of a text before anything else: control tokens, unknown, user-defined.

The rules are llama.cpp's: the longest token is searched for first, in all of the text. The ``tokenizers`` library goes
through the text from the left instead; that differs where one token's end begins a longer one. And white space beside
a token that swallows it is ASCII only. Where either makes a difference, the document says so by `RULE`, which the
library skips and the runtime follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlxc.vocab.keys import CONTROL, UNKNOWN, USER_DEFINED, Keys, Vocabulary

RULE = {"cut": "longest first"}

_PLAIN = frozenset(["<unk>", "<s>", "<|endoftext|>"])


def added_tokens(vocabulary: Vocabulary, keys: Keys, *, by_runtime: bool) -> list[dict[str, Any]]:
    """The entries of ``tokenizer.json``, in order of their ids; ``by_runtime`` has them say `RULE` in any case."""
    left, right = _strips(vocabulary, keys)
    entries: list[dict[str, Any]] = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": text in left,
            "rstrip": text in right,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    if entries and (by_runtime or left or right or _overlap(entry["content"] for entry in entries)):
        entries[0] |= RULE
    return entries


def _strips(vocabulary: Vocabulary, keys: Keys) -> tuple[set[str], set[str]]:
    """The tokens that swallow white space before them, and after them.

    GGUF files do not say so: llama.cpp goes by names of models, architectures and pre-tokenizers.
    """
    name, architecture = (keys.metadata.get(f"general.{key}", "") for key in ("name", "architecture"))
    name, architecture, pre = str(name).lower(), str(architecture), keys.get("pre", str, "")
    if any(mark in pre for mark in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
        mark in architecture for mark in ("nomic-bert-moe", "jina-bert-v3")
    ):
        return {"<mask>"} & vocabulary.ids.keys(), set()
    if "phi-3" in name or "phi3" in name:
        added = {text for i, text in enumerate(vocabulary.tokens) if vocabulary.is_added(i)}
        return set(), added - _PLAIN
    if "modern-bert" in name:
        return {"[MASK]"} & vocabulary.ids.keys(), set()
    return set(), set()


def _overlap(texts: Iterable[str]) -> bool:
    """Whether, in some text, the first of two tokens that overlap gives way to the longer one after it."""
    tokens = {text.encode("utf-8", "surrogatepass") for text in texts}
    begun: dict[bytes, list[bytes]] = {}
    for token in tokens:
        for n in range(1, len(token)):
            begun.setdefault(token[:n], []).append(token)
    return any(
        len(later) >= len(token)
        and later != token
        and not _taken(token, token[:k] + later, len(later), tokens)
        for token in tokens
        for k in range(1, len(token))
        for later in begun.get(token[k:], ())
    )


def _taken(token: bytes, text: bytes, longest: int, tokens: set[bytes]) -> bool:
    """Whether another token begins the text that is as long as the longest inside: then both rules take that one."""
    return any(text[:n] in tokens and text[:n] != token for n in range(longest, len(text) + 1))
