"""Scales as stored: every byte, and every f16, is the f32 that the judge says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import MXFP4, NVFP4
from host import HERE, each_target
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Kernel, Pointer, serial
from rlxc.backends.tvm.kernels.scales import StoredScales
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.weights.fields import ScaleKind

BYTES = np.arange(256, dtype=np.uint8)
HALVES = np.arange(0x7C00, dtype=np.uint16).view(np.float16)  # all that are finite and not negative
START = 64


def check(
    run_kernel: Any,
    target: CpuTarget,
    kind: ScaleKind,
    unit: float,
    lanes: int,
    stored: npt.NDArray[Any],
    expected: npt.NDArray[np.float32],
    flush: bool = False,
) -> None:
    """Read all of ``stored``, which begins at byte 64, ``lanes`` at a time."""
    count = len(stored) // lanes

    def body(weight: Buffer, out: Buffer) -> None:
        scales = StoredScales(weight, kind, unit, flush=flush)
        with serial(count) as index:
            value = scales.read(START, index * lanes, lanes)
            at = index * lanes
            T.buffer_store(out, value, [at if lanes == 1 else T.Ramp(at, 1, lanes)])

    params = (Pointer("weight", "int8"), Pointer("out", "float32"))
    kernel = Kernel(f"scales_{kind}_{lanes}_{flush}", params, body)
    weight = np.concatenate([np.zeros(START, np.uint8), stored.view(np.uint8)]).view(np.int8)
    out = np.zeros(count * lanes, np.float32)
    run_kernel(kernel, weight, out, target=target)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@each_target
@pytest.mark.parametrize("one", [True, False], ids=["number", "vector"])
def test_e8m0_is_half_a_power_of_two(run_kernel: Any, target: CpuTarget, one: bool) -> None:
    """Also 2^-128 and 2^-127, which have no exponent in f32, and 2^127."""
    expected = MXFP4.e8m0_to_fp32_half(BYTES)
    check(run_kernel, target, "e8m0", 0.5, 1 if one else target.lanes, BYTES, expected)


@each_target
def test_e8m0_without_exponent_can_be_zero(run_kernel: Any, target: CpuTarget) -> None:
    expected = MXFP4.e8m0_to_fp32_half(BYTES)
    expected[:2] = 0
    check(run_kernel, target, "e8m0", 0.5, target.lanes, BYTES, expected, flush=True)


@each_target
@pytest.mark.parametrize("one", [True, False], ids=["number", "vector"])
def test_ue4m3_is_half_a_small_float(run_kernel: Any, target: CpuTarget, one: bool) -> None:
    """Also those without exponent, and 127, which is no number and counts as 0."""
    expected = NVFP4.ue4m3_to_fp32(BYTES).astype(np.float32)
    check(run_kernel, target, "ue4m3", 0.5, 1 if one else target.lanes, BYTES, expected)


@pytest.mark.parametrize("lanes", [1, HERE[0].lanes])
def test_f16_is_multiplied_by_its_unit(run_kernel: Any, lanes: int) -> None:
    expected = HALVES.astype(np.float32) * np.float32(0.125)
    check(run_kernel, HERE[0], "float16", 0.125, lanes, HALVES, expected)
