"""Does at compile time the arithmetic that depends on no input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rlxc.ir import Graph, Node, interp
from rlxc.ir.ops import Add, Constant, Mul
from rlxc.passes.base import Pass, PassResult
from rlxc.passes.rewrite import rename


class FoldConstants(Pass):
    """Evaluates nodes whose inputs are constants; drops ``x * 1`` and ``x + 0``; joins ``(x * a) * b``."""

    def run(self, graph: Graph) -> PassResult:
        """See the class. What a fold leaves without users stays, for remove_dead."""
        constants: dict[str, Constant] = {}
        products: dict[str, tuple[str, float]] = {}  # by name: what it is a multiple of, and how many times
        names: dict[str, str] = {}
        nodes: list[Node] = []
        for original in graph.nodes:
            (node,) = rename([original], names)
            folded = _evaluated(node, constants)
            if folded is not None:
                node = Node(folded, (), node.outputs)
            elif isinstance(node.op, (Add, Mul)):
                value, number = _operands(node, constants)
                is_identity = number == (0.0 if isinstance(node.op, Add) else 1.0)
                if is_identity and node.outputs[0] not in graph.outputs:
                    names[node.outputs[0]] = value
                    continue
                if isinstance(node.op, Mul) and number is not None:
                    if value in products and graph.only_user(value) is not None:
                        base, inner = products[value]
                        if _fits_f32(inner * number):
                            value, number = base, inner * number
                            factor = f"{node.outputs[0]}.factor"
                            nodes.append(Node(Constant(number), (), (factor,)))
                            node = Node(Mul(), (value, factor), node.outputs)
                    products[node.outputs[0]] = (value, number)
            if isinstance(node.op, Constant):
                constants[node.outputs[0]] = node.op
            nodes.append(node)
        if tuple(nodes) == graph.nodes:
            return PassResult(graph, False)
        return PassResult(graph.with_nodes(nodes), True)


def _evaluated(node: Node, constants: dict[str, Constant]) -> Constant | None:
    """The node's result, if all its inputs are constants (numbers and vectors: it is no larger) and f32 holds it."""
    known = [constants[name] for name in node.inputs if name in constants]
    if not known or len(known) != len(node.inputs) or len(node.outputs) != 1:
        return None
    with np.errstate(all="ignore"):  # what has no result here shall not have one when the model runs either
        (result,) = interp.evaluate(node.op, [interp.evaluate(constant, [])[0] for constant in known])
    if not _fits_f32(result):
        return None
    return Constant(tuple(result.tolist()) if result.ndim else float(result))


def _operands(node: Node, constants: dict[str, Constant]) -> tuple[str, float | None]:
    """The operand that is not constant, and the number that the other one is, if it is one."""
    a, b = node.inputs
    value, other = (b, a) if a in constants else (a, b)
    constant = constants.get(other)
    return value, constant.value if constant is not None and not isinstance(constant.value, tuple) else None


def _fits_f32(values: npt.ArrayLike) -> bool:
    """Whether f32 holds these numbers: neither infinite nor vanished."""
    wide = np.asarray(values, np.float64)
    with np.errstate(all="ignore"):
        narrow = wide.astype(np.float32)
    return bool(np.isfinite(narrow).all() and np.array_equal(narrow == 0, wide == 0))
