"""What this CPU can do, in the words of a manifest's libraries."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """This CPU's architecture as Linux names it, on any system: ``x86_64``, ``aarch64`` and so on."""
    name = platform.machine().lower()
    return _MACHINES.get(name, name)


@cache
def cpu_features() -> frozenset[str]:
    """What this CPU can do beyond its architecture's baseline, as ``/proc/cpuinfo`` spells it.

    The standard library can ask Linux only. Elsewhere nothing is known, and the set is empty: libraries that need
    nothing are all that such a system may run.
    """
    try:
        return parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return frozenset()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The features that every CPU in ``text`` has: the ``flags`` of x86-64, the ``Features`` of aarch64."""
    found = [
        frozenset(value.split())
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*found) if found else frozenset()
