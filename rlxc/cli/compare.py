"""``rlxc compare``: how far two artifacts' predictions are apart."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rlxc
from rlxc.artifact import Artifact
from rlxc.errors import OptionError
from rlxc.passes import LoraMode

if TYPE_CHECKING:
    from rlxc.comparing import Divergence


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="What is taken for true.", show_default=False)
    ],
    second: Annotated[
        Path, typer.Argument(metavar="OTHER", help="What is compared with it.", show_default=False)
    ],
    text: Annotated[
        Path | None, typer.Option(help="A text file to compare on.", show_default="an English text of ours")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the predictions of two artifacts of one model: mean KL divergence, and how often the best token agrees.

    \b
    Example:
      rlxc compare exact.rlx int8.rlx
      rlxc compare split.rlx folded.rlx --text sample.txt
    """  # noqa: D301  (a backspace character keeps the lines of the example apart)
    from rlxc.comparing import TEXT
    from rlxc.comparing import compare as compare_artifacts

    sample = TEXT if text is None else text.read_text(encoding="utf-8", errors="replace")
    found = compare_artifacts(first, second, sample, threads)
    print(json.dumps(asdict(found), indent=2) if as_json else _show(found))


def fold_report(
    artifact: Artifact,
    model: Path,
    adapters: list[tuple[Path, float]],
    **options: Any,
) -> str:
    """How far an artifact with folded adapters is from one that keeps them apart, which is compiled and thrown away.

    ``options`` are those of :func:`rlxc.compile` that the artifact was compiled with, besides the adapters' own.
    """
    from rlxc.comparing import TEXT
    from rlxc.comparing import compare as compare_artifacts

    def compiled(path: Path, mode: LoraMode, fold_to: str | None) -> Path:
        rlxc.compile(
            model,
            path,
            context=artifact.manifest.options.context,
            adapters=adapters,
            lora=mode,
            fold_to=fold_to,
            **options,
        )
        return path

    with tempfile.TemporaryDirectory(dir=artifact.path.parent) as folder:
        try:
            other, name = compiled(Path(folder, "split.rlx"), "split", None), "split"
        except OptionError:  # what no side path can do is folded without loss instead
            other, name = compiled(Path(folder, "exact.rlx"), "fold", "f32"), "folded in f32"
        return f"from the adapters {name}: {_show(compare_artifacts(other, artifact.path, TEXT))}"


def _show(found: Divergence) -> str:
    return (
        f"mean KL divergence {found.mean_kl:.3e} (at most {found.max_kl:.3e}), "
        f"same best token {found.same_top:.1%}, over {found.tokens} tokens"
    )
