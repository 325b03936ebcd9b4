"""Whether a model's tokenizer can be built, without the work of building it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlxc.errors import ModelError
from rlxc.vocab.build import check_vocabulary
from rlxc.vocab.huggingface import build_tokenizer_from_folder


def check_tokenizer(path: Path, metadata: Mapping[str, Any], *, rows: int | None) -> None:
    """Raise what keeps a model's tokenizer from being built.

    Args:
        path: the GGUF file, or the folder.
        metadata: values by GGUF key.
        rows: of the embedding; None where that is not known.

    Raises:
        RlxcError: as of `tokenizer_of`; or there are more tokens than rows.
    """
    if path.is_dir():
        if rows is None:
            return
        tokens = build_tokenizer_from_folder(path, rows=rows).vocab_size
    else:
        tokens = check_vocabulary(metadata, source=path)
    if rows is not None and tokens > rows:
        raise ModelError(f"the tokenizer has {tokens} tokens, the embedding {rows} rows", source=path)
