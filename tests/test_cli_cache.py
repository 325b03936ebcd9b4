"""The KV cache on the command line: its type and rollback, its size, speculation, and the end of the context."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models"))

from command_line import assert_done, assert_one_line_error, assert_wrong_usage, call
from hf_folders import HfTiny
from one_layer import write_folder
from tiny import VARIANTS

import rlxc
from rlxc.artifact import Artifact

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with sliding windows, and artifacts of it and of others, which tests read and leave as they are."""
    root = tmp_path_factory.mktemp("cli")
    model = VARIANTS["gemma3-window"].write(root / "model.gguf")
    # Exact: a step of several tokens gives the same best ones as one by one.
    rlxc.compile(model, root / "tiny.rlx", backend="onnx", context=64, activations="float32")
    rlxc.compile(model, root / "rigid.rlx", backend="onnx", rollback=0)
    other = VARIANTS["llama-plain"].write(root / "other.gguf")
    rlxc.compile(other, root / "other.rlx", backend="onnx")
    stranger = write_folder(root / "stranger", HfTiny())
    rlxc.compile(stranger, root / "stranger.rlx", backend="onnx")
    return root


# --- compile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"), [([], "f32"), (["--kv-cache", "auto"], "f32"), (["--kv-cache", "f16"], "f16")]
)
def test_compile_keeps_the_cache_as_it_is_told(
    folder: Path, tmp_path: Path, options: list[str], dtype: str
) -> None:
    assert_done(
        call("compile", folder / "model.gguf", "-o", tmp_path / "a.rlx", "--backend", "onnx", *options)
    )
    plan = Artifact.open(tmp_path / "a.rlx").manifest.kv_cache
    assert {str(layer.dtype) for layer in plan.layers} == {dtype}


@pytest.mark.parametrize("rollback", [0, 5])
def test_compile_keeps_as_many_tokens_as_are_to_be_taken_back(
    folder: Path, tmp_path: Path, rollback: int
) -> None:
    command = ["compile", folder / "model.gguf", "-o", tmp_path / "a.rlx", "--backend", "onnx"]
    assert_done(call(*command, "--rollback", rollback))
    assert Artifact.open(tmp_path / "a.rlx").manifest.kv_cache.rollback == rollback


def test_type_that_the_backend_lacks_is_refused(folder: Path, tmp_path: Path) -> None:
    command = ["compile", folder / "model.gguf", "-o", tmp_path / "a.rlx", "--backend", "onnx"]
    assert_one_line_error(call(*command, "--kv-cache", "int8"), "onnx", "'int8'", "auto, f32, f16")
    assert not (tmp_path / "a.rlx").exists()


@pytest.mark.parametrize(
    ("command", "option", "value", "part"),
    [
        (["compile", "a.gguf", "-o", "a.rlx"], "--kv-cache", "int4", "'bf16', 'int8'"),
        (["graph", "a.gguf"], "--kv-cache", "8", "'bf16', 'int8'"),
        (["compile", "a.gguf", "-o", "a.rlx"], "--rollback", "-1", "--rollback"),
        (["compile", "a.gguf", "-o", "a.rlx"], "--rollback", "some", "--rollback"),
        (["inspect", "a.rlx"], "--batch", "0", "--batch"),
        (["inspect", "a.rlx"], "--context", "0", "--context"),
        (["run", "a.rlx", "text"], "--on-full", "never", "'stop', 'error'"),
    ],
)
def test_impossible_value_is_wrong_usage(command: list[str], option: str, value: str, part: str) -> None:
    assert_wrong_usage(call(*command, option, value), option, part)


# --- graph and inspect --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "f32", "bf16", "int8"])
def test_graph_shows_the_planned_caches(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr("rlxc.compiler.default_backend", lambda: "tvm")
    command = ["graph", folder / "model.gguf", "--after", "schedule_kv_cache", "--kv-cache", dtype]
    text = assert_done(call(*command))
    caches = re.findall(r"^input %past_key_values\.\d\.\w+: (.+)$", text, re.MULTILINE)
    assert caches == [f"{dtype}[pages, 1, 64, 64]"] * 2 * 7
    assert len(re.findall(r"^input %block_table\.\d: i32\[batch, 4\]$", text, re.MULTILINE)) == 2
    assert len(re.findall(r"= KvWrite\(.*layout='paged'\)", text)) == 2 * 7


def test_graph_of_a_type_that_the_backend_lacks_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlxc.compiler.default_backend", lambda: "onnx")
    assert_one_line_error(
        call("graph", folder / "model.gguf", "--kv-cache", "bf16"), "'bf16'", "auto, f32, f16"
    )


def test_inspect_tells_the_bytes_of_as_many_sequences_as_are_asked_for(folder: Path) -> None:
    """A position takes 7 layers x (a key + a value) x 64 floats: with less than a window, that is all there is."""
    command = ["inspect", folder / "tiny.rlx", "--batch", 3, "--context", 5]
    total = {"batch": 3, "context": 5, "bytes": 3 * 5 * 7 * 2 * 64 * 4}
    assert json.loads(assert_done(call(*command, "--json")))["details"]["kv_cache"]["total"] == total
    text = assert_done(call(*command))
    assert re.search(rf"batch +3\n +context +5\n +bytes +{total['bytes']}\n", text)


def test_inspect_of_more_tokens_than_fit_is_refused(folder: Path) -> None:
    assert_one_line_error(call("inspect", folder / "tiny.rlx", "--context", 65), "65 is outside 1..64")
    assert_one_line_error(
        call("inspect", folder / "model.gguf", "--batch", 2), "model.gguf", "only artifacts"
    )


# --- run ----------------------------------------------------------------------------------------------------------


def guessed(stats: str) -> tuple[int, int]:
    """How many guesses were right, and how many there were."""
    found = re.search(r"^speculation: (\d+) of (\d+) guessed tokens were right$", stats, re.MULTILINE)
    assert found
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("drafter", ["ngram", "tiny.rlx", "other.rlx"])
def test_run_with_guesses_prints_the_same_text(folder: Path, drafter: str) -> None:
    command = ["run", folder / "tiny.rlx", PROMPT, "-n", 30, "--threads", 1]
    speculate = drafter if drafter == "ngram" else folder / drafter
    result = call(*command, "--speculate", speculate, "--stats")
    assert assert_done(result) == assert_done(call(*command))
    right, count = guessed(result.stderr)
    assert 0 <= right <= count
    if drafter == "tiny.rlx":  # what the model itself would write
        assert right == count > 20


def test_run_says_nothing_of_guesses_where_there_are_none(folder: Path) -> None:
    result = call("run", folder / "tiny.rlx", PROMPT, "-n", 2, "--stats")
    assert_done(result)
    assert "speculation" not in result.stderr


@pytest.mark.parametrize(
    ("artifact", "drafter", "parts"),
    [
        ("tiny.rlx", "model.gguf", ["model.gguf", "not an artifact", "rlxc compile"]),
        ("tiny.rlx", ".", ["manifest.json is missing"]),
        ("tiny.rlx", "stranger.rlx", ["128 tokens cannot draft for the 300", "the same family"]),
        ("rigid.rlx", "ngram", ["rigid.rlx", "compiled with rollback 0", "--rollback 16"]),
    ],
)
def test_run_with_what_cannot_guess_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, artifact: str, drafter: str, parts: list[str]
) -> None:
    monkeypatch.chdir(folder)
    assert_one_line_error(call("run", artifact, PROMPT, "--speculate", drafter), *parts)


def test_run_with_a_drafter_that_is_not_there_is_wrong_usage(folder: Path) -> None:
    result = call("run", folder / "tiny.rlx", PROMPT, "--speculate", "n-gram")
    assert_wrong_usage(result, "--speculate", "'n-gram' is neither 'ngram' nor an artifact")


@pytest.mark.parametrize("options", [[], ["--on-full", "stop"]], ids=["default", "stop"])
def test_run_ends_at_the_end_of_the_context(folder: Path, options: list[str]) -> None:
    result = call("run", folder / "tiny.rlx", PROMPT, "-n", 100, "--stats", *options)
    assert_done(result)
    prompt, generated = (
        int(re.search(rf"{name}: (\d+) tokens", result.stderr)[1])  # type: ignore[index]
        for name in ("prompt", "generated")
    )
    assert prompt + generated == 64 + 1  # nothing follows the last token: it needs no place


def test_run_says_that_the_context_is_full_if_that_is_an_error(folder: Path) -> None:
    command = ["run", folder / "tiny.rlx", PROMPT, "-n", 100]
    result = call(*command, "--on-full", "error")
    assert result.exit_code == 1
    assert result.stdout == assert_done(call(*command)).rstrip("\n")
    assert re.fullmatch(r"error: .* fill the context of 64; .*--context\n", result.stderr)
