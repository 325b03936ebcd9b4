"""From a model's graph to what a backend builds: the passes, and the plans that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rlxc.artifact import DEFAULT_ROLLBACK, KvLayer, KvPlan
from rlxc.dtypes import DType
from rlxc.ir import Graph
from rlxc.ir.target import TargetFeatures
from rlxc.passes import PipelineResult, WeightChanges, default_passes, run_passes

MAX_STEP = 256
"""Tokens that a step takes at most. Longer prompts go in pieces; see docs/performance.md for why this many."""


@dataclass(frozen=True)
class LoweringOptions:
    """What shapes a graph on its way to a backend.

    Attributes:
        context: positions of a sequence.
        changes: what becomes of the model's weights.
        cache_dtype: how keys and values are stored; None leaves it to the backend.
        rollback: tokens that can always be taken back.
    """

    context: int
    changes: WeightChanges = field(default_factory=WeightChanges)
    cache_dtype: DType | None = None
    rollback: int = DEFAULT_ROLLBACK


def lower_graph(
    graph: Graph,
    features: TargetFeatures,
    options: LoweringOptions,
    *,
    after: str | None = None,
    trace: Callable[[str], None] | None = None,
) -> PipelineResult:
    """The graph after the passes of a backend with these features, or after the pass named ``after``.

    Raises:
        RlxcError: a pass refuses the graph, or there is no such pass.
    """
    passes = default_passes(
        features,
        context=options.context,
        max_step=min(MAX_STEP, options.context),
        rollback=min(options.rollback, options.context),
        cache_dtype=options.cache_dtype,
        changes=options.changes,
    )
    return run_passes(graph, passes, trace=trace, stop_after=after)


def kv_plan(result: PipelineResult) -> KvPlan:
    """Where the caches of a graph after all passes lie."""
    facts = result.facts["kv_cache"]
    layers = tuple(KvLayer(**{**layer, "dtype": DType(layer["dtype"])}) for layer in facts["layers"])
    return KvPlan(**{**facts, "layers": layers})
