"""What the commands show and read on a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlxc.errors import RlxcError

if TYPE_CHECKING:
    from rlxc.runtime import Completion, Stream

_WORST = 3

LONGEST_VALUE = 100  # characters of a value that `outline` shows


def show(stream: Stream) -> Completion:
    """Print a text while it is generated."""
    for piece in stream:
        print(piece.text, end="", flush=True)
    print()
    return stream.completion()


def lines() -> Iterator[str]:
    """What the user types or pipes in, line by line; only a terminal gets a prompt."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None] | None]:
    """Something to report progress to, shown as bars on stderr; None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def outline(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Facts as lines of names and values, nested ones indented, a record in a list on a line of its own."""
    shown = {plain(name): value for name, value in facts.items()}
    width = max(map(len, shown), default=0) + 2
    for name, value in shown.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from outline(value, indent + "  ")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            yield f"{indent}{name}"
            for record in value:
                yield indent + "  " + ", ".join(f"{key} {plain(entry)}" for key, entry in record.items())
        else:
            yield f"{indent}{name:{width}}{plain(value)}"


def plain(value: object, longest: int | None = LONGEST_VALUE) -> str:
    """A value from a file on one short line, without anything that a terminal would obey."""
    text = str(value)
    if not text.isprintable():
        text = repr(text)
    return text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: as the terminal shows it best, or, to a file or a pipe, as lines of aligned words.

    Args:
        columns: their titles; ``>`` before a title puts its column on the right.
        rows: the cells, as many in each.
    """
    titles = [column.lstrip(">") for column in columns]
    rights = [column.startswith(">") for column in columns]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for title, right in zip(titles, rights):
            table.add_column(title, justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    lines_of = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines_of)]
    for line in lines_of:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, rights)
        )
        print("  ".join(cells).rstrip())


def note(text: str) -> None:
    """Print a line that is no result."""
    print(text, file=sys.stderr)


def in_one_line(error: RlxcError | OSError) -> str:
    """An error as its user reads it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def megabytes(size: int) -> str:
    """A number of bytes, readable."""
    return f"{size / 1e6:.1f} MB"


def rate(tokens: int, seconds: float) -> str:
    """Tokens per second; nothing can be said where no time was measured."""
    return f"{tokens / seconds:.1f} tokens/s" if seconds > 0 else "- tokens/s"


def loss_lines(losses: Mapping[str, Mapping[str, float | None]]) -> Iterator[str]:
    """What encoding weights anew cost: the mean, and the worst of them."""
    if not losses:
        return
    errors = {name: loss["relative"] or 0.0 for name, loss in losses.items()}
    mean = sum(errors.values()) / len(errors)
    yield f"{len(errors)} matrices were encoded anew, with a relative error of {mean:.2%} on average; the largest:"
    for name in sorted(errors, key=lambda name: -errors[name])[:_WORST]:
        of_change = losses[name]["of_change"]
        hidden = "" if of_change is None else f", {of_change:.0%} of what adapters changed is lost"
        yield f"  {name}: {errors[name]:.2%}{hidden}"
