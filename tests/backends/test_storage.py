"""What backends say of the weights that they would store, without reading one, against what they write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from tiny import VARIANTS

from rlxc.artifact import BackendName
from rlxc.backends import get_backend
from rlxc.backends.onnx.external import Region, WeightsFile
from rlxc.backends.onnx.planning import plan_weights
from rlxc.backends.onnx.weights import write_weights
from rlxc.ir import Graph
from rlxc.lowering import LoweringOptions, lower_graph
from rlxc.reading import read_model
from rlxc.weights.source import ModelFile, open_model

MODELS = ("llama-formats", "qwen3moe-formats", "gpt-oss-odd", "llama-untied")
"""Every format, experts in any of them, sizes that are no whole tiles, a table that is only looked up."""


class Sink(BytesIO):
    """A file in memory."""

    def write(self, data: Any) -> int:
        return super().write(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes())

    def align(self, multiple: int) -> None:
        self.write(bytes(-self.tell() % multiple))


@contextmanager
def lowered(
    name: str, backend: BackendName, folder: Path, target: str = "native"
) -> Iterator[tuple[ModelFile, Graph]]:
    with open_model(VARIANTS[name].write(folder / "model.gguf")) as file:
        model = read_model(file)
        features = get_backend(backend).features_for(target, "int8")
        yield file, lower_graph(model.graph, features, LoweringOptions(model.context)).graph


def regions(stored: object) -> list[Region]:
    """Where a weight lies in an ONNX artifact, piece by piece."""
    pieces = [getattr(stored, each.name) for each in fields(stored)]  # type: ignore[arg-type]
    return [piece for piece in pieces if isinstance(piece, Region)]


@pytest.mark.parametrize("name", MODELS)
def test_plan_of_an_onnx_artifact_is_what_is_written(name: str, tmp_path: Path) -> None:
    with lowered(name, "onnx", tmp_path) as (file, graph):
        written = write_weights(graph, file.data, WeightsFile("weights.bin", Sink()), lambda weight: None)
        planned = plan_weights(graph)
        said = get_backend("onnx").storage(graph, "int8")
    assert list(planned) == list(written)
    for weight, stored in written.items():
        places = {
            each.name: Region(0, place.length)
            for each in fields(stored)
            if isinstance(place := getattr(stored, each.name), Region)
        }
        assert replace(stored, **places) == planned[weight], weight
        assert said[weight].nbytes == sum(region.length for region in regions(stored)), weight


@pytest.mark.parametrize("target", ["x86-64-v4-vnni", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_a_tvm_artifact_are_those_of_its_file(name: str, target: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from rlxc.backends.tvm.weights import WeightsFile as TvmFile

    sink = Sink()
    with lowered(name, "tvm", tmp_path, target) as (file, graph):
        TvmFile(graph).write(file.data, sink, lambda weight: None)
        said = get_backend("tvm").storage(graph, "int8")
    raw: npt.NDArray[np.uint8] = np.frombuffer(sink.getvalue(), np.uint8)
    header = json.loads(raw[8 : 8 + int(raw[:8].view("<u8")[0])].tobytes())
    ends = {weight: entry["data_offsets"] for weight, entry in header.items() if weight != "__metadata__"}
    assert said.keys() == ends.keys()
    for weight, (start, end) in ends.items():
        # Each starts on a cache line.
        assert end - start == -(-said[weight].nbytes // 64) * 64, weight


TARGETS: dict[BackendName, str] = {"tvm": "x86-64-v4-vnni", "onnx": "native"}
ROUTES = {
    "tvm": {
        "Q4_K": "int8, 4 bits, tiles of 16, gather",
        "Q6_K": "int8, 4+2 bits, tiles of 16, gather",
        "IQ2_XS": "int8 through a codebook, 2+1 bits, tiles of 16, gather",
        "MXFP4": "int8 through a codebook, 4 bits, tiles of 16, gather",
        "Q1_0": "int8, 1 bit, tiles of 16, gather",
        "F16": "f32 from f16, gather",
        "F32": "f32, gather",
    },
    "onnx": {
        "Q4_K": "MatMulNBits and GatherBlockQuantized 4 bits, blocks of 32, minimums apart",
        "Q6_K": "MatMulNBits and GatherBlockQuantized 8 bits, blocks of 16",
        "MXFP4": "MatMulNBits and GatherBlockQuantized 8 bits, blocks of 32",
        "F16": "MatMul and Gather f16",
    },
}


@pytest.mark.parametrize(
    ("backend", "form", "route"),
    [(backend, form, route) for backend, routes in ROUTES.items() for form, route in routes.items()],
)
def test_route_of_a_tied_table(backend: BackendName, form: str, route: str, tmp_path: Path) -> None:
    if backend == "tvm":
        pytest.importorskip("tvm")
    tiny = replace(VARIANTS["llama-plain"], tensor_types=form)
    with open_model(tiny.write(tmp_path / "model.gguf")) as file:
        model = read_model(file)
        engine = get_backend(backend)
        features = engine.features_for(TARGETS[backend], "int8")
        graph = lower_graph(model.graph, features, LoweringOptions(model.context)).graph
        assert engine.storage(graph, "int8")["token_embd.weight"].route == route


@pytest.mark.parametrize(
    ("target", "route"),
    [
        ("x86-64-v3", "int8 through a codebook, 2+1 bits, tiles of 8, gather"),
        ("x86-64", "int8, 8 bits, tiles of 16, gather"),
    ],
)
def test_route_shows_the_layout_that_a_target_was_given(target: str, route: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    tiny = replace(VARIANTS["llama-plain"], tensor_types="IQ2_XS")
    with open_model(tiny.write(tmp_path / "model.gguf")) as file:
        model, engine = read_model(file), get_backend("tvm")
        features = engine.features_for(target, "int8")
        graph = lower_graph(model.graph, features, LoweringOptions(model.context)).graph
        assert engine.storage(graph, "int8")["token_embd.weight"].route == route


def test_exact_activations_take_the_exact_route(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    with lowered("llama-untied", "tvm", tmp_path, "x86-64-v4") as (_, graph):
        routes = get_backend("tvm").storage(graph, "float32")
    assert routes["output.weight"].route == "f32, 4+1 bits, tiles of 16"
    assert routes["token_embd.weight"].route == "gather, 4+1 bits, tiles of 16"
    assert routes["output_norm.weight"].route == "f32"
