"""What a target's kernels can do: plain data that a backend states and passes read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlxc.dtypes import DType


@dataclass(frozen=True)
class TargetFeatures:
    """Which fused ops a backend accepts, and which formats it stores alike.

    ``storage`` names, for each packed format, how the backend stores it: weights of the same storage can be
    stacked without changing a code. ``widest`` names, for each storage, the format that holds all the others'
    codes and scales exactly.
    """

    add_rms_norm: bool = False
    glu: bool = False
    group_query_attention: bool = False
    ring_cache: bool = False
    storage: Mapping[DType, str] = field(default_factory=dict)
    widest: Mapping[str, DType] = field(default_factory=dict)
