"""What a pass is: a function from graph to graph that says what it did."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlxc.ir import Graph, Node


@dataclass(frozen=True)
class NoMatch:
    """Why a rewrite that nearly applied at a node did not."""

    reason: str
    node: Node

    def __str__(self) -> str:
        return f"%{self.node.outputs[0]} = {self.node.op.name}: {self.reason}"


@dataclass(frozen=True)
class PassResult:
    """A pass's outcome. ``facts`` are plain data (what JSON holds) for the artifact's manifest.

    ``missed`` says what nearly applied, and ``notes`` why the pass chose what it chose: lines for a trace.
    """

    graph: Graph
    modified: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    missed: tuple[NoMatch, ...] = ()
    notes: tuple[str, ...] = ()


class Pass(ABC):
    """One transformation. A pass keeps the graph's meaning and its outputs' names, and has no state between runs."""

    @property
    def name(self) -> str:
        """The class's name in snake_case, as ``--after`` and ``--trace`` spell it."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def run(self, graph: Graph) -> PassResult:
        """Transform the graph."""
