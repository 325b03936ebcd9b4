"""From a GGUF file's vocabulary to a standard ``tokenizer.json`` and a chat template.

Two kinds of vocabulary are understood, named as ``tokenizer.ggml.model`` names them:

- ``llama``: SentencePiece BPE. The file holds scores, no merges; see :func:`_merges_from_scores`.
- ``gpt2``: byte-level BPE with explicit merges; ``tokenizer.ggml.pre`` names the regular expressions
  that cut the text into words first.

Which tokens begin and end a text follows llama.cpp's ``llama-vocab.cpp``, the reference reader of these keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rlxc.errors import FormatError, ModelError, UnsupportedError
from rlxc.vocab.pretokenizers import PRE_TOKENIZERS
from rlxc.vocab.templates import DEFAULT_TEMPLATES

_KEY = "tokenizer.ggml."

# Token types of the GGUF specification.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_ADDED = (_UNKNOWN, _CONTROL, _USER_DEFINED)

_SPACE = "\u2581"  # what SentencePiece writes for a space
_MAX_TOKEN = 1024  # characters; deriving a merge is quadratic in them

# Tokens that end a turn wherever they occur, whatever type the file gives them.
END_TEXTS = frozenset(
    [
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
        *(
            "<|endoftext|>",
            "<|end_of_text|>",
            "<end_of_utterance>",
            "<eos>",
            "<EOT>",
            "_<EOT>",
            "[EOT]",
            "[EOS]",
        ),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|file_sep|>"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ]
)
_END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class TokenizerFiles:
    """What an artifact stores about its vocabulary.

    Attributes:
        tokenizer_json: a file for the ``tokenizers`` library; the same input gives the same bytes.
        chat_template: Jinja source, from the file or :data:`DEFAULT_TEMPLATES`; None if neither has one.
        bos_id: the token that begins a text.
        eos_ids: tokens at which generation stops, the file's own end of text first.
        add_bos: whether encoding puts ``bos_id`` in front (``tokenizer_json`` does so).
        add_eos: likewise for the first of ``eos_ids`` at the end.
        vocab_size: number of tokens; ids are 0 ... vocab_size - 1.
    """

    tokenizer_json: bytes
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    vocab_size: int


@dataclass(frozen=True)
class _Parts:
    """What differs between the two kinds of vocabulary, and llama.cpp's defaults for each."""

    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any]
    model: dict[str, Any]
    add_bos: bool
    bos_id: int | None = None
    eos_id: int | None = None


class _Metadata:
    """Typed access to ``tokenizer.ggml.*``, with errors that name the key."""

    def __init__(self, metadata: Mapping[str, Any], source: object) -> None:
        self.metadata = metadata
        self.source = source

    def get(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.metadata.get(_KEY + name, default)
        if value is default:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{_KEY}{name} has type {type(value).__name__}", source=self.source)
        return value

    def token_id(self, name: str, size: int, default: int | None = None) -> int | None:
        value: int | None = self.get(f"{name}_token_id", int, None)
        if value is None:
            return default if default is not None and default < size else None
        if not 0 <= value < size:
            raise ModelError(
                f"{_KEY}{name}_token_id is {value}, but the vocabulary has {size} tokens", source=self.source
            )
        return value

    def strings(self, name: str) -> list[str]:
        value = self.metadata.get(_KEY + name)
        if value is None:
            raise ModelError(f"{_KEY}{name} is missing", source=self.source)
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise FormatError(f"{_KEY}{name} is not an array of strings", source=self.source)
        strings = list(value)
        if not all(isinstance(text, str) for text in strings):
            raise FormatError(f"{_KEY}{name} is not an array of strings", source=self.source)
        return strings

    def numbers(self, name: str, size: int, kinds: str) -> np.ndarray[Any, Any]:
        value = self.metadata.get(_KEY + name)
        if value is None:
            raise ModelError(f"{_KEY}{name} is missing", source=self.source)
        array = np.asarray(value)
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise FormatError(f"{_KEY}{name} is not an array of numbers", source=self.source)
        if len(array) != size:
            raise ModelError(f"{_KEY}{name} has {len(array)} entries for {size} tokens", source=self.source)
        return array


@dataclass(frozen=True)
class _Vocabulary:
    """Every token by id, its type, and its id by text."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, keys: _Metadata) -> _Vocabulary:
        tokens = keys.strings("tokens")
        if not tokens:
            raise ModelError(f"{_KEY}tokens is empty", source=keys.source)
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        types = keys.numbers("token_type", len(tokens), "iu").tolist()
        ids = {text: i for i, text in enumerate(tokens)}
        if len(ids) != len(tokens):
            i, text = next((i, text) for i, text in enumerate(tokens) if ids[text] != i)
            raise ModelError(f"tokens {i} and {ids[text]} are both {_shown(text)}", source=keys.source)
        for text in END_TEXTS & ids.keys():
            types[ids[text]] = _CONTROL
        return cls(tokens, types, ids)

    def added(self) -> list[dict[str, Any]]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": i, "content": self.tokens[i], **flags, "special": kind != _USER_DEFINED}
            for i, kind in enumerate(self.types)
            if kind in _ADDED
        ]


def build_tokenizer(metadata: Mapping[str, Any], *, source: object) -> TokenizerFiles:
    """Builds the tokenizer that ``metadata`` of a GGUF file describes.

    Args:
        metadata: values by GGUF key; arrays of strings are sequences of str, arrays of numbers numpy arrays.
        source: the file, for error messages.

    Raises:
        UnsupportedError: a kind of vocabulary or pre-tokenizer that is not implemented.
        ModelError: arrays are missing or contradict each other.
        FormatError: a value has the wrong type.
    """
    keys = _Metadata(metadata, source)
    kinds = {"llama": _sentence_piece, "gpt2": _byte_level}
    kind = keys.get("model", str, None)
    if kind is None:
        raise ModelError(f"{_KEY}model is missing", source=source, remedy="the file carries no tokenizer")
    if kind not in kinds:
        known = ", ".join(kinds)
        raise UnsupportedError(
            f"tokenizer model {kind!r} is not supported", source=source, remedy=f"known: {known}"
        )
    vocabulary = _Vocabulary.read(keys)
    parts = kinds[kind](vocabulary, keys)

    size = len(vocabulary.tokens)
    bos_id = keys.token_id("bos", size, parts.bos_id)
    eos_id = keys.token_id("eos", size, parts.eos_id)
    add_bos = bool(keys.get("add_bos_token", bool, parts.add_bos))
    add_eos = bool(keys.get("add_eos_token", bool, False))
    for add, name, token_id in ((add_bos, "bos", bos_id), (add_eos, "eos", eos_id)):
        if add and token_id is None:
            raise ModelError(f"{_KEY}add_{name}_token is true, but there is no such token", source=source)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": _template(
            vocabulary.tokens, bos_id if add_bos else None, eos_id if add_eos else None
        ),
        "decoder": parts.decoder,
        "model": parts.model,
    }
    return TokenizerFiles(
        tokenizer_json=_to_json(document, source),
        chat_template=_chat_template(metadata, vocabulary, source),
        bos_id=bos_id,
        eos_ids=_end_ids(keys, vocabulary, eos_id),
        add_bos=add_bos,
        add_eos=add_eos,
        vocab_size=size,
    )


def _sentence_piece(vocabulary: _Vocabulary, keys: _Metadata) -> _Parts:
    tokens = vocabulary.tokens
    scores = keys.numbers("scores", len(tokens), "fiu").astype(np.float64)
    if np.isnan(scores).any():
        raise ModelError(
            f"{_KEY}scores holds NaN for token {int(np.isnan(scores).argmax())}", source=keys.source
        )
    prefix = keys.get("add_space_prefix", bool, True)
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = keys.token_id("unknown", len(tokens), 0)
    return _Parts(
        normalizer=(
            {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, escape]}
            if prefix
            else escape
        ),
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            vocabulary.ids,
            _merges_from_scores(vocabulary, scores, keys.source),
            unk_token=None if unknown is None else tokens[unknown],
            byte_fallback=all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256)),
        ),
        add_bos=True,
        bos_id=1,
        eos_id=2,
    )


def _merges_from_scores(
    vocabulary: _Vocabulary, scores: np.ndarray[Any, Any], source: object
) -> list[tuple[str, str]]:
    """Returns the merges that make BPE by rank equal to SentencePiece's BPE by score, best first.

    SentencePiece joins whichever two neighbours make the best-scored token, so any way to cut a token in two
    is a possible merge: twice as many as there are tokens. At most one of them ever happens. While nothing has
    been joined across the ends of a stretch of text, what happens inside does not depend on what is outside; so
    when two neighbours that spell token ``t`` meet, they are the last two symbols of BPE run on ``t`` alone, and
    that run has one such pair or none.

    Where tokens share a score, the lower id goes first; SentencePiece would take the leftmost. The two can
    differ only where overlapping joins tie.
    """
    # An added token is cut out of the text beforehand, so its text never comes up here, unless it is
    # spelt with the mark that spaces are turned into afterwards.
    best_first = [
        text
        for i in np.argsort(-scores, kind="stable").tolist()
        if " " not in (text := vocabulary.tokens[i]) and (vocabulary.types[i] not in _ADDED or _SPACE in text)
    ]
    longest = max(best_first, key=len, default="")
    if len(longest) > _MAX_TOKEN:
        raise ModelError(
            f"token {vocabulary.ids[longest]} has {len(longest)} characters; the limit is {_MAX_TOKEN}",
            source=source,
        )
    rank = {text: i for i, text in enumerate(best_first)}
    pairs = (_last_pair(text, rank) for text in best_first if len(text) > 1)
    return [pair for pair in pairs if pair is not None and pair[0] in rank and pair[1] in rank]


def _last_pair(text: str, rank: Mapping[str, int]) -> tuple[str, str] | None:
    """Runs BPE on ``text`` until two symbols are left; None if it gets stuck before."""
    never = len(rank)
    symbols = list(text)
    ranks = [rank.get(left + right, never) for left, right in pairwise(symbols)]
    while len(symbols) > 2:
        best = min(ranks)
        if best == never:
            return None
        i = ranks.index(best)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        del ranks[i]
        if i > 0:
            ranks[i - 1] = rank.get(symbols[i - 1] + symbols[i], never)
        if i < len(ranks):
            ranks[i] = rank.get(symbols[i] + symbols[i + 1], never)
    return symbols[0], symbols[1]


def _byte_level(vocabulary: _Vocabulary, keys: _Metadata) -> _Parts:
    name = keys.get("pre", str, "default")
    pre = next((entry for entry in PRE_TOKENIZERS if name in entry.names), None)
    if pre is None:
        known = ", ".join(sorted(name for entry in PRE_TOKENIZERS for name in entry.names))
        raise UnsupportedError(
            f"pre-tokenizer {name!r} is not supported", source=keys.source, remedy=f"known: {known}"
        )
    ids = vocabulary.ids
    merges = []
    for i, line in enumerate(keys.strings("merges")):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise FormatError(f"{_KEY}merges[{i}] is {_shown(line)}, not two symbols", source=keys.source)
        for part in (left, right, left + right):
            if part not in ids:
                raise ModelError(
                    f"{_KEY}merges[{i}] needs {_shown(part)}, which is not in the vocabulary",
                    source=keys.source,
                )
        merges.append((left, right))
    split = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _Parts(
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*split, byte_level]},
        decoder=byte_level,
        model=_bpe(ids, merges, ignore_merges=pre.ignore_merges),
        add_bos=pre.add_bos,
    )


def _bpe(
    ids: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    # "a b" loads faster and in half the memory of ["a", "b"], but there the library skips what looks like the
    # header of a merges file.
    plain = not any(left.startswith("#version") for left, _ in merges)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": ids,
        "merges": [f"{left} {right}" for left, right in merges] if plain else merges,
    }


def _template(tokens: Sequence[str], bos_id: int | None, eos_id: int | None) -> dict[str, Any] | None:
    """The post-processor that adds the tokens that begin and end a text."""
    added = {tokens[i]: i for i in (bos_id, eos_id) if i is not None}
    if not added:
        return None

    def surround(*sequences: str) -> list[dict[str, Any]]:
        template: list[dict[str, Any]] = []
        for type_id, sequence in enumerate(sequences):
            if bos_id is not None:
                template.append({"SpecialToken": {"id": tokens[bos_id], "type_id": type_id}})
            template.append({"Sequence": {"id": sequence, "type_id": type_id}})
            if eos_id is not None:
                template.append({"SpecialToken": {"id": tokens[eos_id], "type_id": type_id}})
        return template

    return {
        "type": "TemplateProcessing",
        "single": surround("A"),
        "pair": surround("A", "B"),
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in added.items()},
    }


def _end_ids(keys: _Metadata, vocabulary: _Vocabulary, eos_id: int | None) -> tuple[int, ...]:
    """Returns every token that ends generation: the file's own, then those known by their text.

    llama.cpp also counts any token spelt ``</s>``; here only if it is of control type, because in Gemma's
    vocabulary it is an HTML tag.
    """
    named = [eos_id, *(keys.token_id(name, len(vocabulary.tokens)) for name in _END_KEYS)]
    texts = {vocabulary.ids[text] for text in END_TEXTS & vocabulary.ids.keys()}
    closing = vocabulary.ids.get("</s>")
    if closing is not None and vocabulary.types[closing] == _CONTROL:
        texts.add(closing)
    if {"<|return|>", "<|call|>"} <= vocabulary.ids.keys():
        texts.discard(vocabulary.ids.get("<|end|>", -1))  # there it only ends one message of several
    return tuple(dict.fromkeys(i for i in (*named, *sorted(texts)) if i is not None))


def _chat_template(metadata: Mapping[str, Any], vocabulary: _Vocabulary, source: object) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        marks = (mark for mark in DEFAULT_TEMPLATES if mark in vocabulary.ids)
        return DEFAULT_TEMPLATES.get(next(marks, ""))
    if not isinstance(template, str):
        raise FormatError("tokenizer.chat_template is not a string", source=source)
    return template


def _to_json(document: Mapping[str, Any], source: object) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise FormatError("a token is not valid Unicode text", source=source) from error


def _shown(text: str) -> str:
    """A token's text for an error message, cut where it would fill the line."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
