"""Random weights as kernels read them, beside what they decode to."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from random_tensors import random_bytes

from rlxc.backends.tvm.layout import Bytes, Layout, in_tiles, layout_of
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout
from rlxc.weights.formats import FORMATS, GGML_FORMATS

PACKED = [dtype for dtype in DType if dtype.is_packed]
INTEGERS = [dtype for dtype in PACKED if dtype not in (DType.NF4, DType.FP4)]
FLOATS = [DType.F32, DType.F16, DType.BF16]


@dataclass(frozen=True)
class StoredWeight:
    """A matrix: ``data`` uint8 ``[rows, row_bytes]`` of a model file, and ``stored`` int8, as its layout says."""

    layout: Layout
    data: Bytes
    stored: npt.NDArray[np.int8]

    @property
    def decoded(self) -> npt.NDArray[np.float32]:
        """The weights, ``[rows, columns]``: gguf's judgement, or the table's on formats that gguf does not decode."""
        fmt = FORMATS[self.layout.dtype]
        if fmt not in GGML_FORMATS.values() or fmt.dtype is DType.Q1_0:
            return fmt.decode(self.data, self.layout.columns)
        if fmt.dtype is DType.F32:
            return self.data.view(np.float32)
        return np.asarray(gguf.dequantize(self.data, fmt.ggml_type), np.float32)


def random_weight(
    dtype: DType, rows: int, columns: int, seed: int = 0, chosen: WeightLayout | None = None
) -> StoredWeight:
    """Any codes and factors; scales and minimums of both signs."""
    rng = np.random.default_rng(seed)
    data = random_bytes(dtype, (rows, columns), rng, signed=True).reshape(rows, -1)
    layout = layout_of(dtype, rows, columns, chosen)
    return StoredWeight(layout, data, store(layout, [data]))


def store(layout: Layout, parts: list[Bytes], chunk_rows: int = 32) -> npt.NDArray[np.int8]:
    """All sections of a weight, written chunk by chunk; what no section holds is 0xAA."""
    out = np.full(layout.nbytes, 0xAA, np.uint8)
    ends = {name: section.offset for name, section in layout.sections.items()}
    for rows in in_tiles(parts, chunk_rows, layout.tile):
        for name, array in layout.encode(rows).items():
            raw = array.view(np.uint8).ravel()
            out[ends[name] : ends[name] + raw.size] = raw
            ends[name] += raw.size
    expected = {
        n: section.offset + section.tile_bytes * layout.tiles for n, section in layout.sections.items()
    }
    assert ends == expected
    return out.view(np.int8)
