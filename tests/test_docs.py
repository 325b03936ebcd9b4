"""The documentation's tables are made from the code, and its links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

from make_tables import DOCS, PAGES, filled, sections

from rlxc.models import ARCHITECTURES
from rlxc.vocab.build import KINDS
from rlxc.weights.hf_families import FAMILIES

pytest.importorskip("tvm")  # whose routes are in the tables
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
TEXTS = [*DOCS.parent.glob("*.md"), *DOCS.glob("*.md")]


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_up_to_date(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text == filled(text, sections()), "run: python docs/make_tables.py"


def test_every_table_stands_on_one_page() -> None:
    pages = "".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    assert [title for title in sections() if pages.count(f"<!-- {title} -->\n") != 1] == []


def test_a_stale_table_is_written_anew() -> None:
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    expected = "a\n<!-- one -->\n\n1\n<!-- end -->\nb\n<!-- two -->\n\n2\n<!-- end -->\n"
    once = filled(page, {"one": "1", "two": "2"})
    assert (once, filled(once, {"one": "1", "two": "2"})) == (expected, expected)


def test_readme_names_every_architecture() -> None:
    (row,) = (line for line in README.splitlines() if line.startswith("| Architectures |"))
    assert {*re.findall(r"`([^`]+)`", row)} == {*ARCHITECTURES}


def test_readme_names_every_kind_of_tokenizer() -> None:
    (row,) = (line for line in README.splitlines() if line.startswith("| Tokenizers |"))
    assert {*re.findall(r"`([^`]+)`", row)} - {"tokenizer.json"} == {*KINDS}


def test_kinds_of_folders_are_named() -> None:
    text = (DOCS / "adapters.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| Model folders |"))
    assert {*FAMILIES} <= {*re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+\.md)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).is_file()] == []
