"""Writes the tables of this folder's pages from the code. `tests/test_docs.py` checks that they are up to date.

    python docs/make_tables.py

A table stands between the lines ``<!-- Title -->`` and ``<!-- end -->``; titles are those of ``rlxc formats``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from rlxc.cli.formats import in_markdown, tables
from rlxc.supported import supported

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from tokenizer_cases import CASES  # noqa: E402 - what the tests of tokenizers are about
from tokenizer_texts import BYTE_TEXTS, TEXTS  # noqa: E402 - likewise

PAGES = ("formats.md", "architectures.md", "tokenizers.md")
_SECTION = re.compile(r"(?<=<!-- )(?!end )([^\n]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def sections() -> Mapping[str, str]:
    """What stands in each section, by title."""
    made = {title: "\n".join(in_markdown(table)) + "\n" for title, table in tables(supported()).items()}
    return {**made, "parity": _parity()}


def filled(page: str, contents: Mapping[str, str]) -> str:
    """A page with these contents of its sections."""
    return _SECTION.sub(lambda found: f"{found[1]}{found[2]}\n{contents[found[1]]}\n", page)


def _parity() -> str:
    vocabularies = len(CASES) + 1
    texts, byte_texts = TEXTS[1], BYTE_TEXTS[1]
    return (
        f"{vocabularies} vocabularies, of every kind and every row of the table above, each give llama.cpp's ids, one\n"
        f"by one, for {texts:,} generated texts and {byte_texts:,} strings of bytes that are no text:"
        f" {vocabularies * (texts + byte_texts):,}\n"
        "comparisons in `tests/test_tokenizer_ids.py`, without a difference. One of them is Gemma 3's.\n"
    )


def main() -> None:
    """Write all pages anew."""
    contents = sections()
    for name in PAGES:
        path = DOCS / name
        path.write_text(filled(path.read_text(encoding="utf-8"), contents), encoding="utf-8")


if __name__ == "__main__":
    main()
