"""Mixture of experts in ONNX: only the chosen experts' weights are read, each once in a step for all its tokens.

A step's slots (a token has one for each expert that it uses) are sorted by expert. Each expert has an ``If``, whose
branch owns the expert's weights and runs on the expert's rows: products, and the elementwise ops between them. Rows of
experts that nobody chose are none. All rows one after the other are then put back in the order of the slots:

    x ──► sorted rows ──► If any of experts 0-7 ──► If expert 0 ──► gate, up, activation, down ──► rows ──► slots
                          ...                       ...

The inner ops are those of any other matrix, so every format is multiplied as it is elsewhere. ``QMoE`` has no minimums,
and no product of 8 bits with f32 activations. An ``If`` that is not taken takes about 2 microseconds, and ONNX Runtime
optimises graphs in time that grows with the square of their nodes: hence the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from rlxc.backends.onnx.weights import StoredFloat
from rlxc.dtypes import DType
from rlxc.ir import Node, TensorType, ops

if TYPE_CHECKING:
    from rlxc.backends.onnx.lower import Lowering

Lower = Callable[[ops.Op, Node, "Lowering"], None]
"""Appends the nodes of any op."""

GROUP = 8
"""Experts in a group; measured with 32 and 128 experts of which 4 and 8 are used."""

_ELEMENTWISE = (
    *(ops.Add, ops.Mul, ops.ClampedSwiglu),
    *(ops.Square, ops.Sqrt, ops.Rsqrt, ops.Silu, ops.Gelu, ops.SoftCap, ops.Glu),
)


def route(op: ops.Route, node: Node, to: Lowering) -> None:
    """The best experts (of equal ones, ``TopK`` takes the first) and the softmax of their scores."""
    (scores,), (experts, weights) = node.inputs, node.outputs
    used = to.constant(f"used.{op.used}", np.array([op.used]))
    chosen = f"{weights}.scores"
    if to.runtime.sorts_nothing:
        to.add("TopK", [scores, used], [chosen, experts])
    else:  # with one row more, which is taken away again
        to.add("Pad", [scores, to.constant("one_row", np.array([0, 0, 0, 0, 1, 0]))], [f"{scores}.padded"])
        to.add("TopK", [f"{scores}.padded", used], [f"{chosen}.padded", f"{experts}.padded"])
        bounds = [
            to.constant(name, np.array([i])) for name, i in (("index.0", 0), ("last_axis", -1), ("one", 1))
        ]
        for name in (chosen, experts):
            to.add("Slice", [f"{name}.padded", *bounds], [name])
    to.add("Softmax", [chosen], [weights])


def mix(node: Node, to: Lowering) -> None:
    """The weighted sum of slots, as a product of a row with a matrix for each token."""
    (x, weights), (out,) = node.inputs, node.outputs
    axis = to.constant("slot_axis", np.array([2]))
    to.add("Unsqueeze", [weights, axis], [f"{out}.weights"])
    to.add("MatMul", [f"{out}.weights", x], [f"{out}.sum"])
    to.add("Squeeze", [f"{out}.sum", axis], [out])


class ExpertRuns:
    """Finds runs of nodes that work on slots of the same experts, and lowers each as a whole."""

    def __init__(self, to: Lowering, lower: Lower) -> None:
        self._to, self._lower = to, lower
        self._run: list[Node] = []
        self._made: set[str] = set()

    def take(self, node: Node) -> bool:
        """Whether the node belongs to a run, which will be lowered when it ends."""
        if isinstance(node.op, ops.ExpertMatMul):
            if self._run and self._experts != node.inputs[2]:
                self.finish()
        elif not (isinstance(node.op, _ELEMENTWISE) and self._made.issuperset(node.inputs)):
            self.finish()
            return False
        self._run.append(node)
        self._made.update(node.outputs)
        return True

    def finish(self) -> None:
        """Lower the run that is going on, if there is one."""
        if self._run:
            _Run(self._run, self._to, self._lower).lower()
        self._run, self._made = [], set()

    @property
    def _experts(self) -> str:
        """What chooses the run's experts: the input of its first node, which is a product."""
        return self._run[0].inputs[2]


class _Run:
    """Nodes of one run. Values of an expert have its number behind their name."""

    def __init__(self, nodes: list[Node], to: Lowering, lower: Lower) -> None:
        self.nodes, self.to, self._lower_node = nodes, to, lower
        self.name, self.experts = nodes[0].outputs[0], nodes[0].inputs[2]
        self.count = int(to.types[nodes[0].inputs[1]].shape[0])
        made = {name for node in nodes for name in node.outputs}
        inside = {id(node) for node in nodes}
        self.outputs = [
            name
            for name in sorted(made)
            if name in to.graph.outputs
            or any(id(user) not in inside for user in to.graph.users.get(name, ()))
        ]
        products = [node for node in nodes if isinstance(node.op, ops.ExpertMatMul)]
        self.sources = list(dict.fromkeys(node.inputs[0] for node in products if node.inputs[0] not in made))

    def lower(self) -> None:
        """Append the nodes of the whole run."""
        self._sort_slots()
        for x in self.sources:
            self._sort_rows(x)
        groups = [range(first, min(first + GROUP, self.count)) for first in range(0, self.count, GROUP)]
        if len(groups) == 1:
            self._each(groups[0], ".sorted")
        else:
            self._each_group(groups, ".sorted")
        for name in self.outputs:
            self._restore(name)

    def _sort_slots(self) -> None:
        """The slots in the order of their experts, the places of slots in it, and where each expert's begin and end."""
        to, e = self.to, self.experts
        if not to.is_new(f"{e}.order"):
            return
        used = int(to.types[e].shape[2])
        to.add("Reshape", [e, to.constant("last_axis", np.array([-1]))], [f"{e}.flat"])
        to.add("Shape", [f"{e}.flat"], [f"{e}.slots"])
        to.add("TopK", [f"{e}.flat", f"{e}.slots"], [f"{e}.ascending", f"{e}.order"], largest=0)
        to.add("TopK", [f"{e}.order", f"{e}.slots"], [f"{e}.places.ascending", f"{e}.places"], largest=0)
        to.add("Div", [f"{e}.order", to.constant(f"used.{used}", np.array([used]))], [f"{e}.tokens"])
        one = numpy_helper.from_array(np.array([1]))
        to.add("ConstantOfShape", [f"{e}.slots"], [f"{e}.ones"], value=one)
        none = to.constant(f"zeros.{self.count}", np.zeros(self.count, np.int64))
        to.add("ScatterElements", [none, f"{e}.flat", f"{e}.ones"], [f"{e}.counts"], reduction="add")
        to.add("CumSum", [f"{e}.counts", to.constant("index_zero", np.array(0))], [f"{e}.ends"])
        to.add("Sub", [f"{e}.ends", f"{e}.counts"], [f"{e}.starts"])
        to.add("Shape", [e], [f"{e}.shape"])

    def _sort_rows(self, x: str) -> None:
        """The rows of x that the slots read, ``[1, slots, in]``, in their order."""
        to, e = self.to, self.experts
        if not to.is_new(f"{x}.{e}"):
            return
        width = to.width(x)
        to.add("Reshape", [x, to.constant(f"rows.{width}", np.array([1, -1, width]))], [f"{x}.{e}.rows"])
        order = f"{e}.tokens" if len(to.types[x].shape) == 3 else f"{e}.order"
        to.add("Gather", [f"{x}.{e}.rows", order], [f"{x}.{e}"], axis=1)

    def _each_group(self, groups: list[range], suffix: str) -> None:
        """An ``If`` for each group, with one for each of its experts inside."""
        to, e, any_ = self.to, self.experts, f"{self.name}.any"
        for kind, places in (
            ("starts", [group[0] for group in groups]),
            ("ends", [group[-1] for group in groups]),
        ):
            chosen = to.constant(f"{kind}.{self.count}", np.array(places))
            to.add("Gather", [f"{e}.{kind}", chosen], [f"{any_}.{kind}"])
        to.add("Sub", [f"{any_}.ends", f"{any_}.starts"], [f"{any_}.counts"])
        parts = [f".{group[0]}-{group[-1]}" for group in groups]
        for group, part, flag in zip(groups, parts, self._flags(f"{any_}.counts", parts)):
            self._if(flag, part, partial(self._each, group, part))
        self._join(parts, suffix)

    def _each(self, experts: range, suffix: str) -> None:
        """An ``If`` for each of these experts."""
        to, counts = self.to, f"{self.name}.counts{suffix}"
        bounds = [to.constant(f"index.{place}", np.array([place])) for place in (experts.start, experts.stop)]
        to.add("Slice", [f"{self.experts}.counts", *bounds], [counts])
        parts = [f".{number}" for number in experts]
        for number, part, flag in zip(experts, parts, self._flags(counts, parts)):
            self._if(flag, part, partial(self._expert, number))
        self._join(parts, suffix)

    def _expert(self, number: int) -> None:
        """The run on the rows of one expert."""
        to, e = self.to, self.experts
        place = to.constant(f"index.{number}", np.array([number]))
        for kind in ("starts", "ends"):
            to.add("Gather", [f"{e}.{kind}", place], [f"{self.name}.{number}.{kind}"])
        bounds = [f"{self.name}.{number}.{kind}" for kind in ("starts", "ends")]
        for x in self.sources:
            to.add("Slice", [f"{x}.{e}", *bounds, to.constant("one", np.array([1]))], [f"{x}.{number}"])
        for node in self.nodes:
            op, inputs = node.op, node.inputs
            if isinstance(op, ops.ExpertMatMul):
                x, weight, _, *bias = inputs
                op = ops.DequantMatMul() if to.types[weight].dtype.is_packed else ops.MatMul()
                inputs = (x, weight, *bias)
            for name in (*inputs, *node.outputs):
                self._describe(name, number)
            mine = [tuple(f"{name}.{number}" for name in names) for names in (inputs, node.outputs)]
            self._lower_node(op, Node(op, *mine), to)

    def _describe(self, name: str, number: int) -> None:
        """The part of a value or weight that one expert sees."""
        to, part = self.to, f"{name}.{number}"
        to.types[part] = TensorType(DType.F32, (1, "rows", to.width(name)))
        stored = to.stored.get(name)
        if isinstance(stored, StoredFloat):
            to.stored[part] = stored.expert(number)
        elif stored is not None:
            to.stored[part] = stored.expert(number, self.count)

    def _flags(self, counts: str, parts: list[str]) -> list[str]:
        """Whether counts are above zero, one by one."""
        flags = [f"{self.name}.any{part}" for part in parts]
        self.to.add("Cast", [counts], [f"{counts}.any"], to=TensorProto.BOOL)
        self.to.add("Split", [f"{counts}.any"], flags, axis=0, num_outputs=len(flags))
        return flags

    def _if(self, flag: str, part: str, build: Callable[[], None]) -> None:
        """The run's outputs for some experts, as ``build`` makes them, or no rows."""
        widths = {name: self.to.width(name) for name in self.outputs}
        some = self.to.branch(f"{self.name}{part}", {f"{name}{part}": w for name, w in widths.items()}, build)
        none = [
            numpy_helper.from_array(np.zeros((1, 0, width), np.float32), f"{name}{part}.none")
            for name, width in widths.items()
        ]
        results = [
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims))
            for tensor in none
        ]
        nothing = helper.make_graph([], f"{self.name}{part}.none", [], results, none)
        rows = [f"{name}{part}.rows" for name in self.outputs]
        self.to.add("If", [flag], rows, then_branch=some, else_branch=nothing)

    def _join(self, parts: list[str], suffix: str) -> None:
        """The rows of all parts, one after the other."""
        for name in self.outputs:
            self.to.add("Concat", [f"{name}{part}.rows" for part in parts], [f"{name}{suffix}"], axis=1)

    def _restore(self, name: str) -> None:
        """The sorted rows in the order of the slots: ``[B, S, U, width]``."""
        to, e, width = self.to, self.experts, self.to.width(name)
        to.add("Gather", [f"{name}.sorted", f"{e}.places"], [f"{name}.flat"], axis=1)
        shape = [f"{e}.shape", to.constant(f"width.{width}", np.array([width]))]
        to.add("Concat", shape, [f"{name}.shape"], axis=0)
        to.add("Reshape", [f"{name}.flat", f"{name}.shape"], [name])
