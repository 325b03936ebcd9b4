"""What is wrong with a model's tensors, said once for all layers that have the same problem."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rlxc.errors import ModelError, Problems, RlxcError
from rlxc.weights.gguf_header import quote

_LONGEST = 120
_OF_LAYER = re.compile(r"(blk|(?:\w+\.)*layers)\.(\d{1,9})\.(.+)")


@dataclass(frozen=True)
class _Saying:
    """What is said of one tensor, and of several."""

    kind: type[RlxcError]
    one: str
    several: str
    remedy: str


class TensorProblems:
    """Tensors that are missing, misshapen, left over or otherwise wrong.

    Args:
        source: the file or folder, for error messages.
        asker: what says which tensors there should be.
        place: the whole that they should be a part of.
    """

    def __init__(self, source: object, asker: str, place: str) -> None:
        self._source, self._asker, self._place = source, asker, place
        # What is said, of which tensors: by prefix and rest of their names, which layers have it, if it is of layers.
        self._found: dict[_Saying, dict[tuple[str, str], list[int]]] = {}

    def missing(self, name: str) -> None:
        """Take note of a tensor that the model needs and the file lacks."""
        self.add(
            name, "is missing", "are missing", f"{self._asker} asks for it: the file is not a whole model"
        )

    def misshapen(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        """Take note of a tensor that has another shape than it should."""
        shapes = f"shape {list(found)}, but {self._asker} asks for {list(wanted)}"
        self.add(name, f"has {shapes}", f"have {shapes}")

    def surplus(self, name: str) -> None:
        """Take note of a tensor that the model has no use for."""
        place = f"no place in {self._place}"
        self.add(name, f"has {place}", f"have {place}", "dropping it could change the result")

    def add(
        self, name: str, one: str, several: str, remedy: str = "", kind: type[RlxcError] = ModelError
    ) -> None:
        """Take note of something else that is wrong with a tensor, as it is said of one and of several."""
        name = name if name.isprintable() and len(name) <= _LONGEST else quote(name)
        names = self._found.setdefault(_Saying(kind, one, several, remedy), {})
        match = _OF_LAYER.fullmatch(name)
        if match:
            names.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            names["", name] = []

    def report(self, problems: Problems) -> None:
        """Tell everything, in one error for all tensors of the same layers of which the same is said."""
        for saying, names in self._found.items():
            by_layers: dict[tuple[int, ...], list[str]] = {}
            for (prefix, rest), layers in names.items():
                shown = f"{prefix}.{_ranges(layers)}.{rest}" if layers else rest
                by_layers.setdefault(tuple(layers), []).append(shown)
            for numbers, alike in by_layers.items():
                if len(numbers) * len(alike) > 1:
                    what = [f"{len(numbers) * len(alike)} tensors {saying.several}: {', '.join(alike)}"]
                else:
                    what = [f"tensor {shown} {saying.one}" for shown in alike]
                for problem in what:
                    problems.add(saying.kind(problem, source=self._source, remedy=saying.remedy))


def _ranges(numbers: Iterable[int]) -> str:
    """One number as it is, several as the shell spells them: ``{0-4,6}``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
