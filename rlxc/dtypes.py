"""Element types of tensors: plain ones, those of caches, and packed ones: the block formats of GGUF and of QLoRA."""

from __future__ import annotations

from enum import Enum


class DType(str, Enum):
    """The type of a tensor's elements; its value is the spelling in IR text.

    ``INT8`` is of caches only: codes, with one f32 scale for each row of the last axis.
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I32 = "i32"
    I64 = "i64"
    BOOL = "bool"
    INT8 = "int8"

    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_0 = "q8_0"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ1_S = "iq1_s"
    IQ1_M = "iq1_m"
    IQ2_XXS = "iq2_xxs"
    IQ2_XS = "iq2_xs"
    IQ2_S = "iq2_s"
    IQ3_XXS = "iq3_xxs"
    IQ3_S = "iq3_s"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    TQ1_0 = "tq1_0"
    TQ2_0 = "tq2_0"
    Q1_0 = "q1_0"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    NF4 = "nf4"
    FP4 = "fp4"
    INT4 = "int4"

    @property
    def is_packed(self) -> bool:
        """True for block formats, whose bytes only ``DequantMatMul`` and ``Embed`` can read."""
        return self not in _PLAIN

    def __str__(self) -> str:
        return self.value


_PLAIN = frozenset({DType.F32, DType.F16, DType.BF16, DType.I32, DType.I64, DType.BOOL, DType.INT8})


FLOATS = (DType.F32, DType.F16, DType.BF16)
"""The float types that weights can have."""

_ONLY_READ = frozenset(
    {
        *(DType.IQ1_S, DType.IQ1_M, DType.IQ2_XXS, DType.IQ2_XS, DType.IQ2_S, DType.IQ3_XXS, DType.IQ3_S),
        *(DType.IQ4_XS, DType.NVFP4),
    }
)

ENCODABLE = (*FLOATS, *(dtype for dtype in DType if dtype.is_packed and dtype not in _ONLY_READ))
"""The types of weights that values can be encoded in, by ``rlxc.weights.encode``."""
