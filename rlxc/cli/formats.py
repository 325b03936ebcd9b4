"""``rlxc formats``: which formats, architectures and tokenizers are supported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from rlxc.cli.terminal import print_table

if TYPE_CHECKING:
    from rlxc.supported import Supported

_YES = "yes"


@dataclass(frozen=True)
class Table:
    """Titles of columns, ``>`` before those of numbers, and cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def formats(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the formats, architectures and tokenizers that are supported, and which are tested together.

    \b
    Example:
      rlxc formats --json
    """  # noqa: D301  (a backspace character keeps the lines of the example apart)
    if markdown and as_json:
        raise typer.BadParameter("is one way to print, and --json another", param_hint="--markdown")
    from rlxc.supported import supported

    found = supported()
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    for i, (title, table) in enumerate(tables(found).items()):
        if i:
            print()
        if markdown:
            print(f"## {title}\n")
            print("\n".join(in_markdown(table)))
        else:
            print(title)
            titles, *rows = [[cell.replace("`", "") for cell in row] for row in (table.columns, *table.rows)]
            print_table(titles, rows)


def tables(found: Supported) -> Mapping[str, Table]:
    """The tables, by title."""
    return {
        "Formats": _formats(found),
        "Architectures": _architectures(found),
        "Formats and architectures that are tested together": _cells(found),
        "Tokenizers": Table(
            ["tokenizer.ggml.model", "what it is"],
            [[f"`{one.name}`", one.about.replace("``", "`")] for one in found.tokenizers],
        ),
        "Pre-tokenizers": Table(
            ["tokenizer.ggml.pre", "others that cut words alike"],
            [[_code(names[:1]), _code(names[1:])] for names in found.pre_tokenizers],
        ),
    }


def in_markdown(table: Table) -> Iterator[str]:
    """The lines of a table."""
    yield _line([column.lstrip(">") for column in table.columns])
    yield _line(["---:" if column.startswith(">") else "---" for column in table.columns])
    yield from map(_line, table.rows)


def _formats(found: Supported) -> Table:
    backends = list(found.formats[0].stored)
    return Table(
        [
            *("format", "in GGUF", ">block", ">bits"),
            *(column for name in backends for column in (f">bits, {name}", f"route, {name}")),
            "can be encoded",
        ],
        [
            [
                f"`{one.name}`",
                _YES if one.in_gguf else "",
                str(one.block),
                _bits(one.bits),
                *(cell for stored in one.stored.values() for cell in (_bits(stored.bits), stored.route)),
                _YES if one.encoded else "",
            ]
            for one in found.formats
        ],
    )


def _architectures(found: Supported) -> Table:
    return Table(
        ["architecture", "models", "layers can have", "rope scaling", "Hugging Face folders"],
        [
            [f"`{one.name}`", one.about, ", ".join(one.features), ", ".join(one.ropes), _code(one.folders)]
            for one in found.architectures
        ],
    )


def _cells(found: Supported) -> Table:
    return Table(
        ["format", *(f"`{one.name}`" for one in found.architectures)],
        [
            [
                f"`{row.name}`",
                *(_YES if row.name in one.formats else "" for one in found.architectures),
            ]
            for row in found.formats
            if row.in_gguf
        ],
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bits(bits: float) -> str:
    return f"{bits:g}"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
