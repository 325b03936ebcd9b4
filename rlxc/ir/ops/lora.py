"""LoRA adapters that come at run time, a stack of them for each sequence."""

from __future__ import annotations

from dataclasses import dataclass

from rlxc.dtypes import DType
from rlxc.ir.graph import TensorType
from rlxc.ir.ops.base import Op, Types, f32
from rlxc.ir.ops.matrices import DequantMatMul, MatMul


@dataclass(frozen=True)
class LoraDown(Op):
    """The narrow side of LoRA for matrices that read one input: ``u = scales * (x A^T)``, one A for each of them.

    Each sequence has a stack of adapters, their ranks side by side. Inputs: x ``f32[B, S, in]``, the A's
    ``f32[B, parts, rank, in]``, scales ``f32[B, rank]``. Result: ``f32[B, S, parts, rank]``. Source: Hu et al. 2021.
    """

    arity = (3, 3)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, parts, rank]``."""
        x, a, scales = inputs
        self.require(
            len(x.shape) == 3 and len(a.shape) == 4, f"x {x} must be [B, S, in], A {a} [B, parts, rank, in]"
        )
        batch, parts, rank, columns = a.shape
        self.require(x == f32(batch, x.shape[1], columns) and a.dtype is DType.F32, f"A {a} for x {x}")
        self.require(isinstance(parts, int), f"parts of {a} must be a number")
        self.require(scales == f32(batch, rank), f"scales {scales} for A {a}")
        return (f32(*x.shape[:2], parts, rank),)


@dataclass(frozen=True)
class LoraMatMul(Op):
    """A matrix product with LoRA: ``y = x W^T + bias``, plus ``u B^T`` for each part of W's rows.

    ``sizes`` are the parts' rows; the parts of u that belong to them begin at ``first``. Inputs: x ``f32[B, S, in]``,
    weight ``[out, in]`` of any format, optional bias ``f32[out]``, u ``f32[B, S, parts, rank]``, B's
    ``f32[B, out, rank]``. Result: ``f32[B, S, out]``.
    """

    arity = (4, 5)
    sizes: tuple[int, ...]
    first: int = 0

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, out]``."""
        *base, u, b = inputs
        x, weight = base[:2]
        product: Op = DequantMatMul() if weight.dtype.is_packed else MatMul()
        (result,) = product.infer(tuple(base))
        self.require(
            len(x.shape) == 3 and len(u.shape) == 4, f"x {x} must be [B, S, in], u {u} [B, S, parts, rank]"
        )
        parts, rank = u.shape[2:]
        self.require(isinstance(parts, int), f"parts of {u} must be a number")
        assert isinstance(parts, int)
        self.require(u == f32(*x.shape[:2], parts, rank), f"u {u} for x {x}")
        self.require(self.first >= 0 and self.first + len(self.sizes) <= parts, f"u has {parts} parts")
        self.require(sum(self.sizes) == weight.shape[0], f"sizes {self.sizes} for weight {weight}")
        self.require(b == f32(x.shape[0], weight.shape[0], rank), f"B {b} for weight {weight} and u {u}")
        return (result,)


@dataclass(frozen=True)
class LoraEmbed(Op):
    """An embedding with LoRA: ``y = x + (scales * A[ids]) B^T``.

    Inputs: x ``f32[B, S, N]``, ids ``i64[B, S]``, A's ``f32[B, vocab, rank]``, scales ``f32[B, rank]``, B's
    ``f32[B, N, rank]``. Result: the shape of x.
    """

    arity = (5, 5)

    def shape_rule(self, inputs: Types) -> Types:
        """The shape of x."""
        x, ids, a, scales, b = inputs
        self.require(
            len(x.shape) == 3 and len(a.shape) == 3, f"x {x} must be [B, S, N], A {a} [B, vocab, rank]"
        )
        self.require(ids == TensorType(DType.I64, x.shape[:2]), f"ids {ids} for x {x}")
        batch, _, rank = a.shape
        self.require(a.dtype is DType.F32 and batch == x.shape[0], f"A {a} for x {x}")
        self.require(scales == f32(batch, rank), f"scales {scales} for A {a}")
        self.require(x.dtype is DType.F32 and b == f32(batch, x.shape[2], rank), f"B {b} for x {x} and A {a}")
        return (x,)
