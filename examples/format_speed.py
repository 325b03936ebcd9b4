"""How fast the matrix-vector kernel of the tvm backend reads each weight format, beside what the memory gives.

    python examples/format_speed.py [iq4_nl mxfp4 ...] [--megabytes 128] [--threads 2] [--target native] [--layouts]

With ``--layouts``, every layout that the target can run is measured, with one token and with a prompt's 256, beside
what the cost model says of it (with these threads and this bandwidth), and the one that it chooses has a star.

The streaming read goes over the very bytes that the kernel reads, in turns with it, so that a machine that slows down
slows both; the best of all rounds counts. Formats of few bits have more arithmetic in a byte than memory brings: for
them the weights per second are what to look at.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
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
from rlxc.backends.tvm.layout_costs import machine
from rlxc.backends.tvm.problem import call_data, measured_module
from rlxc.backends.tvm.targets import CpuTarget, find_target
from rlxc.dtypes import DType
from rlxc.errors import OptionError, RlxcError
from rlxc.ir import WeightLayout, parse
from rlxc.ir.target import TargetFeatures
from rlxc.passes import ChooseWeightLayout
from rlxc.weights.formats import FORMATS

Array = npt.NDArray[Any]

SCALES: dict[str, np.generic] = {
    "float16": np.float16(2**-10),
    "float32": np.float32(2**-10),
    "e8m0": np.uint8(118),
    "ue4m3": np.uint8(20),
}

COLUMNS = 4096
PROMPT_ROWS, PROMPT_TOKENS = 512, 256
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
    parser.add_argument("--layouts", action="store_true", help="measure all layouts of each format")
    args = parser.parse_args()
    tvm.get_global_func("runtime.config_threadpool")(1, args.threads)
    try:
        unknown = set(args.formats) - set(packed)
        if unknown:
            raise OptionError(
                f"no packed format is called {min(unknown)!r}", remedy=f"one of {', '.join(packed)}"
            )
        names, options = args.formats or packed, (args.target, args.megabytes << 20, args.rounds)
        if args.layouts:
            print("                 in artifact     GB/s  weights, 1e9/s   model    prompts, GOP/s   model")
            for name in names:
                for line in measure_layouts(DType(name), *options, args.threads):
                    print(line, flush=True)
            return
        print("format    bits in file  in artifact     GB/s  of streaming  weights, 1e9/s")
        for name in names:
            print(measure(DType(name), *options), flush=True)
    except RlxcError as error:
        raise SystemExit(f"error: {error}") from None


def measure(dtype: DType, target_name: str, size: int, rounds: int) -> str:
    """One format's line."""
    target = find_target(target_name)
    layout = large_layout(dtype, size)
    call, weight = product_with(target, layout, 1)
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


def measure_layouts(dtype: DType, target_name: str, size: int, rounds: int, threads: int) -> Iterator[str]:
    """A line for each layout of a format."""
    target = find_target(target_name)
    typical = machine(target, int8=True)
    whole = np.zeros(size // 64 * 64, np.int8)
    stream = compiled(streaming_read(target, whole.nbytes), target, [whole.view(np.int32), RESULTS.copy()])
    here = replace(
        typical, threads=threads, bandwidth=whole.nbytes / min(seconds(stream) for _ in range(rounds)) / 1e9
    )
    assumed = f"{typical.bandwidth} by {typical.threads} assumed"
    yield f"{dtype.value}: {here.bandwidth:.1f} GB/s by {threads} threads; {assumed}"
    product = parse(
        f"graph product\ninput %x: f32[batch, seq, {COLUMNS}]\nweight @w: {dtype.value}[4096, {COLUMNS}]\n"
        "%y = DequantMatMul(%x, @w)\noutput %y"
    )
    chosen = ChooseWeightLayout(TargetFeatures(machines=(typical,))).run(product).graph.weight["w"].layout
    for cost in here.layouts[dtype]:
        layout = large_layout(dtype, size, cost.layout)
        call, _ = product_with(target, layout, 1)
        one = layout.rows * COLUMNS / min(seconds(call) for _ in range(rounds)) / 1e9
        few = PackedLayout(dtype, PROMPT_ROWS, COLUMNS, cost.layout)
        call, _ = product_with(target, few, PROMPT_TOKENS)
        operations = 2 * few.rows * COLUMNS * PROMPT_TOKENS
        many = operations / min(seconds(call) for _ in range(max(2, rounds // 5))) / 1e9
        reading = here.bandwidth * cost.bandwidth * 8 / cost.bits
        star = "*" if cost.layout == chosen else " "
        yield (
            f"{star} {layout.bits} bits, tiles of {layout.tile:2}  {layout.bits_per_weight:6.3f}  "
            f"{one * layout.bits_per_weight / 8:7.1f}  {one:14.1f}  {min(reading, 1000 * threads / cost.decode):6.1f}"
            f"  {many:16.0f}  {2000 * threads / cost.prompt:6.0f}"
        )


def large_layout(dtype: DType, size: int, chosen: WeightLayout | None = None) -> PackedLayout:
    """The layout of a matrix of about so many bytes."""
    row_bytes = PackedLayout(dtype, 16, COLUMNS, chosen).nbytes // 16
    return PackedLayout(dtype, size // row_bytes // 16 * 16, COLUMNS, chosen)


def product_with(target: CpuTarget, layout: PackedLayout, tokens: int) -> tuple[Callable[[], None], Array]:
    """A call of a product with a random weight, and the weight."""
    shape: dict[str, Any] = {
        "dtype": layout.dtype.value,
        "layout": layout.chosen and astuple(layout.chosen),
        "rows": layout.rows,
        "columns": COLUMNS,
        "stride": layout.rows,
    }
    if layout.has_integers:
        problem = matmul(target, **shape, bias=False, tokens=tokens)
    else:
        problem = matmul_exact(target, **shape, x_stride=COLUMNS, bias=False, tokens=tokens)
    weight = random_weight(layout)
    numbers = np.random.default_rng(0).standard_normal
    arrays = []
    for data in call_data(problem):
        if data.values is not None:
            arrays.append(np.full(data.elements, data.values, data.dtype))
        else:
            arrays.append(numbers(data.elements).astype(data.dtype))
    arrays[1] = weight.view(arrays[1].dtype)
    return compiled(measured_module(problem, problem.space[0]), target, arrays), weight


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
