"""The CPUs that code is made for: what LLVM is told, and which instructions the kernels are written with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tvm

from rlxc.artifact.cpu import cpu_features, machine
from rlxc.errors import OptionError

Dot = Literal["vpdpbusd", "vpmaddubsw", "sdot", "multiply"]
"""How four products of 8-bit integers are added to a 32-bit one."""


@dataclass(frozen=True)
class CpuTarget:
    """A family of CPUs.

    Attributes:
        name: what the user calls it.
        triple: LLVM's name of the architecture and system.
        cpu: LLVM's name of the least CPU of the family.
        attributes: what LLVM may use, or should do, beyond that.
        machine: the architecture, as ``platform.machine()`` names it on Linux.
        needs: the features that the code may use, as ``/proc/cpuinfo`` spells them; the baseline has none.
        lanes: 32-bit numbers in a vector register.
        registers: vector registers.
        dot: the multiplication of 8-bit integers.
    """

    name: str
    triple: str
    cpu: str
    attributes: tuple[str, ...]
    machine: str
    needs: tuple[str, ...]
    lanes: int
    registers: int
    dot: Dot

    @property
    def lookup(self) -> str | None:
        """LLVM's name of the instruction that looks up each byte of a vector in 16 bytes; None without one."""
        return "llvm.aarch64.neon.tbl1" if self.machine == "aarch64" else _LOOKUPS.get(self.lanes)

    @property
    def llvm(self) -> Any:
        """The target as TVM takes it."""
        config: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu, "opt-level": 3}
        # It would join the kernels' vectors into ones of many registers, and take them apart again.
        config["cl-opt"] = ["-vectorize-slp=false"]
        if self.attributes:
            config["mattr"] = list(self.attributes)
        return tvm.target.Target(config)


_LOOKUPS = {16: "llvm.x86.avx512.pshuf.b.512", 8: "llvm.x86.avx2.pshuf.b"}

# The levels of the x86-64 psABI: everything that LLVM takes for granted in `-march=x86-64-v3` and `-v4`.
_V3 = (
    *("cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"),
    *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
)
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# LLVM prefers 256-bit vectors on these CPUs, because the first of them slowed down for wider ones.
_WIDE = "-prefer-256-bit"


def _x86(
    cpu: str, attributes: tuple[str, ...], needs: tuple[str, ...], lanes: int, registers: int, dot: Dot
) -> CpuTarget:
    name = f"{cpu}-vnni" if dot == "vpdpbusd" else cpu
    return CpuTarget(
        name, "x86_64-unknown-linux-gnu", cpu, attributes, "x86_64", needs, lanes, registers, dot
    )


def _arm(name: str, attributes: tuple[str, ...], needs: tuple[str, ...], dot: Dot) -> CpuTarget:
    return CpuTarget(name, "aarch64-unknown-linux-gnu", "generic", attributes, "aarch64", needs, 4, 32, dot)


TARGETS = (
    _x86("x86-64-v4", ("+avx512vnni", _WIDE), (*_V4, "avx512_vnni"), 16, 32, "vpdpbusd"),
    _x86("x86-64-v4", (_WIDE,), _V4, 16, 32, "vpmaddubsw"),
    _x86("x86-64-v3", ("+avxvnni",), (*_V3, "avx_vnni"), 8, 16, "vpdpbusd"),
    _x86("x86-64-v3", (), _V3, 8, 16, "vpmaddubsw"),
    _x86("x86-64", (), (), 4, 16, "multiply"),
    _arm("aarch64-dotprod", ("+dotprod",), ("asimddp",), "sdot"),
    _arm("aarch64", (), (), "multiply"),
)
"""Every target; of those that a CPU can run, the first is the best."""


def native_target() -> CpuTarget:
    """The best target that this CPU can run.

    Raises:
        OptionError: no target is for this architecture.
    """
    have = cpu_features()
    for target in TARGETS:
        if target.machine == machine() and have.issuperset(target.needs):
            return target
    raise OptionError(
        f"no target for this machine's architecture, {machine()!r}",
        source="target native",
        remedy=f"name the machine that the artifact is for: {_names()}",
    )


def find_target(name: str) -> CpuTarget:
    """The target of that name, ``native`` for this machine's.

    Raises:
        OptionError: there is no such target.
    """
    if name == "native":
        return native_target()
    for target in TARGETS:
        if target.name == name:
            return target
    raise OptionError(f"no such target: {name!r:.40}", source="target", remedy=f"one of native, {_names()}")


def find_targets(names: str) -> tuple[CpuTarget, ...]:
    """The targets of a list like ``x86-64-v3,x86-64-v4-vnni``: each once, and a better one first.

    Raises:
        OptionError: a name is not that of a target.
    """
    found = {find_target(name.strip()) for name in names.split(",")}
    return tuple(target for target in TARGETS if target in found)


def _names() -> str:
    return ", ".join(target.name for target in TARGETS)
