"""What every kind of model file offers, so that nothing after it asks which kind it was.

Metadata has GGUF's keys, tensors have GGUF's names, shapes and order of rows: a Hugging Face folder is translated as
it is opened (see `rlxc.weights.huggingface`).
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.weights.gguf import open_gguf
from rlxc.weights.gguf_header import MetaValue
from rlxc.weights.huggingface import open_folder


class TensorFacts(Protocol):
    """A tensor of a model: ``shape`` is ``[out, in]`` or ``[n]``, ``nbytes`` what `ModelFile.data` gives."""

    @property
    def name(self) -> str:
        """Its name in GGUF files."""

    @property
    def dtype(self) -> DType:
        """Its element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions, rows first."""

    @property
    def nbytes(self) -> int:
        """Its size."""


class ModelFile(Protocol):
    """An open model, which is mapped: do not change its files meanwhile."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def metadata(self) -> Mapping[str, MetaValue]:
        """Key-value pairs, as a GGUF file has them."""

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """Every tensor, by name."""

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, ``uint8 [nbytes]``, which outlive `close`.

        Raises:
            WeightError: there is no such tensor, or the model is closed.
        """

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that the model is made of.

        Raises:
            FormatError: a file is gone or has changed since it was opened.
            WeightError: the model is closed, by another thread perhaps.
        """

    def check_unchanged(self) -> None:
        """Check that the bytes are still those that were opened.

        Raises:
            FormatError: a file is gone or has changed since it was opened.
        """

    def close(self) -> None:
        """Let go of the mapping."""

    def __enter__(self) -> ModelFile: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_model(path: str | PathLike[str], *, allow_foreign: bool = False) -> ModelFile:
    """Open a GGUF file (of a split model, the first) or a Hugging Face folder.

    Args:
        path: the file or folder.
        allow_foreign: as of `open_gguf`.

    Raises:
        FormatError: a file is missing, damaged or cut short.
        UnsupportedError: something in it is not implemented.
        ModelError: configuration and tensors of a folder do not make up a model.
    """
    return open_folder(path) if Path(path).is_dir() else open_gguf(path, allow_foreign=allow_foreign)
