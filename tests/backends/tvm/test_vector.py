"""The 8-bit dot product: exact on every target, whatever the codes and activations, and the instruction meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tvm
from tvm.ir import IRModule

from rlxc.artifact.cpu import cpu_features, machine
from rlxc.backends.tvm.build import compile_module
from rlxc.backends.tvm.kernels.cache import CacheShape
from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Kernel, Number, Pointer, bind, local, serial
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.targets import TARGETS, CpuTarget, find_target

CALLER = Path(__file__).with_name("call_dots.c")
TOPS = (2, 3, 7, 15, 31, 63, 86, 124, 240, 255)
WORDS = 64
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
each_top = pytest.mark.parametrize("top", TOPS)


def dot_kernel(target: CpuTarget, top: int) -> Kernel:
    """``out = start + sum of dots`` over ``words`` words of activations; codes u8 ``[words, lanes, 4]``."""
    vectors = Vectors.of(target)

    def body(codes: Buffer, words: Buffer, start: Buffer, out: Buffer, count: Expr) -> None:
        acc = local(vectors.lanes, "int32")
        vectors.store(acc, 0, vectors.load(start, 0))
        with serial(count) as index:
            group = bind(vectors.load_bytes(codes, index * (4 * vectors.lanes)))
            vectors.store(acc, 0, vectors.dot(vectors.load(acc, 0), group, words[index], top))
        vectors.store(out, 0, vectors.load(acc, 0))

    arrays = (Pointer("words", "int32"), Pointer("start", "int32"), Pointer("out", "int32"))
    return Kernel("dots", (Pointer("codes", "uint8"), *arrays, Number("count")), body)


@cache
def built(target: CpuTarget, top: int) -> tvm.runtime.Module:
    function = dot_kernel(target, top).function(private=False).with_attr("global_symbol", "dots")
    return tvm.tirx.build(IRModule({"dots": function}), target=target.llvm)


def instructions(target: CpuTarget, top: int) -> str:
    """The assembly of a kernel, without labels and directives."""
    return "\n".join(re.findall(r"^\t[^.].*", built(target, top).inspect_source("s"), re.MULTILINE))


Case = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8], npt.NDArray[np.int32]]


def extremes(lanes: int, top: int) -> Case:
    """Codes ``[words, lanes, 4]``, activations ``[words, 4]`` and starts ``[lanes]``; some are the largest."""
    random = np.random.default_rng(top)
    codes = random.integers(0, top + 1, (WORDS, lanes, 4), dtype=np.uint8)
    activations = random.integers(-127, 128, (WORDS, 4), dtype=np.int8)
    edges = [(code, activation) for code in {0, top // 2, top // 2 + 1, top} for activation in (-127, 127)]
    for word, (code, activation) in enumerate(edges):
        codes[word], activations[word] = code, activation
    return codes, activations, random.integers(-(2**20), 2**20, lanes, dtype=np.int32)


def expected(target: CpuTarget, top: int, case: Case) -> npt.NDArray[np.int64]:
    codes, activations, start = case
    shifted = codes.astype(np.int64) - Vectors.of(target).shift(top)
    return start + (shifted * activations.astype(np.int64)[:, None]).sum((0, 2))


def runs_here(target: CpuTarget) -> bool:
    return target.machine == machine() and cpu_features().issuperset(target.needs)


@each_top
@each_target
def test_dot_is_exact(target: CpuTarget, top: int) -> None:
    if not runs_here(target):
        pytest.skip("this CPU cannot run the target's code")
    case = extremes(target.lanes, top)
    codes, activations, start = case
    # Each word alone: saturation in one must not hide in the sum of all.
    for word in range(WORDS):
        one = (codes[word : word + 1], activations[word : word + 1], start)
        arrays = (
            one[0].reshape(-1),
            one[1].reshape(-1).view(np.int32),
            start,
            np.zeros(target.lanes, np.int32),
        )
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        built(target, top)["dots"](*tensors, 1)
        np.testing.assert_array_equal(tensors[-1].numpy(), expected(target, top, one))


@each_top
@pytest.mark.parametrize("name", ["x86-64-v4-vnni", "x86-64-v3-vnni", "aarch64-dotprod"])
def test_dot_is_one_instruction_where_there_is_one(name: str, top: int) -> None:
    target = find_target(name)
    code = instructions(target, top)
    operation = {
        "vpdpbusd": r"vpdpbusd\b.*%zmm" if target.lanes == 16 else r"vpdpbusd\b.*%ymm",
        "sdot": r"sdot\b",
    }
    assert re.search(operation[target.dot], code)
    assert not re.search(r"vpmaddubsw|vpmulld|\bmla\b", code)


@pytest.mark.parametrize(("name", "register"), [("x86-64-v4", "zmm"), ("x86-64-v3", "ymm")])
@each_top
def test_dot_without_vnni_multiplies_bytes_in_pairs(name: str, register: str, top: int) -> None:
    code = instructions(find_target(name), top)
    assert re.search(rf"vpmaddubsw\b.*%{register}", code)
    assert re.search(rf"vpmaddwd\b.*%{register}", code)
    assert "vpdpbusd" not in code


def test_portable_dot_is_vectorised() -> None:
    assert re.search(r"\bpmaddwd\b.*%xmm", instructions(find_target("x86-64"), 255))
    assert re.search(r"\bmla\b.*v\d+\.4s", instructions(find_target("aarch64"), 255))


@pytest.mark.parametrize(
    "name", ["x86-64-v4-vnni", "x86-64-v4", "x86-64-v3-vnni", "x86-64-v3", "aarch64-dotprod"]
)
def test_codes_of_up_to_7_bits_are_multiplied_as_they_are(name: str) -> None:
    vectors = Vectors.of(find_target(name))
    assert not any(vectors.shift(top) for top in TOPS if top < 128)


@each_target
def test_f16_converts_exactly_without_another_library(target: CpuTarget) -> None:
    """All f16 to f32 and back; a CPU without the instructions must not need a C compiler's library."""
    vectors = Vectors.of(target)

    def body(halves: Buffer, floats: Buffer, back: Buffer) -> None:
        with serial(65536 // vectors.lanes) as index:
            at = index * vectors.lanes
            wide = bind(vectors.floats(vectors.load(halves, at)))
            vectors.store(floats, at, wide)
            vectors.store(back, at, wide.astype(f"float16x{vectors.lanes}"))

    params = (Pointer("halves", "float16"), Pointer("floats", "float32"), Pointer("back", "float16"))
    function = Kernel("convert", params, body).function(private=False).with_attr("global_symbol", "convert")
    library = tvm.tirx.build(IRModule({"convert": function}), target=target.llvm)
    code = library.inspect_source("s")
    called = set(re.findall(r"\t(?:callq|jmp|bl)\t(__\w*hf\w*)", code))
    assert called <= set(re.findall(r"^(\w+):", code, re.MULTILINE))
    if not runs_here(target):
        return
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    tensors = [
        tvm.runtime.tensor(array)
        for array in (every, np.zeros(65536, np.float32), np.zeros(65536, np.float16))
    ]
    library["convert"](*tensors)
    np.testing.assert_array_equal(tensors[1].numpy(), every.astype(np.float32))
    np.testing.assert_array_equal(tensors[2].numpy(), every)


@each_target
def test_bf16_is_the_nearest_and_of_two_the_even_one(target: CpuTarget) -> None:
    """Every upper half of an f32 beside lower halves below, at and above the middle, against another conversion."""
    if not runs_here(target):
        pytest.skip("this CPU cannot run the target's code")
    vectors = Vectors.of(target)

    def body(floats: Buffer, rounded: Buffer, back: Buffer, count: Expr) -> None:
        with serial(count // vectors.lanes) as index:
            at = index * vectors.lanes
            vectors.store(rounded, at, vectors.round_to_bf16(vectors.load(floats, at)))
            vectors.store(back, at, vectors.widen_bf16(vectors.load(rounded, at)))

    params = (
        Pointer("floats", "float32"),
        Pointer("rounded", "uint16"),
        Pointer("back", "float32"),
        Number("count"),
    )
    function = Kernel("bf16", params, body).function(private=False).with_attr("global_symbol", "bf16")
    library = compile_module(IRModule({"bf16": function}), target)
    upper = np.arange(65536, dtype=np.uint32) << 16
    floats = (
        (upper[:, None] | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32))
        .view(np.float32)
        .ravel()
    )
    floats = np.where(np.isnan(floats), np.float32(np.nan), floats)  # as CPUs make it
    tensors = [
        tvm.runtime.tensor(array)
        for array in (floats, np.zeros(floats.shape, np.uint16), np.zeros_like(floats))
    ]
    library["bf16"](*tensors, len(floats))
    exact = floats.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors[1].numpy(), exact.view(np.uint16))
    np.testing.assert_array_equal(tensors[2].numpy(), exact.astype(np.float32))


# The instructions that make a register of f32 of a cache's elements.
WIDENING = {
    ("x86_64", "float16"): r"\tvcvtph2ps\t.*%[yz]mm",
    ("x86_64", "bfloat16"): r"\tvpmovzxwd\t.*%[yz]mm",
    ("x86_64", "int8"): r"\tvpmovsxbd\t.*%[yz]mm(.|\n)*\tvcvtdq2ps\t%[yz]mm",
    ("aarch64", "float16"): r"\tfcvtl\tv\d+\.4s",
    ("aarch64", "bfloat16"): r"\tu?shll\tv\d+\.4s",
    ("aarch64", "int8"): r"\tscvtf\tv\d+\.4s",
}


@pytest.mark.parametrize("name", ["x86-64-v4-vnni", "x86-64-v3", "aarch64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_cache_is_widened_by_whole_registers(name: str, dtype: Any) -> None:
    target = find_target(name)
    vectors, shape = Vectors.of(target), CacheShape(1, 64, 64, dtype)

    def body(stored: Buffer, floats: Buffer, count: Expr) -> None:
        with serial(count) as index:
            at = index * vectors.lanes
            vectors.store(floats, at, shape.floats(vectors, vectors.load(stored, at)))

    params = (Pointer("stored", shape.element), Pointer("floats", "float32"), Number("count"))
    function = Kernel("widen", params, body).function(private=False).with_attr("global_symbol", "widen")
    code = compile_module(IRModule({"widen": function}), target).inspect_source("s")
    assert re.search(WIDENING[target.machine, dtype], code)
    one_by_one = r"\t(v?cvtsi2ss|pinsr\w|vpinsr[bd]|movs[bl]\w*|ldrs?b|ld1\t\{ v\d+\.\w \}\[)"
    assert not re.search(one_by_one, code.split("widen_compute_:")[-1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-user")
@pytest.mark.skipif(find_spec("ziglang") is None, reason="needs ziglang, a C compiler and linker")
@each_top
@pytest.mark.parametrize("name", ["aarch64-dotprod", "aarch64"])
def test_dot_is_exact_on_an_emulated_arm(tmp_path: Path, name: str, top: int) -> None:
    target = find_target(name)
    case = extremes(target.lanes, top)
    codes, activations, start = case
    built(target, top).write_to_file(str(tmp_path / "dots.o"), "o")
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static", "-O1"]
    files = [CALLER, "dots.o", "-o", "dots"]
    subprocess.run([*compiler, f"-DLANES={target.lanes}", *files], cwd=tmp_path, check=True)
    given = b"".join(
        codes[word].tobytes() + activations[word].tobytes() + start.tobytes() for word in range(WORDS)
    )
    ran = subprocess.run(["qemu-aarch64", tmp_path / "dots"], input=given, capture_output=True, check=True)
    got = np.frombuffer(ran.stdout, np.int32).reshape(WORDS, target.lanes)
    want = [expected(target, top, (codes[i : i + 1], activations[i : i + 1], start)) for i in range(WORDS)]
    np.testing.assert_array_equal(got, np.stack(want))
