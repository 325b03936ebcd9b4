"""Every weight of a model, an adapter or an artifact: its format, its bytes, and what reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rlxc.artifact import Artifact, WeightEntry
from rlxc.checking import Lowered
from rlxc.errors import ArtifactError, RlxcError
from rlxc.ir import Alias, Balance, Concat, Encode, Fold, Graph, Source, TensorType, Weight, parse
from rlxc.weights.adapters import AdapterFacts
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import GgufFile, open_gguf
from rlxc.weights.source import ModelFile

BASE = "base"
_ALIAS = "alias of "
_LAYER = re.compile(r"(?:blk|layers)\.(\d{1,9})\.")


@dataclass(frozen=True)
class WeightRow:
    """One weight.

    Attributes:
        name: its name.
        parts: the names of the weights that were stacked to make it, if it is none of the model's own.
        shape: ``[out, in]``, ``[n]``, or ``[experts, out, in]``.
        format: how its numbers are packed.
        nbytes: what the model file has of it; an alias takes none. None if nobody knows its type.
        stored_bytes: what it takes in an artifact; None where no backend was asked.
        route: what reads it there, in words; empty where no backend was asked.
        kind: ``base``, ``alias of NAME`` or ``adapter NAME``; ``base with adapter NAME`` where one is folded in.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int | None
    stored_bytes: int | None = None
    route: str = ""
    kind: str = BASE
    parts: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, or those of the parts in one: ``blk.9.{ffn_gate,ffn_up}.weight``."""
        if not self.parts:
            return self.name
        pieces = [part.split(".") for part in self.parts]
        start, end = _alike(pieces), _alike([piece[::-1] for piece in pieces])
        first = pieces[0]
        middle = ",".join(".".join(piece[start : len(piece) - end]) for piece in pieces)
        return ".".join([*first[:start], f"{{{middle}}}", *first[len(first) - end :]])

    @property
    def is_alias(self) -> bool:
        """Whether it is another name of a weight that has a row of its own."""
        return self.kind.startswith(_ALIAS)


@dataclass(frozen=True)
class WeightTotals:
    """What some weights come to; aliases count once, as what they are aliases of."""

    tensors: int
    parameters: int
    nbytes: int | None
    stored_bytes: int | None


@dataclass(frozen=True)
class WeightTable:
    """The weights, as ``backend`` stores them if one was asked, and their totals: of each format, and of all."""

    backend: str | None
    rows: tuple[WeightRow, ...]
    by_format: Mapping[str, WeightTotals]
    total: WeightTotals

    @classmethod
    def of(cls, rows: Iterable[WeightRow], backend: str | None = None) -> WeightTable:
        """The table of these rows."""
        rows = tuple(sorted(rows, key=_place))
        counted = [row for row in rows if not row.is_alias]
        formats: dict[str, list[WeightRow]] = {}
        for row in counted:
            formats.setdefault(row.format, []).append(row)
        by_format = {name: _totals(formats[name]) for name in sorted(formats)}
        return cls(backend, rows, by_format, _totals(counted))


def of_file(file: ModelFile) -> WeightTable:
    """The tensors of a model file, of which nobody knows how they would be stored."""
    rows = [WeightRow(info.name, info.shape, str(info.dtype), info.nbytes) for info in file.tensors.values()]
    if isinstance(file, GgufFile):
        rows += [WeightRow(tensor.name, tensor.shape, tensor.type.lower(), None) for tensor in file.foreign]
    return WeightTable.of(rows)


def of_adapter(facts: AdapterFacts, name: str) -> WeightTable:
    """The tensors of an adapter."""
    return WeightTable.of(
        WeightRow(tensor.name, tensor.shape, tensor.format, tensor.nbytes, kind=f"adapter {name}")
        for tensor in facts.tensors
    )


def of_graph(lowered: Lowered, activations: str) -> WeightTable:
    """The weights of a model as a backend would store them, and the aliases among them."""
    stored = lowered.engine.storage(lowered.graph, activations)
    rows = [
        WeightRow(
            weight.name,
            tuple(map(int, weight.type.shape)),
            str(weight.type.dtype),
            file_bytes(weight),
            stored[weight.name].nbytes,
            stored[weight.name].route,
            parts=_parts(weight),
        )
        for weight in lowered.graph.weights
    ]
    aliases = aliases_of(lowered.model, lowered.graph)
    return WeightTable.of([*rows, *_aliases(rows, aliases)], lowered.engine.name)


def of_artifact(artifact: Artifact) -> WeightTable:
    """The weights of an artifact, and the adapters that lie in it.

    Raises:
        ArtifactError: the manifest has a recipe that is none.
        FormatError: an adapter is damaged.
    """
    manifest = artifact.manifest
    rows = []
    for entry in manifest.weights:
        parts = _parts(_weight_of(entry, artifact))
        folded = [each.name for each in manifest.adapters if {entry.name, *parts} & {*each.folded}]
        rows.append(
            WeightRow(
                entry.name,
                entry.shape,
                str(entry.dtype),
                entry.nbytes,
                entry.stored_bytes,
                entry.route,
                f"{BASE} with adapter {', '.join(folded)}" if folded else BASE,
                parts,
            )
        )
    rows += _aliases(rows, manifest.aliases)
    for adapter in manifest.adapters:
        if adapter.file is not None:
            rows += _in_adapter(artifact.file(adapter.file), adapter.name)
    return WeightTable.of(rows, manifest.target.backend)


def _in_adapter(path: Path, name: str) -> list[WeightRow]:
    """The tensors of an adapter's file in an artifact."""
    with open_gguf(path) as file:
        return [
            WeightRow(
                info.name,
                info.shape,
                str(info.dtype),
                info.nbytes,
                info.nbytes,
                "side path",
                f"adapter {name}",
            )
            for info in file.tensors.values()
        ]


def _weight_of(entry: WeightEntry, artifact: Artifact) -> Weight:
    """The weight that a manifest's entry describes."""
    recipe = f" = {entry.recipe}" if entry.recipe else ""
    try:
        weights = parse(f"weight @{entry.name}: {TensorType(entry.dtype, entry.shape)}{recipe}").weights
        problem = "it has several lines"
    except RlxcError as error:
        weights, problem = (), error.problem
    if len(weights) != 1:
        raise ArtifactError(
            f"weight {entry.name!r:.80} cannot be read: {problem}",
            source=artifact.path,
            remedy="compile the model again",
        )
    return weights[0]


def _parts(weight: Weight) -> tuple[str, ...]:
    return tuple(part.name for part in weight.recipe.parts) if isinstance(weight.recipe, Concat) else ()


def file_bytes(weight: Weight) -> int:
    """What the model file has of a weight: of one made of several tensors, the bytes of them all."""
    match weight.recipe:
        case Source():
            shape = tuple(map(int, weight.type.shape))
            return math.prod(shape[:-1]) * FORMATS[weight.type.dtype].row_bytes(shape[-1])
        case Alias():
            return 0
        case Concat(parts):
            return sum(map(file_bytes, parts))
        case Encode(part) | Fold(base=part) | Balance(weight=part):
            return file_bytes(part)


def aliases_of(model: Graph, compiled: Graph) -> dict[str, str]:
    """The tensors of a model that became other names of what is stored, and the names that it is stored by."""
    return {
        weight.name: weight.recipe.target
        for weight in model.weights
        if isinstance(weight.recipe, Alias) and weight.name not in compiled.weight
    }


def _aliases(rows: Iterable[WeightRow], aliases: Mapping[str, str]) -> list[WeightRow]:
    by_name = {row.name: row for row in rows}
    return [
        WeightRow(alias, target.shape, target.format, 0, 0, target.route, f"{_ALIAS}{name}")
        for alias, name in aliases.items()
        for target in [by_name[name]]
    ]


def _alike(pieces: Iterable[list[str]]) -> int:
    """How many pieces all lists begin with."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*pieces))))


def _place(row: WeightRow) -> float:
    """Where a row belongs: what comes before the layers, layer by layer, what comes after them."""
    name = row.parts[0] if row.parts else row.name
    layer = _LAYER.match(name)
    if layer:
        return int(layer[1])
    return math.inf if name.startswith("output") else -1


def _totals(rows: Iterable[WeightRow]) -> WeightTotals:
    rows = list(rows)
    return WeightTotals(
        tensors=len(rows),
        parameters=sum(math.prod(row.shape) for row in rows),
        nbytes=_sum(row.nbytes for row in rows),
        stored_bytes=_sum(row.stored_bytes for row in rows),
    )


def _sum(sizes: Iterable[int | None]) -> int | None:
    """The sum, if all are known."""
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total
