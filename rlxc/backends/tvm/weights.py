"""The weights file: a safetensors file whose tensors lie as kernels read them, mapped and used in place."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from rlxc.artifact.alignment import align
from rlxc.backends.recipes import Losses, ReadBytes, packed_rows
from rlxc.backends.tvm.layout import Bytes, Layout, in_tiles, layout_of, tiled
from rlxc.ir import Graph, Weight
from rlxc.ir.ops import ExpertMatMul
from rlxc.weights.formats import FORMATS

_CHUNK_BYTES = 1 << 18
"""Bytes of the model file that are rearranged at a time: large enough for numpy, small enough for the cache."""

_CHUNKS_AHEAD = 4
"""How many chunks may be rearranged before they are written."""

T = TypeVar("T")


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
        for weight in self.graph.weights:
            rows = packed_rows(weight, read, losses)
            if weight.name in self._biases:
                rows = _padded_rows(rows)
            elif len(weight.type.shape) == 3:
                rows = _padded_experts(rows, int(weight.type.shape[1]))
            for part in _ahead(_sections(rows, self.stored[weight.name])):
                sink.write(part)
            sink.align(64)
            progress(weight.name)
        for array in self.constants.values():
            sink.write(np.ascontiguousarray(array))
            sink.align(64)

    def _place(self, name: str, layout: Layout | None, nbytes: int) -> None:
        self.stored[name] = Stored(self.nbytes, nbytes, layout)
        self.nbytes = align(self.nbytes + nbytes)

    def _header(self) -> bytes:
        """The length of the description, and the description; data starts at a multiple of 64."""
        tensors: dict[str, Any] = {"__metadata__": {"format": "rlxc tiles of 16 rows", "version": "1"}}
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
    """How a matrix lies, or experts' ``[E, out, in]``, each in whole tiles; None for a vector, which stays as it is."""
    match tuple(map(int, weight.type.shape)):
        case (rows, columns):
            return layout_of(weight.type.dtype, rows, columns)
        case (experts, rows, columns):
            return layout_of(weight.type.dtype, experts * tiled(rows), columns)
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
    later: Mapping[str, list[npt.NDArray[np.generic]]] = {name: [] for name in others}
    row_bytes = FORMATS[layout.dtype].row_bytes(layout.columns)
    rows_at_once = max(16, _CHUNK_BYTES // row_bytes // 16 * 16)
    position = 0
    for chunk in in_tiles(rows, rows_at_once):
        sections = layout.encode(chunk)
        yield sections[first]
        position += sections[first].nbytes
        for name in others:
            later[name].append(sections[name])
    for name in others:
        yield np.zeros(layout.sections[name].offset - position, np.uint8)
        position = layout.sections[name].offset
        for array in later[name]:
            yield array
            position += array.nbytes


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, made in another thread while earlier ones are in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="rlxc-weights") as pool:
        coming: deque[Future[T | None]] = deque()
        while True:
            while len(coming) < _CHUNKS_AHEAD:
                coming.append(pool.submit(next, items, None))
            item = coming.popleft().result()
            if item is None:
                return
            yield item
