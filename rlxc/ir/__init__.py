"""The graph IR: ops with shape rules, a verifier, a text form, and a numpy interpreter as the oracle."""

from rlxc.ir.graph import (
    Alias,
    Balance,
    Concat,
    Dim,
    Encode,
    Fold,
    Graph,
    Node,
    Recipe,
    Source,
    TensorType,
    Value,
    Weight,
    WeightLayout,
)
from rlxc.ir.rope import RopeSpec, Yarn
from rlxc.ir.text import parse, show
from rlxc.ir.verify import verify

__all__ = [
    "Alias",
    "Balance",
    "Concat",
    "Dim",
    "Encode",
    "Fold",
    "Graph",
    "Node",
    "Recipe",
    "RopeSpec",
    "Source",
    "TensorType",
    "Value",
    "Weight",
    "WeightLayout",
    "Yarn",
    "parse",
    "show",
    "verify",
]
