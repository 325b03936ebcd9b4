"""Opening an artifact: every file is there, has its size and its digest."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rlxc.artifact.manifest import MANIFEST, Manifest
from rlxc.errors import ArtifactError

_LARGEST_MANIFEST = 64 << 20
_HASH_CHUNK = 1 << 20  # larger ones fall out of the cache between reading and hashing
_COMPILE_FIRST = "compile a model: rlxc compile MODEL -o OUT.rlx"
_DAMAGED = "the artifact is damaged: copy it again, or compile the model again"


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Artifact:
        """Check everything but the digests, which :meth:`start_verification` or :meth:`verify` compare.

        Raises:
            ArtifactError: naming the file or field that is not as it must be.
        """
        root = Path(path)
        if not os.path.lexists(root):
            raise ArtifactError("no such artifact", source=root, remedy=_COMPILE_FIRST)
        if not root.is_dir():
            raise ArtifactError("not an artifact, which is a folder", source=root, remedy=_COMPILE_FIRST)
        manifest = Manifest.from_json(read_manifest(root), source=root)
        for name, entry in manifest.files.items():
            size = _regular_size(root, name)
            if size != entry.size:
                raise ArtifactError(
                    f"{name} has {size} bytes, its manifest says {entry.size}", source=root, remedy=_DAMAGED
                )
        return cls(root, manifest)

    def file(self, name: str) -> Path:
        """Where a file of the artifact is.

        Raises:
            ArtifactError: the manifest does not name it.
        """
        if name not in self.manifest.files:
            raise ArtifactError(
                f"the artifact has no {name}", source=self.path, remedy="compile the model again"
            )
        return self.path / name

    def start_verification(self) -> Verification:
        """Start to compare every file with its digest, in a thread."""
        return Verification(self)

    def verify(self) -> None:
        """Compare every file with its digest.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        with self.start_verification() as verification:
            verification.wait()


class Verification:
    """Digests compared in a thread while the model loads, small files first: code is checked before weights.

    Files are read, not mapped, so that their pages stay out of this process's resident memory.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._root = artifact.path
        self._stop = threading.Event()
        files = sorted(artifact.manifest.files.items(), key=lambda item: item[1].size)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rlxc-verify")
        self._checks = {name: self._pool.submit(self._check, name, entry.sha256) for name, entry in files}
        self._pool.shutdown(wait=False)  # the thread ends with its work

    def wait(self, *names: str) -> None:
        """Wait until the named files, or all of them, are compared.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        for name in names or self._checks:
            self._checks[name].result()

    def close(self) -> None:
        """Give up what is not compared yet, and wait for the thread to end."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Verification:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, name: str, expected: str) -> None:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_CHUNK))
        with _reading(self._root, name), open(self._root / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if self._stop.is_set():
                    raise CancelledError
                digest.update(buffer[:count])
        if digest.hexdigest() != expected:
            raise ArtifactError(
                f"{name} does not have the sha256 in its manifest", source=self._root, remedy=_DAMAGED
            )


def read_manifest(root: Path) -> bytes:
    """The bytes of an artifact's manifest.

    Raises:
        ArtifactError: there is none, or it is too large to be one.
    """
    size = _regular_size(root, MANIFEST)
    if size > _LARGEST_MANIFEST:
        raise ArtifactError(f"{MANIFEST} has {size} bytes, which is not that of an artifact", source=root)
    with _reading(root, MANIFEST):
        return (root / MANIFEST).read_bytes()


def _regular_size(root: Path, name: str) -> int:
    """The size of a plain file: not a link that leads elsewhere, not a pipe that never ends."""
    with _reading(root, name):
        status = os.lstat(root / name)
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{name} is not a plain file", source=root, remedy="put the file itself there")
    return status.st_size


@contextmanager
def _reading(root: Path, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        remedy = "give the path of an artifact" if name == MANIFEST else _DAMAGED
        raise ArtifactError(f"{name} is missing", source=root, remedy=remedy) from None
    except OSError as error:
        raise ArtifactError(f"{name} cannot be read ({error.strerror})", source=root) from error
