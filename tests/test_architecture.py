"""The layout of DESIGN: which part may import which, what each exports, and how the package is put together."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlxc"
LONGEST_FILE = 500
MODULE_NAME = re.compile(r"rlxc(\.\w+)+")

# What each part may import from rlxc, besides itself. A name stands for itself and everything below it.
BASE = {"errors", "dtypes"}
MAY_IMPORT = {
    "errors": set(),
    "dtypes": set(),
    "weights": BASE,
    "ir": BASE,
    "artifact": BASE,
    "vocab": BASE,
    "models": BASE | {"ir", "weights"},
    "passes": BASE | {"ir"},
    "backends": BASE
    | {"ir", "artifact", "weights.fields", "weights.formats", "weights.encode", "weights.encode_keeping"},
    "runtime": BASE | {"artifact", "weights.adapters"},
}
MAY_IMPORT_EVERYTHING = {
    *("__init__", "__main__", "cli"),
    *("compiler", "reading", "lowering", "adapting", "merging", "comparing"),
    *("inspection", "checking", "weight_table", "supported"),
}

# Modules that import what a table in them names; the rules hold for the names in such tables as well.
MAY_COMPUTE = ("__init__", "runtime.engines")

# Where a package with a heavy or optional dependency may be imported.
ONLY_IN = {
    "gguf": ("weights",),
    "safetensors": ("weights",),
    "onnx": ("backends.onnx",),
    "onnxruntime": ("backends.onnx", "runtime.engines.onnxruntime"),
    "tvm": ("backends.tvm", "runtime.engines.tvm"),
    "typer": ("cli",),
    "rich": ("cli",),
}

EXPORTS = {
    "rlxc": ["RlxcError", "__version__", "compare", "compile", "errors", "inspect", "load", "merge"],
    "rlxc.ir": [
        "Alias",
        "Balance",
        "Concat",
        "Dim",
        "Encode",
        "Fold",
        "Graph",
        "Node",
        "Recipe",
        "RopeSpec",
        "Source",
        "TensorType",
        "Value",
        "Weight",
        "WeightLayout",
        "Yarn",
        "parse",
        "show",
        "verify",
    ],
    "rlxc.passes": [
        "Change",
        "ChooseLoraStrategy",
        "ChooseWeightLayout",
        "Delta",
        "LoraMode",
        "NoMatch",
        "Pass",
        "PassReport",
        "PassResult",
        "PipelineResult",
        "Replacement",
        "WeightChanges",
        "default_passes",
        "run_passes",
    ],
    "rlxc.runtime": [
        "Batch",
        "Completion",
        "Draft",
        "DraftHead",
        "Drafter",
        "Event",
        "HeadDrafter",
        "KvSnapshot",
        "LayerKv",
        "LoraStack",
        "ModelDrafter",
        "NgramDrafter",
        "Piece",
        "Request",
        "SamplingOptions",
        "Scheduler",
        "Session",
        "SessionAdapters",
        "StopReason",
        "Stream",
        "TargetModule",
        "load",
    ],
}


def source_files() -> dict[str, Path]:
    """Every module below ``rlxc``, as ``passes.base`` or ``backends.onnx.__init__``, and its file."""
    folders = [PACKAGE, PACKAGE / "passes", PACKAGE / "runtime"]
    files = {file for folder in folders for file in folder.rglob("*.py")}
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in sorted(files)}


def imported_names(code: str) -> Iterator[str]:
    """The full name of everything imported anywhere in `code`: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from () if isinstance(node.args[0], ast.Constant) else ("<computed>",)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and MODULE_NAME.fullmatch(node.value)
        ):
            yield node.value


def within(name: str, parts: set[str] | tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def violations(module: str, code: str) -> list[str]:
    """What `code`, as module `module` of rlxc, imports against the rules."""
    part = module.split(".")[0]
    free = part in MAY_IMPORT_EVERYTHING
    found = []
    for name in imported_names(code):
        top, _, inside = name.partition(".")
        if top == "":
            found.append(f"{module}: relative import of {name}")
        elif name == "<computed>" and not within(module, MAY_COMPUTE):
            found.append(f"{module}: import of a computed name")
        elif top == "rlxc" and not free and not within(inside, MAY_IMPORT[part] | {part}):
            found.append(f"{module}: {name}")
        elif top in ONLY_IN and not within(module, ONLY_IN[top]):
            found.append(f"{module}: {name} outside of {', '.join(ONLY_IN[top])}")
    return found


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", source_files())
def test_module_imports_only_what_its_part_may(module: str) -> None:
    assert violations(module, source_files()[module].read_text(encoding="utf-8")) == []


def test_every_part_has_a_row_in_the_import_table() -> None:
    parts = {module.split(".")[0] for module in source_files()}
    assert parts == MAY_IMPORT.keys() | MAY_IMPORT_EVERYTHING


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("passes.fold", "from rlxc.weights import gguf"),
        ("passes.fold", "def f():\n    import rlxc.backends.onnx"),
        ("runtime.session", "from rlxc.ir import Graph"),
        ("runtime.session", "from rlxc.weights.gguf import open_gguf"),
        ("runtime.session", "import importlib\nimportlib.import_module('rlxc.compiler')"),
        ("runtime.session", "import_module(name)"),
        ("runtime.engines.__init__", "_ENGINES = {'onnx': 'rlxc.backends.onnx'}"),
        ("backends.onnx.build", "from rlxc.weights import FORMATS"),
        ("models.llama", "from ..compiler import compile"),
        ("models.llama", "import rlxc"),
        ("ir.graph", "import onnx.helper"),
        ("runtime.session", "from onnxruntime import InferenceSession"),
        ("compiler", "import tvm"),
    ],
)
def test_the_checker_finds_a_forbidden_import(module: str, code: str) -> None:
    assert len(violations(module, code)) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("passes.fold", "from rlxc.ir import Graph\nfrom rlxc.passes.base import Pass\nimport numpy"),
        ("backends.onnx.build", "from rlxc.weights.formats import FORMATS\nimport onnx"),
        ("runtime.engines.onnxruntime", "import onnxruntime\nfrom rlxc.artifact import Manifest"),
        ("compiler", "from rlxc.backends.onnx import build"),
    ],
)
def test_the_checker_accepts_an_allowed_import(module: str, code: str) -> None:
    assert violations(module, code) == []


@pytest.mark.parametrize("package", EXPORTS)
def test_exported_names_are_exactly_these(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == EXPORTS[package]


@pytest.mark.parametrize("package", EXPORTS)
def test_every_exported_name_exists(package: str) -> None:
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_dir_of_the_package_lists_its_lazy_names() -> None:
    rlxc = importlib.import_module("rlxc")
    assert set(rlxc.__all__) <= set(dir(rlxc))


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'rlxc' has no attribute 'decompile'"):
        importlib.import_module("rlxc").decompile  # noqa: B018  (the lookup is the test)


@pytest.mark.parametrize("folder", ["passes", "runtime"])
def test_top_level_folder_is_linked_into_the_package(folder: str) -> None:
    link = PACKAGE / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


@pytest.mark.parametrize("folder", ["passes", "runtime"])
def test_import_under_the_folder_s_own_name_is_refused(folder: str) -> None:
    error = run_python(f"import {folder}").stderr.splitlines()[-1:]
    assert [line for line in error if line.startswith("ImportError") and f"rlxc.{folder}" in line]


def test_importing_the_package_loads_no_dependency() -> None:
    code = "import sys; old = set(sys.modules); import rlxc; print(*{m.split('.')[0] for m in set(sys.modules) - old})"
    loaded = set(run_python(code).stdout.split())
    assert "rlxc" in loaded
    assert loaded - {"rlxc"} <= set(sys.stdlib_module_names)


def test_the_runtime_needs_no_compiler() -> None:
    code = "import sys, rlxc.runtime; print(*{m for m in sys.modules if m.startswith(('rlxc.', 'onnx.', 'gguf'))})"
    loaded = run_python(code).stdout.split()
    assert "rlxc.runtime" in loaded
    assert not [
        m for m in loaded if not within(m, ("rlxc.runtime", "rlxc.artifact", "rlxc.errors", "rlxc.dtypes"))
    ]


def test_files_are_short_enough_to_read() -> None:
    lines = {
        module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in source_files().items()
    }
    assert {module: count for module, count in lines.items() if count > LONGEST_FILE} == {}
