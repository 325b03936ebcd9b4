"""Lets queries carry what makes keys hard to round.

A cache of 8-bit codes has one scale for each key, which the key's largest channel decides: where the norm before the
rope makes some channels much larger than others, the others are left with few codes. A score is a sum of products of
a query's and a key's channels, so that a channel can be made smaller in all keys and larger in all queries. Rope mixes
the two channels of a pair, which therefore get one factor.
"""

from __future__ import annotations

from dataclasses import replace

from rlxc.dtypes import DType
from rlxc.ir import Alias, Balance, Graph, Node, Source, Weight
from rlxc.ir.ops import Attention, KvAppend, RmsNorm, Rope
from rlxc.passes.base import NoMatch, Pass, PassResult


class BalanceKeys(Pass):
    """The weights of the norms of an attention's queries and keys become equally large, channel by channel.

    With wq and wk those weights, of a pair of channels: ``wq * sqrt(|wk| / |wq|)`` and ``wk * sqrt(|wq| / |wk|)``.
    Scores stay what they are; keys in the cache are other ones. Source: Xiao et al. 2022 (SmoothQuant), alpha = 1/2.

    Args:
        cache_dtype: how caches are stored; all but int8 have room for large channels beside small ones.
    """

    def __init__(self, cache_dtype: DType) -> None:
        self.cache_dtype = cache_dtype

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        if self.cache_dtype is not DType.INT8:
            return PassResult(graph, False)
        balanced: dict[str, Weight] = {}
        missed: list[NoMatch] = []
        for node in graph.nodes:
            if not isinstance(node.op, Attention):
                continue
            found = _matched(graph, node)
            if isinstance(found, NoMatch):
                missed.append(found)
            else:
                balanced.update(found)
        if not balanced:
            return PassResult(graph, False, missed=tuple(missed))
        weights = [balanced.get(weight.name, weight) for weight in graph.weights]
        return PassResult(graph.with_nodes(graph.nodes, weights), True, missed=tuple(missed))


def _matched(graph: Graph, attention: Node) -> dict[str, Weight] | NoMatch:
    """The new weights, by name, of the norms before an attention."""
    q, keys, values = attention.inputs[:3]
    append = graph.producer.get(keys)
    if append is None or not isinstance(append.op, KvAppend):
        return NoMatch("its keys do not come from a growing cache", attention)
    if graph.users[keys] != (attention,) or keys == values:
        return NoMatch("its keys are also read elsewhere", attention)
    sources = [graph.producer.get(name) for name in (q, append.inputs[1])]
    ropes = [node for node in sources if node is not None and isinstance(node.op, Rope)]
    if len(ropes) < 2:
        return NoMatch("its queries and keys are not rotated last", attention)
    sources = [graph.producer.get(rope.inputs[0]) for rope in ropes]
    norms = [node for node in sources if node is not None and isinstance(node.op, RmsNorm)]
    if len(norms) < 2:
        return NoMatch("there are no norms right before the ropes of its queries and keys", attention)
    problem = _why_not(graph, ropes, norms)
    if problem:
        return NoMatch(problem, attention)
    assert isinstance(ropes[0].op, Rope)
    spec = ropes[0].op.spec
    wq, wk = (graph.weight[norm.inputs[1]] for norm in norms)
    return {
        weight.name: replace(
            weight, recipe=Balance(_given(weight), _given(other), spec.dim, spec.interleaved)
        )
        for weight, other in ((wq, wk), (wk, wq))
    }


def _why_not(graph: Graph, ropes: list[Node], norms: list[Node]) -> str:
    """Why the weights of these norms cannot be balanced, or "" if they can."""
    if len({node.op.spec for node in ropes if isinstance(node.op, Rope)}) > 1:
        return "q and k rotate differently"
    if any(graph.only_user(node.outputs[0]) is None for node in (*ropes, *norms)):
        return "what is normed or rotated is also read elsewhere"
    for rope, norm in zip(ropes, norms):
        assert isinstance(rope.op, Rope) and isinstance(norm.op, RmsNorm)
        if rope.op.heads != norm.op.heads:
            return "a norm is not per head"
        name = norm.inputs[1]
        if name not in graph.weight:
            return "a norm's weight is computed"
        if graph.only_user(name) is None or any(weight.recipe == Alias(name) for weight in graph.weights):
            return f"@{name} is also used elsewhere"
        if graph.weight[name].recipe != Source(name):
            return f"@{name} is not a tensor of the model file as it is"
    return ""


def _given(weight: Weight) -> Weight:
    return replace(weight, name=f"{weight.name}.given")
