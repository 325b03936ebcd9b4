"""Kernels that have knobs, each made once, with the best that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlxc.backends.tvm.families import Entry
from rlxc.backends.tvm.kernels.kernel import Kernel, Knobs
from rlxc.backends.tvm.kernels.lora import LoraUp
from rlxc.backends.tvm.problem import Problem
from rlxc.backends.tvm.program import Amount
from rlxc.backends.tvm.targets import CpuTarget

FindKnobs = Callable[[Problem], Knobs | None]
"""Gives the best known setting of a kernel's knobs at one shape, or None if it was never measured."""


@dataclass
class TunedKernels:
    """The tuned kernels of a program, and what they were made from."""

    target: CpuTarget
    most_tokens: int
    find_knobs: FindKnobs
    _entries: dict[str, tuple[Entry, int]] = field(default_factory=dict)
    _kernels: dict[tuple[str, LoraUp | None], Kernel] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What can be tuned, each with how often it was asked for."""
        return tuple(entry.times(count) for entry, count in self._entries.values())

    def make(self, family: str, amount: Amount, *, lora: LoraUp | None = None, **parameters: Any) -> Kernel:
        """The kernel with these parameters, and with the best known knobs for as many tokens as it may get.

        Side paths cost little beside the product: it has the knobs that are best for it alone.
        """
        many = (self.most_tokens, 1) if amount == "tokens" else (1,)
        entries = [Entry(family, {**parameters, "tokens": tokens}) for tokens in dict.fromkeys(many)]
        for entry in entries:
            self._entries[entry.key] = (entry, self._entries.get(entry.key, (entry, 0))[1] + 1)
        key = (entries[0].key, lora)
        if key not in self._kernels:
            problems = [entry.problem(self.target) for entry in entries]
            knobs = dict(problems[0].space[0])
            # Each problem has a say in what it makes better; where two disagree, the one with many tokens wins.
            for problem in reversed(problems):
                best = self.find_knobs(problem) or {}
                knobs.update({name: value for name, value in best.items() if value != problem.space[0][name]})
            whole = problems[0] if lora is None else entries[0].problem(self.target, lora=lora)
            self._kernels[key] = whole.make(knobs)
        return self._kernels[key]
