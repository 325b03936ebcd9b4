"""Safetensors files, mapped: the header is read at once, tensor bytes are borrowed from the mapping.

Layout: https://github.com/huggingface/safetensors#format.  The ``safetensors`` library checks the header: sizes,
shapes, element types, and that the tensors cover the file without gap or overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from rlxc.dtypes import DType
from rlxc.errors import FormatError, UnsupportedError, WeightError
from rlxc.weights.files import Digest, MappedFile, parse_json
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf_header import DAMAGED, quote

_FLOATS = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}


@dataclass(frozen=True)
class Tensor:
    """A tensor: its element type as the file spells it (``F32``, ``BF16``, ``U8``, ...), shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class _Place:
    file: int
    offset: int


class SafetensorsFile:
    """An open safetensors file, or several that make up one model.

    Args:
        paths: the files, in the order that `hash_into` reads them.

    Attributes:
        path: the first of them.
        tensors: by name, in file order.
        metadata: the strings under ``__metadata__`` of the first file.

    Raises:
        FormatError: a file is missing, damaged or cut short, or a tensor is in two of them.
    """

    def __init__(self, *paths: str | PathLike[str]) -> None:
        if not paths:
            raise FormatError("no safetensors file was given", remedy="pass at least one path")
        self._files = [MappedFile(Path(path)) for path in paths]
        self.path = self._files[0].path
        self.metadata: Mapping[str, str] = {}
        tensors: dict[str, Tensor] = {}
        self._places: dict[str, _Place] = {}
        for number, file in enumerate(self._files):
            data_start, header = _read_header(file)
            metadata = header.pop("__metadata__", None) or {}
            if number == 0:
                self.metadata = MappingProxyType(metadata)
            for name, entry in header.items():
                if name in tensors:
                    other = self._files[self._places[name].file].path.name
                    raise FormatError(
                        f"tensor {quote(name)} is also in {other}",
                        source=file.path,
                        remedy="keep the files of one model together, and no others",
                    )
                tensors[name], begin = _read_entry(file.path, name, entry)
                self._places[name] = _Place(number, data_start + begin)
        self.tensors: Mapping[str, Tensor] = MappingProxyType(tensors)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, ``uint8 [nbytes]``: a read-only view of the mapping that outlives `close`.

        Raises:
            WeightError: there is no such tensor, or the file is closed.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise WeightError(
                f"has no tensor {quote(name)}",
                source=self.path,
                remedy="list its tensors with `rlxc inspect`",
            )
        if not self._files:
            raise WeightError("the file is closed", source=self.path, remedy="open it again")
        place = self._places[name]
        return np.frombuffer(self._files[place.file].mapping, np.uint8, tensor.nbytes, place.offset)

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """The values of an F32, F16 or BF16 tensor, in its shape; an F32 tensor is not copied if it is aligned.

        Raises:
            WeightError: as `data`.
            UnsupportedError: the tensor has another element type.
        """
        raw = self.data(name)
        tensor = self.tensors[name]
        dtype = _FLOATS.get(tensor.dtype)
        if dtype is None:
            raise UnsupportedError(
                f"tensor {quote(name)} has element type {tensor.dtype}",
                source=self.path,
                remedy=f"one of {', '.join(_FLOATS)} is needed here",
            )
        if dtype is DType.F32:
            return np.require(raw.view("<f4"), requirements="A").reshape(tensor.shape)
        values = FORMATS[dtype].decode(raw[None], raw.size // 2) if raw.size else np.empty(0, np.float32)
        return values.reshape(tensor.shape)

    def hash_into(self, digest: Digest) -> None:
        """Feed the bytes of every file to a hash, file after file.

        Raises:
            FormatError: a file is gone or has changed since it was opened.
        """
        for file in self._files:
            file.hash_into(digest)

    def check_unchanged(self) -> None:
        """Raise what `hash_into` would raise for a file that is gone or has changed."""
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        """Let go of the mappings; they end when the last view from `data` is gone."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_header(file: MappedFile) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header as the library found it to be sound."""
    try:
        with safe_open(file.path, framework="np"):
            pass
    except SafetensorError as error:
        raise FormatError(
            f"is not a sound safetensors file: {str(error).splitlines()[0]}",
            source=file.path,
            remedy=DAMAGED,
        ) from None
    except OSError as error:
        raise FormatError(
            f"cannot be read: {error.strerror or error}",
            source=file.path,
            remedy="check the path and its permissions",
        ) from error
    data_start = 8 + int.from_bytes(file.mapping[:8], "little")
    return data_start, parse_json(file.mapping[8:data_start], file.path, "the header")


def _read_entry(path: Path, name: str, entry: Any) -> tuple[Tensor, int]:
    """A tensor, and where in the data it begins."""
    # The library takes a list of the three values for an entry as well; the format knows objects only.
    if not isinstance(entry, dict):
        raise FormatError(f"the entry of tensor {quote(name)} is no object", source=path, remedy=DAMAGED)
    begin, end = entry["data_offsets"]
    return Tensor(name, entry["dtype"], tuple(entry["shape"]), end - begin), begin
