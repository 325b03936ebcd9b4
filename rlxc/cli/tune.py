"""``rlxc tune``: measure the settings of a model's kernels, and keep the results for later compiles."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlxc.cli.terminal import note

if TYPE_CHECKING:
    from rlxc.backends.tvm.measure import RpcAddress
    from rlxc.backends.tvm.problem import Problem
    from rlxc.backends.tvm.targets import CpuTarget
    from rlxc.backends.tvm.tune import Result, Trial

DEFAULT_KEY = "rlxc"
TRACKER_PORT = 9190


def tune(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .gguf file or an artifact.", show_default=False)
    ],
    target: Annotated[str, typer.Option(help="The machine to tune for; native is this one.")] = "native",
    trials: Annotated[
        int | None, typer.Option(min=1, help="Most measurements.", show_default="all candidates")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option("--time", min=0, help="Seconds to spend.", show_default="until all are measured"),
    ] = None,
    rpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]", help="A TVM RPC tracker that lends machines of the target's kind."
        ),
    ] = None,
    key: Annotated[
        str, typer.Option(help="The key under which the tracker knows these machines.")
    ] = DEFAULT_KEY,
    database: Annotated[
        Path | None,
        typer.Option(help="The folder that keeps results.", show_default="tuned in rlxc's cache folder"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads.", show_default="all cores, or what the RPC server has"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the settings of a model's kernels on this machine, for later compiles to use.

    \b
    Example:
      rlxc tune gemma-3-270m.gguf --time 600
      rlxc tune gemma.rlx --target aarch64-dotprod --rpc 192.168.0.2:9190 --key phone
    """  # noqa: D301  (a backspace character keeps the lines of the example apart)
    if rpc is not None and target == "native":
        raise typer.BadParameter(
            "native is this machine; name the target of the others", param_hint="--target"
        )
    tracker = None if rpc is None else _address(rpc, key)

    from rlxc.backends.tvm.database import Database, shipped_folder, user_folder
    from rlxc.backends.tvm.targets import find_target
    from rlxc.backends.tvm.tune import tune as search

    cpu = find_target(target)
    folder = database or user_folder()
    known = Database(shipped_folder(), folder, warn=note)
    measured = 0
    with _best_so_far() as show:

        def report(trial: Trial) -> None:
            nonlocal measured
            measured = trial.done
            show(trial)

        try:
            summary = search(
                _problems(model, cpu),
                cpu,
                known,
                trials=trials,
                seconds=seconds,
                threads=threads,
                rpc=tracker,
                report=report,
            )
        except KeyboardInterrupt:
            note(f"{measured} measurements are kept in {folder}")
            raise
    if as_json:
        facts = {
            "database": str(folder),
            "target": cpu.name,
            "trials": summary.trials,
            "failed": summary.failed,
            "complete": summary.complete,
            "problems": [_facts(result) for result in summary.results],
        }
        print(json.dumps(facts, indent=2))
        return
    for result in summary.results:
        print(_line(result))
    more = "" if summary.complete else "; some candidates are left, run it again to go on"
    print(f"{folder}: {summary.trials} measurements for {cpu.name}, {summary.failed} failed{more}")


def _problems(model: Path, target: CpuTarget) -> list[Problem]:
    from rlxc.compiler import tuning_problems

    return tuning_problems(model, target=target)


def _address(rpc: str, key: str) -> RpcAddress:
    from rlxc.backends.tvm.measure import RpcAddress

    host, _, port = rpc.partition(":")
    port = port or str(TRACKER_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise typer.BadParameter(f"{rpc!r} is not HOST:PORT", param_hint="--rpc")
    return RpcAddress(host, int(port), key)


@contextmanager
def _best_so_far() -> Iterator[Callable[[Trial], None]]:
    """Something to report trials to: a bar on stderr with the last problem's best time, if somebody watches."""
    if not sys.stderr.isatty():
        yield lambda trial: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("building")

        def show(trial: Trial) -> None:
            bars.update(task, description=_line(trial.result), completed=trial.done, total=trial.total)

        yield show


def _line(result: Result) -> str:
    if not result.measured:
        return f"{result.problem.name}: not measured yet"
    if result.best_seconds is None or result.best is None:
        return f"{result.problem.name}: none of {result.measured} candidates works"
    knobs = ", ".join(f"{name} {value}" for name, value in result.best.items())
    gain = ""
    if result.default_seconds is not None:
        gain = f" ({result.default_seconds / result.best_seconds:.2f} × the default's speed)"
    return f"{result.problem.name}: {result.best_seconds * 1e6:.1f} µs, {_speed(result)}{gain}: {knobs}"


def _speed(result: Result) -> str:
    assert result.best_seconds is not None
    bandwidth, rate = result.problem.bytes_moved, result.problem.operations
    return f"{bandwidth / result.best_seconds / 1e9:.1f} GB/s, {rate / result.best_seconds / 1e9:.1f} GOP/s"


def _facts(result: Result) -> dict[str, Any]:
    return {
        "name": result.problem.name,
        "default_seconds": result.default_seconds,
        "best_seconds": result.best_seconds,
        "best": None if result.best is None else dict(result.best),
        "measured": result.measured,
        "failed": result.failed,
    }
