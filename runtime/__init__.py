"""Running artifacts: sessions, tokenizers, sampling. Needs no compiler, and never imports it."""

if __name__ != "rlxc.runtime":
    raise ImportError(f"import this package as rlxc.runtime, not as {__name__}")

from rlxc.runtime.adapters import LoraStack, TargetModule
from rlxc.runtime.batch import Request
from rlxc.runtime.sampling import SamplingOptions
from rlxc.runtime.scheduler import AdapterScheduler
from rlxc.runtime.session import Session, load
from rlxc.runtime.session_adapters import SessionAdapters
from rlxc.runtime.stream import Completion, Piece, StopReason, Stream

__all__ = [
    "AdapterScheduler",
    "Completion",
    "LoraStack",
    "Piece",
    "Request",
    "SamplingOptions",
    "Session",
    "SessionAdapters",
    "StopReason",
    "Stream",
    "TargetModule",
    "load",
]
