"""The IR as text, printed and parsed; ``parse(show(graph)) == graph``.

    graph tiny
    input %ids: i64[batch, seq]
    weight @table: q8_0[256, 64]
    weight @output: q8_0[256, 64] = alias(@table)
    weight @gate: q4_k[256, 64] layout(4, 32, 16)
    %h = Embed(%ids, @table) : f32[batch, seq, 64]
    %n = RmsNorm(%h, @norm; eps=1e-06) : f32[batch, seq, 64]
    %logits = DequantMatMul(%n, @output) : f32[batch, seq, 256]
    output %logits

Attributes at their default are left out. Types after ``:`` may be left out; where they stand, they are checked.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from abc import ABCMeta
from collections.abc import Iterator

from rlxc.dtypes import DType
from rlxc.errors import ParseError
from rlxc.ir import ops
from rlxc.ir.graph import (
    Alias,
    Balance,
    Concat,
    Dim,
    Encode,
    Fold,
    Graph,
    Node,
    Recipe,
    Source,
    TensorType,
    Value,
    Weight,
    WeightLayout,
)
from rlxc.ir.rope import RopeSpec, Yarn

_OPS: dict[str, type[ops.Op]] = {
    name: cls
    for name, cls in vars(ops).items()
    if isinstance(cls, ABCMeta) and issubclass(cls, ops.Op) and not cls.__subclasses__()
}
_RECORDS = {"RopeSpec": RopeSpec, "Yarn": Yarn}


def show(graph: Graph) -> str:
    """The graph as text, one input, weight, node or output a line."""
    lines = [f"graph {graph.name}"]
    lines += [f"input %{value.name}: {value.type}" for value in graph.inputs]
    lines += [f"weight {_show_weight(weight)}" for weight in graph.weights]
    lines += [_show_node(graph, node) for node in graph.nodes]
    lines += [f"output %{name}" for name in graph.outputs]
    return "\n".join(lines) + "\n"


def show_recipe(weight: Weight) -> str:
    """How a weight is obtained; nothing where it is the file's tensor of the same name."""
    match weight.recipe:
        case Source(tensor):
            return "" if tensor == weight.name else f'source("{tensor}")'
        case Alias(target):
            return f"alias(@{target})"
        case Concat(parts):
            return f"concat({', '.join(map(_show_weight, parts))})"
        case Encode(part):
            return f"encode({_show_weight(part)})"
        case Fold() as fold:
            parts_of = ", ".join(map(_show_weight, fold.parts))
            return f"{'fold_transposed' if fold.transposed else 'fold'}({parts_of}, {fold.scale!r})"
        case Balance(balanced, other, dim, interleaved):
            kind = "balance_interleaved" if interleaved else "balance"
            return f"{kind}({_show_weight(balanced)}, {_show_weight(other)}, {dim})"


def _show_weight(weight: Weight) -> str:
    recipe, layout = show_recipe(weight), weight.layout
    shown = f" layout({layout.bits}, {layout.block}, {layout.tile})" if layout else ""
    return f"@{weight.name}: {weight.type}{shown}" + (f" = {recipe}" if recipe else "")


def _show_node(graph: Graph, node: Node) -> str:
    inputs = ", ".join(("@" if name in graph.weight else "%") + name for name in node.inputs)
    attributes = _show_fields(node.op)
    results = ", ".join(f"%{name}" for name in node.outputs)
    types = ", ".join(str(graph.types[name]) for name in node.outputs)
    return f"{results} = {node.op.name}({'; '.join(filter(None, (inputs, attributes)))}) : {types}"


def _show_fields(record: ops.Op | RopeSpec | Yarn) -> str:
    shown = [
        f"{field.name}={_show_attribute(getattr(record, field.name))}"
        for field in dataclasses.fields(record)
        if getattr(record, field.name) != field.default
    ]
    return ", ".join(shown)


def _show_attribute(value: object) -> str:
    if isinstance(value, (RopeSpec, Yarn)):
        return f"{type(value).__name__}({_show_fields(value)})"
    return repr(value)


def parse(text: str) -> Graph:
    """The graph that this text describes.

    Raises:
        ParseError: with the line that cannot be read, or whose types disagree with the ops' rules.
        GraphError: types are stated, and the ops' rules refuse the graph.
    """
    name = ""
    inputs: list[Value] = []
    weights: list[Weight] = []
    nodes: list[Node] = []
    outputs: list[str] = []
    stated: list[tuple[int, str, TensorType]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        reader = _Reader(line, number)
        if reader.take("graph"):
            name = reader.rest()
        elif reader.take("input"):
            inputs.append(Value(reader.name("%"), reader.type()))
        elif reader.take("weight"):
            weights.append(reader.weight())
        elif reader.take("output"):
            outputs.append(reader.name("%", typed=False))
        else:
            node, types = reader.node()
            nodes.append(node)
            stated += [(number, result, type_) for result, type_ in zip(node.outputs, types)]
        reader.end()
    graph = Graph(name, tuple(inputs), tuple(outputs), tuple(nodes), tuple(weights))
    for number, result, type_ in stated:
        if graph.types[result] != type_:
            raise ParseError(
                f"%{result} is {graph.types[result]}, the text says {type_}", source=f"line {number}"
            )
    return graph


_TOKEN = re.compile(r'\s*(%[\w.+/\-]+|@[\w.+/\-]+|[A-Za-z_]\w*|"[^"]*"|[=:;,()\[\]])')
_INTEGER = re.compile(r"\s*(\d+)")
_NUMBER = re.compile(r"\s*(-?[\d.]+(?:e[+-]?\d+)?)")
_DIM = re.compile(r"\w+(?:\+\w+)*")


class _Reader:
    """Reads one line from left to right."""

    def __init__(self, line: str, number: int) -> None:
        self.line, self.number, self.at = line, number, 0

    def fail(self, expected: str) -> ParseError:
        return ParseError(f"expected {expected} at {self.line[self.at :]!r}", source=f"line {self.number}")

    def peek(self) -> str:
        found = _TOKEN.match(self.line, self.at)
        return found.group(1) if found else ""

    def next(self, expected: str) -> str:
        found = _TOKEN.match(self.line, self.at)
        if not found:
            raise self.fail(expected)
        self.at = found.end()
        return found.group(1)

    def take(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.next(token)
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.fail(repr(token))

    def rest(self) -> str:
        found = self.line[self.at :].strip()
        self.at = len(self.line)
        return found

    def end(self) -> None:
        if self.line[self.at :].strip():
            raise self.fail("the end of the line")

    def name(self, mark: str, typed: bool = True) -> str:
        token = self.next(f"a name after {mark}")
        if not token.startswith(mark):
            raise self.fail(f"a name after {mark}")
        if typed:
            self.expect(":")
        return token[1:]

    def type(self) -> TensorType:
        spelling = self.next("a type")
        if spelling not in [dtype.value for dtype in DType]:
            raise self.fail(f"an element type instead of {spelling!r}")
        closing = self.line.find("]", self.at)
        if self.peek() != "[" or closing < 0:
            raise self.fail("a shape in brackets")
        inside = self.line[self.line.index("[", self.at) + 1 : closing]
        self.at = closing + 1
        dims = [part.strip() for part in inside.split(",")] if inside.strip() else []
        if not all(_DIM.fullmatch(dim) for dim in dims):
            raise self.fail(f"dimensions instead of {inside!r}")
        shape: tuple[Dim, ...] = tuple(int(dim) if dim.isdecimal() else dim for dim in dims)
        return TensorType(DType(spelling), shape)

    def weight(self) -> Weight:
        name = self.name("@")
        type_ = self.type()
        layout = self._layout() if self.take("layout") else None
        recipe: Recipe = Source(name)
        if self.take("="):
            recipe = self._recipe()
        return Weight(name, type_, recipe, layout)

    def _layout(self) -> WeightLayout:
        """Bits, block and tile."""
        numbers = []
        for mark in "(,,":
            self.expect(mark)
            numbers.append(self._integer())
        self.expect(")")
        return WeightLayout(*numbers)

    def _recipe(self) -> Recipe:
        kind = self.next("a recipe")
        self.expect("(")
        recipe: Recipe
        if kind == "source":
            recipe = Source(self.next("a tensor name").strip('"'))
        elif kind == "alias":
            recipe = Alias(self.name("@", typed=False))
        elif kind == "concat":
            recipe = Concat(tuple(self._parts()))
        elif kind == "encode":
            recipe = Encode(self.weight())
        elif kind in ("fold", "fold_transposed"):
            parts = list(self._parts())
            if len(parts) not in (3, 4):
                raise self.fail(f"3 or 4 weights instead of {len(parts)}")
            magnitude = parts[3] if parts[3:] else None
            base, a, b = parts[:3]
            recipe = Fold(base, a, b, self._number(), magnitude, kind == "fold_transposed")
        elif kind in ("balance", "balance_interleaved"):
            parts = list(self._parts())
            if len(parts) != 2:
                raise self.fail(f"2 weights instead of {len(parts)}")
            recipe = Balance(parts[0], parts[1], self._integer(), kind == "balance_interleaved")
        else:
            raise self.fail(f"source, alias, concat, encode, fold or balance instead of {kind!r}")
        self.expect(")")
        return recipe

    def _parts(self) -> Iterator[Weight]:
        """Weights with commas between; a comma after the last is taken too."""
        yield self.weight()
        while self.take(","):
            if self.peek()[:1] != "@":
                return
            yield self.weight()

    def _integer(self) -> int:
        found = _INTEGER.match(self.line, self.at)
        if not found:
            raise self.fail("an integer")
        self.at = found.end()
        return int(found.group(1))

    def _number(self) -> float:
        found = _NUMBER.match(self.line, self.at)
        if not found:
            raise self.fail("a number")
        self.at = found.end()
        return float(found.group(1))

    def node(self) -> tuple[Node, list[TensorType]]:
        outputs = [self.name("%", typed=False)]
        while self.take(","):
            outputs.append(self.name("%", typed=False))
        self.expect("=")
        op_name = self.next("an op")
        if op_name not in _OPS:
            raise self.fail(f"an op instead of {op_name!r}")
        self.expect("(")
        inputs = []
        while self.peek()[:1] in ("%", "@"):
            inputs.append(self.next("an input")[1:])
            self.take(",")
        attributes = self._attributes() if self.take(";") or self.peek() != ")" else ""
        self.expect(")")
        types = []
        if self.take(":"):
            types.append(self.type())
            while self.take(","):
                types.append(self.type())
            if len(types) != len(outputs):
                raise self.fail(f"{len(outputs)} types instead of {len(types)}")
        return Node(self._op(op_name, attributes), tuple(inputs), tuple(outputs)), types

    def _attributes(self) -> str:
        start, depth = self.at, 0
        for position in range(start, len(self.line)):
            depth += {"(": 1, ")": -1}.get(self.line[position], 0)
            if depth < 0:
                self.at = position
                return self.line[start:position].strip()
        raise self.fail("a closing parenthesis")

    def _op(self, name: str, attributes: str) -> ops.Op:
        try:
            call = ast.parse(f"{name}({attributes})", mode="eval").body
            op = _build(call, {**_OPS, **_RECORDS})
        except (SyntaxError, ValueError, TypeError) as error:
            raise ParseError(f"attributes of {name}: {error}", source=f"line {self.number}") from None
        assert isinstance(op, ops.Op)
        return op


def _build(tree: ast.expr, classes: dict[str, type]) -> object:
    """The value of an expression of literals and calls of `classes` with keyword arguments."""
    if not isinstance(tree, ast.Call):
        return ast.literal_eval(tree)
    if not isinstance(tree.func, ast.Name) or tree.func.id not in classes or tree.args:
        raise ValueError(f"cannot read {ast.unparse(tree)!r}")
    keywords = {keyword.arg: _build(keyword.value, classes) for keyword in tree.keywords if keyword.arg}
    return classes[tree.func.id](**keywords)
