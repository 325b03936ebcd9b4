"""Running artifacts: sessions, tokenizers, sampling. Needs no compiler, and never imports it."""

if __name__ != "rlxc.runtime":
    raise ImportError(f"import this package as rlxc.runtime, not as {__name__}")

from rlxc.runtime.adapters import LoraStack, TargetModule
from rlxc.runtime.batch import Batch, Event, Request
from rlxc.runtime.drafters import Draft, Drafter, DraftHead, HeadDrafter, ModelDrafter, NgramDrafter
from rlxc.runtime.load import load
from rlxc.runtime.sampling import SamplingOptions
from rlxc.runtime.scheduler import Scheduler
from rlxc.runtime.session import Session
from rlxc.runtime.session_adapters import SessionAdapters
from rlxc.runtime.snapshot import KvSnapshot, LayerKv
from rlxc.runtime.stream import Completion, Piece, StopReason, Stream

__all__ = [
    "Batch",
    "Completion",
    "Draft",
    "DraftHead",
    "Drafter",
    "Event",
    "HeadDrafter",
    "KvSnapshot",
    "LayerKv",
    "LoraStack",
    "ModelDrafter",
    "NgramDrafter",
    "Piece",
    "Request",
    "SamplingOptions",
    "Scheduler",
    "Session",
    "SessionAdapters",
    "StopReason",
    "Stream",
    "TargetModule",
    "load",
]
