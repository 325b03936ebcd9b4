"""Tiny models with scaled RoPE; ``tests/data/make_long_logits.py`` takes logits far along a text from llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# The tiny models lie in a folder of their own.
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from tiny import CONTEXT, VARIANTS, VOCAB

ORIGINAL = 64
"""Positions that scaling by 4 makes the context of."""

TEXT = [1, *np.random.RandomState(5).randint(3, VOCAB, 249).tolist()]
"""Almost the whole context: four pages."""

POSITIONS = (1, 62, 63, 64, 65, 127, 128, 129, 200, 249)
"""Whose logits are compared: around the ends of pages and of the original context, and the last one."""

CASES: Mapping[str, Mapping[str, Any]] = {
    "llama-linear": {},
    "llama-yarn": {"rope.scaling.original_context_length": ORIGINAL},
    "llama-llama3": {},
    "gemma3-linear": {},
}
"""Variants of ``tests/models/tiny.py``, and the metadata that are other ones here."""


def write_model(name: str, path: Path, **changes: Any) -> Path:
    """The file of a case; with other metadata where they are given."""
    metadata = {**CASES[name], **changes.pop("metadata", {})}
    return VARIANTS[name].write(path, metadata=metadata, **changes)


__all__ = ["CASES", "CONTEXT", "POSITIONS", "TEXT", "VARIANTS", "write_model"]
