"""Graphs on random packed tensors, run through a backend and by the interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from rlxc.artifact import (
    Artifact,
    ArtifactWriter,
    BackendName,
    KvLayer,
    KvPlan,
    LoraPlan,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
)
from rlxc.artifact.kv import row_bytes
from rlxc.backends import BuildOptions, get_backend
from rlxc.backends.onnx import OnnxBackend
from rlxc.backends.recipes import Losses
from rlxc.dtypes import DType
from rlxc.ir import Graph, Node, TensorType, Value, interp, parse
from rlxc.ir.ops import GroupQueryAttention
from rlxc.runtime.engines import Engine, Mix, find_engine

# What the tests of all backends share lies beside this file.
sys.path.insert(0, str(Path(__file__).parent))

from random_adapters import Stack, split_graph, stack_feeds
from random_tensors import RandomTensors

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class FolderWriter:
    """An artifact writer's part that backends use, on a plain folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> FolderFile:
        return FolderFile(self.folder / name)


class FolderFile:
    def __init__(self, path: Path) -> None:
        self.stream = path.open("wb")

    def __enter__(self) -> FolderFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()

    def write(self, data: Array) -> None:
        self.stream.write(np.ascontiguousarray(data).tobytes())

    def tell(self) -> int:
        return self.stream.tell()

    def align(self, multiple: int) -> None:
        self.stream.write(b"\0" * (-self.stream.tell() % multiple))


@dataclass(frozen=True)
class Built:
    """A graph built by the ONNX backend, beside its tensors."""

    graph: Graph
    tensors: RandomTensors
    folder: Path
    losses: Losses = field(default_factory=Losses)

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.folder / "model.onnx", load_external_data=False)

    def region(self, initializer: str) -> Array:
        """An initializer's values, read from the weights file with numpy alone."""
        tensor = next(t for t in self.model.graph.initializer if t.name == initializer)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count, offset = int(entries["length"]) // dtype.itemsize, int(entries["offset"])
        return np.fromfile(self.folder / entries["location"], dtype, count, offset=offset).reshape(
            tensor.dims
        )

    def open(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return ort.InferenceSession(self.folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Arrays, session: ort.InferenceSession | None = None) -> dict[str, Array]:
        """The graph's outputs by name; ``past_length`` becomes the mask that stands for it."""
        fed = {name: array for name, array in feeds.items() if name != "past_length"}
        if "past_length" in feeds:
            total = int(feeds["past_length"]) + next(a.shape[1] for a in fed.values() if a.ndim in (2, 3))
            fed["attention_mask"] = np.ones((1, total), np.int64)
        outputs = list(self.graph.outputs)
        return dict(zip(outputs, (session or self.open()).run(outputs, fed)))

    def interpret(self, feeds: Arrays) -> dict[str, Array]:
        """The oracle's outputs for the same tensors."""
        return interp.run(self.graph, feeds, self.tensors.decoded.__getitem__)


Build = Callable[..., Built]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """``build(ir_text, activations="float32", context=64, folder="built")``."""

    def build_(text: str, activations: str = "float32", context: int = 64, folder: str = "built") -> Built:
        graph = parse(text)
        built = Built(graph, RandomTensors(graph, seed=0), tmp_path / folder)
        built.folder.mkdir()
        options = BuildOptions(activations, "native", KvPlan(context, context, 0, None, 0, ()))
        read = built.tensors.packed.__getitem__
        writer = FolderWriter(built.folder)
        OnnxBackend().build(graph, read, writer, options, lambda name: None, built.losses)
        return built

    return build_


# --- both backends ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A graph with the inputs and outputs of a model, built by a backend and loaded by its engine."""

    graph: Graph
    tensors: RandomTensors
    artifact: Artifact
    engine: Engine[Any, Any]
    plan: LoraPlan | None

    def step(
        self, cache: Any, ids: Sequence[int], rows: Sequence[int] | None = None, mix: Mix[Any] = ()
    ) -> Array:
        """The logits of these rows, of all by default."""
        return self.step_together([cache], [ids], rows, [mix])[0]

    def step_together(
        self,
        caches: Sequence[Any],
        ids: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
        mixes: Sequence[Mix[Any]] = (),
    ) -> Array:
        """The logits ``[B, R, vocab]`` of a step of several sequences."""
        wanted = np.arange(len(ids[0])) if rows is None else np.array(rows, np.int64)
        return self.engine.step(caches, np.array(ids, np.int64), wanted, mixes).values

    def run(self, ids: Sequence[int], rows: Sequence[int] | None = None, mix: Mix[Any] = ()) -> Array:
        """The logits of a sequence's first tokens."""
        return self.step(self.engine.new_cache(), ids, rows, mix)

    def interpret(self, ids: Sequence[int], stack: Stack = ()) -> Array:
        """The oracle's logits of a sequence's first tokens."""
        feeds: dict[str, Array] = {"input_ids": np.array([ids]), "logit_rows": np.arange(len(ids))}
        for value in self.graph.inputs:
            if value.name.startswith("past_key_values"):
                feeds[value.name] = np.zeros((1, *map(int, value.type.shape[1:])), np.float32)
        feeds["past_length"] = np.array(0, np.int32)
        if self.plan is not None:
            feeds |= stack_feeds(self.plan, [stack])
        feeds = {value.name: feeds[value.name] for value in self.graph.inputs}
        return interp.run(self.graph, feeds, self.tensors.decoded.__getitem__)["logits"][0]


Load = Callable[..., Loaded]


@pytest.fixture(scope="session")
def load_graph(backend: BackendName, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """``load_graph(ir_text, activations="float32", lora=())``, once on each backend, with steps of up to 16 tokens.

    Caches are linear in the text, and lie in pages where the backend has them. ``lora`` names the matrices that take
    adapters.
    """
    folder = tmp_path_factory.mktemp("graphs")
    loaded: list[Loaded] = []

    @cache
    def load(text: str, activations: Any = "float32", lora: tuple[str, ...] = ()) -> Loaded:
        graph, made = parse(text), get_backend(backend)
        lora_plan = None
        if lora:
            dtype = made.features.rounded_lora if activations == "int8" else DType.F32
            graph, lora_plan = split_graph(graph, lora, dtype)
        page_size = made.features.page_size
        plan = _plan(graph, page_size)
        tensors = RandomTensors(graph, seed=0)
        options = BuildOptions(activations, "native", plan, lora_plan)
        with ArtifactWriter(folder / f"{len(loaded)}.rlx") as writer:
            read = tensors.packed.__getitem__
            built = graph if page_size is None else _in_pages(graph, plan)
            libraries = made.build(built, read, writer, options, lambda name: None)
            vocab = int(graph.types["logits"].shape[-1])
            manifest = Manifest(
                rlxc="0.1.0",
                model=ModelFacts("graph", "random", "0" * 64, len(plan.layers), 1, 1, vocab, plan.context),
                target=TargetFacts(made.name, made.runs_on, libraries),
                options=Options(activations, plan.context),
                kv_cache=plan,
                tokenizer=TokenizerFacts(None, (), add_bos=False, add_eos=False),
                weights=(),
                lora=lora_plan,
            )
            artifact = writer.commit(manifest)
        engine = find_engine(artifact, artifact.start_verification())(artifact, 1)
        loaded.append(Loaded(graph, tensors, artifact, engine, lora_plan))
        return loaded[-1]

    yield load
    for one in loaded:
        one.engine.close()


def _plan(graph: Graph, page_size: int | None) -> KvPlan:
    """The plan of a graph of linear caches, which lie in pages of so many positions if there are any."""
    layers: list[KvLayer] = []
    tables: dict[int | None, int] = {}
    context = 0
    for index, node in enumerate(_attentions(graph)):
        assert isinstance(node.op, GroupQueryAttention) and node.op.layout == "linear"
        dtype, window = graph.types[node.inputs[3]].dtype, node.op.window
        heads, rows, dim = map(int, graph.types[node.inputs[3]].shape[1:])
        context, layout, table = max(context, rows), "linear", None
        if page_size is not None:
            rows, layout, table = (
                -(-rows // page_size) * page_size,
                "paged",
                tables.setdefault(window, len(tables)),
            )
        size = 2 * row_bytes(dtype, heads, dim)
        layers.append(KvLayer(index, layout, rows, window, heads, dim, dtype, size, None, table))  # type: ignore[arg-type]
    return KvPlan(context, 16, 0, page_size, sum(layer.bytes_per_token for layer in layers), tuple(layers))


def _in_pages(graph: Graph, plan: KvPlan) -> Graph:
    """The same graph as it is scheduled for a target with pages."""
    types = {value.name: value.type for value in graph.inputs}
    nodes = {id(node): node for node in graph.nodes}
    for node, layer in zip(_attentions(graph), plan.layers):
        assert isinstance(node.op, GroupQueryAttention) and plan.page_size is not None
        pages = TensorType(layer.dtype, ("pages", layer.heads, plan.page_size, layer.head_dim))
        types |= dict.fromkeys(node.inputs[3:5], pages)
        table = f"block_table.{layer.table}"
        types[table] = TensorType(DType.I32, ("batch", plan.table_width))
        inputs = (*node.inputs[:6], table, *node.inputs[6:])
        nodes[id(node)] = Node(replace(node.op, layout="paged"), inputs, node.outputs)
    values = tuple(Value(name, type_) for name, type_ in types.items())
    return replace(graph, inputs=values, nodes=tuple(nodes.values()))


def _attentions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if isinstance(node.op, GroupQueryAttention)]
