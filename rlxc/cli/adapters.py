"""Options that name adapters and formats, the same in every command that takes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rlxc.dtypes import ENCODABLE, DType
from rlxc.passes import LoraMode

_NARROW = [str(dtype) for dtype in ENCODABLE if dtype is not DType.F32]

Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="ADAPTER[:SCALE]",
        help="A LoRA adapter: a .gguf file or a PEFT folder; may be given several times.",
        show_default=False,
    ),
]
LoraModeOption = Annotated[
    LoraMode,
    typer.Option(
        "--lora-mode",
        help="split keeps adapters swappable, fold makes them part of the weights, auto folds what that hardly harms.",
    ),
]
FoldTo = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help=f"Format of folded matrices: {', '.join(map(str, ENCODABLE))}.",
        show_default="each one's own",
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help=f"Encode the model's matrices anew: none, {', '.join(_NARROW)}.",
    ),
]


def parse_adapters(arguments: list[str] | None) -> list[tuple[Path, float]]:
    """Paths and scales of ``ADAPTER[:SCALE]``; a path may have a colon itself."""
    return [_parse(argument) for argument in arguments or ()]


def _parse(argument: str) -> tuple[Path, float]:
    path, colon, scale = argument.rpartition(":")
    if not colon or not path or os.path.exists(argument):
        return Path(argument), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        # No number: the colon belongs to a name, which then is missing as it stands.
        return Path(argument), 1.0
