"""What a kind of vocabulary contributes to ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlxc.vocab.keys import SPACE


@dataclass(frozen=True)
class Parts:
    """What differs between the kinds, and llama.cpp's defaults for each.

    Attributes:
        normalizer: of the document, as `pre_tokenizer` and `decoder`.
        model: makes the document's model, which is the slow part.
        add_bos: whether a text begins with `bos_id` unless the file says otherwise.
        add_eos: likewise for `eos_id` at its end.
        always: the file has no say: both are added.
        by_runtime: the library's normalizers and pre-tokenizers only come close; the runtime has its own.
        bos_id: unless the file names another.
        eos_id: unless the file names another.
    """

    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any]
    model: Callable[[], dict[str, Any]]
    add_bos: bool = False
    add_eos: bool = False
    always: bool = False
    by_runtime: bool = False
    bos_id: int | None = None
    eos_id: int | None = None


def sequence(kind: str, steps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Several ``normalizers``, ``pretokenizers`` or ``decoders`` as one; None for none."""
    return {"type": "Sequence", kind: list(steps)} if steps else None


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    """A pre-tokenizer that cuts at what a regular expression matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    """A normalizer or decoder that replaces a ``String`` or what a ``Regex`` matches."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def marked_spaces(*, strip: bool) -> dict[str, Any]:
    """The decoder of vocabularies that write ``SPACE`` for a space; ``strip`` takes one away from the front."""
    steps = [replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def bpe(
    ids: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The model of both kinds of BPE; ``merges`` are best first."""
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
