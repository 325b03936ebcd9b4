"""Files that are not trusted: mapped, or read as JSON, with one kind of error for everything that can be wrong."""

from __future__ import annotations

import json
import mmap
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from os import fstat, stat_result
from pathlib import Path
from typing import Any, Protocol

from rlxc.errors import FormatError, WeightError
from rlxc.weights.gguf_header import DAMAGED, quote

_CHUNK = 1 << 20
_LONGEST_JSON = 1 << 26
"""Bytes; configurations are kilobytes, and the index of the shards of a large model a few megabytes."""


class Digest(Protocol):
    """A running hash, such as ``hashlib.sha256()``."""

    def update(self, data: Any, /) -> None:
        """Hash more bytes."""


class MappedFile:
    """A regular file that is not empty, mapped to read.

    Attributes:
        path: the file.
        mapping: its bytes; do not truncate a file that is open.

    Raises:
        FormatError: there is no such file, it is empty, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closed = False
        with _reading(path) as file:
            self._identity = _identity(fstat(file.fileno()))
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def hash_into(self, digest: Digest) -> None:
        """Feed the file's bytes to a hash, until another thread closes the file.

        Raises:
            FormatError: the file is gone or has changed since it was opened.
            WeightError: the file is closed.
        """
        # Read, not mapped: hashing would fault in every page, which takes longer than the hash itself.
        buffer = memoryview(bytearray(_CHUNK))
        with _reading(self.path) as file:
            self._check_identity(file)
            while count := file.readinto(buffer):
                if self._closed:
                    raise WeightError("the file is closed", source=self.path, remedy="open it again")
                digest.update(buffer[:count])

    def check_unchanged(self) -> None:
        """Raise what `hash_into` would raise for a file that is gone or has changed."""
        with _reading(self.path) as file:
            self._check_identity(file)

    def close(self) -> None:
        """End what another thread does with the file; the mapping ends with its last view."""
        self._closed = True

    def _check_identity(self, file: FileIO) -> None:
        if _identity(fstat(file.fileno())) != self._identity:
            raise FormatError("has changed since it was opened", source=self.path, remedy="open it again")


def read_bytes(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
        FormatError: there is no such file, it is empty, too long, or it cannot be read.
    """
    with _reading(path) as file:
        size = fstat(file.fileno()).st_size
        if size > _LONGEST_JSON:
            raise FormatError(
                f"is {size} bytes long; at most {_LONGEST_JSON} are read", source=path, remedy=DAMAGED
            )
        return file.readall()


def parse_json(raw: bytes, path: Path, what: str = "the file") -> dict[str, Any]:
    """The JSON object that ``raw`` holds.

    Raises:
        FormatError: it is not UTF-8, not JSON, not an object, or an object in it has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"key {quote(twice)} appears twice")
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply", source=path, remedy=DAMAGED) from None
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise FormatError(f"{what} is not sound JSON: {why}", source=path, remedy=DAMAGED) from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object", source=path, remedy=DAMAGED)
    return value


@contextmanager
def _reading(path: Path) -> Iterator[FileIO]:
    """A file that is there, regular and not empty, open to read."""
    try:
        # Looked at before opening, because opening a pipe would wait.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
            raise FormatError(what, source=path, remedy="pass the path of a file")
        if status.st_size == 0:
            raise FormatError("is empty", source=path, remedy="download or convert it again")
        with FileIO(path) as file:
            yield file
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise FormatError(
            f"cannot be read: {why}", source=path, remedy="check the path and its permissions"
        ) from error


def _identity(status: stat_result) -> tuple[int, ...]:
    """What stays the same while a file is neither replaced nor written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
