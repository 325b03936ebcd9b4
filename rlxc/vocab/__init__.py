"""The vocabulary of a model file, as a standard ``tokenizer.json`` and a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlxc.vocab.build import TokenizerFiles, build_tokenizer
from rlxc.vocab.checking import check_tokenizer
from rlxc.vocab.huggingface import build_tokenizer_from_folder
from rlxc.vocab.templates import DEFAULT_TEMPLATES

__all__ = [
    "DEFAULT_TEMPLATES",
    "TokenizerFiles",
    "build_tokenizer",
    "build_tokenizer_from_folder",
    "check_tokenizer",
    "tokenizer_of",
]


def tokenizer_of(path: Path, metadata: Mapping[str, Any], *, rows: int) -> TokenizerFiles:
    """The tokenizer of a model: from the metadata of a GGUF file, or from the files of a Hugging Face folder.

    Args:
        path: the file or folder.
        metadata: values by GGUF key.
        rows: of the embedding.

    Raises:
        RlxcError: as `build_tokenizer` and `build_tokenizer_from_folder`.
    """
    if path.is_dir():
        return build_tokenizer_from_folder(path, rows=rows)
    return build_tokenizer(metadata, source=path)
