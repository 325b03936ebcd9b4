"""How fast the matrix-vector kernel of the tvm backend reads each weight format, beside what the memory gives.

    python examples/format_speed.py [iq4_nl mxfp4 ...] [--megabytes 128] [--threads 2] [--target native]

The streaming read goes over the very bytes that the kernel reads, in turns with it, so that a machine that slows down
slows both; the best of all rounds counts. Formats of few bits have more arithmetic in a byte than memory brings: for
them the weights per second are what to look at.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm.ir import IRModule
from tvm.tirx import Cast

from rlxc.backends.tvm.build import compile_module
from rlxc.backends.tvm.families import matmul, matmul_exact
from rlxc.backends.tvm.kernels.kernel import (
    Buffer,
    Kernel,
    Pointer,
    Register,
    bind,
    parallel,
    prefetch,
    serial,
)
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import PackedLayout
from rlxc.backends.tvm.problem import call_data, measured_module
from rlxc.backends.tvm.targets import CpuTarget, find_target
from rlxc.dtypes import DType
from rlxc.errors import OptionError, RlxcError
from rlxc.weights.formats import FORMATS

Array = npt.NDArray[Any]

SCALES: dict[str, np.generic] = {
    "float16": np.float16(2**-10),
    "float32": np.float32(2**-10),
    "e8m0": np.uint8(118),
    "ue4m3": np.uint8(20),
}

COLUMNS = 4096
TASKS, CHAINS, AHEAD = 256, 8, 512
RESULTS = np.zeros(TASKS * 16, np.int32)
"""What a streaming read leaves: a vector for each task, so that nothing can be left out."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    packed = [dtype.value for dtype in DType if dtype.is_packed]
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(packed)}; all without")
    parser.add_argument("--megabytes", type=int, default=128, help="of weights; more than the caches hold")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--target", default="native")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    tvm.get_global_func("runtime.config_threadpool")(1, args.threads)
    try:
        unknown = set(args.formats) - set(packed)
        if unknown:
            raise OptionError(
                f"no packed format is called {min(unknown)!r}", remedy=f"one of {', '.join(packed)}"
            )
        print("format    bits in file  in artifact     GB/s  of streaming  weights, 1e9/s")
        for name in args.formats or packed:
            print(measure(DType(name), args.target, args.megabytes << 20, args.rounds), flush=True)
    except RlxcError as error:
        raise SystemExit(f"error: {error}") from None


def measure(dtype: DType, target_name: str, size: int, rounds: int) -> str:
    """One format's line."""
    target = find_target(target_name)
    row_bytes = PackedLayout(dtype, 16, COLUMNS).nbytes // 16
    layout = PackedLayout(dtype, size // row_bytes // 16 * 16, COLUMNS)
    shape: dict[str, Any] = {
        "dtype": dtype.value,
        "rows": layout.rows,
        "columns": COLUMNS,
        "stride": layout.rows,
    }
    if layout.has_integers:
        problem = matmul(target, **shape, bias=False, tokens=1)
    else:
        problem = matmul_exact(target, **shape, x_stride=COLUMNS, bias=False, tokens=1)
    weight = random_weight(layout)
    numbers = np.random.default_rng(0).standard_normal
    arrays = []
    for data in call_data(problem):
        if data.values is not None:
            arrays.append(np.full(data.elements, data.values, data.dtype))
        else:
            arrays.append(numbers(data.elements).astype(data.dtype))
    arrays[1] = weight.view(arrays[1].dtype)
    call = compiled(measured_module(problem, problem.space[0]), target, arrays)
    stream = compiled(streaming_read(target, weight.nbytes), target, [weight.view(np.int32), RESULTS.copy()])
    product, streaming = [], []
    for _ in range(rounds):
        product.append(seconds(call))
        streaming.append(seconds(stream))
    speed, most = (weight.nbytes / min(times) / 1e9 for times in (product, streaming))
    count = layout.rows * COLUMNS
    return (
        f"{dtype.value:8}  {FORMATS[dtype].bits_per_weight:12.3f}  {layout.bits_per_weight:11.3f}  "
        f"{speed:7.1f}  {speed / most:12.2f}  {count / min(product) / 1e9:14.1f}"
    )


def random_weight(layout: PackedLayout) -> Array:
    """Random codes and factors, and scales that are all the same: other floats might be slower to multiply."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, 256, 1 << 20, dtype=np.uint8)
    weight = np.zeros(layout.nbytes, np.uint8)
    for name, section in layout.sections.items():
        part = weight[section.offset : section.offset + section.tile_bytes * layout.tiles]
        if name == "codes":
            part[:] = np.resize(some, part.size)
        elif name.endswith("factors"):
            part[:] = np.resize(some >> 3, part.size)
        else:
            assert layout.format.scale is not None
            one = SCALES[layout.format.scale.kind]
            part.view(one.dtype)[:] = one
    return weight.view(np.int8)


def streaming_read(target: CpuTarget, size: int) -> IRModule:
    """A module whose ``main`` adds up ``size`` bytes, whole vectors, as fast as they come."""
    vectors = Vectors.of(target)
    step = CHAINS * vectors.lanes
    steps = size // 4 // TASKS // step

    def body(words: Buffer, out: Buffer) -> None:
        with parallel(TASKS) as task:
            sums = [Register(vectors.lanes, vectors.splat(0, "int32"), "int32") for _ in range(CHAINS)]
            first = bind(Cast("int64", task) * (steps * step))
            with serial(steps) as index:
                for chain, total in enumerate(sums):
                    at = first + index * step + chain * vectors.lanes
                    total.set(total.get() + vectors.load(words, at))
                    prefetch(words, at + AHEAD)
            for total in sums[1:]:
                sums[0].set(sums[0].get() + total.get())
            vectors.store(out, task * 16, sums[0].get())

    kernel = Kernel("main", (Pointer("words", "int32"), Pointer("out", "int32")), body)
    return IRModule({"main": kernel.function(private=False)})


def compiled(module: IRModule, target: CpuTarget, arrays: list[Array]) -> Callable[[], None]:
    """A call of the module's ``main`` with these arrays."""
    main = compile_module(module, target)["main"]
    tensors = [tvm.runtime.from_dlpack(aligned(array)) for array in arrays]
    return lambda: main(*tensors)


def aligned(array: Array) -> Array:
    """The array, or a copy of it, on a cache line."""
    if array.ctypes.data % 64 == 0:
        return array
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + array.nbytes].view(array.dtype)
    out[:] = array
    return out


def seconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
