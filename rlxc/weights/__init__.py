"""Model files: mapped, with their weights packed and exact."""

from rlxc.weights.formats import FORMATS, BlockFormat, Planes
from rlxc.weights.gguf import GgufFile, MetaValue, StringArray, TensorInfo, open_gguf
from rlxc.weights.registry import (
    F32,
    Base,
    LoraAdapter,
    MatWeight,
    Packed,
    Pin,
    TiedAlias,
    WeightKind,
    WeightRegistry,
    base_registry,
)

__all__ = [
    "F32",
    "FORMATS",
    "Base",
    "BlockFormat",
    "GgufFile",
    "LoraAdapter",
    "MatWeight",
    "MetaValue",
    "Packed",
    "Pin",
    "Planes",
    "StringArray",
    "TensorInfo",
    "TiedAlias",
    "WeightKind",
    "WeightRegistry",
    "base_registry",
    "open_gguf",
]
