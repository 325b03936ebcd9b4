"""QLoRA: a linear layer with a base in 4 bits, and a low-rank adapter in f32 beside it (Dettmers et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.bnb import NestedAbsmax, quantize_absmax
from rlxc.weights.encode import encode
from rlxc.weights.formats import FORMATS, Bytes
from rlxc.weights.lora import LoraPair

F32 = npt.NDArray[np.float32]

SCHEMES = (DType.INT4, DType.NF4, DType.FP4)
"""The formats of a base: blocks of an f32 scale and 64 codes."""

_SCALE_BYTES = 4


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of a layer.

    Attributes:
        unquantized: of the base in f32.
        quantized: of the base as it is.
        adapter: of a and b.
    """

    unquantized: int
    quantized: int
    adapter: int

    @property
    def total(self) -> int:
        """Bytes of the whole layer."""
        return self.quantized + self.adapter

    @property
    def ratio(self) -> float:
        """How many times smaller the base is than in f32."""
        return self.unquantized / self.quantized


@dataclass(frozen=True, eq=False)
class QuantizedBase:
    """A matrix in blocks of 64 weights, which run on from row to row, as in bitsandbytes; zeros fill the last one.

    Attributes:
        scheme: one of :data:`SCHEMES`.
        shape: ``(out, in)``.
        codes: two to a byte, as the scheme packs them, uint8 ``[blocks, 32]``.
        scales: what multiplies the values of a block: f32 ``[blocks]``, or the same in 8 bits.
    """

    scheme: DType
    shape: tuple[int, int]
    codes: Bytes
    scales: F32 | NestedAbsmax

    @classmethod
    def quantize(cls, weight: F32, scheme: DType, *, double: bool) -> QuantizedBase:
        """A matrix f32 ``[out, in]`` in 4 bits, its scales in 8 bits if ``double``.

        Raises:
            WeightError: another scheme, no matrix, or values that are not finite.
        """
        if scheme not in SCHEMES:
            raise WeightError(
                f"{scheme} is not a format of QLoRA", remedy=f"use one of {', '.join(map(str, SCHEMES))}"
            )
        if weight.ndim != 2 or not weight.size:
            raise WeightError(
                f"a base of shape {list(weight.shape)} is no matrix", remedy="pass f32 [out, in]"
            )
        size = FORMATS[scheme].block_size
        blocks = np.pad(weight.reshape(-1), (0, -weight.size % size)).reshape(-1, size)
        packed = encode(scheme, blocks)
        scales = packed[:, :_SCALE_BYTES].copy().view("<f4")[:, 0]
        out, in_ = weight.shape
        return cls(
            scheme=scheme,
            shape=(out, in_),
            codes=packed[:, _SCALE_BYTES:].copy(),
            scales=quantize_absmax(scales) if double else scales,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def packed(self) -> Bytes:
        """The blocks in the scheme's format, uint8 ``[blocks, 36]``.

        They are the bytes of a packed weight where ``in`` is whole blocks: reshape them to ``[out, row_bytes]``.
        """
        scales = self.scales.values() if isinstance(self.scales, NestedAbsmax) else self.scales
        return np.concatenate([scales.astype("<f4")[:, None].view(np.uint8), self.codes], axis=1)

    def dequantize(self) -> F32:
        """The matrix, f32 ``[out, in]``."""
        out, in_ = self.shape
        form = FORMATS[self.scheme]
        return form.decode(self.packed(), form.block_size).reshape(-1)[: out * in_].reshape(out, in_)


class QLoraLayer:
    """``y = x W^T + scale * (x a^T) b^T`` with W in 4 bits.

    Attributes:
        base_weight_quantized: W, ``[out, in]``; it never changes.
        lora_a: f32 ``[rank, in]``, the layer's own copy: training may write to it.
        lora_b: f32 ``[out, rank]``, likewise.
        scale: what multiplies the adapter's part, such as ``alpha / rank``.
    """

    def __init__(self, base: QuantizedBase, pair: LoraPair) -> None:
        """A layer of a base and a copy of an adapter's pair.

        Raises:
            WeightError: the pair is for another shape, or it is a DoRA pair, whose magnitude this layer has not.
        """
        if pair.magnitude is not None:
            raise WeightError(
                "a DoRA pair has a magnitude, a QLoRA layer none", remedy="fold the pair into the base"
            )
        fits = (pair.b.shape[0], pair.a.shape[1])
        if fits != base.shape:
            raise WeightError(
                f"the adapter is for a weight {list(fits)}, but the base is {list(base.shape)}",
                remedy="pass the base that the adapter was made for",
            )
        self.base_weight_quantized = base
        self.lora_a: F32 = pair.a.copy()
        self.lora_b: F32 = pair.b.copy()
        self.scale = pair.scale

    @classmethod
    def from_lora(cls, weight: F32, pair: LoraPair, scheme: DType = DType.INT4) -> QLoraLayer:
        """A layer from a weight f32 ``[out, in]`` and its adapter; a scale of a block is an f32.

        Raises:
            WeightError: as :meth:`QuantizedBase.quantize` and the constructor.
        """
        return cls(QuantizedBase.quantize(weight, scheme, double=False), pair)

    @classmethod
    def from_lora_double_quant(cls, weight: F32, pair: LoraPair, scheme: DType = DType.INT4) -> QLoraLayer:
        """As :meth:`from_lora`, but a scale is 8 bits, and 256 of them share an f32.

        Raises:
            WeightError: as :meth:`from_lora`.
        """
        return cls(QuantizedBase.quantize(weight, scheme, double=True), pair)

    @property
    def is_double_quantized(self) -> bool:
        """Whether the scales of the base are in 8 bits."""
        return isinstance(self.base_weight_quantized.scales, NestedAbsmax)

    def forward(self, x: F32) -> F32:
        """The layer's output f32 ``[..., out]`` for f32 ``[..., in]``.

        Raises:
            WeightError: ``x`` has another last dimension.
        """
        adapted = self._pair().apply(x)
        adapted += x @ self.base_weight_quantized.dequantize().T
        return adapted

    def merge_to_f32(self) -> F32:
        """The weight that does the same alone: ``dequantize(base) + scale * b a``, f32 ``[out, in]``."""
        return self.base_weight_quantized.dequantize() + self._pair().delta()

    def trainable_params(self) -> tuple[F32, F32]:
        """The arrays that training changes: a and b themselves."""
        return self.lora_a, self.lora_b

    def memory_stats(self) -> MemoryStats:
        """What the layer takes."""
        out, in_ = self.base_weight_quantized.shape
        return MemoryStats(
            unquantized=out * in_ * 4,
            quantized=self.base_weight_quantized.nbytes,
            adapter=self.lora_a.nbytes + self.lora_b.nbytes,
        )

    def _pair(self) -> LoraPair:
        return LoraPair(self.lora_a, self.lora_b, self.scale)
