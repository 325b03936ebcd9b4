"""The option ``--speculate``, and what guesses tokens for it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import rlxc

if TYPE_CHECKING:
    from rlxc.runtime import ModelDrafter, Session

Speculate = Annotated[
    str | None,
    typer.Option(
        metavar="ngram|PATH",
        help="Guess tokens and check several in one step: ngram guesses that the text repeats itself; the path is that "
        "of a smaller model's artifact, which guesses. The model's choices stay what they are.",
        show_default=False,
    ),
]


def check_drafter(speculate: str | None) -> None:
    """Refuse a draft model that is not there, before anything is loaded.

    Raises:
        typer.BadParameter: it is not.
    """
    if speculate not in (None, "ngram") and not Path(str(speculate)).exists():
        raise typer.BadParameter(
            f"{speculate!r} is neither 'ngram' nor an artifact", param_hint="--speculate"
        )


def drafter_of(
    speculate: str | None, session: Session, threads: int | None, closing: ExitStack
) -> Literal["ngram"] | ModelDrafter | None:
    """What ``session.stream`` is to speculate with; a draft model is closed with ``closing``."""
    if speculate is None or speculate == "ngram":
        return "ngram" if speculate else None
    from rlxc.runtime import ModelDrafter

    draft = closing.enter_context(rlxc.load(speculate, threads=threads, prefix_cache=0))
    return ModelDrafter(draft, session)
