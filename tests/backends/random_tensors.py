"""Random weights of every format, as they would lie in a model file."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.ir import Balance, Concat, Encode, Fold, Graph, Source
from rlxc.weights.fields import Scale
from rlxc.weights.formats import FORMATS, Scales


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
            if weight.name == "factors":  # what frequencies are divided by
                data = (1 + abs(data.view(np.float32))).view(np.uint8)
            rows = data.reshape(-1, fmt.row_bytes(shape[-1]))
            self.packed[weight.recipe.tensor] = data
            self.decoded[weight.recipe.tensor] = fmt.decode(rows, shape[-1]).reshape(shape)


def random_bytes(
    dtype: DType, shape: tuple[int, ...], rng: np.random.Generator, *, signed: bool = False
) -> npt.NDArray[np.uint8]:
    """Any codes and sub-scales, but scales and minimums of a sane size; ``signed`` if floats may be negative."""
    fmt = FORMATS[dtype]
    if fmt.is_float:
        values = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        if dtype is DType.BF16:
            return np.ascontiguousarray(values.view(np.uint16)[..., 1::2]).view(np.uint8).ravel()
        return values.astype(np.float16 if dtype is DType.F16 else np.float32).view(np.uint8).ravel()
    count = math.prod(shape) // fmt.block_size
    blocks = rng.integers(0, 256, (count, fmt.block_bytes), dtype=np.uint8)
    for scale in (fmt.scale, fmt.minimum):
        if scale is not None:
            _set(scale, _random_scales(scale, (count, scale.bases), rng, signed), blocks)
    return blocks.ravel()


def _random_scales(
    scale: Scale, shape: tuple[int, int], rng: np.random.Generator, signed: bool
) -> npt.NDArray[Any]:
    """As stored: floats, or the bytes of 2^-11 to 2^-8, or of 2^-6 to 2^-4 where bytes reach no lower."""
    if scale.kind == "e8m0":
        return rng.integers(127 - 11, 127 - 8, shape, dtype=np.uint8)
    if scale.kind == "ue4m3":
        return rng.integers(1 << 3, 3 << 3, shape, dtype=np.uint8)
    sign = rng.choice([-1.0, 1.0], shape) if signed else 1.0
    return (sign * rng.uniform(0.0005, 0.002, shape)).astype(scale.base)


def _set(scale: Scale, values: npt.NDArray[Any], blocks: npt.NDArray[np.uint8]) -> None:
    """Write the scales where random bits are."""
    alone = replace(scale, factors=None, sign=1)
    ones = np.full(values.nbytes, 0xFF, np.uint8).view(values.dtype).reshape(values.shape)
    mask, bits = np.zeros_like(blocks), np.zeros_like(blocks)
    alone.write(Scales(ones, None), mask)
    alone.write(Scales(values, None), bits)
    blocks &= ~mask
    blocks |= bits
