"""Scales as they are stored, floats or bytes that stand for floats, made f32, exactly."""

from __future__ import annotations

from typing import Any

from tvm.tirx import Cast, Select, call_intrin, const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, bind, size_of, view
from rlxc.weights.fields import ScaleKind

_BYTES: dict[ScaleKind, float] = {"e8m0": 2.0, "ue4m3": 2.0**8}
"""What the f32 that a byte is made of lacks: a power of two."""


class StoredScales:
    """An array of scales of one kind, in a weight's bytes.

    Args:
        weight: the weight's bytes, an int8 buffer.
        kind: how they are stored.
        unit: what all of them are multiplied by, a power of two.
        flush: take e8m0 scales of less than 2^-126 for 0, since CPUs take 100 times as long to multiply them.
    """

    def __init__(self, weight: Buffer, kind: ScaleKind, unit: float, *, flush: bool = False) -> None:
        self._kind, self._flush = kind, flush
        self._factor = unit * _BYTES.get(kind, 1.0)
        self._buffer = view(weight, "uint8" if kind in _BYTES else kind)
        self._size = 1 if kind in _BYTES else size_of(kind)

    def read(self, section: Expr, index: Any, lanes: int) -> Expr:
        """``lanes`` scales, f32, from the ``index``-th of those that begin at byte ``section``."""
        at = section // self._size + index
        stored = self._buffer[at] if lanes == 1 else self._buffer[T.Ramp(at, 1, lanes)]
        if self._kind == "e8m0":
            value = _e8m0(_Numbers(lanes), stored, self._flush)
        elif self._kind == "ue4m3":
            value = _ue4m3(_Numbers(lanes), stored)
        else:
            value = Cast(_Numbers(lanes).type("float32"), stored)
        return value if self._factor == 1 else value * _Numbers(lanes).splat(self._factor, "float32")


class _Numbers:
    """Types and constants of one number, or of vectors."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes

    def type(self, element: str) -> str:
        return element if self._lanes == 1 else f"{element}x{self._lanes}"

    def splat(self, value: float, element: str) -> Expr:
        number = const(value, element)
        return number if self._lanes == 1 else T.Broadcast(number, self._lanes)


def _e8m0(of: _Numbers, byte: Expr, flush: bool) -> Expr:
    """2^(byte - 128), which for 0 and 1 has no exponent but one bit of fraction."""
    byte = bind(Cast(of.type("int32"), byte))
    bits = (byte << of.splat(23, "int32")) - of.splat(1 << 23, "int32")
    least = of.splat(0, "int32")
    if not flush:
        # For 0 and 1 the bits of the number, otherwise less than those.
        least = (byte << of.splat(21, "int32")) + of.splat(1 << 21, "int32")
    return call_intrin(of.type("float32"), "tirx.reinterpret", T.max(bits, least))


def _ue4m3(of: _Numbers, byte: Expr) -> Expr:
    """The number times 2^-8: with three more bits of fraction, and one of exponent, it is an f16."""
    byte = bind(Cast(of.type("uint16"), byte))
    bits = (byte & of.splat(127, "uint16")) << of.splat(7, "uint16")
    bits = Select(byte == of.splat(127, "uint16"), of.splat(0, "uint16"), bits)
    return Cast(of.type("float32"), call_intrin(of.type("float16"), "tirx.reinterpret", bits))
