"""Every op of the IR: its attributes (the dataclass fields), what it computes, and its shape rule.

Shape letters: ``B`` batch, ``S`` tokens of this step, ``T`` tokens with a key, ``H`` heads, ``K`` key/value heads,
``D`` head dim. Activations are ``f32[B, S, features]``; heads lie side by side in the last dimension.
"""

from __future__ import annotations

from rlxc.ir.ops.arithmetic import (
    Add,
    AddRmsNorm,
    Binary,
    ClampedSwiglu,
    Constant,
    Gelu,
    LayerNorm,
    Mean,
    Mul,
    RmsNorm,
    Rsqrt,
    Silu,
    SoftCap,
    Sqrt,
    Square,
    Unary,
)
from rlxc.ir.ops.attention import Attention, GroupQueryAttention, KvAppend, KvRead, KvWrite, Positions, Rope
from rlxc.ir.ops.base import Op, Types
from rlxc.ir.ops.experts import ExpertMatMul, MixExperts, Route
from rlxc.ir.ops.lora import LoraDown, LoraEmbed, LoraMatMul
from rlxc.ir.ops.matrices import DequantMatMul, Embed, Glu, MatMul, SelectRows, Split

__all__ = [
    "Add",
    "AddRmsNorm",
    "Attention",
    "Binary",
    "ClampedSwiglu",
    "Constant",
    "DequantMatMul",
    "Embed",
    "ExpertMatMul",
    "Gelu",
    "Glu",
    "GroupQueryAttention",
    "KvAppend",
    "KvRead",
    "KvWrite",
    "LayerNorm",
    "LoraDown",
    "LoraEmbed",
    "LoraMatMul",
    "MatMul",
    "Mean",
    "MixExperts",
    "Mul",
    "Op",
    "Positions",
    "RmsNorm",
    "Rope",
    "Route",
    "Rsqrt",
    "SelectRows",
    "Silu",
    "SoftCap",
    "Split",
    "Sqrt",
    "Square",
    "Types",
    "Unary",
]
