"""``rlxc merge``: write a model with adapters merged in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from rlxc.cli.adapters import FoldTo, Lora, parse_adapters
from rlxc.cli.terminal import loss_lines, megabytes, note, progress_bars


def merge(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A .gguf file or a Hugging Face folder.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The .gguf or .safetensors file to write.", show_default=False),
    ],
    lora: Lora = None,
    fold_to: FoldTo = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Merge LoRA adapters into a model, for any software that loads it.

    \b
    Example:
      rlxc merge gemma-3-270m.gguf --lora style.gguf:0.8 -o gemma-style.gguf
      rlxc merge gemma-3-270m.gguf --lora style/ --fold-to bf16 -o model.safetensors
    """  # noqa: D301  (a backspace character keeps the lines of the example apart)
    from rlxc.merging import merge as merge_model

    started = time.perf_counter()
    with progress_bars() as progress:
        merged = merge_model(
            model, parse_adapters(lora), output, fold_to=fold_to, overwrite=force, progress=progress
        )
    seconds = time.perf_counter() - started
    print(f"{output}: {merged.tensors} tensors, {megabytes(output.stat().st_size)}, in {seconds:.1f} s")
    for line in loss_lines(merged.losses):
        note(line)
