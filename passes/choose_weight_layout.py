"""Decides how each packed matrix is stored: the width of its codes, its blocks and its tiles, by what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rlxc.ir import Graph, Node, Weight, WeightLayout
from rlxc.ir.ops import Embed, ExpertMatMul, LoraEmbed
from rlxc.ir.target import LayoutCost, Machine, TargetFeatures
from rlxc.passes.base import Pass, PassResult

DECODED, PROMPT = 64, 512
"""What time is counted for: so many decoded tokens, after a prompt of so many, which is what benchmarks take."""

MARGIN = 0.1
"""By how much what takes more bytes must be faster: the model is not exact, and it takes the space for certain."""

ROUNDING = 0.007
"""The largest error of rounded activations, unless every layout has more; most formats' blocks, of 32, have 0.0054."""

_UNTIMED = (Embed, LoraEmbed)


@dataclass(frozen=True)
class _Use:
    """What multiplies a weight: ``times`` its rows (experts' that a token uses), or no product (0).

    ``in_prompts`` says whether every token of a prompt is multiplied with it, and not the last one only.
    """

    rows: int
    times: int
    in_prompts: bool


@dataclass(frozen=True)
class _Time:
    """Picoseconds a weight where no thread is ever idle: of a decoded token to read or to compute, and of a prompt's.

    As some are, it takes ``idle`` times as long.
    """

    read: float
    compute: float
    prompt: float
    idle: float

    @property
    def decoded(self) -> float:
        return DECODED * max(self.read, self.compute)

    @property
    def prompts(self) -> float:
        return PROMPT * self.prompt

    @property
    def total(self) -> float:
        return self.idle * (self.decoded + self.prompts)


@dataclass(frozen=True)
class _Choice:
    layout: WeightLayout
    reason: str


class ChooseWeightLayout(Pass):
    """Every packed matrix gets the layout that costs least on the machines that the target names.

    Where one file of weights serves several machines, that is the layout whose cost, relative to the best one's on the
    same machine, is least on the machine that likes it least. A table that is only looked up gets the fewest bits.
    """

    def __init__(self, features: TargetFeatures) -> None:
        self.machines = features.machines

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        weights, why = [], dict[str, list[str]]()
        for weight in graph.weights:
            choice = self._choose(graph, weight)
            if choice is None:
                weights.append(weight)
                continue
            weights.append(replace(weight, layout=choice.layout))
            why.setdefault(f"{weight.type.dtype} in {choice.layout}: {choice.reason}", []).append(weight.name)
        notes = tuple(f"{line} ({_some(names)})" for line, names in why.items())
        changed = tuple(weights) != graph.weights
        return PassResult(graph.with_nodes(graph.nodes, weights), changed, notes=notes)

    def _choose(self, graph: Graph, weight: Weight) -> _Choice | None:
        offered = [_by_layout(machine, weight) for machine in self.machines]
        common = (
            [layout for layout in offered[0] if all(layout in costs for costs in offered)] if offered else []
        )
        if not common:
            return None
        if len(common) == 1:
            return _Choice(common[0], "all that the target can run")
        use = _use(graph, weight)
        if not use.times:
            bits = {layout: max(costs[layout].bits for costs in offered) for layout in common}
            return _Choice(min(common, key=bits.__getitem__), "only looked up, so the fewest bits")
        errors = {layout: max(costs[layout].rounding for costs in offered) for layout in common}
        most = max(ROUNDING, min(errors.values()))
        fine = [layout for layout in common if errors[layout] <= most]
        choice, unbound = self._cheapest(use, fine, offered), self._cheapest(use, common, offered).layout
        if unbound == choice.layout:
            return choice
        error = f"{errors[unbound]:.2%}, more than {most:.2%}"
        return _Choice(choice.layout, f"{choice.reason}; {unbound} would round activations by {error}")

    def _cheapest(
        self, use: _Use, layouts: Sequence[WeightLayout], offered: Sequence[dict[WeightLayout, LayoutCost]]
    ) -> _Choice:
        times = [
            {layout: _time(machine, costs[layout], use) for layout in layouts}
            for machine, costs in zip(self.machines, offered)
        ]

        def worst(layout: WeightLayout) -> float:
            return max(of[layout].total / min(time.total for time in of.values()) for of in times)

        ranked = sorted(layouts, key=worst)
        good = [layout for layout in ranked if worst(layout) <= (1 + MARGIN) * worst(ranked[0])]
        best = min(good, key=lambda layout: (max(costs[layout].bits for costs in offered), worst(layout)))
        if len(layouts) == 1:
            return _Choice(best, "no other rounds activations as finely")
        if best != ranked[0]:
            return _Choice(best, f"{ranked[0]} would save less than {MARGIN:.0%} of the time")
        # On the machine where the next best one is worst.
        other = ranked[1]
        machine, of = max(
            zip(self.machines, times), key=lambda pair: pair[1][other].total / pair[1][best].total
        )
        part = of[best].total / of[other].total
        if part > 0.995:
            return _Choice(best, "as fast as any other")
        why = f"{part:.2f} of the time of {other} on {machine.name}: {_where(of[best], of[other])}"
        return _Choice(best, why)


def _by_layout(machine: Machine, weight: Weight) -> dict[WeightLayout, LayoutCost]:
    """What a machine can run of a matrix: blocks are parts of its rows."""
    columns = int(weight.type.shape[-1])
    costs = machine.layouts.get(weight.type.dtype, ())
    return {cost.layout: cost for cost in costs if columns % cost.layout.block == 0}


def _use(graph: Graph, weight: Weight) -> _Use:
    nodes = [node for node in graph.users.get(weight.name, ()) if not isinstance(node.op, _UNTIMED)]
    *_, rows, _ = map(int, weight.type.shape)
    if not nodes:
        return _Use(rows, 0, False)
    return _Use(
        rows, max(_times(graph, node) for node in nodes), any(_in_prompts(graph, node) for node in nodes)
    )


def _times(graph: Graph, node: Node) -> int:
    """How many experts' rows a token multiplies; of any other matrix, all rows once."""
    return int(graph.types[node.inputs[2]].shape[-1]) if isinstance(node.op, ExpertMatMul) else 1


def _in_prompts(graph: Graph, node: Node) -> bool:
    """Whether a product is made of every token, and not of the rows that were selected."""
    return graph.types[node.outputs[0]].shape[1] != "rows"


def _time(machine: Machine, cost: LayoutCost, use: _Use) -> _Time:
    tasks = -(-use.rows // cost.layout.tile) * use.times
    return _Time(
        read=125 * cost.bits / (machine.bandwidth * cost.bandwidth),
        compute=cost.decode / machine.threads,
        prompt=cost.prompt / machine.threads * use.in_prompts,
        # Threads that have no task in the last turn wait for the others.
        idle=-(-tasks // machine.threads) * machine.threads / tasks,
    )


def _where(best: _Time, other: _Time) -> str:
    """What the other one loses most by."""
    limit = "fewer bytes to read" if other.read >= other.compute else "less work"
    lost = {
        f"{limit} while decoding": other.decoded - best.decoded,
        "less work in prompts": other.prompts - best.prompts,
        "fewer idle threads": (other.idle / best.idle - 1) * (other.decoded + other.prompts),
    }
    return max(lost, key=lost.__getitem__)


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"@{first} and {len(others)} more" if others else f"@{first}"
