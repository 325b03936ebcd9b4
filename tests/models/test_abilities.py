"""What is said of an architecture's abilities is what its tiny models show, whose logits are llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from oracle import OpenModel
from quirks import QUIRKS
from tiny import VARIANTS

from rlxc.ir import Graph
from rlxc.models import ARCHITECTURES
from rlxc.models.abilities import abilities, features_of, ropes_of
from rlxc.weights.gguf import open_gguf

FOLDERS = "windows of folders"


@pytest.fixture(scope="module")
def graphs(
    open_tiny: Callable[[str], OpenModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Graph]]:
    """The graphs of all models that are compared with llama.cpp, by architecture."""
    path = tmp_path_factory.mktemp("quirks") / "model.gguf"
    found: dict[str, list[Graph]] = {name: [] for name in ARCHITECTURES}
    for name, tiny in VARIANTS.items():
        found[tiny.architecture].append(open_tiny(name).graph)
    for quirk in QUIRKS.values():
        with open_gguf(quirk.write(path)) as file:
            found[quirk.model.architecture].append(OpenModel(file).graph)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_that_are_compared_with_llama_cpp(
    architecture: str, graphs: dict[str, list[Graph]]
) -> None:
    shown = {feature for graph in graphs[architecture] for feature in features_of(graph)}
    assert {*abilities(architecture).features} - {FOLDERS} == shown


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_rope_scaling_is_forgotten(architecture: str, graphs: dict[str, list[Graph]]) -> None:
    shown = {rope for graph in graphs[architecture] for rope in ropes_of(graph)}
    assert shown <= {*abilities(architecture).ropes}


def test_every_rope_scaling_is_compared_with_llama_cpp_s(graphs: dict[str, list[Graph]]) -> None:
    shown = {rope for of_one in graphs.values() for graph in of_one for rope in ropes_of(graph)}
    assert {rope for name in ARCHITECTURES for rope in abilities(name).ropes} == shown


def test_what_a_definition_refuses_is_no_ability() -> None:
    assert "LongRoPE" not in abilities("gpt-oss").ropes  # although it reads factors
    assert "partial" not in abilities("gpt-oss").ropes
    assert "experts" not in abilities("granite").features  # although it reads how many


def test_windows_that_only_folders_have_are_told_apart() -> None:
    assert FOLDERS in abilities("phi3").features
    assert {"windows", FOLDERS} & {*abilities("gemma2").features} == {"windows"}


def test_models_are_named() -> None:
    for name in ARCHITECTURES:
        about = abilities(name).about
        assert about.endswith(".") and len(about) > 20, name
