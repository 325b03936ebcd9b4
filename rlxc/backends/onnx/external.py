"""The weights file of an ONNX artifact: tensors one after the other, each on a page of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rlxc.backends.ahead import ahead

PAGE = 4096
"""External tensors start at multiples of this, so that they can be mapped in place."""


class Sink(Protocol):
    """Where the bytes go: a file of the artifact."""

    def write(self, data: bytes | npt.NDArray[np.generic]) -> None:
        """Append bytes."""

    def tell(self) -> int:
        """Bytes written so far."""

    def align(self, multiple: int) -> None:
        """Pad with zeros to a multiple."""


@dataclass(frozen=True)
class Region:
    """Where a tensor's bytes lie in the file."""

    offset: int
    length: int

    def part(self, number: int, parts: int) -> Region:
        """One of so many equal parts."""
        length = self.length // parts
        return Region(self.offset + number * length, length)


class WeightsFile:
    """Writes regions, and describes them as ONNX initializers. Several tensors may describe the same region."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.sink = name, sink

    def add(self, chunks: Iterable[npt.NDArray[np.generic]]) -> Region:
        """Append arrays back to back, starting on a new page."""
        self.sink.align(PAGE)
        offset = self.sink.tell()
        for chunk in ahead(chunks):
            self.sink.write(chunk)
        return Region(offset, self.sink.tell() - offset)

    def tensor(self, name: str, data_type: int, dims: tuple[int, ...], region: Region) -> TensorProto:
        """The initializer that reads this region."""
        tensor = TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
        entries = {"location": self.name, "offset": region.offset, "length": region.length}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor
