"""Gives matrices a side path for LoRA adapters, which come when the model runs; the base stays packed as it is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from rlxc.dtypes import DType
from rlxc.ir import Concat, Graph, Node, TensorType, Value
from rlxc.ir.ops import DequantMatMul, Embed, LoraDown, LoraEmbed, LoraMatMul, MatMul
from rlxc.passes.base import Pass, PassResult

SCALES = "lora_scales"
OUTPUT = "output.weight"
"""What adapters call the matrix that makes the logits, even where it is tied to the embedding."""


@dataclass(frozen=True)
class _Product:
    """A matrix product and the tensors whose rows its weight is made of, with their numbers of rows."""

    node: Node
    tensors: tuple[tuple[str, int], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(rows for _, rows in self.tensors)


class SplitLora(Pass):
    """``y = W x`` becomes ``y = W x + B (scales * A x)``: A, B and scales are new inputs of the graph.

    Products that read one value share one `LoraDown`, whose A's lie in one input. The fact ``lora`` lists the groups.
    It runs after the fusions that stack weights.

    Args:
        tensors: the matrices that adapters may change; a stacked product gets its side path if any of its parts does.
    """

    def __init__(self, tensors: Collection[str]) -> None:
        self.tensors = frozenset(tensors)

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        groups: dict[str, list[_Product]] = {}  # by the value that is multiplied
        embeds: list[Node] = []
        for node in graph.nodes:
            if isinstance(node.op, MatMul | DequantMatMul):
                product = _Product(node, _tensors(graph, node))
                if self.tensors.intersection(name for name, _ in product.tensors):
                    groups.setdefault(node.inputs[0], []).append(product)
            elif isinstance(node.op, Embed) and node.inputs[1] in self.tensors:
                embeds.append(node)
        if not groups and not embeds:
            return PassResult(graph, False)
        inputs = [*graph.inputs, Value(SCALES, TensorType(DType.F32, ("batch", "rank")))]
        placed: dict[str, tuple[Node, ...]] = {}  # by the first result of what they replace
        facts: list[dict[str, Any]] = []
        for node in embeds:
            placed[node.outputs[0]] = _adapted_embed(graph, node, inputs, facts)
        for x, products in groups.items():
            for product, new in zip(products, _adapted_products(graph, x, products, inputs, facts)):
                placed[product.node.outputs[0]] = new
        nodes = [new for node in graph.nodes for new in placed.get(node.outputs[0], (node,))]
        result = replace(graph, inputs=tuple(inputs), nodes=tuple(nodes))
        return PassResult(result, True, facts={"lora": facts})


def _adapted_embed(
    graph: Graph, node: Node, inputs: list[Value], facts: list[dict[str, Any]]
) -> tuple[Node, ...]:
    ids, table = node.inputs
    (out,) = node.outputs
    vocab, width = map(int, graph.weight[table].type.shape)
    down, up = _input_names(table)
    inputs += [_input(down, vocab, "rank"), _input(up, width, "rank")]
    part = {"tensor": table, "rows": width, "columns": vocab, "up": up, "first_row": 0, "up_rows": width}
    facts.append({"kind": "embedding", "down": down, "parts": [part]})
    base = f"{out}.base"
    return (
        Node(Embed(), node.inputs, (base,)),
        Node(LoraEmbed(), (base, ids, down, SCALES, up), (out,)),
    )


def _adapted_products(
    graph: Graph, x: str, products: list[_Product], inputs: list[Value], facts: list[dict[str, Any]]
) -> list[tuple[Node, ...]]:
    """What takes the place of each product; the first comes with the `LoraDown` that all of them read."""
    columns = int(graph.types[x].shape[-1])
    down, _ = _input_names(products[0].tensors[0][0])
    u = f"{down}.u"
    inputs.append(_input(down, sum(len(product.sizes) for product in products), "rank", columns))
    parts: list[dict[str, Any]] = []
    replaced: list[tuple[Node, ...]] = []
    for product in products:
        _, up = _input_names(product.tensors[0][0])
        rows = sum(product.sizes)
        inputs.append(_input(up, rows, "rank"))
        op = LoraMatMul(product.sizes, len(parts))
        replaced.append((Node(op, (*product.node.inputs, u, up), product.node.outputs),))
        first = 0
        for tensor, size in product.tensors:
            part = {
                "tensor": tensor,
                "rows": size,
                "columns": columns,
                "up": up,
                "first_row": first,
                "up_rows": rows,
            }
            parts.append(part)
            first += size
    facts.append({"kind": "linear", "down": down, "parts": parts})
    replaced[0] = (Node(LoraDown(), (x, down, SCALES), (u,)), *replaced[0])
    return replaced


def _tensors(graph: Graph, node: Node) -> tuple[tuple[str, int], ...]:
    weight = graph.weight[node.inputs[1]]
    if any(isinstance(user.op, Embed) for user in graph.users[weight.name]):
        return ((OUTPUT, int(weight.type.shape[0])),)
    parts = weight.recipe.parts if isinstance(weight.recipe, Concat) else (weight,)
    return tuple((part.name, int(part.type.shape[0])) for part in parts)


def _input_names(tensor: str) -> tuple[str, str]:
    stem = f"lora.{tensor.removesuffix('.weight')}"
    return f"{stem}.down", f"{stem}.up"


def _input(name: str, *shape: int | str) -> Value:
    return Value(name, TensorType(DType.F32, ("batch", *shape)))
