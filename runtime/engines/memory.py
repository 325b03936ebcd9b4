"""Memory that kernels may be given."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from rlxc.artifact.alignment import ALIGNMENT
from rlxc.runtime.logits import Floats


def private_memory(size: int, *, large_pages: bool = False) -> npt.NDArray[np.int8]:
    """Zeros, which a forked process has to itself: by default, such a mapping is shared with it.

    They begin at a page's start, and pages that nobody touches take no memory. Large pages, where the system has them,
    are read faster when what is read lies in many short pieces.

    Raises:
        MemoryError: the system has no more.
    """
    try:
        mapping = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes") from error
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.int8)


def aligned(*shape: int) -> Floats:
    """An array that begins where kernels may expect it to."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + ALIGNMENT, np.int8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)
