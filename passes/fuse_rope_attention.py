"""Joins rope, cache write and read, and attention into the one op that does them all."""

from __future__ import annotations

from rlxc.ir import Graph, Node
from rlxc.ir.ops import Attention, GroupQueryAttention, KvRead, KvWrite, Positions, Rope
from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.rewrite import Replacement, rewrite


class FuseRopeAttention(Pass):
    """Attention over caches written in this step becomes GroupQueryAttention, with rope inside where q and k agree."""

    def run(self, graph: Graph) -> PassResult:
        """See the class."""
        return rewrite(graph, _rule)


def _rule(graph: Graph, node: Node) -> Replacement | NoMatch | None:
    if not isinstance(node.op, Attention):
        return None
    reads = [graph.producer.get(name) for name in node.inputs[1:]]
    found = [read for read in reads if read is not None and isinstance(read.op, KvRead)]
    writes = [graph.producer.get(read.inputs[0]) for read in found]
    if len(found) < 2 or any(write is None or not isinstance(write.op, KvWrite) for write in writes):
        return NoMatch("keys and values do not come from caches", node)
    key_write, value_write = (write for write in writes if write is not None)
    if any(graph.only_user(name) is None for read in found for name in read.outputs):
        return NoMatch("what it reads is also read elsewhere", node)
    if set(graph.users[key_write.outputs[0]] + graph.users[value_write.outputs[0]]) != set(found):
        return NoMatch("its caches are also read elsewhere", node)
    assert isinstance(key_write.op, KvWrite)

    q, k, v = node.inputs[0], key_write.inputs[1], value_write.inputs[1]
    old = [*found, key_write, value_write, node]
    inputs = [q, k, v, key_write.inputs[0], value_write.inputs[0], key_write.inputs[2]]
    spec = None
    ropes = _common_rope(graph, q, k, inputs[5])
    if ropes is not None:
        q_rope, k_rope = ropes
        assert isinstance(q_rope.op, Rope)
        spec = q_rope.op.spec
        inputs[:2] = [q_rope.inputs[0], k_rope.inputs[0]]
        inputs += q_rope.inputs[2:]
        old += [q_rope, k_rope]
    attention = node.op
    op = GroupQueryAttention(attention.heads, attention.scale, key_write.op.layout, attention.window, spec)
    outputs = (node.outputs[0], key_write.outputs[0], value_write.outputs[0])
    return Replacement(tuple(old), (Node(op, tuple(inputs), outputs),))


def _common_rope(graph: Graph, q: str, k: str, past: str) -> tuple[Node, Node] | None:
    """The ropes of q and k, if they rotate alike by the positions of this step and nobody else reads their results."""
    q_rope, k_rope = graph.producer.get(q), graph.producer.get(k)
    if q_rope is None or k_rope is None or not isinstance(q_rope.op, Rope) or not isinstance(k_rope.op, Rope):
        return None
    if q_rope.op.spec != k_rope.op.spec or q_rope.inputs[1:] != k_rope.inputs[1:]:
        return None
    positions = graph.producer.get(q_rope.inputs[1])
    if positions is None or not isinstance(positions.op, Positions) or positions.inputs[1] != past:
        return None
    # k is read twice: by the cache's write, and by its read for the number of rows.
    if graph.only_user(q) is None or any(
        not isinstance(user.op, (KvWrite, KvRead)) for user in graph.users[k]
    ):
        return None
    return q_rope, k_rope
