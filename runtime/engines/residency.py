"""Gives back the memory of a mapped weights file once an engine has copied what it needs into its own layout.

The pages are clean copies of the file: the kernel reads them again if anyone looks. What is still looked at is a few
rows of the embedding per token, so read-ahead is turned off as well.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def release_mapped(path: Path) -> None:
    """Drop the resident pages of every mapping of ``path`` in this process; does nothing but on Linux."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    libc = ctypes.CDLL(None)
    name = os.path.realpath(path)
    for line in maps.read_text().splitlines():
        if not line.endswith(name):
            continue
        start, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
        for advice in (mmap.MADV_RANDOM, mmap.MADV_DONTNEED):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
