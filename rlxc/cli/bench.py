"""``rlxc bench``: how fast a model runs here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import rlxc
from rlxc.cli.adapters import Lora, parse_adapters
from rlxc.cli.models import ModelContext, Runnable, Threads, artifact_of
from rlxc.cli.terminal import progress_bars


def bench(
    model: Runnable,
    prompt_tokens: Annotated[
        int, typer.Option("-p", "--prompt-tokens", min=1, help="Tokens to prefill.")
    ] = 512,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Tokens to decode.")] = 64,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Measurements of each.")] = 5,
    threads: Threads = None,
    context: ModelContext = None,
    depth: Annotated[
        int | None,
        typer.Option("-d", "--depth", min=1, help="Decode after so many tokens, too.", show_default=False),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Decode this many sequences together, too.", show_default=False),
    ] = None,
    lora: Lora = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the time of each kernel.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure tokens per second: prefill and decode, each from an empty context, after a warm-up.

    The rate at which decoding reads weights is compared with the one at which numpy reads memory. With adapters,
    decoding with the first is compared with decoding without, and a batch whose sequences use different ones with a
    batch whose sequences all use the first.

    \b
    Example:
      rlxc bench gemma.rlx -p 512 -n 64 -r 5 --threads 2
      rlxc bench gemma.rlx --profile --batch 8 --depth 2048
      rlxc bench gemma.rlx --batch 8 --lora one.gguf --lora two.gguf
    """  # noqa: D301  (a backspace character keeps the lines of the example apart)
    from rlxc.cli.adapter_costs import measure_adapters
    from rlxc.cli.measuring import Bench, bytes_per_token, streaming_bandwidth, table, to_json
    from rlxc.runtime.threads import choose_threads

    report: dict[str, Any] = {"model": str(model), "threads": threads, "repetitions": repetitions}
    adapters = parse_adapters(lora)
    artifact = artifact_of(model, context, adapters=bool(adapters))
    with rlxc.load(artifact, threads=threads, prefix_cache=0) as session, progress_bars() as progress:
        measured = Bench(session, repetitions, progress)
        if profile:
            report["profile"] = measured.profile(prompt_tokens, max_tokens)
        report["prefill"] = {"tokens": prompt_tokens, "tokens_per_second": measured.prefill(prompt_tokens)}
        decode = measured.decode(max_tokens)
        report["decode"] = {"tokens": max_tokens, "tokens_per_second": decode}
        if depth:
            rates = measured.decode(max_tokens, depth)
            report["depth"] = {"depth": depth, "tokens": max_tokens, "tokens_per_second": rates}
            report["depth"]["ratio"] = rates.median / decode.median
        if batch:
            rates = measured.decode_together(batch, max_tokens)
            report["batch"] = {"sequences": batch, "tokens": max_tokens, "tokens_per_second": rates}
            report["batch"]["ratio"] = rates.median / decode.median
        if adapters:
            report["adapters"] = measure_adapters(session, adapters, max_tokens, batch, repetitions, progress)
        used = choose_threads(threads)
        bandwidth, read = streaming_bandwidth(used), bytes_per_token(session.artifact.manifest)
        report["memory"] = {
            "threads": used,
            "gigabytes_per_second": bandwidth / 1e9,
            "bytes_per_token": read,
            "fraction": read * decode.median / bandwidth,
        }
    print(to_json(report) if as_json else "\n".join(table(report)))
