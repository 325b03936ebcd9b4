"""What commands that run a model take: an artifact, or a model that is compiled first and kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated

import typer

import rlxc
from rlxc.artifact import VERSION
from rlxc.cli.terminal import note, progress_bars

Runnable = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="An artifact, or a .gguf file or Hugging Face folder, which is compiled first and kept in ~/.cache/rlxc "
        "(or $RLXC_CACHE).",
        show_default=False,
    ),
]
DEFAULT_CONTEXT = "4096, or what the model was trained for"
ModelContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        help="Tokens that the KV cache holds; for a model that is compiled first.",
        show_default=DEFAULT_CONTEXT,
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores")
]


def artifact_of(model: Path, context: int | None, *, adapters: bool = False) -> Path:
    """The artifact to run: ``model`` itself, or one that is compiled once and kept, to take adapters if it shall."""
    is_folder = (model / "config.json").exists() and not (model / "manifest.json").exists()
    if not (is_folder or model.is_file() or model.suffix == ".gguf"):
        if context is not None:
            raise typer.BadParameter(
                "an artifact has the context it was compiled with", param_hint="--context"
            )
        return model
    from rlxc.passes import LoraMode
    from rlxc.weights.source import open_model

    lora: LoraMode = "split" if adapters else "auto"
    with open_model(model) as file:
        key = json.dumps([rlxc.__version__, VERSION, file.fingerprint(), context, lora])
    cache = Path(os.environ.get("RLXC_CACHE") or Path.home() / ".cache" / "rlxc")
    artifact = cache / f"{model.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.rlx"
    if not artifact.exists():
        note(f"compiling {model} into {artifact}, once")
        cache.mkdir(parents=True, exist_ok=True)
        with progress_bars() as progress:
            # Another process may finish the same artifact first: replacing it is harmless.
            rlxc.compile(model, artifact, context=context, lora=lora, overwrite=True, progress=progress)
    return artifact
