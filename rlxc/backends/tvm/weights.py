"""The weights file: a safetensors file whose tensors lie as kernels read them, mapped and used in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rlxc.artifact.alignment import align
from rlxc.backends.ahead import ahead
from rlxc.backends.recipes import Losses, ReadBytes, packed_rows
from rlxc.backends.tvm.layout import TILE, Bytes, Layout, PackedLayout, in_tiles, layout_of, tiled
from rlxc.ir import Graph, Weight
from rlxc.ir.ops import ExpertMatMul
from rlxc.weights.formats import FORMATS

_CHUNK_BYTES = 1 << 21
"""Bytes of the model file that become bytes to write at a time: with fewer, threads would be busy handing them over."""


class Sink(Protocol):
    """Where the bytes go: a file of the artifact."""

    def write(self, data: bytes | npt.NDArray[np.generic]) -> None:
        """Append bytes."""

    def align(self, multiple: int) -> None:
        """Pad with zeros to a multiple."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: where it lies in the data; its layout if it is a matrix."""

    offset: int
    nbytes: int
    layout: Layout | None

    @property
    def chosen(self) -> tuple[int, int, int] | None:
        """Bits, block and tile of the layout, if it was chosen."""
        chosen = self.layout.chosen if isinstance(self.layout, PackedLayout) else None
        return (chosen.bits, chosen.block, chosen.tile) if chosen else None


@dataclass
class WeightsFile:
    """Where every tensor will lie: known before the first byte is written, because layouts have fixed sizes."""

    graph: Graph
    stored: dict[str, Stored] = field(default_factory=dict)
    constants: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    nbytes: int = 0

    def __post_init__(self) -> None:
        """Give each weight of the graph its place."""
        self._biases = {
            name for node in self.graph.nodes if isinstance(node.op, ExpertMatMul) for name in node.inputs[3:]
        }
        for weight in self.graph.weights:
            if weight.name in self._biases:
                experts, rows = map(int, weight.type.shape)
                self._place(weight.name, None, 4 * experts * tiled(rows))
            else:
                self._place(weight.name, layout_of_weight(weight), _nbytes(weight))

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> Stored:
        """Add a small array that the compiler made."""
        if name not in self.stored:
            self.constants[name] = array
            self._place(name, None, array.nbytes)
        return self.stored[name]

    def write(
        self, read: ReadBytes, sink: Sink, progress: Callable[[str], None], losses: Losses | None = None
    ) -> None:
        """Write the file, tensor by tensor.

        Args:
            read: gives the bytes of the model file's tensors.
            sink: where they go.
            progress: told each weight's name when it is written.
            losses: told what encoding weights costs.
        """
        sink.write(self._header())
        for part in ahead(self._parts(read, losses)):
            if isinstance(part, str):
                sink.align(64)
                progress(part)
            else:
                sink.write(part)
        for array in self.constants.values():
            sink.write(np.ascontiguousarray(array))
            sink.align(64)

    def _parts(self, read: ReadBytes, losses: Losses | None) -> Iterator[npt.NDArray[np.generic] | str]:
        """The bytes of every weight of the graph, and after them its name."""
        for weight in self.graph.weights:
            rows = packed_rows(weight, read, losses)
            if weight.name in self._biases:
                rows = _padded_rows(rows)
            elif len(weight.type.shape) == 3:
                rows = _padded_experts(rows, int(weight.type.shape[1]))
            yield from _sections(rows, self.stored[weight.name])
            yield weight.name

    def _place(self, name: str, layout: Layout | None, nbytes: int) -> None:
        self.stored[name] = Stored(self.nbytes, nbytes, layout)
        self.nbytes = align(self.nbytes + nbytes)

    def _header(self) -> bytes:
        """The length of the description, and the description; data starts at a multiple of 64."""
        tensors: dict[str, Any] = {"__metadata__": {"format": "rlxc tiles", "version": "1"}}
        for name, stored in self.stored.items():
            # Padding belongs to the tensor before it: the format wants no gaps.
            size = align(stored.nbytes)
            tensors[name] = {
                "dtype": "U8",
                "shape": [size],
                "data_offsets": [stored.offset, stored.offset + size],
            }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text


def layout_of_weight(weight: Weight) -> Layout | None:
    """How a matrix lies, or experts' ``[E, out, in]``, each in whole tiles of 16; None for a vector, as it is."""
    match tuple(map(int, weight.type.shape)):
        case (rows, columns):
            return layout_of(weight.type.dtype, rows, columns, weight.layout)
        case (experts, rows, columns):
            return layout_of(weight.type.dtype, experts * tiled(rows), columns, weight.layout)
        case _:
            return None


def _nbytes(weight: Weight) -> int:
    layout = layout_of_weight(weight)
    if layout is not None:
        return layout.nbytes
    return int(np.prod([int(dim) for dim in weight.type.shape])) * FORMATS[weight.type.dtype].block_bytes


def _padded_rows(parts: Iterator[Bytes]) -> Iterator[Bytes]:
    """Experts' biases, f32 ``[E, out]``, with zeros after each up to whole tiles."""
    for part in parts:
        values = part.shape[1] // 4
        yield np.pad(part, ((0, 0), (0, 4 * (tiled(values) - values))))


def _padded_experts(parts: Iterator[Bytes], rows: int) -> Iterator[Bytes]:
    """Rows, with zeros after every ``rows`` of them up to whole tiles."""
    missing, position = tiled(rows) - rows, 0
    for part in parts:
        while missing and position + len(part) >= rows:
            last, part = part[: rows - position], part[rows - position :]
            yield np.pad(last, ((0, missing), (0, 0)))
            position = 0
        yield part
        position += len(part)


def _sections(rows: Iterator[Bytes], stored: Stored) -> Iterator[npt.NDArray[np.generic]]:
    """The bytes of a tensor of these rows: the first section as it comes; the others, which are small, after it."""
    layout = stored.layout
    if layout is None:
        yield from rows
        return
    first, *others = layout.sections
    rest_start = layout.sections[others[0]].offset if others else layout.nbytes
    rest = np.zeros(layout.nbytes - rest_start, np.uint8)
    row_bytes = FORMATS[layout.dtype].row_bytes(layout.columns)
    rows_at_once = max(TILE, _CHUNK_BYTES // row_bytes // TILE * TILE)
    tiles = 0
    for chunk in in_tiles(rows, rows_at_once, layout.tile):
        sections = layout.encode(chunk)
        yield sections[first]
        for name in others:
            start = layout.sections[name].offset - rest_start + tiles * layout.sections[name].tile_bytes
            rest[start : start + sections[name].nbytes] = sections[name].reshape(-1).view(np.uint8)
        tiles += len(chunk) // layout.tile
    yield np.zeros(rest_start - tiles * layout.sections[first].tile_bytes, np.uint8)
    yield rest
