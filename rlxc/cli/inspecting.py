"""``rlxc inspect``: what a file holds, whether it compiles, and every weight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import rlxc
from rlxc.artifact import Activations, BackendName
from rlxc.cli.terminal import megabytes, outline, plain, print_table

if TYPE_CHECKING:
    from rlxc.checking import Readiness
    from rlxc.weight_table import WeightTable, WeightTotals


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A model, an adapter or an artifact.", show_default=False)
    ],
    weights: Annotated[
        bool, typer.Option("--weights", help="List every weight: format, bytes, what reads it, and totals.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if the model does not compile.")
    ] = False,
    backend: Annotated[
        BackendName | None,
        typer.Option(
            help="Look at one backend only.", show_default="all; --weights and --check: tvm if installed"
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="The CPUs that a model would be compiled for.")] = "native",
    activations: Annotated[
        Activations, typer.Option(help="The activations that a model would be compiled with.")
    ] = "int8",
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="The context that a model would be compiled with; of an artifact, tokens of each sequence.",
            show_default="of a model 4096, or what it was trained for; of an artifact all that fit",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Sequences that the size of an artifact's KV cache is for.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model, an adapter or an artifact holds, and whether a model compiles.

    Of a model that does not compile, everything that is missing is listed. That is no error: the exit code is 0, unless
    --check asks.

    \b
    Example:
      rlxc inspect gemma-3-270m.gguf
      rlxc inspect gemma-3-270m.gguf --check --backend onnx && echo it compiles
      rlxc inspect gemma-3-270m.gguf --weights --backend tvm
      rlxc inspect gemma.rlx --batch 8 --context 2048 --json
    """  # noqa: D301  (a backspace character keeps the lines of the example apart)
    info = rlxc.inspect(
        path,
        batch=batch,
        context=context,
        backend=backend,
        target=target,
        activations=activations,
        weights=weights,
    )
    if check and not info.readiness:
        raise typer.BadParameter(f"{path} is no model", param_hint="--check")
    facts = info.to_dict()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        del facts["readiness"], facts["weights"]
        for line in (*outline(facts), *_readiness(info.readiness)):
            print(line)
        if info.weights is not None:
            _print_weights(info.weights)
    if check:
        from rlxc.backends import default_backend

        judge = backend or default_backend()
        if not all(one.compiles for one in info.readiness if one.backend == judge):
            raise typer.Exit(1)


def _readiness(found: Iterable[Readiness]) -> Iterator[str]:
    """Which backends compile the model, and what is missing, once for those that lack the same."""
    alike: dict[tuple[str, ...], list[Readiness]] = {}
    for one in found:
        alike.setdefault(one.problems, []).append(one)
    if alike:
        yield "compiles"
    for problems, backends in alike.items():
        if problems:
            yield f"  {', '.join(one.backend for one in backends)}: no"
            yield from (f"    {plain(problem, longest=None)}" for problem in problems)
        else:
            for one in backends:
                caches = (
                    "" if one.cache_bytes is None else f", whose caches take {megabytes(one.cache_bytes)}"
                )
                yield f"  {one.backend}: yes, with a context of {one.context} tokens{caches}"


def _print_weights(table: WeightTable) -> None:
    print()
    stored = table.backend is not None
    print_table(
        [
            "tensor",
            "shape",
            "format",
            ">in the file",
            *([">in the artifact", "route"] if stored else []),
            "kind",
        ],
        (
            [
                plain(row.label),
                "x".join(map(str, row.shape)),
                row.format,
                _size(row.nbytes),
                *([_size(row.stored_bytes), plain(row.route)] if stored else []),
                plain(row.kind),
            ]
            for row in table.rows
        ),
    )
    print()
    of_all = [*table.by_format.items(), ("all", table.total)]
    print_table(
        [
            *("format", ">tensors", ">weights", ">in the file", ">bits each"),
            *([">in the artifact", ">bits each"] if stored else []),
        ],
        (
            [
                name,
                str(totals.tensors),
                str(totals.parameters),
                _size(totals.nbytes),
                _bits(totals, totals.nbytes),
                *([_size(totals.stored_bytes), _bits(totals, totals.stored_bytes)] if stored else []),
            ]
            for name, totals in of_all
        ),
    )


def _size(nbytes: int | None) -> str:
    return "?" if nbytes is None else str(nbytes)


def _bits(totals: WeightTotals, nbytes: int | None) -> str:
    return "?" if nbytes is None or not totals.parameters else f"{8 * nbytes / totals.parameters:.2f}"
