"""Which experts each token goes to, with what weights, and which tokens each expert is for.

Products with experts want the latter: they take one expert after the other, with all of its tokens. A slot is one of
the ``used`` places that a token has for experts; slots are numbered token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.tirx import any as any_of
from tvm.tirx import const
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Expr,
    Kernel,
    Number,
    Pointer,
    bind,
    for_rows,
    local,
    serial,
    when,
)
from rlxc.backends.tvm.kernels.math import exp, lanes_of
from rlxc.backends.tvm.kernels.vector import Vectors


@dataclass(frozen=True)
class Groups:
    """Slots by expert, as int32: how many experts are wanted by any; ``active``, which ones; ``starts``; ``order``.

    ``order`` has the slots of expert 0, those of expert 1 and so on, each in their own order; expert e's begin at
    ``starts[e]`` and end before ``starts[e + 1]``.
    """

    experts: int

    @property
    def active(self) -> int:
        """Where the numbers of the wanted experts begin."""
        return 1

    @property
    def starts(self) -> int:
        """Where the starts begin."""
        return self.active + self.experts

    @property
    def order(self) -> int:
        """Where the slots begin."""
        return self.starts + self.experts + 2  # one that sorting needs

    def even(self, slots: int) -> tuple[int, ...]:
        """So many slots that go to each expert in turn."""
        wanted = min(slots, self.experts)
        order = [slot for expert in range(wanted) for slot in range(expert, slots, self.experts)]
        ends = np.cumsum([len(range(expert, slots, self.experts)) for expert in range(self.experts)])
        active = [*range(wanted), *[0] * (self.experts - wanted)]
        return (wanted, *active, 0, *ends.tolist(), slots, *order)


def route_kernel(vectors: Vectors, experts: int, used: int, stride: int, weights_stride: int) -> Kernel:
    """The kernel for scores of so many experts, of which each token uses some.

    Its parameters: scores f32 ``[tokens, experts]``, ``stride`` numbers from token to token; chosen int32
    ``[tokens, used]``, the experts of largest score, best first, of equal ones the first; their weights f32
    ``[tokens, used]``, ``weights_stride`` apart, the softmax of their scores; :class:`Groups`; the number of tokens.
    Scores that are not numbers make any experts come out; where the best one is not finite, weights are no numbers.
    """
    groups = Groups(experts)

    def body(scores: Buffer, chosen: Buffer, weights: Buffer, grouped: Buffer, count: Expr) -> None:
        def route(token: Expr, task: Expr) -> None:
            best = _Best(chosen, bind(token * used), weights, bind(token * weights_stride), used)
            first = bind(token * stride)
            with serial(experts) as expert:
                best.offer(expert, bind(scores[first + expert]))
            best.soften(vectors)

        for_rows(count, route)
        _group(groups, chosen, grouped, bind(count * used))

    params = (
        Pointer("scores", "float32"),
        Pointer("chosen", "int32"),
        Pointer("weights", "float32"),
        Pointer("groups", "int32"),
        Number("tokens"),
    )
    return Kernel(f"route_{used}_of_{experts}_{stride}_{weights_stride}", params, body)


@dataclass(frozen=True)
class _Best:
    """The best experts of a token so far, the best first, and their scores."""

    chosen: Buffer
    first: Expr
    scores: Buffer
    first_score: Expr
    used: int

    def offer(self, expert: Expr, score: Expr) -> None:
        """Put an expert where it belongs, if it does; those before it have been offered."""
        last = self.used - 1
        with when(any_of(expert < self.used, score > self.scores[self.first_score + last])):
            before = bind(T.min(expert, const(last, "int32")))
            place = local(1, "int32")
            T.buffer_store(place, before, [0])
            with serial(before):  # once one is not worse, none before it is
                at = bind(place[0])
                other = bind(self.scores[self.first_score + at - 1])
                with when(other < score):
                    self._put(at, self.chosen[self.first + at - 1], other)
                    T.buffer_store(place, at - 1, [0])
            self._put(place[0], expert, score)

    def soften(self, vectors: Vectors) -> None:
        """Scores become their softmax."""
        largest = bind(self.scores[self.first_score])
        total = local(1, "float32")
        # Nothing, or NaN where the score is not finite; TVM would make any other product with 0 a plain 0.
        zero = vectors.splat(0.0)
        nothing = lanes_of(bind(vectors.fma(vectors.splat(largest), zero, zero)), [0])
        T.buffer_store(total, nothing, [0])
        with serial(self.used) as slot:
            power = exp(vectors, vectors.splat(self.scores[self.first_score + slot] - largest))
            power = bind(lanes_of(bind(power), [0]))
            T.buffer_store(self.scores, power, [self.first_score + slot])
            T.buffer_store(total, total[0] + power, [0])
        with serial(self.used) as slot:
            at = self.first_score + slot
            T.buffer_store(self.scores, self.scores[at] / total[0], [at])

    def _put(self, at: Expr, expert: Expr, score: Expr) -> None:
        T.buffer_store(self.chosen, expert, [self.first + at])
        T.buffer_store(self.scores, score, [self.first_score + at])


def _group(groups: Groups, chosen: Buffer, grouped: Buffer, slots: Expr) -> None:
    """A counting sort. While it runs, an expert's start stands at one place more, and its number at two."""
    starts = groups.starts

    def count(expert: Expr) -> Expr:
        return grouped[starts + expert + 2]

    with serial(groups.experts + 2) as index:
        T.buffer_store(grouped, const(0, "int32"), [starts + index])
    with serial(slots) as slot:
        expert = bind(chosen[slot])
        T.buffer_store(grouped, count(expert) + 1, [starts + expert + 2])
    T.buffer_store(grouped, const(0, "int32"), [0])
    with serial(groups.experts) as expert:
        with when(count(expert) > 0):
            active = bind(grouped[0])
            T.buffer_store(grouped, expert, [groups.active + active])
            T.buffer_store(grouped, active + 1, [0])
        T.buffer_store(grouped, count(expert) + grouped[starts + expert + 1], [starts + expert + 2])
    with serial(slots) as slot:
        expert = bind(chosen[slot])
        at = bind(grouped[starts + expert + 1])
        T.buffer_store(grouped, slot, [groups.order + at])
        T.buffer_store(grouped, at + 1, [starts + expert + 1])
