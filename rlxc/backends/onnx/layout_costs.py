"""What each layout of a packed weight costs in ONNX Runtime, for the pass that chooses one.

A narrower number is less to read, but not every width is multiplied fast: see :data:`_MEASURED`. A scale that many
weights share can be stored for smaller blocks too. Activations in int8 are rounded block by block: the larger the
block, the larger the error.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlxc.backends.onnx.runtime import Runtime
from rlxc.backends.onnx.storage import Storage, has_integers, scale_block
from rlxc.dtypes import DType
from rlxc.ir import WeightLayout
from rlxc.ir.target import LayoutCost, Machine
from rlxc.weights.formats import FORMATS

_BLOCKS = (16, 32, 64, 128, 256)

# ``examples/onnx_layout_speed.py`` measures these, here on 2 threads of the development machine. By bits, for
# each of the blocks: 1e9 weights per second of a matrix in memory times one token; GOP/s with 256 tokens.
_MEASURED: dict[bool, dict[int, tuple[tuple[float, float], ...]]] = {
    True: {
        2: ((0.3, 199), (18.3, 100), (69.8, 228), (111.3, 329), (0.5, 215)),
        4: ((21.6, 243), (33.1, 255), (40.0, 280), (45.2, 350), (48.4, 390)),
        8: ((19.2, 255), (21.6, 278), (24.7, 305), (24.7, 410), (27.1, 455)),
    },
    False: {
        2: ((0.3, 200), (0.5, 201), (0.5, 215), (0.5, 208), (0.5, 234)),
        4: ((13.1, 330), (18.6, 345), (18.9, 325), (19.5, 340), (19.3, 330)),
        8: ((0.3, 203), (0.4, 206), (0.5, 224), (0.5, 233), (0.5, 236)),
    },
}
"""By whether activations are int8."""

_ROUNDING = {16: 0.0048, 32: 0.0054, 64: 0.0059, 128: 0.0066, 256: 0.0071}
"""The relative error of products with activations that are rounded in such blocks; theirs are normally distributed."""

_THREADS, _BANDWIDTH = 2, 40.0
"""Of the machine that was measured; its times have reading in them, so nothing else is limited by bandwidth."""


def machine(runtime: Runtime, *, int8: bool) -> Machine:
    """The machine that ONNX Runtime was measured on, with all layouts of all formats of integers."""
    layouts = {
        dtype: tuple(_cost(layout, int8) for layout in layouts_of(runtime, dtype))
        for dtype in DType
        if dtype.is_packed and has_integers(dtype)
    }
    return Machine("onnxruntime", _THREADS, _BANDWIDTH, layouts)


def layouts_of(runtime: Runtime, dtype: DType) -> Iterator[WeightLayout]:
    """What holds the integers of a format, the default first."""
    default, shared = Storage.of(dtype), scale_block(FORMATS[dtype])
    yield WeightLayout(default.bits, default.block, 1)
    for bits in runtime.widths:
        for block in _BLOCKS:
            layout = WeightLayout(bits, block, 1)
            is_default = (bits, block) == (default.bits, default.block)
            if shared % block == 0 and not is_default and _holds(dtype, bits):
                yield layout


def _holds(dtype: DType, bits: int) -> bool:
    fmt, default = FORMATS[dtype], Storage.of(dtype)
    integers = fmt.integers or (fmt.code_min, fmt.code_max)
    return (max(integers) - min(integers)) // default.step < 1 << bits


def _cost(layout: WeightLayout, int8: bool) -> LayoutCost:
    weights, operations = _MEASURED[int8][layout.bits][_BLOCKS.index(layout.block)]
    return LayoutCost(
        layout,
        bits=layout.bits + 32 / layout.block,
        decode=1000 * _THREADS / weights,
        prompt=2000 * _THREADS / operations,
        rounding=_ROUNDING[layout.block] if int8 else 0.0,
    )
