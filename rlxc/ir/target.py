"""What a target's kernels can do: plain data that a backend states and passes read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlxc.dtypes import DType


@dataclass(frozen=True)
class TargetFeatures:
    """Which fused ops a backend accepts, how it keeps caches, and which formats it stores alike.

    Caches have elements of one of ``cache_dtypes``, the first unless the user wants another. They are made of pages of
    ``page_size`` positions; without that, of one piece each, which can be a ring where ``ring_cache``.
    ``storage`` names, for each packed format, how the backend stores it: weights of the same storage can be
    stacked without changing a code. ``widest`` names, for each storage, the format that holds all the others'
    codes and scales exactly. Adapters' numbers are kept as ``rounded_lora`` where activations are rounded to int8.
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
