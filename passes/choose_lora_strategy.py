"""Decides, matrix by matrix, whether adapters are folded into it or split off to its side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlxc.dtypes import DType
from rlxc.errors import OptionError
from rlxc.ir import Graph, Weight
from rlxc.passes.base import Pass, PassResult
from rlxc.passes.fold_lora import Change, Delta

LoraMode = Literal["auto", "split", "fold"]
"""``split`` keeps adapters swappable, ``fold`` makes them part of the weights, ``auto`` asks the cost model."""

ERROR_BUDGET = 0.01
"""What encoding a folded matrix anew may cost by default: relative error, as root mean square."""

_UNIT = 16  # ranks are kept in units of so many
_SPLIT_BYTES = 2  # of a number of an adapter at run time

# The relative root mean square error of normally distributed weights in each format that can be encoded in; a
# re-encoded matrix has it anew. Ternary and binary formats suit weights that were trained for them only.
_ERRORS = {
    DType.F32: 0.0,
    DType.F16: 0.00021,
    DType.BF16: 0.00166,
    DType.Q8_0: 0.00536,
    DType.Q6_K: 0.0174,
    DType.Q5_K: 0.0347,
    DType.Q5_0: 0.0428,
    DType.Q5_1: 0.0379,
    DType.Q4_K: 0.0707,
    DType.IQ4_NL: 0.0750,
    DType.Q4_0: 0.0861,
    DType.Q4_1: 0.0783,
    DType.NF4: 0.0919,
    DType.FP4: 0.122,
    DType.INT4: 0.108,
    DType.MXFP4: 0.1156,
    DType.Q3_K: 0.147,
    DType.Q2_K: 0.279,
    DType.Q1_0: 0.600,
    DType.TQ1_0: 0.809,
    DType.TQ2_0: 0.809,
}


@dataclass(frozen=True)
class _Choice:
    fold: bool
    reason: str


class ChooseLoraStrategy(Pass):
    """The fact ``lora_strategy`` says for each matrix that an adapter changes: fold or split, and why.

    Args:
        changes: by the matrix's name, what each adapter does to it.
        mode: what the user asked for.
        to: by the matrix's name, the format that folding would encode it in; missing ones keep theirs.
        budget: the relative error that folding may cause, where the mode leaves the choice.
    """

    def __init__(
        self,
        changes: Mapping[str, Sequence[Change]],
        mode: LoraMode,
        to: Mapping[str, DType],
        budget: float = ERROR_BUDGET,
    ) -> None:
        self.changes, self.mode, self.to, self.budget = changes, mode, to, budget

    def run(self, graph: Graph) -> PassResult:
        """See the class.

        Raises:
            OptionError: split was asked for and a matrix can only be folded, or the other way round.
        """
        choices = {
            name: self._choose(name, graph.stored(graph.weight[name]), changes)
            for name, changes in self.changes.items()
        }
        if not choices:
            return PassResult(graph, False)
        facts = {
            name: {"fold": choice.fold, "reason": choice.reason} for name, choice in sorted(choices.items())
        }
        return PassResult(graph, False, facts={"lora_strategy": facts})

    def _choose(self, name: str, weight: Weight, changes: Sequence[Change]) -> _Choice:
        only_folds = _needs_fold(changes)
        activated = any(isinstance(change, Delta) and change.activated for change in changes)
        if activated and (only_folds or self.mode == "fold"):
            raise OptionError(
                f"an adapter of {name} cannot be folded: it acts only after its invocation tokens",
                remedy="split it (lora mode split), without adapters that have to be folded",
            )
        if only_folds and self.mode == "split":
            raise OptionError(
                f"an adapter changes {name} as no side path can: {only_folds}",
                remedy="fold it (lora mode fold or auto)",
            )
        if only_folds:
            return _Choice(True, only_folds)
        if self.mode != "auto":
            return _Choice(self.mode == "fold", f"{self.mode} was asked for")
        if activated:
            return _Choice(False, "it acts only after its invocation tokens")
        dtype = self.to.get(name, weight.type.dtype)
        rows, columns = map(int, weight.type.shape)
        rank = sum(-(-change.rank // _UNIT) * _UNIT for change in changes if isinstance(change, Delta))
        added = rank * (rows + columns) * _SPLIT_BYTES
        error = _ERRORS[dtype]
        if error <= self.budget:
            return _Choice(
                True, f"{dtype} costs an error of {error:.2%}; a side path reads {added} bytes a token"
            )
        return _Choice(
            False,
            f"{dtype} anew would cost an error of {error:.1%}, more than {self.budget:.1%}; "
            f"rank {rank} reads {added} bytes a token",
        )


def _needs_fold(changes: Sequence[Change]) -> str:
    """Why these changes can only be folded, or nothing."""
    if any(not isinstance(change, Delta) for change in changes):
        return "it was trained as a whole"
    if any(isinstance(change, Delta) and change.magnitude is not None for change in changes):
        return "DoRA scales whole rows"
    return ""
