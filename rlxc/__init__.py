"""rlxc compiles language models into self-contained artifacts, and runs them.

    import rlxc

    rlxc.compile("model.gguf", "model.rlx")
    print(rlxc.load("model.rlx").generate("The capital of France is").text)

The names below are looked up when first used: importing `rlxc` alone takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlxc import errors as errors
    from rlxc.comparing import compare as compare
    from rlxc.compiler import compile as compile
    from rlxc.errors import RlxcError as RlxcError
    from rlxc.inspection import inspect as inspect
    from rlxc.merging import merge as merge
    from rlxc.runtime import load as load

__version__ = "0.1.0"

_HOMES = {
    "RlxcError": "rlxc.errors",
    "compare": "rlxc.comparing",
    "compile": "rlxc.compiler",
    "inspect": "rlxc.inspection",
    "load": "rlxc.runtime",
    "merge": "rlxc.merging",
}

__all__ = ["RlxcError", "__version__", "compare", "compile", "errors", "inspect", "load", "merge"]


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("rlxc.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'rlxc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
