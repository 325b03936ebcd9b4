"""The order of the passes, the checks between them, and whole models going through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from model_graphs import MODELS

from rlxc.errors import OptionError, VerifyError
from rlxc.ir import Graph, Node, ops, parse, show
from rlxc.ir.target import TargetFeatures
from rlxc.passes import Pass, PassResult, WeightChanges, default_passes, run_passes
from rlxc.passes.remove_dead import RemoveDead
from rlxc.passes.share_common import ShareCommon

ORDER = [
    "fold_lora",
    "quantize_weights",
    "resolve_tied_aliases",
    "fold_constants",
    "share_common",
    "select_rows_early",
    "fuse_norm",
    "fuse_qkv",
    "fuse_gated_mlp",
    "split_lora",
    "balance_keys",
    "schedule_kv_cache",
    "fuse_rope_attention",
    "remove_dead",
    "choose_weight_layout",
]

SMALL = "graph small\ninput %x: f32[4]\n%a = Silu(%x)\n%b = Silu(%x)\n%y = Add(%a, %b)\noutput %y"

STEPS = (3, 1, 1, 2, 4, 1, 4, 1, 3)
"""Sizes of steps that fill a context of 20: beyond the window of 6 and around the ring of 12."""

ModelGraph = Callable[..., Graph]


class MakesChanges(Pass):
    """Renames the graph, and says so or not."""

    def __init__(self, claim: bool) -> None:
        self.claim = claim

    def run(self, graph: Graph) -> PassResult:
        return PassResult(replace(graph, name="other"), self.claim)


class DoesNothing(Pass):
    """Gives a graph that equals the old one, and says otherwise or not."""

    def __init__(self, claim: bool) -> None:
        self.claim = claim

    def run(self, graph: Graph) -> PassResult:
        return PassResult(replace(graph), self.claim)


class BreaksGraph(Pass):
    """Leaves a node that reads what is not there."""

    def run(self, graph: Graph) -> PassResult:
        return PassResult(graph.with_nodes([*graph.nodes, Node(ops.Silu(), ("gone",), ("z",))]), True)


class StatesFact(Pass):
    """Says something about the graph."""

    def __init__(self, name: str) -> None:
        self.fact = name

    def run(self, graph: Graph) -> PassResult:
        return PassResult(graph, False, facts={self.fact: len(graph.nodes)})


def pipeline(features: TargetFeatures) -> list[Pass]:
    return default_passes(
        features, context=20, max_step=4, rollback=2, cache_dtype=None, changes=WeightChanges()
    )


@pytest.mark.parametrize("with_everything", [True, False])
def test_order_is_the_same_for_every_target(with_everything: bool, features: TargetFeatures) -> None:
    passes = pipeline(features if with_everything else TargetFeatures())
    assert [one.name for one in passes] == ORDER


# --- the runner ---------------------------------------------------------------------------------------------------


def test_passes_run_in_order_on_each_other_s_graphs() -> None:
    result = run_passes(parse(SMALL), [ShareCommon(), MakesChanges(True)])
    assert result.graph.name == "other"
    assert [node.op.name for node in result.graph.nodes] == ["Silu", "Add"]


def test_facts_of_all_passes_are_collected() -> None:
    result = run_passes(parse(SMALL), [StatesFact("before"), ShareCommon(), StatesFact("after")])
    assert result.facts == {"before": 3, "after": 2}


def test_reports_count_nodes() -> None:
    result = run_passes(parse(SMALL), [ShareCommon(), RemoveDead()])
    assert [(r.name, r.modified, r.nodes_before, r.nodes_after) for r in result.reports] == [
        ("share_common", True, 3, 2),
        ("remove_dead", False, 2, 2),
    ]


def test_malformed_input_is_refused_before_any_pass() -> None:
    with pytest.raises(VerifyError, match=r"^small: "):
        run_passes(parse(SMALL.replace("%b = Silu(%x)", "%b = Silu(%z)")), [ShareCommon()])


@pytest.mark.parametrize(
    "liar", [MakesChanges(False), DoesNothing(True)], ids=["hides a change", "invents one"]
)
def test_pass_that_lies_about_changes_is_refused_by_name(liar: Pass) -> None:
    with pytest.raises(VerifyError, match=f"^{liar.name}: says modified={liar.claim}, which is not so"):  # type: ignore[attr-defined]
        run_passes(parse(SMALL), [ShareCommon(), liar])


@pytest.mark.parametrize("honest", [MakesChanges(True), DoesNothing(False)], ids=["changes", "does nothing"])
def test_honest_pass_is_accepted(honest: Pass) -> None:
    assert run_passes(parse(SMALL), [honest]).reports[0].modified is honest.claim  # type: ignore[attr-defined]


def test_pass_that_breaks_the_graph_is_blamed_by_name() -> None:
    with pytest.raises(VerifyError, match=r"^breaks_graph: Silu reads 'gone'"):
        run_passes(parse(SMALL), [ShareCommon(), BreaksGraph(), RemoveDead()])


def test_running_stops_after_the_named_pass() -> None:
    result = run_passes(parse(SMALL), [ShareCommon(), BreaksGraph()], stop_after="share_common")
    assert [report.name for report in result.reports] == ["share_common"]


def test_unknown_pass_to_stop_after_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        run_passes(parse(SMALL), [ShareCommon(), RemoveDead()], stop_after="fuse_all")
    assert "'fuse_all'" in caught.value.problem
    assert caught.value.remedy == "choose one of: share_common, remove_dead"


def test_trace_tells_each_pass_and_each_near_match(features: TargetFeatures, model_graph: ModelGraph) -> None:
    lines: list[str] = []
    run_passes(model_graph("llama", 1, bias=True), pipeline(replace(features, widest={})), trace=lines.append)
    assert lines == [
        "fold_lora: nothing to do",
        "quantize_weights: nothing to do",
        "resolve_tied_aliases: 23 -> 23 nodes",
        "fold_constants: nothing to do",
        "share_common: nothing to do",
        "select_rows_early: 23 -> 24 nodes",
        "fuse_norm: 24 -> 22 nodes",
        "fuse_qkv: 22 -> 22 nodes\n"
        "  not %layers.0.attention = Attention: q, k and v stay apart: their formats differ: q5_0, q5_0, q8_0",
        "fuse_gated_mlp: 22 -> 20 nodes",
        "split_lora: nothing to do",
        "balance_keys: nothing to do",
        "schedule_kv_cache: 20 -> 22 nodes",
        "fuse_rope_attention: 22 -> 16 nodes",
        "remove_dead: 16 -> 15 nodes",
        "choose_weight_layout: nothing to do",
    ]


# --- whole models -------------------------------------------------------------------------------------------------

every_model = pytest.mark.parametrize(("architecture", "options"), MODELS.values(), ids=MODELS)


@every_model
def test_logits_in_steps_equal_one_pass_of_the_model(
    architecture: str,
    options: dict[str, Any],
    features: TargetFeatures,
    model_graph: ModelGraph,
    same_logits_in_steps: Callable[..., None],
) -> None:
    graph = model_graph(architecture, 7, **options)
    same_logits_in_steps(graph, run_passes(graph, pipeline(features)).graph, STEPS)


@every_model
@pytest.mark.parametrize("fused", [True, False])
def test_logits_in_steps_over_pages_equal_one_pass_of_the_model(
    fused: bool,
    architecture: str,
    options: dict[str, Any],
    features: TargetFeatures,
    model_graph: ModelGraph,
    same_logits_in_steps: Callable[..., None],
) -> None:
    graph = model_graph(architecture, 7, **options)
    paged = replace(features if fused else TargetFeatures(), page_size=4)
    same_logits_in_steps(graph, run_passes(graph, pipeline(paged)).graph, STEPS)


def with_shared_caches(graph: Graph, reader: int, owner: int) -> Graph:
    """The model with a layer that reads the keys and values of an earlier one instead of its own."""
    gone = {f"{name}.{reader}.{side}" for name in ("past_key_values", "present") for side in ("key", "value")}
    nodes = []
    for node in graph.nodes:
        names = {name: name.replace(f".{reader}.", f".{owner}.") for name in gone}
        if gone.isdisjoint(node.outputs):
            nodes.append(Node(node.op, tuple(names.get(name, name) for name in node.inputs), node.outputs))
    return replace(
        graph,
        inputs=tuple(value for value in graph.inputs if value.name not in gone),
        outputs=tuple(name for name in graph.outputs if name not in gone),
        nodes=tuple(nodes),
    )


@pytest.mark.parametrize(
    ("architecture", "reader", "owner"), [("llama", 1, 0), ("llama", 2, 0), ("gemma3", 6, 0)]
)
@pytest.mark.parametrize("page_size", [None, 4])
def test_layers_that_share_caches_keep_their_logits(
    page_size: int | None,
    architecture: str,
    reader: int,
    owner: int,
    features: TargetFeatures,
    model_graph: ModelGraph,
    same_logits_in_steps: Callable[..., None],
) -> None:
    graph = with_shared_caches(model_graph(architecture, 7), reader, owner)
    result = run_passes(graph, pipeline(replace(features, page_size=page_size)))
    assert [layer["shares"] for layer in result.facts["kv_cache"]["layers"]].count(owner) == 1
    # The sharing layer's own keys and values have no use any more.
    assert not [node for node in result.graph.nodes if f"layers.{reader}.k_rope" in node.outputs]
    same_logits_in_steps(graph, result.graph, STEPS)


@every_model
def test_logits_for_a_target_without_fused_ops_are_the_same(
    architecture: str,
    options: dict[str, Any],
    model_graph: ModelGraph,
    same_logits_in_steps: Callable[..., None],
) -> None:
    graph = model_graph(architecture, 7, **options)
    same_logits_in_steps(graph, run_passes(graph, pipeline(TargetFeatures())).graph, STEPS)


@every_model
@pytest.mark.parametrize("page_size", [None, 4])
def test_graph_that_went_through_goes_through_unchanged(
    page_size: int | None,
    architecture: str,
    options: dict[str, Any],
    features: TargetFeatures,
    model_graph: ModelGraph,
) -> None:
    features = replace(features, page_size=page_size)
    once = run_passes(model_graph(architecture, 7, **options), pipeline(features)).graph
    assert run_passes(once, pipeline(features)).graph == once


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_same_model_gives_the_same_text_facts_and_trace(
    architecture: str, features: TargetFeatures, model_graph: ModelGraph
) -> None:
    traces: tuple[list[str], list[str]] = ([], [])
    first, second = (
        run_passes(model_graph(architecture, 7), pipeline(features), trace=trace.append) for trace in traces
    )
    assert show(first.graph) == show(second.graph)
    assert first.facts == second.facts
    assert traces[0] == traces[1]


@every_model
def test_large_model_goes_through_whole(
    architecture: str, options: dict[str, Any], features: TargetFeatures, model_graph: ModelGraph
) -> None:
    result = run_passes(model_graph(architecture, 60, **options), pipeline(features))
    counts = Counter(node.op.name for node in result.graph.nodes)
    assert counts["GroupQueryAttention"] == counts["Split"] == 60
    assert counts["Glu"] == (0 if "experts" in options or architecture == "starcoder2" else 60)
    assert counts["Attention"] == counts["Rope"] == counts["Positions"] == counts["KvWrite"] == 0
    # Of the last layer's attention, and of what it and, in parallel, the MLP are added to.
    assert counts["SelectRows"] == (3 if "parallel" in options else 2)
    assert len(result.facts["kv_cache"]["layers"]) == 60


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_tied_table_is_stored_once_and_nothing_else_is_lost(
    architecture: str, features: TargetFeatures, model_graph: ModelGraph
) -> None:
    before = model_graph(architecture, 2)
    after = run_passes(before, pipeline(features)).graph
    read = [tensor for weight in after.weights for tensor in weight.tensors]
    assert sorted(read) == sorted(tensor for weight in before.weights for tensor in weight.tensors)
