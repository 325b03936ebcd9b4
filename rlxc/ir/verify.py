"""The invariants of a graph, checked after every pass."""

from __future__ import annotations

from bisect import bisect_left

from rlxc.dtypes import DType
from rlxc.errors import GraphError, VerifyError
from rlxc.ir.graph import Alias, Balance, Concat, Dim, Encode, Fold, Graph, Node, TensorType, Weight


def verify(graph: Graph, *, after: str = "") -> None:
    """Check that names are defined once and before use, that types agree, and that weights' recipes make sense.

    Args:
        graph: the graph to check.
        after: what produced the graph (a pass), named in the error.

    Raises:
        VerifyError: naming `after`, the node, and the nodes that its inputs come from.
    """
    try:
        _check_interface(graph)
        for weight in graph.weights:
            _check_recipe(graph, weight)
            _check_layout(weight)
        _check_types(graph)
    except GraphError as error:
        raise VerifyError(str(error), source=after or graph.name) from None


def _check_interface(graph: Graph) -> None:
    """Inputs, weights and outputs; what nodes define twice is found with their types."""
    names: set[str] = set()
    for name in (*(value.name for value in graph.inputs), *(weight.name for weight in graph.weights)):
        if name in names:
            raise GraphError(f"{name!r} is defined twice")
        names.add(name)
    values = {value.name for value in graph.inputs} | graph.producer.keys()
    for i, name in enumerate(graph.outputs):
        if name not in values:
            raise GraphError(f"output %{name} is not a value of the graph")
        if name in graph.outputs[:i]:
            raise GraphError(f"output %{name} is listed twice")


def _check_recipe(graph: Graph, weight: Weight) -> None:
    match weight.recipe:
        case Alias():
            stored = graph.stored(weight)
            if stored.type != weight.type:
                raise GraphError(
                    f"@{weight.name} is {weight.type}, its target @{stored.name} is {stored.type}"
                )
        case Concat(parts):
            columns = {part.type.shape[1:] for part in parts}
            rows = [part.type.shape[0] for part in parts]
            numbers = [row for row in rows if isinstance(row, int)]
            if (
                columns != {weight.type.shape[1:]}
                or len(numbers) != len(rows)
                or sum(numbers) != weight.type.shape[0]
            ):
                raise GraphError(
                    f"@{weight.name} is {weight.type}, its parts have rows {rows} and columns {columns}"
                )
            for part in parts:
                _check_recipe(graph, part)
        case Encode(part):
            if part.type.shape != weight.type.shape:
                raise GraphError(f"@{weight.name} is {weight.type}, it encodes {part.type}")
            _check_recipe(graph, part)
        case Fold() as fold:
            _check_fold(weight, fold)
            for part in fold.parts:
                _check_recipe(graph, part)
        case Balance() as balance:
            _check_balance(weight, balance)
            for part in balance.parts:
                _check_recipe(graph, part)


def _check_layout(weight: Weight) -> None:
    if weight.layout is None:
        return
    bits, block, tile = weight.layout.bits, weight.layout.block, weight.layout.tile
    if not weight.type.dtype.is_packed or isinstance(weight.recipe, Alias):
        raise GraphError(f"@{weight.name} is {weight.type}, only packed matrices with bytes have a layout")
    columns = weight.type.shape[-1]
    if min(bits, block, tile) < 1 or not isinstance(columns, int) or columns % block:
        raise GraphError(f"@{weight.name} is {weight.type}, it cannot have a layout of {weight.layout}")


def _check_fold(weight: Weight, fold: Fold) -> None:
    if weight.type.dtype is not DType.F32 or weight.type.shape != fold.base.type.shape:
        raise GraphError(f"@{weight.name} is {weight.type}, it folds into {fold.base.type} in f32")
    rank = fold.a.type.shape[0]
    out, columns = weight.type.shape[::-1] if fold.transposed else weight.type.shape
    expected: list[tuple[Dim, ...]] = [(rank, columns), (out, rank)]
    if fold.magnitude is not None:
        expected.append(weight.type.shape[:1])
    for part, shape in zip(fold.parts[1:], expected):
        if part.type != TensorType(DType.F32, shape):
            raise GraphError(f"@{weight.name} is {weight.type}, it cannot fold @{part.name}: {part.type}")


def _check_balance(weight: Weight, balance: Balance) -> None:
    if weight.type.dtype is not DType.F32 or len(weight.type.shape) != 1:
        raise GraphError(f"@{weight.name} is {weight.type}, only vectors in f32 can be balanced")
    for part in balance.parts:
        if part.type != weight.type:
            raise GraphError(f"@{weight.name} is {weight.type}, it cannot balance @{part.name}: {part.type}")
    (size,) = weight.type.shape
    if not isinstance(size, int) or balance.dim not in range(0, size + 1, 2):
        raise GraphError(f"@{weight.name} is {weight.type}, {balance.dim} of its channels cannot be rotated")


def _check_types(graph: Graph) -> None:
    try:
        _ = graph.types
    except GraphError as error:
        first = bisect_left(range(len(graph.nodes)), True, key=lambda i: _is_refused(graph, i + 1))
        raise GraphError(f"{error} ({_describe(graph, graph.nodes[first])})") from None


def _is_refused(graph: Graph, count: int) -> bool:
    """Whether the shape rules refuse one of the first ``count`` nodes."""
    try:
        _ = graph.with_nodes(graph.nodes[:count]).types
    except GraphError:
        return True
    return False


def _describe(graph: Graph, node: Node) -> str:
    feeders = [
        f"%{name} from {graph.producer[name].op.name}" for name in node.inputs if name in graph.producer
    ]
    origin = f", with {', '.join(feeders)}" if feeders else ""
    return f"node %{', %'.join(node.outputs)} = {node.op.name}{origin}"
