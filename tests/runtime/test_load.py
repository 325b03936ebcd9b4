"""Loading: which engine, how many threads, and what is refused before anything runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rlxc.runtime.threads
from rlxc.artifact import Artifact, TargetFacts
from rlxc.errors import ArtifactError, OptionError, SessionError
from rlxc.runtime import load
from rlxc.runtime.threads import choose_threads

MakeArtifact = Callable[..., Artifact]


def test_missing_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact"):
        load(tmp_path / "out.rlx")


def test_damaged_model_is_refused_before_it_is_loaded(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    artifact.file("model.onnx").write_bytes(b"GRAPH")
    with pytest.raises(ArtifactError, match=r"model\.onnx does not have the sha256"):
        load(artifact.path)


def test_model_that_the_engine_cannot_read_is_refused(make_artifact: MakeArtifact) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(SessionError, match="cannot load the model"):
        load(make_artifact().path)


def test_missing_engine_package_says_what_to_install(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rlxc.runtime.engines.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        SessionError, match="runs on onnxruntime, which is not installed; pip install onnxruntime"
    ):
        load(make_artifact().path)


def test_other_missing_module_is_not_taken_for_the_engine_s(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rlxc.runtime.engines.onnxruntime", None)
    with pytest.raises(ModuleNotFoundError):
        load(make_artifact().path)


def test_artifact_for_an_unknown_backend_is_refused(make_artifact: MakeArtifact) -> None:
    plain = make_artifact()
    target = TargetFacts("abacus", "abacus>=1.0")
    other = make_artifact("abacus.rlx", manifest=replace(plain.manifest, target=target))
    with pytest.raises(SessionError, match="compiled for 'abacus', which this rlxc cannot run; upgrade"):
        load(other.path)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", (os.cpu_count() or 1) + 1])
def test_impossible_thread_count_is_refused(make_artifact: MakeArtifact, threads: Any) -> None:
    with pytest.raises(OptionError, match=f"threads must be an integer in 1..{os.cpu_count()}"):
        load(make_artifact().path, threads=threads)


def test_thread_count_is_taken_as_given() -> None:
    assert choose_threads(os.cpu_count()) == os.cpu_count()


@pytest.mark.parametrize(
    ("available", "siblings", "cores"),
    [
        ({0, 1, 2, 3}, ["0,2", "1,3", "0,2", "1,3"], 2),
        ({0, 2}, ["0,2", "1,3", "0,2", "1,3"], 1),
        ({1, 2}, ["0,2", "1,3", "0,2", "1,3"], 2),
        ({0, 1, 2}, [], 3),
    ],
    ids=["two threads a core", "one core allowed", "half of each core", "unknown topology"],
)
def test_default_is_one_thread_for_each_core_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: set[int], siblings: list[str], cores: int
) -> None:
    for processor, list_ in enumerate(siblings):
        (tmp_path / str(processor)).write_text(list_)
    monkeypatch.setattr(rlxc.runtime.threads, "_SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: available, raising=False)
    assert choose_threads(None) == cores


@pytest.mark.parametrize("requirement", ["onnxruntime>=99.0", "onnxruntime<1.0", "abacus>=1.0"])
def test_model_for_another_onnxruntime_is_refused(make_artifact: MakeArtifact, requirement: str) -> None:
    plain = make_artifact()
    target = TargetFacts("onnx", requirement)
    other = make_artifact("other.rlx", manifest=replace(plain.manifest, target=target))
    with pytest.raises(SessionError, match=f"compiled for {requirement}, this is onnxruntime"):
        load(other.path)


@pytest.mark.parametrize("requirement", ["onnxruntime>=1.0", "onnxruntime<99.0"])
def test_range_that_this_onnxruntime_is_in_is_accepted(make_artifact: MakeArtifact, requirement: str) -> None:
    plain = make_artifact()
    target = TargetFacts("onnx", requirement)
    other = make_artifact("other.rlx", manifest=replace(plain.manifest, target=target))
    # The model itself is no ONNX file: getting as far as reading it shows that the range was met.
    with pytest.raises(SessionError, match="cannot load the model"):
        load(other.path)
