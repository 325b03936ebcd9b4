"""The tokenizer of a Hugging Face folder: its ``tokenizer.json``, and what the files beside it say.

``tokenizer.json`` is taken as it is, except for what never holds for a model's input: padding and truncation (which
Transformers switches off too), and added tokens that the embedding has no row for, such as the image token in
Gemma 3's text models. Those are cut out of GGUF files as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from rlxc.errors import FormatError, ModelError, UnsupportedError
from rlxc.vocab.build import TokenizerFiles
from rlxc.vocab.keys import END_TEXTS
from rlxc.vocab.templates import DEFAULT_TEMPLATES

_TOKENIZER, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SPACE = "\u2581"
_WORD = "a"  # any text, to see what is put around it

# What runtime/tokenizer.py does with a token's text. It never drops a byte, so how runs are fused makes no difference.
_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip"})


def build_tokenizer_from_folder(folder: Path, *, rows: int) -> TokenizerFiles:
    """Reads the tokenizer of a folder.

    Args:
        folder: with ``tokenizer.json``, and maybe ``tokenizer_config.json``, ``generation_config.json``,
            ``config.json`` and ``chat_template.jinja``.
        rows: of the embedding; added tokens from there on are left out.

    Raises:
        FormatError: a file is missing or damaged.
        UnsupportedError: a kind of tokenizer that cannot be decoded, or whose ids have gaps.
        ModelError: the files contradict each other.
    """
    path = folder / _TOKENIZER
    if not path.is_file():
        how = "open it in Transformers and call save_pretrained, which writes tokenizer.json"
        found = (name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file())
        has = next((f", only {name}" for name in found), "")
        raise FormatError(f"has no {_TOKENIZER}{has}", source=folder, remedy=how)
    raw, document = _prepared(path, rows)
    with _library(path):
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    size: int = tokenizer.get_vocab_size(with_added_tokens=True)
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if size < 1 or set(ids.values()) != set(range(size)):
        raise UnsupportedError(
            f"its {size} tokens do not have the ids 0 to {size - 1}",
            source=path,
            remedy="use a tokenizer whose ids have no gaps",
        )
    _check_decoder(document, ids, path)
    settings = _Settings.read(folder, ids)
    settings.check_added_tokens(rows)
    start, end = _surroundings(tokenizer, path)
    bos_id, eos_id = _special(start, "bos", settings), _special(end, "eos", settings)
    return TokenizerFiles(
        tokenizer_json=raw,
        chat_template=_chat_template(folder, settings, ids),
        bos_id=bos_id,
        eos_ids=_end_ids(settings, eos_id, document, ids),
        add_bos=bool(start),
        add_eos=bool(end),
        vocab_size=size,
    )


def _prepared(path: Path, rows: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes to store, and the document that they hold."""
    raw = _read(path)
    document = _parse(raw, path)
    tokens = document.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(
        isinstance(token, dict) and isinstance(token.get("id"), int) for token in tokens
    ):
        raise FormatError(
            "added_tokens is no list of tokens with ids", source=path, remedy="download it again"
        )
    kept = [token for token in tokens if token["id"] < rows]
    changes = {
        **({"added_tokens": kept} if len(kept) < len(tokens) else {}),
        **{key: None for key in ("truncation", "padding") if document.get(key) is not None},
    }
    if not changes:
        return raw, document
    document |= changes
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(), document
    except UnicodeEncodeError as error:
        raise FormatError("a token is not valid Unicode text", source=path) from error


@contextmanager
def _library(path: Path) -> Iterator[None]:
    """Turns what the library raises, which is no narrower than Exception, into an error that names the file."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())
        raise FormatError(f"is no tokenizer: {why}", source=path, remedy="download it again") from error


def _check_decoder(document: Mapping[str, Any], ids: Mapping[str, int], path: Path) -> None:
    """Refuses rules of decoding other than the two that the runtime, which decodes token by token, follows."""
    decoder = document.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    for step in steps:
        kind = step.get("type")
        spaces = step.get("pattern") == {"String": _SPACE} and step.get("content") == " "
        leading = (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0)
        if kind not in _DECODERS or (kind == "Replace" and not spaces) or (kind == "Strip" and not leading):
            raise _no_decoder(f"has a step {kind!r} that is not implemented", path)
    kinds = {step["type"] for step in steps}
    if ("ByteLevel" in kinds) == ("Replace" in kinds):
        raise _no_decoder("is neither of the two kinds", path)
    if "Replace" in kinds and "ByteFallback" not in kinds and "<0x00>" in ids:
        raise _no_decoder("does not turn its byte tokens into bytes", path)


def _no_decoder(problem: str, path: Path) -> UnsupportedError:
    remedy = "byte-level and SentencePiece decoders are implemented"
    return UnsupportedError(f"its decoder {problem}", source=path, remedy=remedy)


@dataclass(frozen=True)
class _Settings:
    """The files beside ``tokenizer.json``; those that are missing are empty."""

    path: Path
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    model: Mapping[str, Any]
    ids: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path, ids: Mapping[str, int]) -> _Settings:
        tokenizer, generation, model = (
            _optional(folder / name) for name in (_SETTINGS, "generation_config.json", "config.json")
        )
        return cls(folder / _SETTINGS, tokenizer, generation, model, ids)

    def token(self, name: str) -> int | None:
        """The id of a special token by its role, ``bos`` or ``eos``; None if there is none."""
        key = f"{name}_token"
        if key not in self.tokenizer:
            return next(iter(self.numbers(name)), None)
        value = self.tokenizer[key]
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return None
        if not isinstance(text, str) or text not in self.ids:
            raise ModelError(f"{key} is {text!r}, which is no token", source=self.path)
        return self.ids[text]

    def numbers(self, name: str) -> list[int]:
        """Ids by role from the generation's settings, or else the model's: one, or a list."""
        key = f"{name}_token_id"
        values = self.generation if self.generation.get(key) is not None else self.model
        found = values.get(key)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(self.ids):
                raise ModelError(
                    f"{key} is {found!r}, but the vocabulary has {len(self.ids)} tokens",
                    source=self.path.parent,
                )
        return ids

    def check_added_tokens(self, rows: int) -> None:
        """Refuses tokens that Transformers would add to, or read otherwise than, ``tokenizer.json``."""
        listed = self.tokenizer.get("added_tokens_decoder")
        for number, token in listed.items() if isinstance(listed, dict) else ():
            content = token.get("content") if isinstance(token, dict) else None
            text = content if isinstance(content, str) else ""
            left_out = number.isdecimal() and int(number) >= rows and text not in self.ids
            if not left_out and str(self.ids.get(text)) != number:
                raise ModelError(
                    f"added_tokens_decoder has token {number} as {text!r}, {_TOKENIZER} has it as "
                    f"{self.ids.get(text)}",
                    source=self.path,
                    remedy="open it in Transformers and save it again",
                )


def _surroundings(tokenizer: tokenizers.Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """The ids that the post-processor really puts before and after a text."""
    with _library(path):
        plain: list[int] = tokenizer.encode(_WORD, add_special_tokens=False).ids
        full: list[int] = tokenizer.encode(_WORD, add_special_tokens=True).ids
    for at in (0, 1):
        start, end = full[:at], full[at + len(plain) :]
        known = all(tokenizer.id_to_token(i) is not None for i in (*start, *end))
        if plain and full[at : at + len(plain)] == plain and len(end) <= 1 and known:
            return start, end
    raise UnsupportedError(
        "its post-processor does more than to put one token before and one after a text",
        source=path,
        remedy="no other one is implemented",
    )


def _special(around: list[int], name: str, settings: _Settings) -> int | None:
    """The token of a role, on which the post-processor and the settings must agree."""
    known = settings.token(name)
    flag = settings.tokenizer.get(f"add_{name}_token")
    if isinstance(flag, bool) and flag != bool(around):
        raise ModelError(
            f"add_{name}_token is {flag}, but the post-processor of {_TOKENIZER} does otherwise",
            source=settings.path,
            remedy="open it in Transformers and save it again, or correct the flag",
        )
    if around and known not in (None, around[0]):
        raise ModelError(
            f"{name}_token is token {known}, but {_TOKENIZER} adds token {around[0]}", source=settings.path
        )
    return around[0] if around else known


def _end_ids(
    settings: _Settings, eos_id: int | None, document: Mapping[str, Any], ids: Mapping[str, int]
) -> tuple[int, ...]:
    """Every token that ends generation: the tokenizer's own, those of the settings, then those known by their text."""
    special = {token["content"] for token in document.get("added_tokens") or () if token.get("special")}
    texts: Iterable[int] = sorted(ids[text] for text in END_TEXTS & ids.keys())
    closing = [ids["</s>"]] if "</s>" in special else []
    known = [eos_id, *settings.numbers("eos"), *texts, *closing]
    return tuple(dict.fromkeys(i for i in known if i is not None))


def _chat_template(folder: Path, settings: _Settings, ids: Mapping[str, int]) -> str | None:
    own = folder / _TEMPLATE
    if own.is_file():
        try:
            return _read(own).decode()
        except UnicodeDecodeError as error:
            raise FormatError("is not UTF-8", source=own, remedy="download it again") from error
    template = settings.tokenizer.get("chat_template")
    if isinstance(template, list):  # several, by name
        defaults = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = defaults[0].get("template") if defaults else template
    if template is None:
        return DEFAULT_TEMPLATES.get(next((mark for mark in DEFAULT_TEMPLATES if mark in ids), ""))
    if not isinstance(template, str):
        raise FormatError(
            "chat_template is no text, and none of its parts is the default", source=settings.path
        )
    return template


def _optional(path: Path) -> dict[str, Any]:
    return _parse(_read(path), path) if path.is_file() else {}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = error.strerror or error
        raise FormatError(f"cannot be read: {why}", source=path, remedy="check its permissions") from error


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise FormatError("is not JSON", source=path, remedy="download it again") from error
    if not isinstance(value, dict):
        raise FormatError("is no JSON object", source=path, remedy="download it again")
    return value
