"""The smallest model that has a layer with a window and one without, and one that has no window."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# The tiny models lie in a folder of their own.
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from tiny import LAYERS, VOCAB, shapes, write_tiny_model

WINDOW = 8


def write_small_model(path: Path, windows: bool = True, **options: Any) -> Path:
    """Two layers of Gemma 3, of which the first has a window; or one layer of Llama. Options: `write_tiny_model`'s."""
    architecture, layers = ("gemma3", 2) if windows else ("llama", 1)
    metadata: dict[str, Any] = {"block_count": layers}
    if windows:
        metadata["attention.sliding_window_pattern"] = 2
    beyond = tuple(f"blk.{i}." for i in range(layers, LAYERS[architecture]))
    names = [name for name, _ in shapes(architecture, 1, True, False, None)]
    return write_tiny_model(
        path,
        architecture,
        kv_heads=1,
        window=WINDOW if windows else 0,
        seed=3,
        metadata=metadata,
        tensors={name: None for name in names if name.startswith(beyond)},
        **options,
    )


__all__ = ["VOCAB", "WINDOW", "write_small_model"]
