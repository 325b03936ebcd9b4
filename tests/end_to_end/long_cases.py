"""Tiny models with scaled RoPE; ``tests/data/make_long_logits.py`` takes logits far along a text from llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

# The tiny models lie in a folder of their own.
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from tiny import CONTEXT, VARIANTS, VOCAB, Tiny

ORIGINAL = 64
"""Positions that scaling by 4 makes the context of."""

TEXT = [1, *np.random.RandomState(5).randint(3, VOCAB, 249).tolist()]
"""Almost the whole context: four pages."""

POSITIONS = (1, 62, 63, 64, 65, 127, 128, 129, 200, 249)
"""Whose logits are compared: around the ends of pages and of the original context, and the last one."""

_PHI3 = Tiny("phi3", "Q8_0", rope_scaling="longrope", rope_dim=48, seed=60)
"""It was trained at half the context."""

CASES: Mapping[str, Tiny] = {
    "llama-linear": VARIANTS["llama-linear"],
    "llama-yarn": replace(
        VARIANTS["llama-yarn"], metadata={"rope.scaling.original_context_length": ORIGINAL}
    ),
    "llama-llama3": VARIANTS["llama-llama3"],
    "gemma3-linear": VARIANTS["gemma3-linear"],
    "phi3-long": _PHI3,
    "phi3-short": replace(_PHI3, metadata={"rope.scaling.original_context_length": CONTEXT}),
}

__all__ = ["CASES", "CONTEXT", "POSITIONS", "TEXT"]
