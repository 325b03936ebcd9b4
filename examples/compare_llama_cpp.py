"""Speed of rlxc beside llama.cpp on the same GGUF, alternating in one run, so that both see the same machine.

    python examples/compare_llama_cpp.py model.gguf [--threads 2] [--json]

Each round measures, for one and then for the other: prefill of P random tokens, then N single-token steps after them.
Ratios are of medians over the rounds. llama.cpp must be built for this CPU, which installing it from source does:
`pip install --no-binary llama-cpp-python llama-cpp-python`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama

import rlxc


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="single-token steps")
    parser.add_argument("-r", "--rounds", type=int, default=7)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "model.rlx"
        rlxc.compile(args.model, artifact)
        context = args.prompt + args.tokens
        peer = Llama(
            str(args.model),
            n_ctx=context,
            n_batch=args.prompt,
            n_ubatch=512,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            verbose=False,
        )
        with rlxc.load(artifact, threads=args.threads) as session:
            ids = np.random.default_rng(0).integers(0, session.vocab_size, context).tolist()
            prompt, rest = ids[: args.prompt], ids[args.prompt :]
            prefill: dict[str, list[float]] = {"rlxc": [], "llama.cpp": []}
            decode: dict[str, list[float]] = {"rlxc": [], "llama.cpp": []}
            for _ in range(args.rounds + 1):
                for name, reset, many, one in (
                    ("rlxc", session.reset, session.prefill, session.decode),
                    ("llama.cpp", peer.reset, *peer_steps(peer)),
                ):
                    reset()
                    prefill[name].append(args.prompt / seconds(lambda many=many: many(prompt)))
                    decode[name].append(args.tokens / seconds(lambda one=one: [one(id) for id in rest]))
    # The first round warms up.
    speeds = {"prefill": prefill, "decode": decode}
    medians = {k: {name: statistics.median(v[1:]) for name, v in by.items()} for k, by in speeds.items()}
    ratios = {kind: by["rlxc"] / by["llama.cpp"] for kind, by in medians.items()}
    if args.json:
        print(json.dumps({"ratios": ratios, "tokens_per_second": speeds, "threads": args.threads}))
        return
    for kind, count in (("prefill", args.prompt), ("decode", args.tokens)):
        shown = "   ".join(
            f"{name} {medians[kind][name]:6.0f} ({min(v[1:]):.0f}..{max(v[1:]):.0f})"
            for name, v in speeds[kind].items()
        )
        print(f"{kind:8} {count:5} tokens   tokens/s: {shown}   ratio {ratios[kind]:.2f}")


def peer_steps(peer: Llama) -> tuple[Callable[[list[int]], None], Callable[[int], None]]:
    """llama.cpp's steps without its Python wrapper's copies of the logits."""
    capacity = peer.n_batch
    batch = llama_cpp.llama_batch_init(capacity, 0, 1)
    position = 0

    def many(ids: list[int]) -> None:
        nonlocal position
        position = 0
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(peer.ctx), True)
        run(ids)

    def run(ids: list[int]) -> None:
        nonlocal position
        batch.n_tokens = len(ids)
        for i, id in enumerate(ids):
            batch.token[i], batch.pos[i] = id, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(ids) - 1
        if llama_cpp.llama_decode(peer.ctx, batch) != 0:
            raise RuntimeError("llama.cpp could not decode the batch")
        llama_cpp.llama_synchronize(peer.ctx)
        position += len(ids)

    return many, lambda id: run([id])


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
