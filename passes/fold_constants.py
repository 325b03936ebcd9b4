"""Does at compile time the arithmetic that depends on no input."""

from __future__ import annotations

from rlxc.ir import Graph, Node, interp
from rlxc.ir.ops import Add, Constant, Mul
from rlxc.passes.base import Pass, PassResult
from rlxc.passes.rewrite import rename

LARGEST = 4096
"""Elements of a folded result: constants are written out in the graph, so they stay small."""


class FoldConstants(Pass):
    """Evaluates nodes whose inputs are constants; drops ``x * 1`` and ``x + 0``; joins ``(x * a) * b``."""

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        constants: dict[str, Constant] = {}
        products: dict[str, tuple[str, Constant]] = {}  # name: what it is a multiple of, and how many times
        names: dict[str, str] = {}
        nodes: list[Node] = []
        for original in graph.nodes:
            (node,) = rename([original], names)
            folded = self._evaluated(graph, node, constants)
            if folded is not None:
                node = Node(folded, (), node.outputs)
            elif isinstance(node.op, (Add, Mul)):
                value, constant = self._operands(node, constants)
                if (
                    constant is not None
                    and self._is_identity(node, constant)
                    and self._can_go(graph, node, value)
                ):
                    names[node.outputs[0]] = value
                    continue
                if isinstance(node.op, Mul) and constant is not None and isinstance(constant.value, float):
                    node = self._joined(graph, node, value, constant, products, nodes)
            if isinstance(node.op, Constant):
                constants[node.outputs[0]] = node.op
            nodes.append(node)
        modified = tuple(nodes) != graph.nodes
        return PassResult(graph.with_nodes(nodes) if modified else graph, modified)

    def _evaluated(self, graph: Graph, node: Node, constants: dict[str, Constant]) -> Constant | None:
        known = [constants[name] for name in node.inputs if name in constants]
        if not known or len(known) != len(node.inputs) or len(node.outputs) != 1:
            return None
        (result,) = interp.evaluate(node.op, [interp.evaluate(c, [])[0] for c in known])
        if result.dtype.kind != "f" or result.ndim > 1 or result.size > LARGEST:
            return None
        return Constant(tuple(result.tolist()) if result.ndim else float(result))

    def _operands(self, node: Node, constants: dict[str, Constant]) -> tuple[str, Constant | None]:
        a, b = node.inputs
        return (b, constants[a]) if a in constants else (a, constants.get(b))

    def _is_identity(self, node: Node, constant: Constant) -> bool:
        return constant.value == (1.0 if isinstance(node.op, Mul) else 0.0)

    def _can_go(self, graph: Graph, node: Node, value: str) -> bool:
        same = graph.types[node.outputs[0]] == graph.types[value] if value in graph.types else False
        return same and node.outputs[0] not in graph.outputs

    def _joined(
        self,
        graph: Graph,
        node: Node,
        value: str,
        constant: Constant,
        products: dict[str, tuple[str, Constant]],
        nodes: list[Node],
    ) -> Node:
        assert isinstance(constant.value, float)
        base, factor = value, constant.value
        if value in products and graph.only_user(value) is not None:
            base, inner = products[value]
            assert isinstance(inner.value, float)
            factor *= inner.value
            name = f"{node.outputs[0]}.factor"
            nodes.append(Node(Constant(factor), (), (name,)))
            node = Node(Mul(), (base, name), node.outputs)
        products[node.outputs[0]] = (base, Constant(factor))
        return node
