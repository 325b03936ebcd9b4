"""What a user installs: the wheel, also when it is built from the sdist, holds the whole package as real files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


def build(source: Path, output: Path, *kinds: str) -> None:
    """Build `source` with the tools of this environment, so without network."""
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(output), str(source)]
    result = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy, because the build writes into its source folder.
    checkout = tmp_path_factory.mktemp("checkout") / "rlxc"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=IGNORED)
    output = tmp_path_factory.mktemp("sdist")
    build(checkout, output, "--sdist", "--wheel")
    return next(output.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel built from the checkout."""
    return next(sdist.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    output = tmp_path_factory.mktemp("wheel")
    build(next(folder.iterdir()), output, "--wheel")
    return next(output.glob("*.whl"))


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    sources = {
        file for folder in ("rlxc", "rlxc/passes", "rlxc/runtime") for file in (ROOT / folder).rglob("*.py")
    }
    expected = {str(file.relative_to(ROOT)) for file in sources} | {"rlxc/py.typed"}
    assert files_in(wheel) == expected


def test_wheel_from_the_sdist_holds_the_same_files(wheel: Path, wheel_of_sdist: Path) -> None:
    assert files_in(wheel_of_sdist) == files_in(wheel)


def test_sdist_holds_no_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive if not (member.isreg() or member.isdir())] == []


@pytest.mark.parametrize("module", ["rlxc", "rlxc.passes", "rlxc.runtime", "rlxc.compiler", "rlxc.cli"])
def test_wheel_is_importable_outside_of_the_checkout(module: str, wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # Neither the current folder nor an editable install may stand in for the wheel.
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {module} as m; print(m.__file__)"
    result = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)
