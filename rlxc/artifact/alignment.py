"""Where numbers may begin that kernels read: at whole cache lines."""

from __future__ import annotations

ALIGNMENT = 64


def align(size: int) -> int:
    """The size in bytes, rounded up to whole cache lines."""
    return -(-size // ALIGNMENT) * ALIGNMENT
