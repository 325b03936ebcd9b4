"""LoRA side paths in an ONNX model: its inputs and their defaults, batches, and what the engine keeps in memory."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from layer_graph import layer
from random_adapters import Pairs, random_pairs, split_graph, stack_feeds
from test_onnx_model import PLAIN, feeds

from rlxc.artifact import LoraPlan
from rlxc.ir import parse, show

Build = Callable[..., Any]
Array = npt.NDArray[Any]

SMALL = """
graph small
input %ids: i64[batch, seq]
input %y: f32[batch, seq, 32]
weight @table: f32[50, 32]
weight @pair: q4_1[56, 32] = concat(@first: q4_1[40, 32], @second: q4_1[16, 32])
weight @bias: f32[56]
weight @third: f16[24, 32]
%e = Embed(%ids, @table)
%x = Add(%e, %y)
%both = DequantMatMul(%x, @pair, @bias)
%z = MatMul(%x, @third)
output %both
output %z
"""
TENSORS = ("table", "first", "second", "third")


@pytest.fixture
def small(build: Build) -> tuple[Any, LoraPlan]:
    """The graph with side paths for everything, built, and its plan."""
    graph, plan = split_graph(parse(SMALL), TENSORS)
    return build(show(graph)), plan


def onnx_feeds(plan: LoraPlan, of_graph: dict[str, Array]) -> dict[str, Array]:
    """The model's inputs, from the graph's: B's of one product apart, A's of one group in one matrix."""
    result = dict(of_graph)
    for group in plan.groups:
        if group.kind == "linear":
            batch, parts, rank, columns = of_graph[group.down].shape
            result[group.down] = of_graph[group.down].reshape(batch, parts * rank, columns)
        for part in group.parts:
            result.pop(part.up, None)
            rows = slice(part.first_row, part.first_row + part.rows)
            result[f"{part.up}.{part.first_row}"] = np.ascontiguousarray(of_graph[part.up][:, rows])
    return result


def random_inputs(batch: int, tokens: int) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {
        "ids": rng.integers(0, 50, (batch, tokens)),
        "y": rng.standard_normal((batch, tokens, 32)).astype(np.float32),
    }


def assert_close(results: dict[str, Array], expected: dict[str, Array]) -> None:
    """Sums of at most 32 products and of 20 ranks in f32, relative to the largest."""
    for name, array in results.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=3e-6 * np.abs(expected[name]).max())


@pytest.mark.parametrize("tokens", [1, 5])
def test_each_sequence_of_a_batch_has_its_own_stack(small: tuple[Any, LoraPlan], tokens: int) -> None:
    built, plan = small
    one, two = random_pairs(plan, 5, 1), random_pairs(plan, 12, 2, ["table", "second", "third"])
    stacks: list[list[tuple[Pairs, float]]] = [[(one, 0.5)], [], [(two, 1.0), (one, -2.0)]]
    given, lora = random_inputs(3, tokens), stack_feeds(plan, stacks)
    results = built.run({**given, **onnx_feeds(plan, lora)})
    assert_close(results, built.interpret({**given, **lora}))
    plain = built.run(given)
    assert np.abs(results["both"][0] - plain["both"][0]).max() > 0.1
    assert_close({"both": results["both"][1]}, {"both": plain["both"][1]})


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 4), (3, 2)])
def test_without_adapters_the_model_is_the_base(
    small: tuple[Any, LoraPlan], build: Build, batch: int, tokens: int
) -> None:
    base = build(SMALL, folder="base")
    given = random_inputs(batch, tokens)
    for name, array in base.run(given).items():
        np.testing.assert_array_equal(small[0].run(given)[name], array)


def test_no_tokens_give_no_rows(small: tuple[Any, LoraPlan]) -> None:
    built, plan = small
    lora = onnx_feeds(plan, stack_feeds(plan, [[(random_pairs(plan, 5, 1), 0.5)]]))
    assert built.run({**random_inputs(1, 0), **lora})["both"].shape == (1, 0, 56)


def test_inputs_are_those_of_the_plan_and_have_defaults(small: tuple[Any, LoraPlan]) -> None:
    built, plan = small
    names = {"lora_scales"}
    for group in plan.groups:
        names |= {group.down, *(f"{part.up}.{part.first_row}" for part in group.parts)}
    model = built.model.graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.input
    }
    assert shapes.keys() == {"ids", "y"} | names
    assert names <= {tensor.name for tensor in model.initializer}
    assert shapes["lora.first.down"] == ["batch", "3*rank", 32]
    assert shapes["lora.first.up.40"] == ["batch", 16, "rank"]
    assert shapes["lora.third.up.0"] == ["batch", 24, "rank"]
    assert shapes["lora.table.down"] == ["batch", 50, "rank"]


def test_defaults_share_one_place_of_zeros(small: tuple[Any, LoraPlan]) -> None:
    built, _ = small
    places = set()
    for tensor in built.model.graph.initializer:
        if tensor.name.startswith("lora"):
            places.add(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
            assert not built.region(tensor.name).any()
    assert len(places) == 1


# --- a whole layer ------------------------------------------------------------------------------------------------

LAYER_TENSORS = ("table", "qkv", "o", "gate_up", "down", "output.weight")


def split_layer(build: Build, activations: str = "float32") -> Any:
    return build(show(split_graph(parse(layer()), LAYER_TENSORS)[0]), activations)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_the_full_check_of_onnx_passes_with_side_paths(build: Build, activations: str) -> None:
    onnx.checker.check_model(str(split_layer(build, activations).folder / "model.onnx"), full_check=True)


def test_plain_onnxruntime_runs_a_model_with_side_paths(build: Build, tmp_path: Path) -> None:
    model = split_layer(build).folder / "model.onnx"
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, str(model)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "(1, 1, 96)\n", result.stderr


def test_layer_without_adapters_gives_the_base_s_logits(build: Build) -> None:
    base = build(layer(), folder="base").run(feeds())
    split = split_layer(build).run(feeds())
    np.testing.assert_array_equal(split["logits"], base["logits"])


# --- the engine ---------------------------------------------------------------------------------------------------


on_onnx = pytest.mark.parametrize("backend", ["onnx"], indirect=True, scope="session")


@pytest.fixture
def engine(load_graph: Callable[..., Any]) -> Any:
    """The layer, loaded."""
    return load_graph(layer(), lora=LAYER_TENSORS)


class Counted:
    """A binding that counts what is bound."""

    def __init__(self, binding: Any) -> None:
        self.binding, self.bound = binding, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.binding, name)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.bound.append(name)
        self.binding.bind_ortvalue_input(name, value)

    def taken(self) -> list[str]:
        """The adapters' inputs that were bound since the last call."""
        bound, self.bound = self.bound, []
        return [name for name in bound if name.startswith("lora")]


@on_onnx
def test_unchanged_adapters_are_not_bound_again(engine: Any) -> None:
    one, two = (engine.engine.prepare(random_pairs(engine.plan, 5, seed)) for seed in (1, 2))
    cache = engine.engine.new_cache()
    engine.step(cache, [1])
    binding = engine.engine.bindings[cache]
    counted = binding.io = Counted(binding.io)
    every = 1 + sum(1 + len(group.parts) for group in engine.plan.groups)
    for mix, expected in [
        ([], 0),
        ([(one, 1.0)], every),
        ([(one, 1.0)], 0),
        ([(one, 0.5)], 1),  # the scales alone
        ([(one, 0.5), (two, 1.0)], every),
        ([(one, 0.5), (two, 1.0)], 0),
        ([(one, 0.5), (two, 0.25)], 1),
        ([], every),
        ([], 0),
    ]:
        engine.step(cache, [1, 2, 3], mix=mix)
        assert len(counted.taken()) == expected, mix


@on_onnx
def test_sequences_with_one_stack_share_its_memory(engine: Any) -> None:
    one, two = (engine.engine.prepare(random_pairs(engine.plan, 5, seed)) for seed in (1, 2))
    caches = [engine.engine.new_cache() for _ in range(3)]
    for cache, scale in zip(caches[:2], (0.5, 0.25)):
        engine.step(cache, [1, 2, 3], mix=[(one, 1.0), (two, scale)])
    engine.step(caches[2], [1, 2, 3], mix=[(two, 1.0), (one, 1.0)])
    bindings = [engine.engine.bindings[cache] for cache in caches]
    assert bindings[0].stack is bindings[1].stack
    assert bindings[0].stack is not bindings[2].stack
    forgotten = weakref.ref(bindings[0].stack)
    for cache, binding in zip(caches, bindings):
        engine.step(cache, [4], mix=[(one, 1.0)])
        assert binding.stack is one
    assert forgotten() is None


@on_onnx
def test_prepared_adapter_is_read_where_it_lies(engine: Any) -> None:
    prepared = engine.engine.prepare(random_pairs(engine.plan, 16, 1))
    for name, value in prepared.values.items():
        assert value.data_ptr() == prepared.arrays[name].ctypes.data


@on_onnx
def test_missing_matrices_take_no_memory(engine: Any) -> None:
    (part,) = [part for part in engine.plan.parts if part.tensor == "o"]
    pairs = random_pairs(engine.plan, 16, 1, ["o"])
    assert engine.engine.prepare(pairs).nbytes == 4 * 16 * (part.rows + part.columns)
