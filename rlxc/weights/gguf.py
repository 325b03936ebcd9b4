"""GGUF files, mapped: header and tensor table are read at once, tensor bytes are borrowed from the mapping.

Versions 2 and 3, little-endian, whole or split into shards.  Like every mapping, this one relies on its file:
do not truncate a file that is open.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np
import numpy.typing as npt

from rlxc.errors import FormatError, Problems, RlxcError, UnsupportedError, WeightError
from rlxc.weights.files import MappedFile
from rlxc.weights.formats import GGML_FORMATS
from rlxc.weights.gguf_header import (
    DAMAGED,
    ForeignTensor,
    Header,
    MetaValue,
    StringArray,
    TensorInfo,
    quote,
    read_header,
)

__all__ = ["ForeignTensor", "GgufFile", "MetaValue", "StringArray", "TensorInfo", "open_gguf"]

_SHARD_NAME = re.compile(r"(?P<stem>.*)-\d{5}-of-\d{5}\.gguf", re.DOTALL)


@dataclass(frozen=True)
class _Shard:
    file: MappedFile
    header: Header

    @property
    def path(self) -> Path:
        return self.file.path


class GgufFile:
    """An open GGUF file, or all the shards of a split one; get one from `open_gguf`.

    Attributes:
        path: the file that was opened.
        version: the GGUF version, 2 or 3.
        alignment: bytes that tensor offsets are a multiple of.
        metadata: the key-value pairs (of the first shard), in file order; they outlive `close`.
        tensors: name to place, in file order.
        foreign: tensors whose types rlxc does not implement; there are none unless `open_gguf` was told to allow them.
    """

    def __init__(self, shards: Sequence[_Shard]) -> None:
        self.path = shards[0].path
        self.version = shards[0].header.version
        self.alignment = shards[0].header.alignment
        self.metadata: Mapping[str, MetaValue] = MappingProxyType(shards[0].header.metadata)
        names: set[str] = set()
        for shard in shards:
            header = shard.header
            for name in [
                *(info.name for info in header.tensors),
                *(tensor.name for tensor in header.foreign),
            ]:
                if name in names:
                    raise FormatError(
                        f"tensor {quote(name)} is also in another shard",
                        source=shard.path,
                        remedy=DAMAGED,
                    )
                names.add(name)
        infos = {info.name: info for shard in shards for info in shard.header.tensors}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(infos)
        self.foreign = tuple(tensor for shard in shards for tensor in shard.header.foreign)
        self._spans = shards[0].header.spans
        self._files = [shard.file for shard in shards]

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, ``uint8 [nbytes]``: a read-only view of the mapping that outlives `close`.

        Raises:
            WeightError: there is no such tensor, or the file is closed.
        """
        info = self.tensors.get(name)
        if info is None:
            raise WeightError(
                f"has no tensor {quote(name)}",
                source=self.path,
                remedy="list its tensors with `rlxc inspect`",
            )
        return np.frombuffer(self._opened()[info.shard].mapping, np.uint8, info.nbytes, info.offset)

    def pair(self, key: str) -> bytes:
        """A pair of the metadata as it is in the file: key, type and value.

        Raises:
            WeightError: there is no such key, or the file is closed.
        """
        span = self._spans.get(key)
        if span is None:
            raise WeightError(f"has no metadata {quote(key)}", source=self.path, remedy="see `rlxc inspect`")
        return self._opened()[0].mapping[span]

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the bytes of the file, shard after shard.

        Raises:
            FormatError: a file is gone or has changed since it was opened.
            WeightError: the file is closed.
        """
        digest = hashlib.sha256()
        for file in self._opened():
            file.hash_into(digest)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Check that the bytes are still those that were opened.

        Raises:
            FormatError: a file is gone or has changed since it was opened.
            WeightError: the file is closed.
        """
        for file in self._opened():
            file.check_unchanged()

    def close(self) -> None:
        """Let go of the mapping; it ends when the last view from `data` is gone."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> list[MappedFile]:
        if not self._files:
            raise WeightError("the file is closed", source=self.path, remedy="open it again")
        return self._files


def open_gguf(path: str | PathLike[str], *, allow_foreign: bool = False) -> GgufFile:
    """Map a GGUF file, and its other shards if it is the first of several.

    Args:
        path: the file.
        allow_foreign: open it even if it has tensors of types that rlxc does not implement, to look at the others.

    Raises:
        FormatError: a file is missing, damaged, truncated, or not the shard that it should be.
        UnsupportedError: a file is big-endian, of version 1, or holds types that rlxc does not implement.
    """
    first = _open_shard(Path(path), 0)
    # Merged files say 0, whole ones nothing.
    count = _split_number(first, "split.count") if "split.count" in first.header.metadata else 0
    file = GgufFile([first] if count <= 1 else [first, *_other_shards(first, count)])
    if file.foreign and not allow_foreign:
        raise foreign_types(file)
    return file


def foreign_types(file: GgufFile) -> RlxcError:
    """The error that a file, which has some, holds tensors of foreign types: a part for each type."""
    names: dict[str, list[str]] = {}
    for tensor in file.foreign:
        names.setdefault(tensor.type, []).append(quote(tensor.name))
    supported = ", ".join(kind.name for kind in GGML_FORMATS)
    problems = Problems()
    for kind, of_kind in names.items():
        what = f"tensor {of_kind[0]} has type {kind}"
        if len(of_kind) > 1:
            what = f"{len(of_kind)} tensors have type {kind}, such as {of_kind[0]}"
        problems.add(
            UnsupportedError(what, source=file.path, remedy=f"use a file quantised to one of {supported}")
        )
    return problems.error()


def _other_shards(first: _Shard, count: int) -> list[_Shard]:
    """Shards 2 to ``count``, found by their names beside the first."""
    name = _SHARD_NAME.fullmatch(first.path.name)
    stem = name["stem"] if name else "..."
    start = f"{stem}-00001-of-{count:05d}.gguf"
    number = _split_number(first, "split.no") + 1
    if number != 1:
        raise FormatError(f"is shard {number} of {count}", source=first.path, remedy=f"open {start} instead")
    if first.path.name != start:
        raise FormatError(
            f"is shard 1 of {count}, but its name does not say so",
            source=first.path,
            remedy=f"rename it to {start}, and the other shards alike",
        )
    shards = []
    for index in range(1, count):
        path = first.path.with_name(f"{stem}-{index + 1:05d}-of-{count:05d}.gguf")
        if not path.exists():
            raise FormatError(
                f"shard {index + 1} of {count} is missing", source=path, remedy=f"put it beside {start}"
            )
        shard = _open_shard(path, index)
        for key, expected in (("split.no", index), ("split.count", count)):
            if _split_number(shard, key) != expected:
                raise FormatError(
                    f"{key} is {_split_number(shard, key)}, but its name makes it {expected}",
                    source=path,
                    remedy="put the shards of one model together",
                )
        shards.append(shard)
    headers = [first.header, *(shard.header for shard in shards)]
    found = sum(len(header.tensors) + len(header.foreign) for header in headers)
    promised = _split_number(first, "split.tensors.count")
    if found != promised:
        raise FormatError(
            f"split.tensors.count is {promised}, but the {count} shards hold {found} tensors",
            source=first.path,
            remedy="put the shards of one model together",
        )
    return shards


def _split_number(shard: _Shard, key: str) -> int:
    value = shard.header.metadata.get(key)
    if not isinstance(value, int):
        raise FormatError(f"{key} is missing or not a number", source=shard.path, remedy=DAMAGED)
    return value


def _open_shard(path: Path, index: int) -> _Shard:
    file = MappedFile(path)
    return _Shard(file, read_header(path, file.mapping, index))
