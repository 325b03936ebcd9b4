"""Calls of the command line in this process, and what is expected of all of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from typer.testing import CliRunner, Result

from rlxc.cli import app


def call(*arguments: object, text: str = "", cache: Path | None = None) -> Result:
    """Run a command with this text as its input."""
    env = {"RLXC_CACHE": str(cache)} if cache else {}
    return CliRunner().invoke(app, list(map(str, arguments)), input=text, env=env)


def assert_done(result: Result) -> str:
    """The command succeeded; gives what it printed."""
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_one_line_error(result: Result, *parts: str) -> None:
    """The command failed with one line on stderr that holds these parts, and printed nothing else."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert [part for part in parts if part not in lines[0]] == [], lines[0]


def assert_wrong_usage(result: Result, *parts: str) -> None:
    """The command was refused before it did anything, in words that hold these parts."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert [part for part in parts if part not in result.stderr] == [], result.stderr


def with_chat_template(artifact: Path, copy: Path, template: str | None) -> Path:
    """A copy of an artifact, as if its model had come with this chat template, or with none."""
    name = "chat_template.jinja"
    copy.mkdir()
    for file in artifact.iterdir():
        if file.name not in ("manifest.json", name):
            os.link(file, copy / file.name)
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["files"][name]
    if template is not None:
        (copy / name).write_bytes(template.encode())
        digest = hashlib.sha256(template.encode()).hexdigest()
        manifest["files"][name] = {"size": len(template.encode()), "sha256": digest}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy
