"""The smallest model that has a layer with a window and one without, and one that has no window."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# The tiny models lie in a folder of their own.
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from tiny import VOCAB, write_tiny_model

WINDOW = 8


def write_small_model(path: Path, windows: bool = True, **options: Any) -> Path:
    """Two layers of Gemma 3, of which the first has a window; or one layer of Llama. Options: `write_tiny_model`'s."""
    return write_tiny_model(
        path,
        "gemma3" if windows else "llama",
        layers=2 if windows else 1,
        kv_heads=1,
        window=WINDOW if windows else 0,
        metadata={"attention.sliding_window_pattern": 2} if windows else {},
        seed=3,
        **options,
    )


__all__ = ["VOCAB", "WINDOW", "write_small_model"]
