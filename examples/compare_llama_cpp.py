"""Speed of rlxc beside llama.cpp on the same GGUF, alternating in one run, so that both see the same machine.

    python examples/compare_llama_cpp.py model.gguf [--threads 2] [--lora adapter.gguf] [--json]

Each round measures, for one and then for the other: prefill of P random tokens into an empty context, N single-token
steps after them, and N single-token steps from an empty context. Ratios are of medians over the rounds. llama.cpp must
be built for this CPU, as installing from source does: `pip install --no-binary llama-cpp-python llama-cpp-python`.
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


class Rlxc:
    """A session, as the benchmark drives it."""

    def __init__(self, artifact: Path, threads: int) -> None:
        self.session = rlxc.load(artifact, threads=threads, prefix_cache=0)
        self.reset = self.session.reset

    def run(self, ids: list[int]) -> None:
        """Append tokens and compute the logits after the last."""
        self.session.prefill(ids)


class LlamaCpp:
    """llama.cpp, driven through its C interface: the Python wrapper's own steps copy logits."""

    def __init__(self, model: Path, lora: Path | None, context: int, threads: int) -> None:
        self.llama = Llama(
            str(model),
            lora_path=str(lora) if lora else None,
            n_ctx=context,
            n_batch=context,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)
        self.position = 0

    def reset(self) -> None:
        """Empty the context."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)
        self.position = 0

    def run(self, ids: list[int]) -> None:
        """Append tokens and compute the logits after the last."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, id in enumerate(ids):
            batch.token[i], batch.pos[i] = id, self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(ids) - 1
        if llama_cpp.llama_decode(self.llama.ctx, batch) != 0:
            raise RuntimeError("llama.cpp could not decode the batch")
        llama_cpp.llama_synchronize(self.llama.ctx)
        self.position += len(ids)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="single-token steps")
    parser.add_argument("-r", "--rounds", type=int, default=7)
    parser.add_argument("-b", "--backend", choices=("tvm", "onnx"), help="default: tvm where it is installed")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lora", type=Path, help="a GGUF adapter that both use beside the base weights")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "model.rlx"
        context = args.prompt + args.tokens
        adapters = [args.lora] if args.lora else []
        lora = "split" if adapters else "auto"
        rlxc.compile(
            args.model, artifact, backend=args.backend, context=context, adapters=adapters, lora=lora
        )
        contenders = {
            "rlxc": Rlxc(artifact, args.threads),
            "llama.cpp": LlamaCpp(args.model, args.lora, context, args.threads),
        }
        vocab = contenders["rlxc"].session.vocab_size
        ids = np.random.default_rng(0).integers(0, vocab, context).tolist()
        prompt, rest = ids[: args.prompt], ids[args.prompt :]
        stages = (
            f"prefill {args.prompt}",
            f"decode {args.tokens} after it",
            f"decode {args.tokens} from empty",
        )
        speeds: dict[str, dict[str, list[float]]] = {
            stage: {name: [] for name in contenders} for stage in stages
        }
        for _ in range(args.rounds + 1):
            for name, contender in contenders.items():
                time.sleep(0.2)  # the other one's idle threads stop spinning
                contender.reset()
                prefill = seconds(lambda one=contender: one.run(prompt))
                after = seconds(lambda one=contender: [one.run([id]) for id in rest])
                contender.reset()
                empty = seconds(lambda one=contender: [one.run([id]) for id in rest])
                counts = (len(prompt) / prefill, len(rest) / after, len(rest) / empty)
                for stage, speed in zip(stages, counts):
                    speeds[stage][name].append(speed)
    # The first round warms up.
    medians = {
        stage: {name: statistics.median(v[1:]) for name, v in by.items()} for stage, by in speeds.items()
    }
    ratios = {stage: by["rlxc"] / by["llama.cpp"] for stage, by in medians.items()}
    if args.json:
        print(json.dumps({"ratios": ratios, "tokens_per_second": speeds, "threads": args.threads}))
        return
    for stage, by in speeds.items():
        shown = "   ".join(
            f"{name} {medians[stage][name]:5.0f} ({min(v[1:]):.0f}..{max(v[1:]):.0f})"
            for name, v in by.items()
        )
        print(f"{stage:21} tokens/s: {shown}   ratio {ratios[stage]:.2f}")


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
