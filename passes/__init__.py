"""Passes: graph in, graph out, one file each; `default_passes` is the table of contents of the compiler."""

if __name__ != "rlxc.passes":
    raise ImportError(f"import this package as rlxc.passes, not as {__name__}")

from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.choose_lora_strategy import ChooseLoraStrategy, LoraMode
from rlxc.passes.choose_weight_layout import ChooseWeightLayout
from rlxc.passes.fold_lora import Change, Delta, Replacement
from rlxc.passes.pipeline import PassReport, PipelineResult, WeightChanges, default_passes, run_passes

__all__ = [
    "Change",
    "ChooseLoraStrategy",
    "ChooseWeightLayout",
    "Delta",
    "LoraMode",
    "NoMatch",
    "Pass",
    "PassReport",
    "PassResult",
    "PipelineResult",
    "Replacement",
    "WeightChanges",
    "default_passes",
    "run_passes",
]
