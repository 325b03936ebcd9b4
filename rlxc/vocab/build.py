"""From a GGUF file's vocabulary to a standard ``tokenizer.json`` and a chat template.

``tokenizer.ggml.model`` names the kind of vocabulary; each has a file of its own. What they do, down to the last id,
is what llama.cpp's ``llama-vocab.cpp`` does, the reference reader of these keys; ``docs/tokenizers.md`` has the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlxc.errors import FormatError, ModelError, UnsupportedError
from rlxc.vocab.added_tokens import added_tokens
from rlxc.vocab.byte_level import byte_level
from rlxc.vocab.keys import CONTROL, END_TEXTS, PREFIX, Keys, Vocabulary, not_ends
from rlxc.vocab.parts import Parts
from rlxc.vocab.sentence_piece import sentence_piece
from rlxc.vocab.templates import DEFAULT_TEMPLATES
from rlxc.vocab.unigram import unigram
from rlxc.vocab.word_piece import word_piece

KINDS = {"llama": sentence_piece, "gpt2": byte_level, "t5": unigram, "bert": word_piece}
"""The kinds of vocabularies, by what ``tokenizer.ggml.model`` calls them."""

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


def build_tokenizer(metadata: Mapping[str, Any], *, source: object) -> TokenizerFiles:
    """Builds the tokenizer that ``metadata`` of a GGUF file describes.

    Args:
        metadata: values by GGUF key; arrays of strings are sequences of str, arrays of numbers numpy arrays.
        source: the file, for error messages.

    Raises:
        UnsupportedError: a kind of vocabulary or pre-tokenizer that is not implemented, or a vocabulary whose ids the
            ``tokenizers`` library would give otherwise than llama.cpp.
        ModelError: arrays are missing or contradict each other.
        FormatError: a value has the wrong type.
    """
    keys = Keys(metadata, source)
    vocabulary, parts = _read(keys)
    around = _surroundings(vocabulary, parts, keys)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(vocabulary, keys, by_runtime=parts.by_runtime),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": _template(
            vocabulary.tokens,
            around.bos_id if around.add_bos else None,
            around.eos_id if around.add_eos else None,
        ),
        "decoder": parts.decoder,
        "model": parts.model(),
    }
    return TokenizerFiles(
        tokenizer_json=_to_json(document, source),
        chat_template=_chat_template(metadata, vocabulary, source),
        bos_id=around.bos_id,
        eos_ids=_end_ids(keys, vocabulary, around.eos_id),
        add_bos=around.add_bos,
        add_eos=around.add_eos,
        vocab_size=len(vocabulary.tokens),
    )


def check_vocabulary(metadata: Mapping[str, Any], *, source: object) -> int:
    """Raises what :func:`build_tokenizer` would raise, without its work; returns the number of tokens."""
    keys = Keys(metadata, source)
    vocabulary, parts = _read(keys)
    around = _surroundings(vocabulary, parts, keys)
    _end_ids(keys, vocabulary, around.eos_id)
    _chat_template(metadata, vocabulary, source)
    for text in vocabulary.tokens:
        _check_unicode(text, source)
    return len(vocabulary.tokens)


def _read(keys: Keys) -> tuple[Vocabulary, Parts]:
    kind = keys.get("model", str, None)
    if kind is None:
        raise ModelError(
            f"{PREFIX}model is missing", source=keys.source, remedy="the file carries no tokenizer"
        )
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UnsupportedError(
            f"tokenizer model {kind!r} is not supported", source=keys.source, remedy=f"known: {known}"
        )
    vocabulary = Vocabulary.read(keys)
    return vocabulary, KINDS[kind](vocabulary, keys)


@dataclass(frozen=True)
class _Surroundings:
    """The tokens that begin and end a text, and whether they are put there."""

    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool


def _surroundings(vocabulary: Vocabulary, parts: Parts, keys: Keys) -> _Surroundings:
    size = len(vocabulary.tokens)
    bos_id = keys.token_id("bos", size, parts.bos_id)
    eos_id = parts.eos_id if parts.always else keys.token_id("eos", size, parts.eos_id)
    add_bos = keys.get("add_bos_token", bool, parts.add_bos) or parts.always
    add_eos = keys.get("add_eos_token", bool, parts.add_eos) or parts.always
    for add, name, token_id in ((add_bos, "bos", bos_id), (add_eos, "eos", eos_id)):
        if add and token_id is None:
            raise ModelError(
                f"{PREFIX}add_{name}_token is true, but there is no such token", source=keys.source
            )
    return _Surroundings(bos_id, eos_id, add_bos, add_eos)


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


def _end_ids(keys: Keys, vocabulary: Vocabulary, eos_id: int | None) -> tuple[int, ...]:
    """Returns every token that ends generation: the file's own, then those known by their text.

    llama.cpp also counts any token spelt ``</s>``; here only if it is of control type, because in Gemma's
    vocabulary it is an HTML tag.
    """
    named = [eos_id, *(keys.token_id(name, len(vocabulary.tokens)) for name in _END_KEYS)]
    texts = {vocabulary.ids[text] for text in END_TEXTS & vocabulary.ids.keys()}
    closing = vocabulary.ids.get("</s>")
    if closing is not None and vocabulary.types[closing] == CONTROL:
        texts.add(closing)
    texts -= {vocabulary.ids.get(text, -1) for text in not_ends(vocabulary.ids)}
    return tuple(dict.fromkeys(i for i in (*named, *sorted(texts)) if i is not None))


def _chat_template(metadata: Mapping[str, Any], vocabulary: Vocabulary, source: object) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        marks = (mark for mark in DEFAULT_TEMPLATES if mark in vocabulary.ids)
        return DEFAULT_TEMPLATES.get(next(marks, ""))
    if not isinstance(template, str):
        raise FormatError("tokenizer.chat_template is not a string", source=source)
    return template


def _to_json(document: Mapping[str, Any], source: object) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    _check_unicode(text, source)
    return text.encode()


def _check_unicode(text: str, source: object) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError("a token is not valid Unicode text", source=source) from error
