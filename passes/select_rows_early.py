"""Picks the wanted tokens before the work on them, rather than after it."""

from __future__ import annotations

from rlxc.dtypes import DType
from rlxc.ir import Graph, Node
from rlxc.ir.ops import (
    Add,
    AddRmsNorm,
    ClampedSwiglu,
    DequantMatMul,
    ExpertMatMul,
    Gelu,
    Glu,
    LayerNorm,
    MatMul,
    MixExperts,
    Mul,
    RmsNorm,
    Route,
    SelectRows,
    Silu,
    SoftCap,
    Split,
)
from rlxc.passes.base import Pass, PassResult

_ROW_WISE = (
    *(
        Add,
        AddRmsNorm,
        ClampedSwiglu,
        DequantMatMul,
        ExpertMatMul,
        Gelu,
        Glu,
        LayerNorm,
        MatMul,
        MixExperts,
        Mul,
    ),
    *(RmsNorm, Route, Silu, SoftCap, Split),
)


class SelectRowsEarly(Pass):
    """Moves SelectRows up through ops that treat every token alike, as far as all their users want the same rows.

    After the last attention, only tokens whose logits are wanted go on: one of hundreds in a prefill.
    """

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        selections = [node for node in graph.nodes if isinstance(node.op, SelectRows)]
        if len(selections) != 1:
            return PassResult(graph, False)
        (selection,) = selections
        moved = self._movable(graph, selection)
        if not moved:
            return PassResult(graph, False)
        x, rows = selection.inputs
        inside = {id(node) for node in moved}
        names = {name: f"{name}.rows" for node in moved for name in node.outputs}
        names[x] = selection.outputs[0]
        nodes: list[Node] = []
        for node in graph.nodes:
            if node is selection:
                continue
            if id(node) not in inside:
                nodes.append(node)
                continue
            for name in _reads(node):
                if name in names or len(graph.types[name].shape) < 3:
                    continue
                names[name] = f"{name}.rows"
                nodes.append(Node(SelectRows(), (name, rows), (names[name],)))
            inputs = tuple(names.get(name, name) for name in node.inputs)
            nodes.append(Node(node.op, inputs, tuple(names[name] for name in node.outputs)))
        return PassResult(graph.with_nodes(nodes), True)

    def _movable(self, graph: Graph, selection: Node) -> list[Node]:
        """The row-wise nodes that only lead to the selection, and read nothing else that rows cannot be picked of."""
        fixed: set[int] = set()
        while True:
            moved = self._leading(graph, selection, fixed)
            made = {name for node in moved for name in node.outputs}
            stuck = {
                id(node)
                for node in moved
                if not all(name in made or _is_selectable(graph, name) for name in _reads(node))
            }
            if not stuck:
                return moved
            fixed |= stuck

    def _leading(self, graph: Graph, selection: Node, fixed: set[int]) -> list[Node]:
        """The row-wise nodes, other than ``fixed`` ones, that only lead to the selection, in execution order."""
        moved: list[Node] = []
        inside = {id(selection)}
        for node in reversed(graph.nodes):
            users = [user for name in node.outputs for user in graph.users.get(name, ())]
            leads = (
                users
                and all(id(user) in inside for user in users)
                and not set(node.outputs) & set(graph.outputs)
            )
            row_wise = isinstance(node.op, _ROW_WISE) and id(node) not in fixed
            if leads and row_wise and self._keeps_tokens(graph, node):
                moved.append(node)
                inside.add(id(node))
        return moved[::-1]

    def _keeps_tokens(self, graph: Graph, node: Node) -> bool:
        """Whether all that the node reads and writes is ``[B, S, ...]``, or the same for every token."""
        written = [graph.types[name].shape for name in node.outputs]
        tokens = written[0][:2]
        shapes = [*written, *(shape for name in _reads(node) if len(shape := graph.types[name].shape) > 1)]
        return all(len(shape) > 2 and shape[:2] == tokens for shape in shapes)


def _reads(node: Node) -> tuple[str, ...]:
    """What the node reads of tokens: all but matrices and their biases."""
    if isinstance(node.op, (DequantMatMul, MatMul)):
        return node.inputs[:1]
    if isinstance(node.op, ExpertMatMul):
        return (node.inputs[0], node.inputs[2])
    return node.inputs


def _is_selectable(graph: Graph, name: str) -> bool:
    """Whether rows can be picked of this value, or need not be."""
    found = graph.types[name]
    return len(found.shape) < 2 or (found.dtype is DType.F32 and len(found.shape) == 3)
