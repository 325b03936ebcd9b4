"""Targets: each is found by its name, the best for a CPU is chosen, and its code keeps to the features it lists."""

from __future__ import annotations

import itertools

import pytest
from tvm.target.codegen import llvm_get_cpu_features

import rlxc.backends.tvm.targets
from rlxc.backends.tvm.targets import TARGETS, CpuTarget, find_target, find_targets, native_target
from rlxc.errors import OptionError

V3 = "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"

# LLVM's names of instruction sets, where /proc/cpuinfo has others. LLVM's list of a CPU's features also holds what the
# baseline has, and advice on which instructions are fast.
CPUINFO_NAMES = {
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avx512vnni": "avx512_vnni",
    "avxvnni": "avx_vnni",
    "dotprod": "asimddp",
}
INSTRUCTION_SETS = (
    "cx16 sahf popcnt sse3 ssse3 sse4.1 sse4.2 avx avx2 bmi bmi2 f16c fma lzcnt movbe xsave avx512f avx512bw avx512cd "
    "avx512dq avx512vl avx512vnni avxvnni avx512bf16 avx512fp16 avx512vbmi avx512ifma avx10.1 amx-tile amx-int8 aes "
    "gfni dotprod i8mm bf16 fullfp16 sve sve2 lse crc rdm"
).split()


def all_llvm_features(target: CpuTarget) -> set[str]:
    return {str(name) for name in llvm_get_cpu_features(target.llvm)}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_llvm_may_use_just_the_features_that_are_needed(target: CpuTarget) -> None:
    used = {CPUINFO_NAMES.get(name, name) for name in all_llvm_features(target) & set(INSTRUCTION_SETS)}
    assert used == set(target.needs)


@pytest.mark.parametrize(
    ("machine", "features", "name"),
    [
        ("x86_64", f"fpu sse2 {V4} avx512_vnni avx_vnni amx_int8", "x86-64-v4-vnni"),
        ("x86_64", f"fpu sse2 {V4}", "x86-64-v4"),
        ("x86_64", f"fpu sse2 {V3} avx_vnni", "x86-64-v3-vnni"),
        ("x86_64", f"fpu sse2 {V3} avx512f", "x86-64-v3"),
        ("x86_64", "fpu sse2 avx2", "x86-64"),
        ("aarch64", "fp asimd asimddp sve", "aarch64-dotprod"),
        ("aarch64", "fp asimd", "aarch64"),
    ],
)
def test_native_is_the_best_that_the_cpu_can_run(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: str, name: str
) -> None:
    monkeypatch.setattr(rlxc.backends.tvm.targets, "machine", lambda: machine)
    monkeypatch.setattr(rlxc.backends.tvm.targets, "cpu_features", lambda: frozenset(features.split()))
    assert find_target("native") == native_target() == find_target(name)


def test_native_on_an_unknown_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlxc.backends.tvm.targets, "machine", lambda: "riscv64")
    with pytest.raises(
        OptionError, match=r"architecture, 'riscv64'; name .*x86-64-v3, x86-64, aarch64-dotprod"
    ):
        native_target()


def test_every_target_is_found_by_its_own_name() -> None:
    assert [find_target(target.name) for target in TARGETS] == list(TARGETS)
    assert len({target.name for target in TARGETS}) == len(TARGETS)


def test_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(OptionError, match=r"'x86-64-v5'; one of native, x86-64-v4-vnni, .*, aarch64$"):
        find_target("x86-64-v5")


def test_list_of_targets_has_each_once_and_a_better_one_first() -> None:
    found = find_targets("x86-64-v3, aarch64,x86-64-v4-vnni,x86-64-v3")
    assert [target.name for target in found] == ["x86-64-v4-vnni", "x86-64-v3", "aarch64"]


def test_empty_name_in_a_list_is_refused() -> None:
    with pytest.raises(OptionError, match="no such target: ''"):
        find_targets("x86-64-v3,")


def test_no_target_hides_a_better_one() -> None:
    """Of two targets that a CPU can run, the one that needs more stands first."""
    for first, second in itertools.combinations(TARGETS, 2):
        assert not (first.machine == second.machine and set(first.needs) <= set(second.needs))
