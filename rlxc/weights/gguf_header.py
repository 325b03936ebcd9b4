"""The header of a GGUF file: bytes to metadata and tensor table.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  A file is not trusted: no length or count
in it is used before it is checked against the bytes that are left.
"""

from __future__ import annotations

import math
import mmap
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType, GGUFValueType

from rlxc.dtypes import DType
from rlxc.errors import FormatError, RlxcError, UnsupportedError
from rlxc.weights.formats import GGML_FORMATS

DAMAGED = "the file is damaged or cut short: download or convert it again"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_U32 = Struct("<I")
_U64 = Struct("<Q")
_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}
_FORMAT_OF_TYPE = {int(kind): row for kind, row in GGML_FORMATS.items()}
# The least bytes of an entry: name length, type, value; name length, rank, one dimension, type, offset.
_LEAST_PAIR = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8


class StringArray(Sequence[str]):
    """A metadata array of strings, decoded from UTF-8 when asked for: a vocabulary is long.

    Raises:
        FormatError: on access to a string that is not UTF-8.
    """

    def __init__(self, blob: bytes, ends: npt.NDArray[np.uint64], source: object, what: str) -> None:
        # In the blob each string follows its 8-byte length; ends[i] is where string i ends.
        self._blob = blob
        self._ends = ends
        self._source = source
        self._what = what

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = int(self._ends[i - 1]) if i else 0
        return self._decode(i, start + 8, int(self._ends[i]))

    def __iter__(self) -> Iterator[str]:
        start = 0
        for i, end in enumerate(self._ends.tolist()):
            yield self._decode(i, start + 8, end)
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StringArray) and self._blob == other._blob

    def __hash__(self) -> int:
        return hash(self._blob)

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)}>"

    def _decode(self, i: int, start: int, end: int) -> str:
        return _utf8(self._blob[start:end], self._source, f"{self._what}[{i}]")


MetaValue = int | float | bool | str | npt.NDArray[Any] | StringArray


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``shape`` is ``[out, in]``, ``offset`` counts from the start of file ``shard``."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: int = 0


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor whose ``type`` rlxc does not implement; how many bytes it has is not known."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What the header of one file says; tensor offsets count from the start of the file.

    ``spans`` are the bytes of the file that each pair of the metadata takes, from its key to the end of its value.
    ``foreign`` are the tensors that only a later version can read.
    """

    version: int
    alignment: int
    metadata: dict[str, MetaValue]
    spans: dict[str, slice]
    tensors: list[TensorInfo]
    foreign: list[ForeignTensor]


def read_header(path: Path, mapping: mmap.mmap, shard: int) -> Header:
    """Read and check the header of a mapped file, the one with index ``shard`` of its model.

    Raises:
        FormatError: the file is damaged or truncated.
        UnsupportedError: it is big-endian or of another version.
    """
    reader = _Reader(path, mapping)
    version = reader.version()
    tensor_count = reader.count("tensor count", _LEAST_TENSOR)
    metadata = reader.metadata(reader.count("metadata count", _LEAST_PAIR))
    alignment = _checked_alignment(metadata.get("general.alignment", _DEFAULT_ALIGNMENT), path)
    tensors, foreign = reader.tensors(tensor_count, alignment, shard)
    return Header(version, alignment, metadata, reader.spans, tensors, foreign)


def _checked_alignment(value: MetaValue, path: Path) -> int:
    if not isinstance(value, int) or value < 8 or value & (value - 1):
        raise FormatError(
            f"general.alignment is {quote(value)}, which is not a power of two of at least 8",
            source=path,
            remedy=DAMAGED,
        )
    return value


class _Reader:
    """Walks the header of a mapped file, checking every length against the bytes that are left."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.size = len(mapping)
        self.position = 0
        self.spans: dict[str, slice] = {}

    def error(self, problem: str, remedy: str = DAMAGED) -> RlxcError:
        return FormatError(problem, source=self.path, remedy=remedy)

    def unsupported(self, problem: str, remedy: str) -> RlxcError:
        return UnsupportedError(problem, source=self.path, remedy=remedy)

    def take(self, nbytes: int, what: str) -> int:
        """Step over ``nbytes`` and return where they start."""
        start = self.position
        if nbytes > self.size - start:
            raise self.error(f"{what} takes {nbytes} bytes at {start}, but the file ends at {self.size}")
        self.position = start + nbytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.mapping, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.mapping, self.take(8, what))[0]
        return value

    def count(self, what: str, least: int) -> int:
        """A count of entries of at least ``least`` bytes each."""
        value = self.u64(what)
        if value * least > self.size - self.position:
            raise self.error(f"{what} is {value}, more than the rest of a file of {self.size} bytes can hold")
        return value

    def string(self, what: str) -> str:
        length = self.u64(f"length of {what}")
        start = self.take(length, what)
        return _utf8(self.mapping[start : start + length], self.path, what)

    def version(self) -> int:
        magic = self.mapping[: self.take(4, "magic") + 4]
        if magic != _MAGIC:
            raise self.error(f"is not a GGUF file: it starts with {magic!r}", "pass the path of a .gguf file")
        version = self.u32("version")
        if version in _VERSIONS:
            return version
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version & 0xFFFF == 0 and swapped:
            raise self.unsupported("is big-endian", "convert it with `gguf-convert-endian FILE little`")
        if version == 0:
            raise self.error("version is 0")
        raise self.unsupported(f"is GGUF version {version}; supported: 2, 3", "convert the model again")

    def metadata(self, count: int) -> dict[str, MetaValue]:
        pairs: dict[str, MetaValue] = {}
        for i in range(count):
            start = self.position
            key = self.string(f"metadata key {i}")
            if not key:  # what zeros read as
                raise self.error(f"metadata key {i} is empty")
            if key in pairs:
                raise self.error(f"metadata key {quote(key)} appears twice")
            pairs[key] = self.value(key)
            self.spans[key] = slice(start, self.position)
        return pairs

    def value(self, key: str) -> MetaValue:
        what = f"metadata {quote(key)}"
        kind = self.value_type(what)
        if key == "general.alignment" and kind is not GGUFValueType.UINT32:
            raise self.error(f"general.alignment is of type {kind.name}, not UINT32")
        if kind is GGUFValueType.STRING:
            return self.string(what)
        if kind is not GGUFValueType.ARRAY:
            value: int | float | bool = self.numbers(kind, 1, what)[0].item()
            return value
        kind = self.value_type(what)
        if kind is GGUFValueType.ARRAY:
            raise self.unsupported(f"{what} is an array of arrays", "remove the key with `gguf-new-metadata`")
        if kind is GGUFValueType.STRING:
            return self.strings(self.count(f"length of {what}", 8), what)
        return self.numbers(kind, self.count(f"length of {what}", _SCALARS[kind].itemsize), what)

    def value_type(self, what: str) -> GGUFValueType:
        code = self.u32(f"type of {what}")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.error(f"{what} has value type {code}, which GGUF does not define") from None

    def numbers(self, kind: GGUFValueType, count: int, what: str) -> npt.NDArray[Any]:
        dtype = _SCALARS[kind]
        start = self.take(count * dtype.itemsize, what)
        # A copy (of bytes, so read-only): metadata is aligned and outlives the mapping.
        raw = self.mapping[start : self.position]
        if kind is GGUFValueType.BOOL and raw.translate(None, b"\0\1"):
            raise self.error(f"{what} holds a boolean that is neither 0 nor 1")
        return np.frombuffer(raw, dtype)

    def strings(self, count: int, what: str) -> StringArray:
        """An array of strings: only the lengths are looked at, one after the other."""
        start = position = self.position
        unpack, mapping, size = _U64.unpack_from, self.mapping, self.size
        ends = array("Q")
        for i in range(count):
            # Length and text have to lie within the file.
            if position > size - 8 or (position := position + 8 + unpack(mapping, position)[0]) > size:
                raise self.error(f"{what} has {count} strings, but the file ends in number {i}")
            ends.append(position - start)
        self.position = position
        return StringArray(mapping[start:position], np.array(ends, np.uint64), self.path, what)

    def tensors(self, count: int, alignment: int, shard: int) -> tuple[list[TensorInfo], list[ForeignTensor]]:
        """The tensor table: what can be read, with its place, and what cannot."""
        entries = [self.tensor(i, alignment, shard) for i in range(count)]
        names: set[str] = set()
        for entry in entries:
            if entry.name in names:
                raise self.error(f"tensor {quote(entry.name)} appears twice")
            names.add(entry.name)
        data_start = -(-self.position // alignment) * alignment
        placed = [
            replace(info, offset=data_start + info.offset) for info in entries if isinstance(info, TensorInfo)
        ]
        for info in placed:
            end = info.offset + info.nbytes
            if end > self.size:
                raise self.error(f"tensor {quote(info.name)} ends at {end}, but the file ends at {self.size}")
        for left, right in pairwise(sorted(placed, key=lambda info: info.offset)):
            if left.offset + left.nbytes > right.offset:
                raise self.error(f"tensors {quote(left.name)} and {quote(right.name)} overlap")
        return placed, [entry for entry in entries if isinstance(entry, ForeignTensor)]

    def tensor(self, i: int, alignment: int, shard: int) -> TensorInfo | ForeignTensor:
        """Entry ``i`` of the tensor table; its offset still counts from the start of the data."""
        name = self.string(f"name of tensor {i}")
        what = f"tensor {quote(name)}"
        n_dims = self.u32(f"dimensions of {what}")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.error(f"{what} has {n_dims} dimensions; 1 to {_MAX_DIMS} are possible")
        shape = tuple(self.u64(f"shape of {what}") for _ in range(n_dims))[::-1]
        if 0 in shape:
            raise self.error(f"{what} has shape {list(shape)}: a dimension is 0")
        code = self.u32(f"type of {what}")
        offset = self.u64(f"offset of {what}")
        if offset % alignment:
            raise self.error(f"{what} has offset {offset}, not a multiple of the alignment {alignment}")
        form = _FORMAT_OF_TYPE.get(code)
        if form is None:
            return ForeignTensor(name, _type_name(code), shape)
        blocks, rest = divmod(shape[-1], form.block_size)
        if rest:
            raise self.error(
                f"{what} has rows of {shape[-1]} weights, which are not whole {form.dtype} blocks "
                f"of {form.block_size}"
            )
        nbytes = math.prod(shape[:-1]) * blocks * form.block_bytes
        return TensorInfo(name, form.dtype, shape, offset, nbytes, shard)


def _type_name(code: int) -> str:
    try:
        return GGMLQuantizationType(code).name
    except ValueError:
        return f"{code}, which is unknown"


def _utf8(raw: bytes, source: object, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{what} is not UTF-8 at byte {error.start}", source=source, remedy=DAMAGED
        ) from None


def quote(value: object) -> str:
    """A value from a file, fit for a one-line message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"
