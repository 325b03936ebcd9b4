"""Pages of keys and values as numpy lays them out: in any order, shared, and poisoned where nothing was written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rlxc.backends.tvm.kernels.cache import CacheShape

Array = npt.NDArray[Any]

NOWHERE = 1 << 46
"""An entry of a block table without a page: reading there ends the process."""

GAP = 64
"""Bytes between the keys of two pages, where a page has something else."""


def stored(x: Array, dtype: str) -> tuple[Array, Array | None]:
    """f32 ``[..., D]`` as elements of a cache, and the scales ``[...]`` of codes."""
    x = x.astype(np.float32)
    if dtype == "bfloat16":
        return x.astype(ml_dtypes.bfloat16).view(np.uint16), None
    if dtype != "int8":
        return x.astype(dtype), None
    scales = np.abs(x).max(-1) / np.float32(127)
    divisors = np.where(scales > 0, scales, np.float32(1))
    # A scale that is a subnormal number has few digits.
    return np.rint(x / divisors[..., None]).clip(-127, 127).astype(np.int8), scales


def restored(elements: Array, scales: Array | None) -> Array:
    """What elements stand for, exactly, in float64."""
    if elements.dtype == np.uint16:
        elements = elements.view(ml_dtypes.bfloat16)
    exact = elements.astype(np.float64)
    return exact if scales is None else exact * scales.astype(np.float64)[..., None]


class PagedMemory:
    """The pages of one layer, and the block tables of sequences; every byte is 0xFF, a NaN, until it is written."""

    def __init__(self, shape: CacheShape, *, sequences: int, context: int, seed: int = 0) -> None:
        self.shape = shape
        self._width = -(-context // shape.page)
        slots = sequences * self._width
        stride = -(-shape.nbytes // 64) * 64 + GAP
        self._free = [int(slot) * stride for slot in np.random.default_rng(seed).permutation(slots)]
        params = {param.name: param.dtype for param in shape.params}
        self.buffers = {
            name: np.full(
                slots * stride // np.dtype(dtype).itemsize, -1, f"i{np.dtype(dtype).itemsize}"
            ).view(dtype)
            for name, dtype in params.items()
            if name not in ("tables", "table")
        }
        # Tables in an order of their own, another layer's between them.
        self.tables = 8 * (np.arange(sequences, dtype=np.int64)[::-1] * (self._width + 3) + 1)
        self.table = np.full(sequences * (self._width + 3) + 1, NOWHERE, np.int64)

    @property
    def arguments(self) -> list[Array]:
        """What a kernel gets for ``shape.params``."""
        return [self.tables, self.table, *self.buffers.values()]

    def entries(self, sequence: int) -> Array:
        """A sequence's block table, to read and write."""
        first = self.tables[sequence] // 8
        return self.table[first : first + self._width]

    def hold(self, sequence: int, first: int, last: int) -> None:
        """Give a sequence pages for positions from ``first`` to ``last``, where it has none."""
        entries = self.entries(sequence)
        for index in range(first // self.shape.page, last // self.shape.page + 1):
            if entries[index] == NOWHERE:
                entries[index] = self._free.pop()

    def write(self, sequence: int, position: int, key: Array, value: Array) -> None:
        """Store a position's key and value ``[K, D]``."""
        places = self.places(sequence, position)
        for name, new in (("key", key), ("value", value)):
            elements, scales = stored(new, self.shape.dtype)
            places[f"{name}s"][...] = elements
            if scales is not None:
                places[f"{name}_scales"][...] = scales

    def read(self, sequence: int, position: int) -> tuple[Array, Array]:
        """What is stored of a position's key and value ``[K, D]``, in float64."""
        places = self.places(sequence, position)
        key, value = (restored(places[f"{n}s"], places.get(f"{n}_scales")) for n in ("key", "value"))
        return key, value

    def places(self, sequence: int, position: int) -> dict[str, Array]:
        """Views of a position's elements ``[K, D]`` and scales ``[K]`` in each buffer."""
        kv_heads, dim, page = self.shape.kv_heads, self.shape.head_dim, self.shape.page
        tile, row = divmod(position % page, 16)
        views = {
            "keys": lambda whole: whole.reshape(kv_heads, page // 16, dim, 16)[:, tile, :, row],
            "values": lambda whole: whole.reshape(kv_heads, page, dim)[:, position % page],
        }
        distance, found = int(self.entries(sequence)[position // page]), {}
        for name, buffer in self.buffers.items():
            count = kv_heads * page * (1 if "scales" in name else dim)
            whole = buffer[distance // buffer.itemsize :][:count]
            found[name] = views.get(name, lambda whole: whole.reshape(kv_heads, page)[:, position % page])(
                whole
            )
        return found
