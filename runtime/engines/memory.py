"""Memory that kernels may be given."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from rlxc.runtime.logits import Floats

_ALIGNMENT = 64


def private_memory(size: int) -> npt.NDArray[np.int8]:
    """Zeros, which a forked process has to itself: by default, such a mapping is shared with it.

    They begin at a page's start, and pages that nobody touches take no memory.
    """
    return np.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), np.int8)


def align(size: int) -> int:
    """The size, rounded up to whole cache lines."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def aligned(*shape: int) -> Floats:
    """An array that begins where kernels may expect it to; it has room for one number at least."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.int8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)
