"""What reads each weight of a graph, in words, and the bytes that it has in the weights file."""

from __future__ import annotations

from collections.abc import Iterable

from rlxc.backends import StoredAs
from rlxc.backends.tvm.layout import Layout, PackedLayout
from rlxc.backends.tvm.weights import WeightsFile
from rlxc.dtypes import DType
from rlxc.ir.ops import Embed, Op


def storage(weights: WeightsFile, *, int8: bool) -> dict[str, StoredAs]:
    """How each weight of the file's graph is stored, where products have their activations in int8 or not."""
    graph = weights.graph
    found = {}
    for weight in graph.weights:
        stored = weights.stored[weight.name]
        users = [node.op for node in graph.users.get(weight.name, ())]
        route = str(weight.type.dtype) if stored.layout is None else _route(stored.layout, users, int8)
        found[weight.name] = StoredAs(stored.nbytes, route)
    return found


def _route(layout: Layout, users: Iterable[Op], int8: bool) -> str:
    """A matrix's route: what its products compute in, how its codes lie, and whether rows are looked up."""
    gathered = [isinstance(op, Embed) for op in users]
    if isinstance(layout, PackedLayout):
        bits = "+".join(map(str, layout.planes)) + f" bit{'' if layout.planes == (1,) else 's'}"
        bits += f", tiles of {layout.tile}"
        multiplied = "int8" if int8 and layout.has_integers else "f32"
        is_looked_up = layout.format.codebook is not None and (layout.table or not layout.has_integers)
        how = f" through a codebook, {bits}" if is_looked_up else f", {bits}"
    else:
        multiplied, how = "f32", "" if layout.dtype is DType.F32 else f" from {layout.dtype}"
    if gathered and all(gathered):
        return f"gather{how}"
    return f"{multiplied}{how}" + (", gather" if any(gathered) else "")
