"""Rows of a table by token id, decoded from the tiles that matrix products read."""

from __future__ import annotations

from typing import Any

from tvm.tirx import Cast, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.codebook import table_of
from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    bind,
    for_rows,
    serial,
    view,
)
from rlxc.backends.tvm.kernels.scales import StoredScales
from rlxc.backends.tvm.layout import BLOCK, GROUPS, TILE, FloatLayout, Layout, PackedLayout
from rlxc.dtypes import DType
from rlxc.weights.fields import Scale

_DTYPES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}


def embed_kernel(layout: Layout) -> Kernel:
    """The kernel for one table's layout.

    Its parameters: the table's bytes; ids int64 ``[tokens]``; the output, f32 ``[tokens, columns]``; the number of
    tokens.
    """

    def body(table: Buffer, ids: Buffer, out: Buffer, count: Expr) -> None:
        def row(token: Expr, task: Expr) -> None:
            id = bind(ids[token])
            start = bind(token * layout.columns)
            if isinstance(layout, FloatLayout):
                _float_row(layout, table, id, out, start)
            else:
                _packed_row(layout, table, id, out, start)

        for_rows(count, row)

    name = f"embed_{layout.name}"
    params = (Pointer("table", "int8"), Pointer("ids", "int64"), Pointer("out", "float32"), Number("tokens"))
    return Kernel(name, params, body)


def _float_row(layout: FloatLayout, table: Buffer, id: Expr, out: Buffer, start: Expr) -> None:
    values = view(table, _DTYPES[layout.dtype])
    first = bind((id >> 4) * (TILE * layout.columns) + (id & 15))
    with serial(layout.columns) as column:
        T.buffer_store(out, Cast("float32", values[first + column * TILE]), [start + column])


def _packed_row(layout: PackedLayout, table: Buffer, id: Expr, out: Buffer, start: Expr) -> None:
    format, words = layout.format, view(table, "int32")
    tile, lane = bind(id >> layout.tile.bit_length() - 1), bind(id & layout.tile - 1)
    codebook = table_of(format.codebook) if format.codebook and not layout.holds_numbers else None

    def place(section: str) -> Expr:
        found = layout.sections[section]
        return found.offset + tile * found.tile_bytes

    def read(name: str, scale: Scale, sub_block: Expr) -> Expr:
        index = sub_block // (layout.scale_columns // format.sub_block)
        value = StoredScales(table, scale.kind, scale.unit).read(
            place(name), index * layout.tile + lane, lanes=1
        )
        if layout.has_factors:
            factor = table[place(f"{name}_factors") + sub_block * layout.tile + lane]
            value = value * Cast("float32", factor)
        return bind(value)

    codes = bind(place("codes") // 4 + lane)
    per_sub = format.sub_block // 4
    with serial(layout.blocks) as block:
        found: dict[str, Any] = {}
        for group in range(GROUPS):
            if group * 4 % format.sub_block == 0:
                sub_block = (block * GROUPS + group) // per_sub
                assert format.scale is not None
                found["scale"] = read("scale", format.scale, sub_block)
                if format.minimum is not None:
                    found["minimum"] = read("minimum", format.minimum, sub_block)
            word = _word(layout, words, codes + block * (layout.bits * layout.tile), group)
            for i in range(4):
                code = (word >> (8 * i)) & 0xFF
                code = Cast("float32", code + layout.low) if codebook is None else codebook[code]
                value = code * found["scale"]
                if format.has_mins:
                    value = value - found["minimum"]
                T.buffer_store(out, value, [start + block * BLOCK + group * 4 + i])


def _word(layout: PackedLayout, words: Buffer, first: Expr, group: int) -> Expr:
    """Four unsigned codes of a row in an int32; ``first`` is the row's word in the block's first plane."""
    word: Expr = const(0, "int32")
    plane = low = 0
    for width in layout.planes:
        part = words[first + (plane + group % width) * layout.tile]
        mask = ((1 << width) - 1) * 0x01010101
        part = (part >> (group // width * width)) & (mask - (mask >> 31 << 32))
        word = word | (part << low)
        plane += width
        low += width
    return bind(word)
