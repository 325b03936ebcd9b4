"""Which ONNX Runtime a model is for: some of its ops changed on the way to 1.31."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rlxc.errors import UnsupportedError


@dataclass(frozen=True)
class Runtime:
    """A range of versions that run the same models.

    ``has_ring`` tells whether GroupQueryAttention can keep a window in a ring; ``counts_own_key`` whether its window
    includes the query's own key; ``sorts_nothing`` whether TopK can be given no rows, which ends the old one's process;
    ``widths`` how many bits a weight's numbers can have.
    The manifest names the range, and the engine refuses a model for the other.
    """

    name: str
    has_ring: bool
    counts_own_key: bool
    sorts_nothing: bool
    widths: tuple[int, ...]


CURRENT = Runtime(
    "onnxruntime>=1.31", has_ring=True, counts_own_key=True, sorts_nothing=True, widths=(2, 4, 8)
)
FOR_PYTHON_3_10 = Runtime(
    "onnxruntime<1.24", has_ring=False, counts_own_key=False, sorts_nothing=False, widths=(4, 8)
)


def installed_runtime() -> Runtime:
    """The range that the installed ONNX Runtime is in; the current one where none is installed.

    Raises:
        UnsupportedError: it is a version in between, which nobody has checked.
    """
    try:
        major, minor = map(int, version("onnxruntime").split(".")[:2])
    except PackageNotFoundError:
        return CURRENT
    if (major, minor) >= (1, 31):
        return CURRENT
    if (major, minor) < (1, 24):
        return FOR_PYTHON_3_10
    raise UnsupportedError(
        f"onnxruntime {major}.{minor} is not supported", remedy="pip install --upgrade 'onnxruntime>=1.31'"
    )
