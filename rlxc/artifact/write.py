"""Writing an artifact: under a hidden name first, with its final name once it is complete."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from rlxc.artifact.manifest import FORMAT, MANIFEST, FileEntry, Manifest, parse_object
from rlxc.artifact.read import Artifact, read_manifest
from rlxc.errors import ArtifactError

if TYPE_CHECKING:
    import numpy.typing as npt
    from _typeshed import ReadableBuffer


class ArtifactWriter:
    """Writes an artifact beside ``path`` under a hidden name; :meth:`commit` gives it its own.

    Leaving the ``with`` block without a commit, by an error or Ctrl-C, removes what was written. A killed process
    leaves the hidden folder; the next compile to the same path removes it.

    Args:
        path: the folder to create, inside one that exists.
        overwrite: replace an artifact that is there; it stays until the new one is complete.

    Raises:
        ArtifactError: ``path`` exists and may not be replaced, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path = Path(path)
        self._final = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._files: dict[str, FileEntry] = {}
        self._check_output()
        self._remove_stale()
        # Readers of the name: _remove_stale.
        name = f".{self._final.name}.{os.getpid()}-{secrets.token_hex(4)}"
        self._staging = self._final.with_name(f"{name}.partial")
        self._aside = self._final.with_name(f"{name}.old")
        with _writing(self.path):
            os.mkdir(self._staging)

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    @contextmanager
    def file(self, name: str) -> Iterator[FileWriter]:
        """A new file of the artifact; it counts when the ``with`` block ends."""
        with FileWriter(self._staging / name, self.path) as file:
            yield file
        self._files[name] = file.entry()

    def commit(self, manifest: Manifest) -> Artifact:
        """Write the manifest, with ``files`` filled in, and give the artifact its name.

        Raises:
            ArtifactError: the manifest is not valid, or the artifact cannot be written.
        """
        text = replace(manifest, files=self._files).to_json()
        manifest = Manifest.from_json(text, source=self.path)
        with FileWriter(self._staging / MANIFEST, self.path) as file:
            file.write(text)
        with _writing(self.path):
            sync_folder(self._staging)
            self._publish()
            sync_folder(self._final.parent)
        return Artifact(self.path, manifest)

    def _publish(self) -> None:
        self._check_output()
        if not os.path.lexists(self._final):
            os.rename(self._staging, self._final)
            return
        try:
            os.rename(self._final, self._aside)
            os.rename(self._staging, self._final)
        except BaseException:
            if not os.path.lexists(self._final):
                os.rename(self._aside, self._final)
            raise
        shutil.rmtree(self._aside, ignore_errors=True)

    def _check_output(self) -> None:
        folder = self._final.parent
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is not a folder", source=self.path, remedy="create it first")
        if not os.path.lexists(self._final):
            return
        if not self._overwrite:
            raise ArtifactError(
                "the output exists already", source=self.path, remedy="remove it, or ask to overwrite it"
            )
        self._check_replaceable()

    def _check_replaceable(self) -> None:
        """Only an artifact, with nothing else in its folder, may be deleted for a new one."""
        remedy = "remove it by hand, or give another output path"
        try:
            tree = parse_object(read_manifest(self._final), self.path)
        except ArtifactError:
            tree = {}
        listed = tree.get("files") if tree.get("format") == FORMAT else None
        if not isinstance(listed, dict):
            raise ArtifactError("the output exists and is no artifact", source=self.path, remedy=remedy)
        with _writing(self.path):
            foreign = sorted(set(os.listdir(self._final)) - {MANIFEST, *listed})
        if foreign:
            raise ArtifactError(
                f"the output holds {foreign[0]!r}, which is not part of the artifact there",
                source=self.path,
                remedy=remedy,
            )

    def _remove_stale(self) -> None:
        """Remove what killed processes left of compiles to the same path."""
        stale = re.compile(re.escape(f".{self._final.name}.") + r"(\d{1,9})-[0-9a-f]{8}\.(partial|old)")
        with _writing(self.path):
            for name in os.listdir(self._final.parent):
                match = stale.fullmatch(name)
                if match and not _is_running(int(match[1])):
                    shutil.rmtree(self._final.parent / name, ignore_errors=True)


_HASHES_BEHIND = 4
"""How many pieces of a file may wait to be hashed, and stay in memory for that."""


class FileWriter:
    """One file of an unfinished artifact, hashed while it is written; on disk when its ``with`` block ends."""

    def __init__(self, path: Path, artifact: Path) -> None:
        self._artifact, self._size, self._digest = artifact, 0, hashlib.sha256()
        # Hashing a large file takes as long as writing it.
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="rlxc-hash")
        self._hashing: deque[Future[None]] = deque()
        with _writing(artifact):
            self._file = open(path, "xb")  # noqa: SIM115 - __exit__ closes it

    def write(self, data: ReadableBuffer | npt.NDArray[Any]) -> None:
        """Append bytes, or those of a contiguous array, which must stay as they are: they are hashed later."""
        view = memoryview(
            cast("ReadableBuffer", data)
        )  # numpy declares its arrays as buffers from Python 3.12 on
        if not view.nbytes:
            return
        view = view.cast("B")
        self._hashing.append(self._hasher.submit(self._digest.update, view))
        with _writing(self._artifact):
            self._file.write(view)
        self._size += len(view)
        self._wait_for_hashes(_HASHES_BEHIND)

    def align(self, multiple: int) -> None:
        """Append zeros up to a multiple of so many bytes."""
        self.write(bytes(-self._size % multiple))

    def tell(self) -> int:
        """The bytes written so far."""
        return self._size

    def entry(self) -> FileEntry:
        """Size and digest of what is written so far."""
        self._wait_for_hashes(0)
        return FileEntry(self._size, self._digest.hexdigest())

    def _wait_for_hashes(self, allowed: int) -> None:
        while len(self._hashing) > allowed:
            self._hashing.popleft().result()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        with _writing(self._artifact), self._file as file:
            if error is None:
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some space, or give an output path on another disk" if full else "give another output path"
        )
        raise ArtifactError(f"cannot be written ({error.strerror})", source=path, remedy=remedy) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, on systems that can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
