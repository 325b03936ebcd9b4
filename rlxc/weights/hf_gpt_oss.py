"""The tensors of gpt-oss that no other kind of folder has: sinks, and experts that are stored all in one.

``mlp.experts.gate_up_proj`` holds the rows of gate and up in turns. As floats it is ``[E, in, out]``; in MXFP4 its
``_blocks`` are ``[E, out, in / 32, 16]`` bytes of two neighbouring weights each, the first in the low bits, and its
``_scales`` ``[E, out, in / 32]`` exponents. In a block of GGUF the exponent comes first, and a byte holds weights that
are 16 apart. Facts from llama.cpp's converter and from Transformers' ``integrations/mxfp4.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

_BLOCK = 32
_SCALES, _BLOCKS = "_scales", "_blocks"


@dataclass(frozen=True)
class Place:
    """Where the values of a GGUF tensor are in a folder.

    Attributes:
        name: the tensor in the folder, within a layer.
        first: of its rows, the first that belongs to the GGUF tensor.
        step: from there, every so-manieth row.
    """

    name: str
    first: int = 0
    step: int = 1


PLACES: Mapping[str, Place] = MappingProxyType(
    {
        "attn_sinks.weight": Place("self_attn.sinks"),
        "ffn_gate_exps.weight": Place("mlp.experts.gate_up_proj", 0, 2),
        "ffn_gate_exps.bias": Place("mlp.experts.gate_up_proj_bias", 0, 2),
        "ffn_up_exps.weight": Place("mlp.experts.gate_up_proj", 1, 2),
        "ffn_up_exps.bias": Place("mlp.experts.gate_up_proj_bias", 1, 2),
        "ffn_down_exps.weight": Place("mlp.experts.down_proj"),
        "ffn_down_exps.bias": Place("mlp.experts.down_proj_bias"),
    }
)
"""By GGUF name within a layer."""


def stored_shape(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape in the folder, as floats, of what is ``[E, out, in]``, ``[E, out]`` or ``[n]`` in GGUF."""
    if len(shape) == 1:
        return shape
    count, out, *rest = shape
    return (count, *rest, out * place.step)


def packed_shapes(shape: tuple[int, int, int], place: Place) -> dict[str, tuple[int, ...]]:
    """The shapes in the folder, in MXFP4, of what is ``[E, out, in]`` in GGUF, by what its names end in."""
    count, out, in_ = shape
    scales = (count, out * place.step, in_ // _BLOCK)
    return {_BLOCKS: (*scales, _BLOCK // 2), _SCALES: scales}


def expert_floats(stored: npt.NDArray[np.uint8], place: Place) -> npt.NDArray[np.uint8]:
    """Expert matrices in GGUF's order: bytes ``[E, in, out, size]`` of values to ``[E, out, in, size]``."""
    return np.ascontiguousarray(stored[:, :, place.first :: place.step].swapaxes(1, 2))


def expert_blocks(
    blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8], place: Place
) -> npt.NDArray[np.uint8]:
    """GGUF's blocks of MXFP4, ``uint8 [E, out, in / 32, 17]``, of what `packed_shapes` describes; no bit is lost."""
    scales = scales[:, place.first :: place.step]
    packed = np.empty((*scales.shape, 1 + _BLOCK // 2), np.uint8)
    packed[..., 0] = scales
    for expert, stored in zip(packed, blocks):  # so that no more than one is unpacked at a time
        pairs = stored[place.first :: place.step]
        codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], _BLOCK)
        expert[..., 1:] = codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4
    return packed
