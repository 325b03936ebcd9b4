"""``context`` bounds what is made for every position: tables of rope, caches, rings and lists of pages."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parent / "models"))

from tiny import HEAD_DIM, VARIANTS

import rlxc
from rlxc.artifact import BackendName, KvPlan
from rlxc.backends import get_backend
from rlxc.lowering import LoweringOptions, kv_plan, lower_graph
from rlxc.reading import read_model
from rlxc.weights.source import open_model

WINDOW = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers that see a window of 8 positions, and layers that see all of 256."""
    return VARIANTS["gemma3-window"].write(tmp_path_factory.mktemp("context") / "m.gguf")


def plan(model: Path, backend: BackendName, context: int) -> KvPlan:
    with open_model(model) as file:
        graph = read_model(file, context).graph
        return kv_plan(lower_graph(graph, get_backend(backend).features, LoweringOptions(context)))


@pytest.mark.parametrize("context", [1, 7, 64, 200, 256])
def test_no_cache_has_more_positions_than_the_context(
    model: Path, backend: BackendName, context: int
) -> None:
    found = plan(model, backend, context)
    page = found.page_size or 1
    assert (found.context, found.max_step) == (context, context)
    assert {layer.window for layer in found.layers} == {None, WINDOW}
    for layer in found.layers:
        assert layer.capacity <= -(-context // page) * page
    assert found.rollback <= context


def test_list_of_pages_is_as_long_as_the_context_needs(model: Path) -> None:
    pytest.importorskip("tvm")
    widths = {context: plan(model, "tvm", context).table_width for context in (1, 64, 65, 256)}
    assert widths == {1: 1, 64: 1, 65: 2, 256: 4}


def test_rope_tables_and_caches_of_an_onnx_artifact_end_with_the_context(model: Path, tmp_path: Path) -> None:
    sizes = {}
    for context in (32, 256):
        artifact = rlxc.compile(model, tmp_path / f"{context}.rlx", backend="onnx", context=context)
        tables = {
            tensor.name: tuple(tensor.dims)
            for tensor in onnx.load(artifact.file("model.onnx"), load_external_data=False).graph.initializer
            if tensor.name.startswith("rope.")
        }
        # Cosines and sines, of the layers with a window and of those without.
        assert len(tables) == 4
        assert set(tables.values()) == {(context, HEAD_DIM // 2)}
        assert artifact.manifest.options.context == artifact.manifest.kv_cache.context == context
        sizes[context] = artifact.manifest.files["weights.bin"].size
    assert sizes[256] - sizes[32] == 4 * (256 - 32) * HEAD_DIM // 2 * 4
