"""Matrix products with a mixture's experts: each of a token's slots is multiplied with the matrix of its own expert.

A task takes an expert that some slot wants and a part of its tiles, and multiplies them with all of its slots: an
expert that nobody wants is not read, and one that many want is read once. Tokens are read, and results written, where
they lie; only the order in which they are visited is the experts'. What a token gives does not depend on others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx import Cast, Select
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.kernel import (
    TASKS,
    Buffer,
    Expr,
    Kernel,
    Knobs,
    Number,
    Pointer,
    bind,
    for_tokens,
    parallel,
    pieces_of,
    serial,
    view,
)
from rlxc.backends.tvm.kernels.matmul import FEW, Places, Product
from rlxc.backends.tvm.kernels.matmul_exact import ExactProduct
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.route import Groups
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import Layout, PackedLayout, layout_of, tiled
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout


@dataclass(frozen=True)
class Experts:
    """A weight ``[experts, rows, columns]``, and how many experts a token has.

    It is stored as one matrix, in which each expert's rows are whole tiles of 16, padded with zeros; so is a bias. The
    ``chosen`` layout may have smaller tiles.
    """

    dtype: DType
    experts: int
    rows: int
    columns: int
    used: int
    chosen: WeightLayout | None = None

    @property
    def tiles(self) -> int:
        """Tiles of each expert that have rows."""
        return -(-self.rows // self.layout.tile)

    @property
    def distance(self) -> int:
        """Tiles from one expert to the next."""
        return tiled(self.rows) // self.layout.tile

    @property
    def layout(self) -> Layout:
        """How it is stored."""
        return layout_of(self.dtype, self.experts * tiled(self.rows), self.columns, self.chosen)

    @property
    def name(self) -> str:
        """Different for different ones."""
        return f"{self.layout.kind}_{self.used}_of_{self.experts}x{self.rows}x{self.columns}"


def expert_matmul_kernel(
    vectors: Vectors, knobs: Knobs, weight: Experts, output: OutputRows, *, shared: bool, bias: bool
) -> Kernel:
    """The kernel for packed weights of integers, and activations in int8.

    Its knobs are those of :func:`~rlxc.backends.tvm.kernels.matmul.matmul_kernel`.

    Its parameters: the weight's bytes; activations as :class:`QuantisedRow` rows, one for each token if ``shared`` by
    its slots, or else for each slot; :class:`~rlxc.backends.tvm.kernels.route.Groups`; the bias f32, stored as the
    weight is, if there is one; the output, f32 ``[slots, rows]``; the number of tokens.
    """
    layout = weight.layout
    assert isinstance(layout, PackedLayout)
    row = QuantisedRow.of(layout, vectors)

    def body(stored: Buffer, activations: Buffer, groups: Buffer, *rest: Buffer) -> None:
        biases = rest[0] if bias else None
        out, count = rest[bias:]
        ints, floats = view(activations, "int32"), view(activations, "float32")

        def multiply(places: Places, tile: Expr, slots: Expr) -> None:
            product = Product(vectors, layout, row, ints, floats, biases, out, output, places)
            product.multiply(knobs, stored, tile, slots)

        _each_tile(weight, groups, count, shared, multiply)

    name = f"expert_matmul_{weight.name}_{output.name}"
    return _kernel(name, Pointer("activations", "int8"), body, shared=shared, bias=bias)


def exact_expert_matmul_kernel(
    vectors: Vectors,
    knobs: Knobs,
    weight: Experts,
    output: OutputRows,
    *,
    stride: int,
    shared: bool,
    bias: bool,
) -> Kernel:
    """The kernel for any weights, and activations in f32, ``stride`` numbers from row to row.

    Its knobs and parameters are otherwise those of :func:`expert_matmul_kernel`.
    """
    layout = weight.layout

    def body(stored: Buffer, x: Buffer, groups: Buffer, *rest: Buffer) -> None:
        biases = rest[0] if bias else None
        out, count = rest[bias:]

        def multiply(places: Places, tile: Expr, slots: Expr) -> None:
            product = ExactProduct(
                vectors, knobs["prefetch"], layout, stored, x, stride, biases, out, output, places
            )
            sizes = pieces_of(knobs["tokens"])
            for_tokens(slots, sizes, lambda tokens, start: product.emit(tile, tokens, start))

        _each_tile(weight, groups, count, shared, multiply)

    name = f"expert_matmul_exact_{weight.name}_{stride}_{output.name}"
    return _kernel(name, Pointer("x", "float32"), body, shared=shared, bias=bias)


def _kernel(name: str, x: Pointer, body: Callable[..., None], *, shared: bool, bias: bool) -> Kernel:
    params: tuple[Pointer | Number, ...] = (
        Pointer("weight", "int8"),
        x,
        Pointer("groups", "int32"),
        *([Pointer("bias", "float32")] if bias else []),
        Pointer("out", "float32"),
        Number("tokens"),
    )
    return Kernel(f"{name}{'_shared' if shared else ''}{'_bias' if bias else ''}", params, body)


def _each_tile(
    weight: Experts,
    grouped: Buffer,
    tokens: Expr,
    shared: bool,
    multiply: Callable[[Places, Expr, Expr], None],
) -> None:
    """Run ``multiply(places, tile, slots)`` for each tile of each expert that any of the tokens want."""
    groups, parts = Groups(weight.experts), min(TASKS, weight.tiles)
    active = bind(grouped[0])
    # Threads get neighbouring tasks. Of a few tokens, any expert takes as long as any other, and is best read in one
    # go; of many, one may have most, and threads share every expert.
    few = tokens <= FEW
    with parallel(active * parts) as task:
        which = bind(Select(few, T.truncdiv(task, parts), T.truncmod(task, active)))
        part = bind(Select(few, T.truncmod(task, parts), T.truncdiv(task, active)))
        expert = bind(grouped[groups.active + which])
        start = bind(grouped[groups.starts + expert])
        slots = bind(grouped[groups.starts + expert + 1] - start)

        def slot(index: Expr) -> Expr:
            return bind(grouped[groups.order + start + index])

        def read(index: Expr) -> Expr:
            return T.truncdiv(slot(index), weight.used) if shared else slot(index)

        places = Places(read, slot, bind(Cast("int64", expert) * weight.distance))
        first = bind(T.truncdiv(part * weight.tiles, parts))
        with serial(T.truncdiv((part + 1) * weight.tiles, parts) - first) as index:
            multiply(places, bind(Cast("int64", first + index)), slots)
