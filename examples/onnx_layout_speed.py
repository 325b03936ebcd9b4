"""How fast ONNX Runtime multiplies weights of each width in each size of blocks: what the onnx backend chooses by.

    python examples/onnx_layout_speed.py [--rows 49152] [--threads 2] [--rounds 5]

For activations in int8 and in f32: a matrix that comes from memory times one token, in 1e9 weights per second, and a
small one times 256 tokens, in 1e9 operations per second. The numbers stand in rlxc/backends/onnx/layout_costs.py.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

COLUMNS = 4096
PROMPT_ROWS, PROMPT_TOKENS = 512, 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=49152, help="of the matrix that comes from memory")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("activations  bits  block  weights, 1e9/s  prompts, GOP/s")
    for level, activations in ((4, "int8"), (1, "float32")):
        for bits in (2, 4, 8):
            for block in (16, 32, 64, 128, 256):
                one = args.rows * COLUMNS / measure(level, bits, block, args.rows, 1, args)
                many = 2 * PROMPT_ROWS * COLUMNS * PROMPT_TOKENS
                many /= measure(level, bits, block, PROMPT_ROWS, PROMPT_TOKENS, args)
                print(
                    f"{activations:11}  {bits:4}  {block:5}  {one / 1e9:14.1f}  {many / 1e9:14.0f}",
                    flush=True,
                )


def measure(level: int, bits: int, block: int, rows: int, tokens: int, args: argparse.Namespace) -> float:
    """The seconds of the fastest of some products."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (rows, COLUMNS // block, block * bits // 8), dtype=np.uint8)
    scales = np.full((rows, COLUMNS // block), 0.01, np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=COLUMNS,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (tokens, COLUMNS))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (tokens, rows))],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    x = rng.standard_normal((tokens, COLUMNS)).astype(np.float32)
    times = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
