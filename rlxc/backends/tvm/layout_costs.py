"""What each layout of a packed weight costs on each target, for the pass that chooses one.

Time to compute is counted in instructions on vectors, as the kernels emit them, times what one takes on the target.
``examples/format_speed.py --layouts`` measures the same products; docs/performance.md has both side by side. The rest
is what machines of a kind typically have: where memory brings less to a thread, narrower codes win, and the other way
round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import BLOCK, GROUPS, TILE, PackedLayout
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout
from rlxc.ir.target import LayoutCost, Machine

_COLUMNS = 4096
"""Of a row whose scales take what they typically do."""

_STEP = 256
"""Tokens of a prompt that share what is unpacked for products in int8."""

_HALF_LINES = 0.77
"""The part of the bandwidth that tiles of two registers reach: each register takes half of a cache line."""


@dataclass(frozen=True)
class _Kind:
    """Picoseconds that an instruction takes in a thread; threads, and GB/s that they read together."""

    instruction: float
    threads: int
    bandwidth: float


# By lanes. Instructions were measured on the development machine; memory is that of servers with AVX-512, of desktops,
# and of small machines.
_KINDS = {16: _Kind(254, 8, 80.0), 8: _Kind(152, 8, 48.0), 4: _Kind(151, 4, 20.0)}

_DOT = {"vpdpbusd": 1.0, "sdot": 1.0, "vpmaddubsw": 3.0, "multiply": 29.0}
"""Instructions of :meth:`Vectors.dot`, as LLVM makes them."""

_SIGN = {"vpmaddubsw": 3.0, "sdot": 1.0}
"""How many more they are where numbers of 8 bits become signed."""

_LOOK_UP_BYTE = 6.0
"""Instructions that looking up a byte takes where no instruction looks up a vector of them."""


def machine(target: CpuTarget, *, int8: bool) -> Machine:
    """The machine that a target stands for, with all layouts of all formats."""
    kind = _KINDS[target.lanes]
    layouts = {
        dtype: tuple(
            _cost(target, kind, PackedLayout(dtype, TILE, _COLUMNS, layout), int8) for layout in offered
        )
        for dtype in DType
        if dtype.is_packed
        for offered in [tuple(layouts_of(target, dtype))]
    }
    return Machine(target.name, kind.threads, kind.bandwidth, layouts)


def layouts_of(target: CpuTarget, dtype: DType) -> Iterator[WeightLayout]:
    """What a target's kernels can run of a format, the default first.

    Codes have their own width, or a plane of their own, in which a codebook's numbers take 8 bits. Tiles have 16 rows,
    or as many as registers of eight lanes have.
    """
    whole = PackedLayout(dtype, TILE, _COLUMNS)
    widths = [whole.code_bits]
    if whole.has_integers:
        widths += [bits for bits in (4, 8) if whole.code_bits < bits and (bits == 8 or len(whole.planes) > 1)]
    for tile in (TILE, 8) if target.lanes == 8 else (TILE,):
        yield from (
            WeightLayout(bits, BLOCK, tile) for bits in dict.fromkeys(widths) if bits >= whole.code_bits
        )


def _cost(target: CpuTarget, kind: _Kind, layout: PackedLayout, int8: bool) -> LayoutCost:
    vectors = Vectors.of(target)
    unpack, multiply = _unpacking(target, layout), _multiplying(vectors, layout, int8)
    picoseconds = kind.instruction / (4 * target.lanes)
    assert layout.chosen is not None
    return LayoutCost(
        layout.chosen,
        bits=layout.bits_per_weight,
        decode=(unpack + multiply) * picoseconds,
        prompt=(unpack / _sharing(target, layout, int8) + multiply) * picoseconds,
        bandwidth=_HALF_LINES if layout.tile > target.lanes == 8 else 1.0,
    )


def _sharing(target: CpuTarget, layout: PackedLayout, int8: bool) -> int:
    """Tokens of a prompt that share what was unpacked: a step's, or those whose sums are in registers."""
    if int8 and layout.has_integers:
        return _STEP
    return 10 if target.registers >= 32 else 4


def _unpacking(target: CpuTarget, layout: PackedLayout) -> float:
    """Instructions that a vector of codes takes: loads of planes, shifts and masks; then the codebook."""
    count = layout.bits / GROUPS  # a plane of w bits has w vectors for 8 groups
    if layout.planes != (8,):
        count += sum(1 - width / GROUPS for width in layout.planes)
        count += 1 if len(layout.planes) == 1 else 2 * len(layout.planes) - 1
        if target.lanes == 16 and len(layout.planes) > 1:
            count -= 1  # one instruction masks a plane and joins it to another
    if layout.table:
        count += 1 if target.lookup else _LOOK_UP_BYTE * 4 * target.lanes
    return count


def _multiplying(vectors: Vectors, layout: PackedLayout, int8: bool) -> float:
    """Instructions that multiplying a vector of numbers with a token takes, its share of the scales with them."""
    format = layout.format
    if int8 and layout.has_integers:
        dot = 1 + _DOT[vectors.dot_kind]  # with an activation in every lane
        if vectors.shift(layout.max_number):
            dot += _SIGN[vectors.dot_kind]
    else:
        dot = 4 * (4 + 2 * format.has_mins)  # shift, mask, convert, multiply and add each of four
    scales = 6 + 3 * layout.has_factors + 5 * format.has_mins
    return dot + scales / (format.sub_block / (BLOCK / GROUPS))
