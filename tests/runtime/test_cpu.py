"""Which library a CPU gets: the best one that it can run, or a list of what it lacks."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace

import pytest

import rlxc.artifact.cpu
import rlxc.runtime.cpu
from rlxc.artifact import Artifact, Library
from rlxc.artifact.cpu import cpu_features, machine, parse_cpuinfo
from rlxc.errors import SessionError
from rlxc.runtime.cpu import choose_library

LIBRARIES = (
    Library("model.fast.o", "fast", "x86_64", ("avx2", "avx512f", "avx512_vnni"), 64, 1, 0, 0),
    Library("model.arm.o", "arm", "aarch64", ("asimddp",), 64, 1, 0, 0),
    Library("model.good.o", "good", "x86_64", ("avx2",), 64, 1, 0, 0),
)


@pytest.fixture
def artifact(make_artifact: Callable[..., Artifact]) -> Artifact:
    whole = make_artifact()
    target = replace(whole.manifest.target, libraries=LIBRARIES)
    return replace(whole, manifest=replace(whole.manifest, target=target))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Pretends to run on a machine with these features, separated by spaces."""

    def pretend(name: str, features: str) -> None:
        monkeypatch.setattr(rlxc.runtime.cpu, "machine", lambda: name)
        monkeypatch.setattr(rlxc.runtime.cpu, "cpu_features", lambda: frozenset(features.split()))

    return pretend


@pytest.mark.parametrize(
    ("name", "features", "file"),
    [
        ("x86_64", "sse avx2 avx512f avx512_vnni", "model.fast.o"),
        ("x86_64", "sse avx2 avx512f", "model.good.o"),
        ("aarch64", "asimd asimddp", "model.arm.o"),
    ],
)
def test_first_library_that_the_cpu_can_run_is_chosen(
    artifact: Artifact, on_cpu: Callable[[str, str], None], name: str, features: str, file: str
) -> None:
    on_cpu(name, features)
    assert choose_library(artifact).file == file


def test_cpu_without_a_library_is_told_what_each_needs(
    artifact: Artifact, on_cpu: Callable[[str, str], None]
) -> None:
    on_cpu("x86_64", "sse avx512f")
    with pytest.raises(SessionError) as refused:
        choose_library(artifact)
    assert str(refused.value).startswith(
        f"{artifact.path}: no library for this x86_64 CPU (fast needs avx2, avx512_vnni; "
        "arm needs a CPU of aarch64; good needs avx2); compile the model for it: `--target native`"
    )


def test_features_of_another_architecture_do_not_count(
    artifact: Artifact, on_cpu: Callable[[str, str], None]
) -> None:
    on_cpu("riscv64", "avx2 asimddp")
    with pytest.raises(SessionError, match="good needs a CPU of x86_64"):
        choose_library(artifact)


def test_artifact_without_libraries_is_refused(make_artifact: Callable[..., Artifact]) -> None:
    with pytest.raises(SessionError, match="there are none"):
        choose_library(make_artifact())


def test_x86_flags_are_those_that_all_cpus_have() -> None:
    text = (
        "processor\t: 0\nflags\t\t: fpu avx2 fma\nvmx flags\t: ept\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n"
    )
    assert parse_cpuinfo(text) == {"fpu", "avx2"}


def test_arm_features_are_read() -> None:
    assert parse_cpuinfo("processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n") == {
        "fp",
        "asimd",
        "asimddp",
    }


def test_nothing_is_known_of_a_cpu_that_lists_no_features() -> None:
    assert parse_cpuinfo("processor : 0\nisa : rv64imafdc\n") == frozenset()


def test_system_without_cpuinfo_has_no_known_features(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(rlxc.artifact.cpu, "_CPUINFO", tmp_path_factory.mktemp("empty") / "cpuinfo")
    assert cpu_features.__wrapped__() == frozenset()


@pytest.mark.parametrize(
    ("said", "name"),
    [("x86_64", "x86_64"), ("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")],
)
def test_architecture_has_one_name_on_every_system(
    monkeypatch: pytest.MonkeyPatch, said: str, name: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: said)
    assert machine() == name
