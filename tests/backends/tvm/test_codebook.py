"""Looking up bytes: any table, on every target, and by the instruction that is for it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from host import each_target
from tvm.ir import IRModule

from rlxc.backends.tvm.build import compile_module
from rlxc.backends.tvm.kernels.codebook import ByteTable
from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, Kernel, Number, Pointer, serial
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.targets import CpuTarget, find_target

NUMBERS = (127, 0, 255, 128, 1, 240, 31, 7, 64, 200, 3, 99, 129, 254, 17, 86)
COUNT = 5


def lookup_kernel(target: CpuTarget, numbers: tuple[int, ...]) -> Kernel:
    """``out[i] = numbers[codes[i]]``, ``count`` vectors of them."""
    vectors = Vectors.of(target)

    def body(codes: Buffer, out: Buffer, count: Expr) -> None:
        table = ByteTable(vectors, numbers)
        with serial(count) as index:
            at = index * (4 * vectors.lanes)
            vectors.store_bytes(out, at, table[vectors.load_bytes(codes, at)])

    params = (Pointer("codes", "int8"), Pointer("out", "int8"), Number("count"))
    return Kernel(f"lookup_{len(numbers)}", params, body)


@each_target
@pytest.mark.parametrize("size", [16, 6])
def test_every_code_is_looked_up(run_kernel: Any, target: CpuTarget, size: int) -> None:
    codes = np.random.default_rng(0).integers(0, size, COUNT * 4 * target.lanes, dtype=np.int8)
    out = np.zeros_like(codes)
    run_kernel(lookup_kernel(target, NUMBERS[:size]), codes, out, COUNT, target=target)
    np.testing.assert_array_equal(out.view(np.uint8), np.array(NUMBERS, np.uint8)[codes])


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("x86-64-v4-vnni", r"vpshufb\b.*%zmm"),
        ("x86-64-v4", r"vpshufb\b.*%zmm"),
        ("x86-64-v3", r"vpshufb\b.*%ymm"),
        ("aarch64-dotprod", r"tbl\tv\d+\.16b"),
        ("aarch64", r"tbl\tv\d+\.16b"),
    ],
)
def test_lookup_is_one_instruction_where_there_is_one(name: str, instruction: str) -> None:
    target = find_target(name)
    kernel = lookup_kernel(target, NUMBERS)
    function = kernel.function(private=False).with_attr("global_symbol", kernel.name)
    code = compile_module(IRModule({kernel.name: function}), target).inspect_source("s")
    assert re.search(instruction, code)
