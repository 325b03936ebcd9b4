"""Adapters on the command line: how they are named, and what each command does with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from adapters import write_gguf_adapter
from command_line import assert_done, assert_one_line_error, call
from one_layer import LINEAR, compile_exact, pairs, write_adapter, write_model

import rlxc
from rlxc.artifact import Artifact
from rlxc.cli.adapters import parse_adapters
from rlxc.comparing import compare

Q = "blk.0.attn_q.weight"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters, and artifacts, which tests read and leave as they are."""
    root = tmp_path_factory.mktemp("cli")
    model = write_model(root / "model.gguf", "Q8_0")
    for name, seed in (("one", 1), ("two", 2)):
        write_adapter(root / f"{name}.gguf", seed=seed)
    compile_exact(model, root / "plain.rlx")
    compile_exact(model, root / "split.rlx", lora="split")
    return root


# --- ADAPTER[:SCALE] ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "path", "scale"),
    [
        ("a.gguf", "a.gguf", 1.0),
        ("a.gguf:0.5", "a.gguf", 0.5),
        ("a.gguf:-2", "a.gguf", -2.0),
        ("folder/a:1e-2", "folder/a", 0.01),
        ("C:\\adapters\\a.gguf", "C:\\adapters\\a.gguf", 1.0),
        ("C:\\adapters\\a.gguf:0.5", "C:\\adapters\\a.gguf", 0.5),
        ("C:/adapters/a.gguf:.5", "C:/adapters/a.gguf", 0.5),
        ("one:two.gguf", "one:two.gguf", 1.0),
        ("one:two.gguf:3", "one:two.gguf", 3.0),
        ("there:0.5", "there:0.5", 1.0),
        ("there:0.5:2", "there:0.5", 2.0),
        ("a.gguf:", "a.gguf:", 1.0),
        (":0.5", ":0.5", 1.0),
    ],
)
def test_scale_is_what_follows_the_last_colon_unless_that_is_part_of_the_name(
    argument: str, path: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there:0.5").write_text("")
    assert parse_adapters([argument]) == [(Path(path), scale)]


def test_adapters_keep_their_order() -> None:
    assert parse_adapters(["b:2", "a", "b:2"]) == [(Path("b"), 2.0), (Path("a"), 1.0), (Path("b"), 2.0)]
    assert parse_adapters(None) == []


@pytest.mark.parametrize("scale", ["nan", "inf", "1e39"])
def test_scale_that_is_not_finite_is_refused(folder: Path, tmp_path: Path, scale: str) -> None:
    output = tmp_path / "out.rlx"
    result = call("compile", folder / "model.gguf", "-o", output, "--lora", f"{folder / 'one.gguf'}:{scale}")
    assert_one_line_error(result, "scale must be a finite number")
    assert not output.exists()


# --- compile and graph --------------------------------------------------------------------------------------------


def test_compile_takes_adapters_and_tells_what_encoding_cost(folder: Path, tmp_path: Path) -> None:
    adapters = ["--lora", f"{folder / 'one.gguf'}:0.5", "--lora", folder / "two.gguf"]
    options = ["--backend", "onnx", "--lora-mode", "fold", "--fold-to", "q6_k"]
    result = call("compile", folder / "model.gguf", "-o", tmp_path / "m.rlx", *adapters, *options)
    assert assert_done(result).startswith(f"{tmp_path / 'm.rlx'}: ")
    manifest = Artifact.open(tmp_path / "m.rlx").manifest
    assert [(entry.name, entry.scale) for entry in manifest.adapters] == [("one", 0.5), ("two", 1.0)]
    first, *others = result.stderr.splitlines()
    assert first.startswith("7 matrices were encoded anew, with a relative error of ")
    assert len(others) == 3
    assert all(" of what adapters changed is lost" in line for line in others)


def test_compile_says_what_quantizing_cost(folder: Path, tmp_path: Path) -> None:
    options = ["--backend", "onnx", "--quantize", "q4_k"]
    result = call("compile", folder / "model.gguf", "-o", tmp_path / "m.rlx", *options)
    assert_done(result)
    assert result.stderr.startswith("8 matrices were encoded anew")
    assert "adapters changed" not in result.stderr


def test_report_measures_the_divergence_from_the_unfolded_adapters(folder: Path, tmp_path: Path) -> None:
    # A text of its own would be longer than the tiny model's context.
    options = ["--backend", "onnx", "--lora", folder / "one.gguf", "--lora-mode", "fold"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlxc.comparing.TEXT", "A short text.")
        result = call(
            "compile",
            folder / "model.gguf",
            "-o",
            tmp_path / "m.rlx",
            *options,
            "--report",
            "--fold-to",
            "q4_0",
        )
    assert_done(result)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("from the adapters split: mean KL divergence ")
    assert [path.name for path in tmp_path.iterdir()] == ["m.rlx"]
    found = float(last.split("divergence ")[1].split(" ")[0])
    rlxc.compile(
        folder / "model.gguf",
        tmp_path / "s.rlx",
        backend="onnx",
        adapters=[folder / "one.gguf"],
        lora="split",
    )
    expected = compare(tmp_path / "s.rlx", tmp_path / "m.rlx", "A short text.")
    assert found == pytest.approx(expected.mean_kl, rel=1e-3)
    assert found > 1e-4


def test_report_of_what_cannot_be_split_compares_with_exact_weights(folder: Path, tmp_path: Path) -> None:
    norm = {"blk.0.attn_norm.weight": np.full(256, 1.5, np.float32)}
    adapter = write_gguf_adapter(tmp_path / "norm.gguf", pairs({Q: LINEAR[Q]}), tensors=norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlxc.comparing.TEXT", "A short text.")
        options = ["--backend", "onnx", "--lora", adapter, "--report"]
        result = call("compile", folder / "model.gguf", "-o", tmp_path / "m.rlx", *options)
    assert_done(result)
    assert result.stderr.splitlines()[-1].startswith("from the adapters folded in f32: mean KL divergence ")


def test_graph_says_why_each_matrix_is_folded_or_split(folder: Path) -> None:
    text = assert_done(call("graph", folder / "model.gguf", "--lora", folder / "one.gguf"))
    reasons = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(reasons) == len(LINEAR)
    assert all(": fold, q8_0 costs an error of 0.54%" in line for line in reasons)


# --- merge --------------------------------------------------------------------------------------------------------


def test_merge_writes_a_model_and_tells_what_it_cost(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    result = call("merge", folder / "model.gguf", "--lora", f"{folder / 'one.gguf'}:0.5", "-o", output)
    assert assert_done(result).startswith(f"{output}: 11 tensors, ")
    assert result.stderr.startswith("7 matrices were encoded anew")
    assert len(gguf.GGUFReader(output).tensors) == 11
    before = output.read_bytes()
    again = ["merge", folder / "model.gguf", "--lora", folder / "two.gguf", "-o", output]
    assert_one_line_error(call(*again), str(output), "exists already")
    assert output.read_bytes() == before
    assert_done(call(*again, "--force"))
    assert output.read_bytes() != before


def test_merge_without_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    result = call("merge", folder / "model.gguf", "-o", tmp_path / "out.gguf")
    assert_one_line_error(result, "there is no adapter to merge")


def test_merge_into_a_folder_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "none" / "out.gguf"
    result = call("merge", folder / "model.gguf", "--lora", folder / "one.gguf", "-o", output)
    assert_one_line_error(result, f"{output}: cannot be written")


# --- compare ------------------------------------------------------------------------------------------------------


def test_compare_prints_text_or_json(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text.")
    command = ["compare", folder / "plain.rlx", folder / "split.rlx", "--text", tmp_path / "text.txt"]
    facts: dict[str, Any] = json.loads(assert_done(call(*command, "--json")))
    assert facts.keys() == {"tokens", "mean_kl", "max_kl", "same_top"}
    assert facts["same_top"] == 1.0
    assert facts["mean_kl"] < 1e-8  # a side path without an adapter adds zeros
    text = assert_done(call(*command))
    assert text.startswith("mean KL divergence ")
    assert text.endswith(f"same best token 100.0%, over {facts['tokens']} tokens\n")


def test_compare_with_a_text_that_is_not_there_is_refused(folder: Path) -> None:
    command = ["compare", folder / "plain.rlx", folder / "split.rlx", "--text", "none.txt"]
    assert_one_line_error(call(*command), "none.txt: No such file")


def test_compare_with_an_empty_text_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    command = ["compare", folder / "plain.rlx", folder / "split.rlx", "--text", tmp_path / "empty.txt"]
    assert_one_line_error(call(*command), "the text has 1 tokens")


# --- run and bench ------------------------------------------------------------------------------------------------


def test_run_pushes_adapters_with_their_scales(folder: Path) -> None:
    with rlxc.load(folder / "split.rlx", threads=1) as session:
        plain = session.generate(PROMPT, max_tokens=12).text
        session.adapters.push(folder / "one.gguf", 0.5)
        session.adapters.push(folder / "two.gguf")
        expected = session.generate(PROMPT, max_tokens=12).text
    assert expected != plain
    adapters = ["--lora", f"{folder / 'one.gguf'}:0.5", "--lora", folder / "two.gguf"]
    result = call("run", folder / "split.rlx", PROMPT, "-n", 12, "--threads", 1, *adapters)
    assert assert_done(result) == f"{expected}\n"


def test_run_of_an_artifact_that_takes_no_adapters_says_how_to_make_one_that_does(folder: Path) -> None:
    result = call("run", folder / "plain.rlx", PROMPT, "--lora", folder / "one.gguf")
    assert_one_line_error(result, "takes no adapters while it runs; compile the model with lora='split'")


def test_run_with_an_adapter_that_is_not_there_is_refused(folder: Path) -> None:
    result = call("run", folder / "split.rlx", PROMPT, "--lora", "none.gguf:0.5")
    assert_one_line_error(result, "'none.gguf'", "there is no such file")


def test_run_of_a_model_with_adapters_compiles_it_once_to_take_any(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlxc.compiler.default_backend", lambda: "onnx")
    command = ["run", folder / "model.gguf", PROMPT, "-n", 2]
    results = [
        call(*command, *options, cache=tmp_path)
        for options in ([], ["--lora", folder / "one.gguf"], ["--lora", folder / "two.gguf"], [])
    ]
    for result in results:
        assert_done(result)
    compiled = [result.stderr.startswith(f"compiling {folder / 'model.gguf'}") for result in results]
    assert compiled == [True, True, False, False]
    # One that takes no adapters, which is faster, and one that takes any.
    plans = [Artifact.open(path).manifest.lora is None for path in tmp_path.iterdir()]
    assert sorted(plans) == [False, True]


def test_bench_compares_adapters(folder: Path) -> None:
    adapters = ["--lora", folder / "one.gguf", "--lora", f"{folder / 'two.gguf'}:0.5"]
    command = ["bench", folder / "split.rlx", "-p", 4, "-n", 4, "-r", 1, "--batch", 3, *adapters]
    costs = json.loads(assert_done(call(*command, "--json")))["adapters"]
    for comparison in (costs["decode"], costs["batch"]):
        # Of one turn.
        assert comparison["ratio"] == pytest.approx(comparison["second"] / comparison["first"])
    assert isinstance(costs["swap_microseconds"], float)
    lines = assert_done(call(*command)).splitlines()
    starts = ["prefill", "decode", "batch", "adapter", "", "memory"]
    assert [line[:8].strip() for line in lines] == starts
    assert "in 3 sequences with adapters in turn" in lines[4]


def test_bench_of_more_sequences_than_a_step_takes_is_refused(folder: Path) -> None:
    command = ["bench", folder / "split.rlx", "-p", 4, "-n", 4, "-r", 1, "--lora", folder / "one.gguf"]
    assert_one_line_error(call(*command, "--batch", 1000), "256 sequences", "--batch")


# --- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_shows_an_adapter_and_an_artifact_that_takes_some(folder: Path) -> None:
    text = assert_done(call("inspect", folder / "one.gguf"))
    assert "LoRA adapter (GGUF)" in text
    facts = json.loads(assert_done(call("inspect", folder / "split.rlx", "--json")))
    assert facts["details"]["takes_adapters"]["max_rank"] == 128
    assert "max_rank" in assert_done(call("inspect", folder / "split.rlx"))
