"""Joins rope, cache write and read, and attention into the one op that does them all."""

from __future__ import annotations

from rlxc.ir import Graph, Node
from rlxc.ir.ops import Attention, GroupQueryAttention, KvRead, KvWrite, Positions, Rope
from rlxc.ir.target import TargetFeatures
from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.rewrite import Replacement, rewrite


class FuseRopeAttention(Pass):
    """Attention over caches written in this step becomes GroupQueryAttention, with rope inside where q and k agree."""

    def __init__(self, features: TargetFeatures) -> None:
        self.features = features

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        if not self.features.group_query_attention:
            return PassResult(graph, False)
        return rewrite(graph, _rule)


def _rule(graph: Graph, node: Node) -> Replacement | NoMatch | None:
    if not isinstance(node.op, Attention):
        return None
    reads = [graph.producer.get(name) for name in node.inputs[1:3]]
    found = [read for read in reads if read is not None and isinstance(read.op, KvRead)]
    sources = [graph.producer.get(read.inputs[0]) for read in found]
    writes = [write for write in sources if write is not None and isinstance(write.op, KvWrite)]
    if len(writes) < 2:
        return NoMatch("keys and values do not come from caches", node)
    problem = _why_apart(graph, node, found, writes)
    if problem:
        return NoMatch(problem, node)

    key_write, value_write = writes
    assert isinstance(key_write.op, KvWrite)
    (key_cache, k, past, *table), (value_cache, v, *_) = key_write.inputs, value_write.inputs
    old = (*found, *writes, node)
    q, spec = node.inputs[0], None
    factors: tuple[str, ...] = ()
    q_rope, k_rope = graph.producer.get(q), graph.producer.get(k)
    missed: tuple[NoMatch, ...] = ()
    if (
        q_rope is not None
        and isinstance(q_rope.op, Rope)
        and k_rope is not None
        and isinstance(k_rope.op, Rope)
    ):
        problem = _why_rope_outside(graph, q_rope, k_rope, {id(key_write), id(found[0])}, past)
        if problem:
            missed = (NoMatch(f"rope stays outside: {problem}", node),)
        else:
            old += (q_rope, k_rope)
            q, k, spec, factors = q_rope.inputs[0], k_rope.inputs[0], q_rope.op.spec, q_rope.inputs[2:]
    sinks = node.inputs[3:]
    op = GroupQueryAttention(
        node.op.heads,
        node.op.scale,
        key_write.op.layout,
        node.op.window,
        spec,
        node.op.soft_cap,
        bool(sinks),
    )
    inputs = (q, k, v, key_cache, value_cache, past, *table, *factors, *sinks)
    outputs = (node.outputs[0], key_write.outputs[0], value_write.outputs[0])
    return Replacement(old, (Node(op, inputs, outputs),), missed=missed)


def _why_apart(graph: Graph, attention: Node, reads: list[Node], writes: list[Node]) -> str:
    """Why these reads, writes and attention cannot become one op, or "" if they can."""
    key_read, value_read = reads
    key_write, value_write = writes
    if any(graph.only_user(read.outputs[0]) is None for read in reads):
        return "what it reads is also read elsewhere"
    if any(graph.users[write.outputs[0]] != (read,) for write, read in zip(writes, reads)):
        return "its caches are also read elsewhere"
    pasts = {node.inputs[2:] for node in (*reads, *writes)}  # and block tables
    assert isinstance(key_read.op, KvRead) and isinstance(attention.op, Attention)
    alike = key_read.op == value_read.op and key_write.op == value_write.op and len(pasts) == 1
    # By window, attention reads what it sees anyway; a linear cache gives everything.
    if not alike or key_read.op.window not in (None, attention.op.window):
        return "its caches are laid out differently"
    return ""


def _why_rope_outside(graph: Graph, q_rope: Node, k_rope: Node, cache: set[int], past: str) -> str:
    """Why the attention op cannot rotate q and k itself, or "" if it can; ``cache`` are the nodes that may read k."""
    assert isinstance(q_rope.op, Rope) and isinstance(k_rope.op, Rope)
    if q_rope.op.spec != k_rope.op.spec or q_rope.inputs[1:] != k_rope.inputs[1:]:
        return "q and k rotate differently"
    positions = graph.producer.get(q_rope.inputs[1])
    if positions is None or not isinstance(positions.op, Positions) or positions.inputs[1] != past:
        return "its positions are not those after the past"
    k = k_rope.outputs[0]
    others = [user for user in graph.users[k] if id(user) not in cache]
    if graph.only_user(q_rope.outputs[0]) is None or others or k in graph.outputs:
        return "what it rotates is also read elsewhere"
    return ""
