"""What the keys of an architecture do to the graph, where no comparison of logits says it better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from model_graphs import MODELS, TRAINED, model_graph

from rlxc.errors import ModelError, RlxcError, UnsupportedError
from rlxc.ir import Graph
from rlxc.ir.ops import Attention, MixExperts, Rope, Route

COMMON = {"vocab_size": 48}
"""What converters write for every architecture besides what all of these models have."""

ALSO_WRITTEN: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 50.0, "attention.sliding_window": 4096},
    "gemma3": {"final_logit_softcapping": 30.0, "attention.sliding_window_pattern": 6},
    "gpt-oss": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    },
    "granite": {
        "attention.head_count_kv": np.array([2, 2]),
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_shared_feed_forward_length": 64,
        "ssm.conv_kernel": 4,
        "ssm.group_count": 1,
        "ssm.inner_size": 64,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
    },
    "llama": {"tensor_data_layout": "Meta AI original pth", "rope.scale_linear": 1.0},
    "olmo2": {
        "attention.sliding_window": 4096,
        "attention.sliding_window_pattern": np.array([True, True]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.yarn_attn_factor": 1.2,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    },
    "phi3": {"attention.sliding_window": 0, "rope.dimension_count": 12},
    "qwen2": {"rope.scaling.type": "none"},
    "qwen3": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.finetuned": True,
    },
    "qwen3moe": {"rope.dimension_count": 16},
    "stablelm": {"use_parallel_residual": True},
    "starcoder2": {"rope.dimension_count": 16},
}


def small(name: str, layers: int = 2, **changes: Any) -> Graph:
    architecture, options = MODELS[name]
    return model_graph(architecture, layers, **{**options, **changes})


def refuse(kind: type[RlxcError], name: str, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        small(name, **changes)
    return caught.value.problem


def windows(graph: Graph) -> list[int | None]:
    return [node.op.window for node in graph.nodes if isinstance(node.op, Attention)]


@pytest.mark.parametrize("name", ALSO_WRITTEN)
def test_keys_that_converters_write_are_known(name: str) -> None:
    small(name, metadata={**COMMON, **ALSO_WRITTEN[name]})


@pytest.mark.parametrize("name", ALSO_WRITTEN)
@pytest.mark.parametrize("key", ["attention.clamp_kqv", "pooling_type"])
def test_other_keys_are_refused_by_every_architecture(name: str, key: str) -> None:
    assert key in refuse(UnsupportedError, name, metadata={key: 1})


# --- numbers of each layer ----------------------------------------------------------------------------------------

PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")


def test_one_number_for_each_layer_is_as_good_as_one_for_all() -> None:
    arrays = {key: np.array([value, value]) for key, value in zip(PER_LAYER, (4, 2, 64))}
    assert small("llama", metadata=arrays) == small("llama")


@pytest.mark.parametrize("key", PER_LAYER)
def test_numbers_that_differ_from_layer_to_layer_are_refused(key: str) -> None:
    assert f"llama.{key} differs" in refuse(UnsupportedError, "llama", metadata={key: np.array([2, 4])})


@pytest.mark.parametrize(
    "value",
    [np.array([4, 4, 4]), np.array([4]), np.array([0, 0]), np.array([4.0, 4.0]), np.array([], np.int32)],
)
@pytest.mark.parametrize("key", PER_LAYER)
def test_senseless_numbers_of_layers_are_refused(key: str, value: Any) -> None:
    assert f"llama.{key}" in refuse(ModelError, "llama", metadata={key: value})


# --- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pattern", "windowed"),
    [
        ("gemma2", None, "10101"),
        ("gemma2", 3, "11011"),
        ("gemma2", 0, "11111"),
        ("gemma2", 1, "00000"),
        ("gemma2", np.array([False, True, True, False, True]), "01101"),
        ("gemma3", None, "11111"),
        ("gemma3", 2, "10101"),
        ("olmo2 with windows", None, "11101"),
        ("olmo2 with windows", np.array([0, 1, 0, 0, 0]), "01000"),
        ("olmo2", None, "00000"),
        ("phi3", None, "00000"),
    ],
)
def test_layers_with_windows(name: str, pattern: Any, windowed: str) -> None:
    graph = small(name, layers=5, metadata={"attention.sliding_window_pattern": pattern})
    assert windows(graph) == [6 if flag == "1" else None for flag in windowed]


@pytest.mark.parametrize("pattern", [np.array([True]), np.array([1, 2]), np.array([0.5, 1]), "all", -1])
def test_senseless_pattern_is_refused(pattern: Any) -> None:
    problem = refuse(ModelError, "gemma3", metadata={"attention.sliding_window_pattern": pattern})
    assert "gemma3.attention.sliding_window_pattern" in problem


def test_gemma2_s_window_is_4096_without_the_key() -> None:
    assert windows(small("gemma2", window=0)) == [4096, None]


def test_window_that_llama_cpp_leaves_out_of_phi3_is_left_out() -> None:
    assert windows(small("phi3", window=7)) == [None, None]


# --- rope ---------------------------------------------------------------------------------------------------------


def factors(graph: Graph) -> set[str]:
    return {node.inputs[2] for node in graph.nodes if isinstance(node.op, Rope)}


@pytest.mark.parametrize("name", ["phi3", "llama", "granite"])
@pytest.mark.parametrize(("context", "kind"), [(TRAINED // 2, "short"), (TRAINED // 2 + 1, "long")])
def test_context_chooses_longrope_s_factors(name: str, context: int, kind: str) -> None:
    graph = small(name, rope_scaling="longrope", context=context)
    assert factors(graph) == {f"rope_factors_{kind}.weight"}
    assert not [
        weight.name for weight in graph.weights if "factors" in weight.name and kind not in weight.name
    ]


def test_factors_of_the_other_context_may_be_missing() -> None:
    assert factors(small("phi3", context=64, without="rope_factors_long.weight"))


def test_factors_of_this_context_may_not_be_missing() -> None:
    problem = refuse(ModelError, "phi3", context=64, without="rope_factors_short.weight")
    assert problem == "tensor rope_factors_short.weight is missing"


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_longrope_is_refused_where_factors_have_no_use(name: str) -> None:
    assert "'longrope'" in refuse(UnsupportedError, name, rope_scaling="longrope")


def test_attention_factor_multiplies_the_angles_of_all_layers() -> None:
    graph = small("gemma3", layers=6, metadata={"rope.scaling.attn_factor": 1.5})
    assert {node.op.spec.magnitude for node in graph.nodes if isinstance(node.op, Rope)} == {1.5}


def test_granite_without_rope_has_no_positions() -> None:
    names = {node.op.name for node in small("granite", metadata={"rope.scaling.finetuned": False}).nodes}
    assert names.isdisjoint({"Rope", "Positions"})


@pytest.mark.parametrize("value", [1, "true"])
def test_granite_s_switch_must_be_a_truth(value: Any) -> None:
    problem = refuse(ModelError, "granite", metadata={"rope.scaling.finetuned": value})
    assert "granite.rope.scaling.finetuned must be true or false" in problem


# --- experts ------------------------------------------------------------------------------------------------------


def test_llama_with_experts_mixes_them_in_every_layer() -> None:
    graph = small("llama with experts", metadata={"expert_used_count": 3})
    assert [node.op for node in graph.nodes if isinstance(node.op, (Route, MixExperts))] == [
        Route(3),
        MixExperts(),
    ] * 2


@pytest.mark.parametrize("numbers", [(4, 0), (4, 5), (0, 2)])
def test_experts_that_cannot_be_used_are_refused(numbers: tuple[int, int]) -> None:
    count, used = numbers
    metadata = {"expert_count": count, "expert_used_count": used}
    assert f"{used} of {count} experts" in refuse(ModelError, "llama", metadata=metadata)


def test_granite_with_experts_is_refused() -> None:
    metadata = {"expert_count": 4, "expert_used_count": 2}
    assert "experts" in refuse(UnsupportedError, "granite", metadata=metadata)


def test_another_layout_of_llama_is_refused() -> None:
    assert "'transposed'" in refuse(UnsupportedError, "llama", metadata={"tensor_data_layout": "transposed"})
