"""Tables, matrix products, and what cuts or picks from their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlxc.dtypes import DType
from rlxc.ir.ops.base import Op, Types, f32, part_size


@dataclass(frozen=True)
class Embed(Op):
    """Rows of a table. Inputs: ids ``i64[B, S]``, table ``[vocab, N]`` of any format. Result: ``f32[B, S, N]``."""

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, N]``."""
        ids, table = inputs
        self.require(ids.dtype is DType.I64 and len(ids.shape) == 2, f"ids must be i64[B, S], got {ids}")
        self.require(len(table.shape) == 2, f"table must be [vocab, N], got {table}")
        return (f32(*ids.shape, table.shape[1]),)


@dataclass(frozen=True)
class _Linear(Op):
    """``y = x W^T + bias``. Inputs: x ``f32[..., in]``, weight ``[out, in]``, optional bias ``f32[out]``."""

    arity = (2, 3)
    formats: ClassVar[frozenset[DType]]
    """The types that the weight may have."""

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[..., out]``."""
        x, weight = inputs[:2]
        self.require(x.dtype is DType.F32, f"x must be f32, got {x}")
        self.require(weight.dtype in self.formats, f"cannot read a weight of type {weight}")
        self.require(
            len(weight.shape) == 2 and x.shape[-1:] == weight.shape[1:], f"weight {weight} for x {x}"
        )
        for bias in inputs[2:]:
            self.require(bias == f32(weight.shape[0]), f"bias {bias} for weight {weight}")
        return (f32(*x.shape[:-1], weight.shape[0]),)


@dataclass(frozen=True)
class MatMul(_Linear):
    """``y = x W^T + bias`` with a float weight (f32, f16 or bf16)."""

    formats = frozenset((DType.F32, DType.F16, DType.BF16))


@dataclass(frozen=True)
class DequantMatMul(_Linear):
    """``y = x W^T + bias`` with a packed weight, decoded on the way to the multiplication."""

    formats = frozenset(dtype for dtype in DType if dtype.is_packed)


@dataclass(frozen=True)
class Split(Op):
    """Cuts the last dimension into parts of these sizes."""

    sizes: tuple[int, ...]

    def shape_rule(self, inputs: Types) -> Types:
        """One result per size."""
        (x,) = inputs
        self.require(part_size(self, x, 1) == sum(self.sizes), f"sizes {self.sizes} for {x}")
        return tuple(f32(*x.shape[:-1], size) for size in self.sizes)


@dataclass(frozen=True)
class Glu(Op):
    """A gated activation: ``act(gate) * up``, where x ``f32[..., 2 F]`` holds gate and up side by side.

    ``activation`` is ``silu`` or ``gelu`` (tanh). Source: Shazeer 2020.
    """

    activation: str

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[..., F]``."""
        (x,) = inputs
        self.require(self.activation in ("silu", "gelu"), f"unknown activation {self.activation!r}")
        return (f32(*x.shape[:-1], part_size(self, x, 2)),)


@dataclass(frozen=True)
class SelectRows(Op):
    """Chosen tokens of a step. Inputs: x ``f32[B, S, N]``, rows ``i64[R]`` (negative counts from the end)."""

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, R, N]``."""
        x, rows = inputs
        self.require(rows.dtype is DType.I64 and len(rows.shape) == 1, f"rows must be i64[R], got {rows}")
        self.require(x.dtype is DType.F32 and len(x.shape) == 3, f"x must be f32[B, S, N], got {x}")
        return (f32(x.shape[0], rows.shape[0], x.shape[2]),)
