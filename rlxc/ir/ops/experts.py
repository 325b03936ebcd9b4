"""Mixture of experts: which experts a token goes to, their matrix products, and the sum of what they give.

``E`` experts, of which each token uses ``U``: its ``U`` slots. Sources: Shazeer et al. 2017; Fedus et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlxc.dtypes import FLOATS, DType
from rlxc.ir.graph import TensorType
from rlxc.ir.ops.base import Op, Types, f32


@dataclass(frozen=True)
class Route(Op):
    """The ``used`` experts of largest score, best first (of equal ones the first), and the softmax of their scores.

    Dividing the softmax of all scores by the sum of the chosen ones gives the same weights.
    Input: scores ``f32[B, S, E]``. Results: experts ``i64[B, S, U]``, weights ``f32[B, S, U]``.
    """

    used: int

    def shape_rule(self, inputs: Types) -> Types:
        """``i64[B, S, U]`` and ``f32[B, S, U]``."""
        (scores,) = inputs
        experts = scores.shape[-1] if len(scores.shape) == 3 else 0
        fits = scores.dtype is DType.F32 and isinstance(experts, int) and 0 < self.used <= experts
        self.require(fits, f"cannot choose {self.used} experts of {scores}")
        slots = (*scores.shape[:2], self.used)
        return (TensorType(DType.I64, slots), f32(*slots))


@dataclass(frozen=True)
class ExpertMatMul(Op):
    """``y = x W_e^T + bias_e`` for the expert e of each slot; a packed weight is decoded on the way.

    Inputs: x ``f32[B, S, in]``, the same for all slots of a token, or ``f32[B, S, U, in]``; weights ``[E, out, in]`` of
    any format; experts ``i64[B, S, U]``; optional bias ``f32[E, out]``. Result: ``f32[B, S, U, out]``.
    """

    arity = (3, 4)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, U, out]``."""
        x, weight, experts, *biases = inputs
        self.require(experts.dtype is DType.I64 and len(experts.shape) == 3, f"experts {experts}")
        readable = weight.dtype in FLOATS or weight.dtype.is_packed
        self.require(readable, f"cannot read a weight of type {weight.dtype}")
        self.require(len(weight.shape) == 3, f"weight {weight} must be [E, out, in]")
        count, out, columns = weight.shape
        slots = experts.shape
        self.require(x in (f32(*slots[:2], columns), f32(*slots, columns)), f"weight {weight} for x {x}")
        for bias in biases:
            self.require(bias == f32(count, out), f"bias {bias} for weight {weight}")
        return (f32(*slots, out),)


@dataclass(frozen=True)
class MixExperts(Op):
    """The weighted sum of a token's slots. Inputs: x ``f32[B, S, U, N]``, weights ``f32[B, S, U]``.

    Result: ``f32[B, S, N]``.
    """

    arity = (2, 2)

    def shape_rule(self, inputs: Types) -> Types:
        """``f32[B, S, N]``."""
        x, weights = inputs
        fits = len(x.shape) == 4 and weights == f32(*x.shape[:3]) and x.dtype is DType.F32
        self.require(fits, f"weights {weights} for x {x}")
        return (f32(*x.shape[:2], x.shape[3]),)
