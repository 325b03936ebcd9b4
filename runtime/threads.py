"""How many threads a session uses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rlxc.errors import OptionError

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def choose_threads(threads: int | None) -> int:
    """``threads``, checked; by default one for each physical core that this process may use.

    Raises:
        OptionError: it is not an integer in 1 ... the number of logical processors.
    """
    if threads is None:
        return _physical_cores()
    most = os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise OptionError(f"threads must be an integer in 1..{most}, got {threads!r}")
    return threads


def _physical_cores() -> int:
    # Two threads on one core share its multipliers: the second one adds waiting, not speed.
    return len({_siblings(processor) for processor in _available_processors()})


def _available_processors() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _siblings(processor: int) -> str:
    try:
        return Path(_SIBLINGS.format(processor)).read_text()
    except OSError:  # not Linux: every processor counts
        return str(processor)
