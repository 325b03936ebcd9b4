"""The compiler's passes in order, and the runner that checks each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlxc.dtypes import DType
from rlxc.errors import OptionError, VerifyError
from rlxc.ir import Graph, verify
from rlxc.ir.target import TargetFeatures
from rlxc.passes.balance_keys import BalanceKeys
from rlxc.passes.base import NoMatch, Pass
from rlxc.passes.choose_weight_layout import ChooseWeightLayout
from rlxc.passes.fold_constants import FoldConstants
from rlxc.passes.fold_lora import Change, FoldLora
from rlxc.passes.fuse_gated_mlp import FuseGatedMlp
from rlxc.passes.fuse_norm import FuseNorm
from rlxc.passes.fuse_qkv import FuseQkv
from rlxc.passes.fuse_rope_attention import FuseRopeAttention
from rlxc.passes.quantize_weights import QuantizeWeights
from rlxc.passes.remove_dead import RemoveDead
from rlxc.passes.resolve_tied_aliases import ResolveTiedAliases
from rlxc.passes.schedule_kv_cache import ScheduleKvCache
from rlxc.passes.select_rows_early import SelectRowsEarly
from rlxc.passes.share_common import ShareCommon
from rlxc.passes.split_lora import SplitLora


@dataclass(frozen=True)
class WeightChanges:
    """What the user wants done to weights.

    Attributes:
        formats: to encode matrices in, by their names.
        folded: what adapters do, by the matrix that they are folded into, and ``fold_to`` the format of the result.
        split: matrices that take adapters at run time.
    """

    formats: Mapping[str, DType] = field(default_factory=dict)
    folded: Mapping[str, Sequence[Change]] = field(default_factory=dict)
    fold_to: Mapping[str, DType] = field(default_factory=dict)
    split: frozenset[str] = frozenset()


def default_passes(
    features: TargetFeatures,
    *,
    context: int,
    max_step: int,
    rollback: int,
    cache_dtype: DType | None,
    changes: WeightChanges,
) -> list[Pass]:
    """What happens to every model on its way to a target, in this order."""
    cache = ScheduleKvCache(
        features, context=context, max_step=max_step, rollback=rollback, dtype=cache_dtype
    )
    return [
        FoldLora(changes.folded, changes.fold_to),  # while every matrix is one tensor of the file
        QuantizeWeights(changes.formats),  # likewise
        ResolveTiedAliases(),  # one matrix for embedding and logits, seen by every later pass
        FoldConstants(),  # so that patterns find plain constants
        ShareCommon(),  # so that what is equal has one name
        SelectRowsEarly(),  # before fusions hide the row-wise ops
        FuseNorm(with_residual=features.add_rms_norm),
        FuseQkv(features),  # looks through norm, rope and growing cache
        FuseGatedMlp(features),
        SplitLora(changes.split),  # one side path for what is one product
        BalanceKeys(cache.dtype),  # while caches grow, and norms and ropes stand alone
        cache,
        FuseRopeAttention(features),  # needs the scheduled caches
        RemoveDead(),  # what the passes above left without users
        ChooseWeightLayout(features),  # of the matrices that there are in the end, by what reads them
    ]


@dataclass(frozen=True)
class PassReport:
    """What one pass did: whether it changed the graph, node counts, what nearly applied, and its notes."""

    name: str
    modified: bool
    nodes_before: int
    nodes_after: int
    missed: tuple[NoMatch, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        change = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.modified else "nothing to do"
        missed = (f"  not {miss}" for miss in self.missed)
        return "\n".join([f"{self.name}: {change}", *missed, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True)
class PipelineResult:
    """The graph after the passes, their facts, and a report from each."""

    graph: Graph
    facts: Mapping[str, Any]
    reports: tuple[PassReport, ...]


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    trace: Callable[[str], None] | None = None,
    stop_after: str | None = None,
) -> PipelineResult:
    """Run passes in order, verifying the graph after each.

    Args:
        graph: a graph, verified first.
        passes: what to run.
        trace: called with each pass's report.
        stop_after: the name of the last pass to run.

    Raises:
        VerifyError: a pass left a malformed graph, or said nothing about a change; the error names the pass.
        OptionError: no pass is called ``stop_after``.
    """
    names = [one.name for one in passes]
    if stop_after is not None and stop_after not in names:
        raise OptionError(f"no pass is called {stop_after!r}", remedy=f"choose one of: {', '.join(names)}")
    verify(graph)
    facts: dict[str, Any] = {}
    reports = []
    for one in passes:
        result = one.run(graph)
        if result.modified != (result.graph != graph):
            raise VerifyError(f"says modified={result.modified}, which is not so", source=one.name)
        verify(result.graph, after=one.name)
        facts |= result.facts
        report = PassReport(
            one.name,
            result.modified,
            len(graph.nodes),
            len(result.graph.nodes),
            result.missed,
            result.notes,
        )
        reports.append(report)
        if trace is not None:
            trace(str(report))
        graph = result.graph
        if one.name == stop_after:
            break
    return PipelineResult(graph, facts, tuple(reports))
