"""Random weights of every format, as they would lie in a model file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.ir import Balance, Concat, Encode, Fold, Graph, Source
from rlxc.weights.formats import FORMATS


class RandomTensors:
    """A model file in memory: a random tensor, packed and decoded, for every source in a graph."""

    def __init__(self, graph: Graph, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.packed: dict[str, npt.NDArray[np.uint8]] = {}
        self.decoded: dict[str, npt.NDArray[np.float32]] = {}
        pending = list(graph.weights)
        while pending:
            weight = pending.pop()
            match weight.recipe:
                case Concat(parts):
                    pending += parts
                case Encode(part):
                    pending.append(part)
                case Fold() | Balance():
                    pending += weight.recipe.parts
            if not isinstance(weight.recipe, Source):
                continue
            shape = tuple(map(int, weight.type.shape))
            fmt = FORMATS[weight.type.dtype]
            data = random_bytes(weight.type.dtype, shape, rng)
            rows = data.reshape(-1, fmt.row_bytes(shape[-1]))
            self.packed[weight.recipe.tensor] = data
            self.decoded[weight.recipe.tensor] = fmt.decode(rows, shape[-1]).reshape(shape)


def random_bytes(dtype: DType, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Any codes and sub-scales, but floating-point scales and minimums of a sane size."""
    fmt = FORMATS[dtype]
    if fmt.is_float:
        values = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        if dtype is DType.BF16:
            return np.ascontiguousarray(values.view(np.uint16)[..., 1::2]).view(np.uint8).ravel()
        return values.astype(np.float16 if dtype is DType.F16 else np.float32).view(np.uint8).ravel()
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    for scale in (fmt.scale, fmt.minimum):
        if scale is not None:
            size = rng.uniform(0.0005, 0.002, (len(blocks), 1)).astype(scale.base)
            blocks[:, scale.offset : scale.offset + scale.base.itemsize] = size.view(np.uint8)
    return blocks.ravel()
