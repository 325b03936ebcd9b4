"""What a large model costs: compiling, loading, decoding, beside a small one in the same run.

    python examples/measure_large.py llama-8b.gguf gemma-3-270m.gguf [--backend tvm|onnx]

A large file that is not there is written first: synthetic, of Llama 8B's shapes (4.9 GB; see synthetic_llama.py). Its
artifact takes as much again while this runs. Both models' tokens are decoded in turns, so that a machine that slows
down slows both; a token costs reading the weights once, so bytes per second are what can be compared.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import rlxc
from rlxc.cli.measuring import bytes_per_token
from rlxc.runtime import Session


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("large", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("-n", "--tokens", type=int, default=16, help="tokens in a round")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-b", "--backend", choices=("tvm", "onnx"), help="default: tvm where it is installed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.large.exists():
        subprocess.run(
            [sys.executable, Path(__file__).with_name("synthetic_llama.py"), args.large], check=True
        )
    report: dict[str, dict[str, Any]] = {"large": {}, "small": {}}
    with tempfile.TemporaryDirectory(dir=args.large.resolve().parent) as folder:
        sessions: dict[str, Session] = {}
        try:
            for size, model in (("large", args.large), ("small", args.small)):
                artifact = Path(folder) / f"{size}.rlx"
                report[size] = compile_in_child(model, artifact, args.backend)
                sessions[size], times = load(artifact, args.threads)
                report[size] |= times
            for size, speed in decode_in_turns(sessions, args.tokens, args.rounds).items():
                report[size] |= speed
        finally:
            for session in sessions.values():
                session.close()
    ratio = report["large"]["decode_bytes_per_second"] / report["small"]["decode_bytes_per_second"]
    if args.json:
        print(json.dumps({**report, "decode_ratio": ratio}, indent=1))
        return
    for size, model in (("large", args.large), ("small", args.small)):
        print(f"{model.name}: {model.stat().st_size / 1e6:.0f} MB\n" + "\n".join(lines(report[size])))
    print(f"bytes per second of decoding, large / small: {ratio:.2f}")


def compile_in_child(model: Path, artifact: Path, backend: str | None) -> dict[str, Any]:
    """Seconds that `rlxc compile` takes from start to end, and the most anonymous memory that it has meanwhile."""
    command = [sys.executable, "-m", "rlxc", "compile", str(model), "-o", str(artifact)]
    started = time.perf_counter()
    options = ["--backend", backend] if backend else []
    child = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    if child.returncode:
        sys.exit(child.returncode)
    rate = model.stat().st_size / seconds
    return {
        "compile_seconds": seconds,
        "compile_bytes_per_second": rate,
        "compile_anonymous_bytes": peak or None,
    }


def anonymous_bytes(pid: int) -> int:
    """What the system says of a process; 0 where it says nothing."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s*(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def load(artifact: Path, threads: int | None) -> tuple[Session, dict[str, Any]]:
    """A session, the seconds until there is one, and until it gave logits: then digests are compared as well."""
    started = time.perf_counter()
    session = rlxc.load(artifact, threads=threads, prefix_cache=0)
    loaded = time.perf_counter()
    session.prefill([0])
    return session, {
        "load_seconds": loaded - started,
        "first_token_seconds": time.perf_counter() - started,
    }


def decode_in_turns(sessions: dict[str, Session], tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """The median seconds of single tokens from an empty context, and the bytes of weights that they read."""
    seconds: dict[str, list[float]] = {size: [] for size in sessions}
    ids = np.random.default_rng(0).integers(0, 256, tokens).tolist()
    for _ in range(rounds):
        for size, session in sessions.items():
            time.sleep(0.2)  # the other one's idle threads stop spinning
            session.reset()
            session.decode(ids[0])  # wakes this one's
            for token in ids:
                started = time.perf_counter()
                session.decode(token)
                seconds[size].append(time.perf_counter() - started)
    report = {}
    for size, session in sessions.items():
        median, read = statistics.median(seconds[size]), bytes_per_token(session.artifact.manifest)
        report[size] = {
            "decode_seconds": median,
            "bytes_per_token": read,
            "decode_bytes_per_second": read / median,
        }
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """A model's numbers, as people read them."""
    memory = report["compile_anonymous_bytes"]
    anonymous = f"{memory / 1e6:.0f} MB" if memory else "an unknown amount"
    return [
        f"  compile: {report['compile_seconds']:.1f} s, {report['compile_bytes_per_second'] / 1e6:.0f} MB/s; "
        f"at most {anonymous} of anonymous memory",
        f"  load: {report['load_seconds']:.2f} s, to the first token {report['first_token_seconds']:.2f} s",
        f"  decode: {1000 * report['decode_seconds']:.1f} ms a token, "
        f"{report['decode_bytes_per_second'] / 1e9:.1f} GB/s of {report['bytes_per_token'] / 1e6:.0f} MB",
    ]


if __name__ == "__main__":
    main()
