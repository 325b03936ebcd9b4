"""What a target's kernels can do: plain data that a backend states and passes read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlxc.dtypes import DType
from rlxc.ir.graph import WeightLayout


@dataclass(frozen=True)
class LayoutCost:
    """A layout that kernels can run for a format, and what it costs.

    Attributes:
        layout: the layout.
        bits: that are read of a weight, its share of the scales with it.
        decode: a thread's time to unpack a weight and to multiply it with one token, in picoseconds.
        prompt: its time for a token among many, likewise.
        bandwidth: the part of the memory's bandwidth that reading it reaches.
        rounding: the relative error that rounding the activations causes in a product; 0 where it does not depend on
            the layout.
    """

    layout: WeightLayout
    bits: float
    decode: float
    prompt: float
    bandwidth: float = 1.0
    rounding: float = 0.0


@dataclass(frozen=True)
class Machine:
    """A kind of machine, as the cost model sees it.

    Attributes:
        name: of the target that it is an example of.
        threads: that share a product, tile by tile.
        bandwidth: GB/s that they read together.
        layouts: for each packed format, what kernels can run there; the first is what they run by default.
    """

    name: str
    threads: int
    bandwidth: float
    layouts: Mapping[DType, tuple[LayoutCost, ...]]


@dataclass(frozen=True)
class TargetFeatures:
    """Which fused ops a backend accepts, how it keeps caches, and which formats it stores alike.

    Caches have elements of one of ``cache_dtypes``, the first unless the user wants another. They are made of pages of
    ``page_size`` positions; without that, of one piece each, which can be a ring where ``ring_cache``.
    ``storage`` names, for each packed format, how the backend stores it: weights of the same storage can be
    stacked without changing a code. ``widest`` names, for each storage, the format that holds all the others'
    codes and scales exactly. Adapters' numbers are kept as ``rounded_lora`` where activations are rounded to int8.
    ``machines`` are those that one file of weights has to serve, each with the layouts that it can run; without any,
    nothing is chosen.
    """

    add_rms_norm: bool = False
    glu: bool = False
    group_query_attention: bool = False
    ring_cache: bool = False
    cache_dtypes: tuple[DType, ...] = (DType.F32,)
    page_size: int | None = None
    rounded_lora: DType = DType.F32
    storage: Mapping[DType, str] = field(default_factory=dict)
    widest: Mapping[str, DType] = field(default_factory=dict)
    machines: tuple[Machine, ...] = ()
