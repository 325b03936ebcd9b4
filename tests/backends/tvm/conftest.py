"""One kernel, compiled for this machine and called with numpy arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

os.environ.setdefault(
    "TVM_NUM_THREADS", "2"
)  # read when TVM is imported; more threads only make tests slower

import tvm

from rlxc.backends.tvm.build import compile_module
from rlxc.backends.tvm.kernels.kernel import Kernel, Number, Pointer
from rlxc.backends.tvm.targets import CpuTarget, native_target

# What these tests share beside fixtures lies beside this file.
sys.path.insert(0, str(Path(__file__).parent))

Array = npt.NDArray[Any]
RunKernel = Callable[..., None]

GUARD = 256
"""Bytes on either side of every array that a kernel must leave alone; they keep the array's alignment too."""


class _Guarded:
    """A copy of an array at a multiple of 64 bytes, between bytes that show a write outside of it."""

    def __init__(self, array: Array) -> None:
        raw = np.full(array.nbytes + 2 * GUARD + 64, 0xFF, np.uint8)  # all ones: NaN, should a float be read
        start = -raw.ctypes.data % 64
        self.bytes = raw[start : start + array.nbytes + 2 * GUARD]
        self.data = self.bytes[GUARD : GUARD + array.nbytes].view(array.dtype)
        self.data[:] = array.ravel()

    def check(self, name: str) -> None:
        outside = np.concatenate([self.bytes[:GUARD], self.bytes[GUARD + self.data.nbytes :]])
        assert (outside == 0xFF).all(), f"the kernel writes outside of {name}"


@pytest.fixture(scope="session")
def run_kernel() -> RunKernel:
    """``run_kernel(kernel, *values, target=None)``: a C-contiguous array for each pointer, an int for each number.

    The values stand in the order of ``kernel.params``. The kernel's name must say all that its code depends on:
    a kernel of a known name is not compiled again. Arrays are changed in place, and a write outside of one fails.
    """
    compiled: dict[tuple[str, str], Any] = {}

    def run(kernel: Kernel, *values: Array | int, target: CpuTarget | None = None) -> None:
        assert len(values) == len(kernel.params), [param.name for param in kernel.params]
        target = target or native_target()
        key = (target.name, kernel.name)
        if key not in compiled:
            module = tvm.IRModule({kernel.name: kernel.function(private=False)})
            compiled[key] = compile_module(module, target)[kernel.name]
        arguments: list[Any] = []
        arrays = []
        for param, value in zip(kernel.params, values):
            if isinstance(param, Number):
                assert isinstance(value, int | np.integer), param.name
                arguments.append(int(value))
                continue
            assert isinstance(param, Pointer) and isinstance(value, np.ndarray), param.name
            assert value.dtype == param.dtype and value.flags.c_contiguous, (param, value.dtype, value.flags)
            guarded = _Guarded(value)
            arrays.append((param.name, value, guarded))
            arguments.append(tvm.runtime.from_dlpack(guarded.data))
        compiled[key](*arguments)
        for name, value, guarded in arrays:
            guarded.check(name)
            value[...] = guarded.data.reshape(value.shape)

    return run
