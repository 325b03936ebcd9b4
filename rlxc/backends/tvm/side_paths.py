"""The side paths of a graph, as kernels see them: where a unit of a LoRA plan has what each of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlxc.artifact.lora import LoraPart, LoraPlan, UnitPart
from rlxc.backends.tvm.kernels.lora import Element, LoraDown, LoraUp, UpPart
from rlxc.backends.tvm.program import Argument, InUnit
from rlxc.dtypes import DType
from rlxc.errors import GraphError

_ELEMENTS: dict[DType, Element] = {DType.F32: "float32", DType.F16: "float16"}


@dataclass(frozen=True)
class SidePaths:
    """What a plan says about the graph inputs that adapters are."""

    plan: LoraPlan

    @property
    def element(self) -> Element:
        """The type of adapters' numbers."""
        return _ELEMENTS[self.plan.dtype]

    def down(self, name: str) -> tuple[LoraDown, tuple[Argument, ...]]:
        """The A's of a graph input, and where a unit has them: the bytes that say so, and the first A.

        Raises:
            GraphError: the plan does not have the input.
        """
        first, parts, places = self._find(name, [part for part, group in self._all if group == name])
        begin = places[0].down
        down = LoraDown(
            self.element, parts[0].columns, tuple(place.down - begin for place in places), self.plan.max_units
        )
        return down, (InUnit(first), InUnit(begin))

    def up(self, name: str, first: int, of: int) -> tuple[LoraUp, tuple[Argument, ...]]:
        """The B's of a graph input, and where a unit has them: the bytes that say so, and the first B.

        Args:
            name: the graph input's.
            first: which part of u the first B is multiplied with.
            of: the parts of u.

        Raises:
            GraphError: the plan does not have the input.
        """
        index, _, places = self._find(name, [part for part, _ in self._all if part.up == name])
        begin = places[0].up
        parts = tuple(UpPart(place.first_tile, place.tiles, place.up - begin) for place in places)
        return LoraUp(self.element, parts, first, of, self.plan.max_units), (InUnit(index), InUnit(begin))

    def embedding(self, name: str) -> tuple[int, tuple[Argument, ...]]:
        """How far a table's B lies behind its A, the graph input, in bytes, and where a unit has the latter.

        Raises:
            GraphError: the plan does not have the input.
        """
        first, _, (place,) = self._find(name, [part for part, group in self._all if group == name])
        return place.up - place.down, (InUnit(first), InUnit(place.down))

    @property
    def _all(self) -> list[tuple[LoraPart, str]]:
        """All parts, in the order of a unit, each with its A's graph input."""
        return [(part, group.down) for group in self.plan.groups for part in group.parts]

    def _find(
        self, name: str, parts: Sequence[LoraPart]
    ) -> tuple[int, Sequence[LoraPart], Sequence[UnitPart]]:
        """The number of the first of some neighbours, they, and where they lie."""
        if not parts:
            raise GraphError(f"the plan for adapters does not have %{name}")
        first = self.plan.parts.index(parts[0])
        return first, parts, self.plan.unit[first : first + len(parts)]
