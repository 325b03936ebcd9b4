"""The types that the manifest's fields have, and what a value must be beyond its type."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Rule:
    """What a value must be, beyond its type."""

    says: str
    holds: Callable[[Any], bool]


def integer(low: int, high: int) -> Rule:
    """An integer in a range."""
    return Rule(f"an integer in {low}..{high}", lambda value: low <= value <= high)


def text(says: str, pattern: str) -> Rule:
    """A string that matches a pattern as a whole."""
    return Rule(says, lambda value: re.fullmatch(pattern, value) is not None)


BackendName = Literal["tvm", "onnx"]
Activations = Literal["int8", "float32"]
Count = Annotated[int, integer(1, 2**31 - 1)]
Index = Annotated[int, integer(0, 2**31 - 1)]
Bytes = Annotated[int, integer(0, 2**62)]
Finite = Annotated[float, Rule("finite", math.isfinite)]
Sha256 = Annotated[str, text("64 hexadecimal digits", r"[0-9a-f]{64}")]
FileName = Annotated[str, text("a plain file name", r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")]
