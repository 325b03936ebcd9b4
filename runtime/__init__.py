"""Running artifacts: sessions, tokenizers, sampling. Needs no compiler, and never imports it."""

if __name__ != "rlxc.runtime":
    raise ImportError(f"import this package as rlxc.runtime, not as {__name__}")

from rlxc.runtime.session import Session, load
from rlxc.runtime.stream import Completion, Piece, StopReason, Stream

__all__ = ["Completion", "Piece", "Session", "StopReason", "Stream", "load"]
