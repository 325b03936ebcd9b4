"""Passes: graph in, graph out, one file each; `default_passes` is the table of contents of the compiler."""

if __name__ != "rlxc.passes":
    raise ImportError(f"import this package as rlxc.passes, not as {__name__}")

from rlxc.passes.base import NoMatch, Pass, PassResult
from rlxc.passes.pipeline import PassReport, PipelineResult, default_passes, run_passes

__all__ = ["NoMatch", "Pass", "PassReport", "PassResult", "PipelineResult", "default_passes", "run_passes"]
