"""Mixture of experts, lowered: the router's choice, and products with the chosen experts' matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlxc.backends.tvm.draft import Draft
from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.route import Groups, route_kernel
from rlxc.backends.tvm.program import Argument
from rlxc.backends.tvm.rows import RowOps
from rlxc.backends.tvm.tuned import TunedKernels
from rlxc.errors import UnsupportedError
from rlxc.ir import Node


@dataclass
class ExpertOps:
    """The ops of experts in a draft; slots by expert are kept for all products with what was chosen."""

    draft: Draft
    rows: RowOps
    tuned: TunedKernels
    _groups: dict[str, tuple[int, Argument]] = field(default_factory=dict)

    def route(self, node: Node, used: int) -> None:
        """Lower a choice."""
        draft, (chosen, weights) = self.draft, node.outputs
        scores = draft.place(node.inputs[0])
        ids, to = draft.new(chosen, stride=used), draft.new(weights)
        groups = draft.buffer(4 * used, 4 * Groups(scores.width).order)
        kernel = route_kernel(draft.vectors, scores.width, used, scores.stride, to.stride)
        arguments = (scores.argument, ids.argument, to.argument, groups, scores.amount)
        draft.call(kernel, arguments, scores.amount)
        self._groups[chosen] = scores.width, groups

    def matmul(self, node: Node) -> None:
        """Lower a product.

        Raises:
            UnsupportedError: its experts are not those that a choice is among.
        """
        draft, (x, weight, chosen, *bias) = self.draft, node.inputs
        stored = draft.weights.stored[weight]
        type_ = draft.graph.types[weight]
        experts, rows, columns = map(int, type_.shape)
        if chosen not in self._groups or self._groups[chosen][0] != experts:
            raise UnsupportedError(
                f"the tvm backend has no kernel for it: %{chosen} is not chosen among the {experts} experts"
                f" of @{weight}"
            )
        groups = self._groups[chosen][1]
        used, amount = draft.width(chosen), draft.amount(node.outputs[0])
        out = draft.new(node.outputs[0])
        shape: dict[str, Any] = {
            "dtype": type_.dtype.value,
            "layout": stored.chosen,
            "experts": experts,
            "rows": rows,
            "columns": columns,
            "used": used,
            "stride": out.stride,
            "shared": len(draft.graph.types[x].shape) == 3,
            "bias": bool(bias),
        }
        rounded = draft.int8_layout(node)
        if rounded is not None:
            activations = self.rows.round(x, QuantisedRow.of(rounded, draft.vectors))
            kernel = self.tuned.make("expert_matmul", amount, **shape)
        else:
            place = draft.place(x)
            activations = place.argument
            kernel = self.tuned.make("expert_matmul_exact", amount, x_stride=place.stride, **shape)
        arguments = (
            draft.weight(weight),
            activations,
            groups,
            *map(draft.weight, bias),
            out.argument,
            amount,
        )
        # A token reads so many experts; several may share some.
        read = stored.nbytes // experts * used
        draft.call(kernel, arguments, amount, read, used * rows * columns)
