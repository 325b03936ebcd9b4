"""The command line: what each command prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from command_line import assert_one_line_error, assert_wrong_usage, call, with_chat_template

import rlxc
from rlxc.cli.terminal import outline
from rlxc.errors import FormatError
from rlxc.runtime import Completion, Stream

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["compile", "run", "chat", "bench", "compare", "merge", "tune", "inspect", "formats", "graph"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    rlxc {command} " in result.stdout


def test_help_lists_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert [command for command in COMMANDS if f"\n  {command} " not in result.stdout] == []


def test_version_is_the_package_s() -> None:
    assert call("--version").stdout == f"rlxc {rlxc.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["decompile", "x"],
        ["run", "x.rlx"],
        ["compile", "x.gguf"],
        ["compile", "x.gguf", "-o", "x.rlx", "--backend", "abacus"],
        ["compile", "x.gguf", "-o", "x.rlx", "--activations", "int4"],
        ["compile", "x.gguf", "-o", "x.rlx", "--context", "0"],
        ["compile", "x.gguf", "-o", "x.rlx", "--lora-mode", "both"],
        ["compile", "x.gguf", "-o", "x.rlx", "--lora-rank", "0"],
        ["compile", "x.gguf", "-o", "x.rlx", "--report"],
        ["compile", "x.gguf", "-o", "x.rlx", "--lora", "a.gguf", "--lora-mode", "split", "--report"],
        ["compare", "x.rlx"],
        ["merge", "x.gguf"],
        ["run", "x.rlx", "hello", "--temp", "-1"],
        ["run", "x.rlx", "hello", "--top-p", "1.5"],
        ["run", "x.rlx", "hello", "-n", "many"],
        ["run", "x.rlx", "hello", "--context", "100"],
        ["bench", "x.rlx", "-r", "0"],
        ["chat", "x.rlx", "--threads", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_has_exit_code_2(arguments: list[str]) -> None:
    assert_wrong_usage(call(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "missing.gguf", "-o", "out.rlx"],
        ["run", "missing.gguf", "hello"],
        ["run", "missing.rlx", "hello"],
        ["chat", "missing.rlx"],
        ["bench", "missing.rlx"],
        ["inspect", "missing.gguf"],
        ["graph", "missing.gguf"],
        ["compare", "missing.rlx", "missing.rlx"],
        ["merge", "missing.gguf", "--lora", "a.gguf", "-o", "out.gguf"],
    ],
    ids=" ".join,
)
def test_missing_file_is_named(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(call(*arguments, cache=tmp_path), arguments[1])


@pytest.mark.parametrize(
    "command", [["compile", "-o", "out.rlx"], ["run", "hello"], ["inspect"], ["graph"]], ids=" ".join
)
def test_file_that_is_no_gguf_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.gguf").write_text("These are notes, not weights.\n" * 100)
    assert_one_line_error(call(command[0], "notes.gguf", *command[1:], cache=tmp_path), "notes.gguf", "GGUF")
    assert sorted(os.listdir()) == ["notes.gguf"]


@pytest.mark.parametrize("command", [["run", "hello"], ["chat"], ["bench"], ["inspect"]], ids=" ".join)
def test_folder_that_is_no_artifact_is_refused(command: list[str], tmp_path: Path) -> None:
    assert_one_line_error(call(command[0], tmp_path, *command[1:]), str(tmp_path))


def test_cache_that_cannot_be_made_is_one_line(gemma_gguf: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "cache"
    in_the_way.write_text("")
    result = call("run", gemma_gguf, "hello", cache=in_the_way)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {in_the_way}: ")


def test_debug_shows_the_exception(tmp_path: Path) -> None:
    result = call("--debug", "inspect", tmp_path / "missing.gguf")
    assert isinstance(result.exception, FormatError)


def test_interrupt_is_one_line_with_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, **options: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(rlxc, "inspect", interrupted)
    result = call("inspect", "model.gguf")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_reader_that_goes_away_is_no_error(gemma_gguf: Path) -> None:
    command = [sys.executable, "-m", "rlxc", "graph", str(gemma_gguf)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


def test_compile_writes_an_artifact_and_says_where(gemma_gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.rlx"
    result = call("compile", gemma_gguf, "-o", output, "--context", 256)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{output}: ")
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["kv_cache"]["context"] == 256


def test_compile_says_what_it_knows_of_tuning(gemma_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from rlxc.backends.tvm.targets import native_target

    records = tmp_path / "cache" / "tuned" / native_target().name / "records.json"
    records.parent.mkdir(parents=True)
    records.write_text("{broken\n")
    records.with_name("workloads.json").write_text("")
    command = ["compile", gemma_gguf, "-o", tmp_path / "g.rlx", "--backend", "tvm", "--context", 256]
    result = call(*command, cache=tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert f"{records}, line 1: no tuning result that can be read" in result.stderr
    assert "use the defaults; to measure them: rlxc tune" in result.stderr


def test_compile_keeps_an_artifact_that_is_there(gemma_gguf: Path, gemma_artifact: Path) -> None:
    before = (gemma_artifact / "manifest.json").stat()
    assert_one_line_error(call("compile", gemma_gguf, "-o", gemma_artifact), str(gemma_artifact), "--force")
    assert (gemma_artifact / "manifest.json").stat() == before


def test_run_prints_the_text_and_nothing_else(gemma_artifact: Path) -> None:
    result = call("run", gemma_artifact, "The capital of France is", "-n", 8)
    assert result.exit_code == 0, result.output
    assert "France" in result.stdout
    assert result.stdout.endswith("\n")
    assert result.stderr == ""


def test_run_with_a_seed_repeats_itself(gemma_artifact: Path) -> None:
    sampled = ["run", gemma_artifact, "Once upon a time", "-n", 12, "--temp", 1, "--seed"]
    first, second, other = (call(*sampled, seed).stdout for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_run_stops_before_a_stop_text(gemma_artifact: Path) -> None:
    prompt = ["run", gemma_artifact, "The capital of France is", "-n", 8]
    assert "France" in call(*prompt).stdout
    assert "France" not in call(*prompt, "--stop", "France").stdout


def test_run_prints_statistics_to_stderr(gemma_artifact: Path) -> None:
    result = call("run", gemma_artifact, "The capital of France is", "-n", 8, "--stats")
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["load", "prompt", "generated"]
    assert "prompt: 6 tokens" in result.stderr
    assert "generated: 8 tokens" in result.stderr


def test_run_of_a_gguf_compiles_it_once(gemma_gguf: Path, tmp_path: Path) -> None:
    command = ["run", gemma_gguf, "The capital of France is", "-n", 2, "--context", 128]
    first, second = (call(*command, cache=tmp_path / "cache") for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stderr.startswith(f"compiling {gemma_gguf} into {tmp_path}")
    assert second.stderr == ""
    assert second.stdout == first.stdout
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_prompt_longer_than_the_context_is_refused(gemma_artifact: Path) -> None:
    assert_one_line_error(call("run", gemma_artifact, "again and " * 4096), "4096")


@pytest.fixture(scope="module")
def chat_artifact(gemma_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    )
    return with_chat_template(gemma_artifact, tmp_path_factory.mktemp("chat") / "gemma.rlx", template)


def test_chat_without_a_template_says_what_to_do(gemma_artifact: Path, tmp_path: Path) -> None:
    artifact = with_chat_template(gemma_artifact, tmp_path / "gemma.rlx", None)
    assert_one_line_error(call("chat", artifact, text="hello\n"), "no chat template", "rlxc run")


def test_chat_answers_each_line(chat_artifact: Path) -> None:
    result = call("chat", chat_artifact, "-n", 8, "--stop", "\n", text="What is red?\n\nWhat is blue?\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == ""


def test_chat_remembers_what_was_said(gemma_artifact: Path, tmp_path: Path) -> None:
    template = (
        "{{ raise_exception(messages | map(attribute='role') | join(' ')) if messages[2] else 'Yes.' }}"
    )
    artifact = with_chat_template(gemma_artifact, tmp_path / "gemma.rlx", template)
    result = call("chat", artifact, "-n", 1, text="one\ntwo\n")
    assert result.exit_code == 1
    assert "user assistant user" in result.stderr


def test_chat_forgets_at_reset(chat_artifact: Path) -> None:
    command = ["chat", chat_artifact, "-n", 8, "--stop", "\n"]
    anew = call(*command, text="What is red?\n/reset\nWhat is blue?\n").stdout.splitlines()
    assert anew[1:] == call(*command, text="What is blue?\n").stdout.splitlines()


def test_chat_reads_only_what_is_new(chat_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []

    def show(stream: Stream) -> Completion:
        answers.append(stream.completion())
        return answers[-1]

    monkeypatch.setattr("rlxc.cli.commands.show", show)
    command = ["chat", chat_artifact, "-n", 8, "--stop", "\n"]
    call(*command, text="What is red?\nWhat is blue?\n/reset\nWhat is red?\n")
    first, second, again = answers
    assert first.cached_tokens == 0
    assert first.prompt_tokens <= second.cached_tokens < second.prompt_tokens
    assert again.cached_tokens == again.prompt_tokens - 1
    assert again.ids == first.ids


def test_chat_ends_at_exit(chat_artifact: Path) -> None:
    result = call("chat", chat_artifact, text="/exit\nWhat is red?\n")
    assert (result.exit_code, result.output) == (0, "")


def test_chat_that_outgrows_the_context_says_so(chat_artifact: Path) -> None:
    assert_one_line_error(call("chat", chat_artifact, text="again and " * 4096), "4096", "/reset")


def test_inspect_shows_nothing_that_a_terminal_would_obey() -> None:
    facts = {"name\x1b[2J": "value\x1b]0;title\x07", "text": "first\nsecond", "rows": [{"key": "\x1b[1m"}]}
    shown = "".join(outline(facts))
    assert shown.isprintable()
    assert "first" in shown


def test_inspect_prints_json_on_request(gemma_gguf: Path, gemma_artifact: Path) -> None:
    for path in (gemma_gguf, gemma_artifact):
        facts = json.loads(call("inspect", path, "--json").stdout)
        assert "gemma3" in json.dumps(facts)


def test_inspect_prints_a_table(gemma_gguf: Path) -> None:
    result = call("inspect", gemma_gguf)
    assert result.exit_code == 0, result.output
    assert "gemma3" in result.stdout
    assert not result.stdout.startswith("{")


def test_bench_prints_json_on_request(gemma_artifact: Path) -> None:
    result = call("bench", gemma_artifact, "-p", 16, "-n", 2, "-r", 3, "--json")
    report: dict[str, Any] = json.loads(result.stdout)
    assert (report["prefill"]["tokens"], report["decode"]["tokens"]) == (16, 2)
    for stage in ("prefill", "decode"):
        rates = report[stage]["tokens_per_second"]
        assert 0 < rates["min"] <= rates["median"] <= rates["max"]


def test_bench_prints_a_line_for_each_stage(gemma_artifact: Path) -> None:
    lines = call("bench", gemma_artifact, "-p", 16, "-n", 2, "-r", 1).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["prefill", "decode", "memory"]


def test_bench_compares_decoding_with_the_memory(gemma_artifact: Path) -> None:
    report = json.loads(call("bench", gemma_artifact, "-p", 4, "-n", 4, "-r", 1, "--json").stdout)
    memory = report["memory"]
    assert memory["gigabytes_per_second"] > 0
    # All but a few of the weights file's bytes are matrices, and the table of embeddings is multiplied with.
    assert memory["bytes_per_token"] == pytest.approx(
        (gemma_artifact / "weights.safetensors").stat().st_size, rel=0.01
    )
    rate = report["decode"]["tokens_per_second"]["median"] * memory["bytes_per_token"] / 1e9
    assert memory["fraction"] == pytest.approx(rate / memory["gigabytes_per_second"])


def test_bench_decodes_several_sequences_together(gemma_artifact: Path) -> None:
    command = ["bench", gemma_artifact, "-p", 4, "-n", 4, "-r", 1, "--batch", 8]
    report = json.loads(call(*command, "--json").stdout)
    batch, decode = report["batch"], report["decode"]
    assert batch["sequences"] == 8
    medians = [stage["tokens_per_second"]["median"] for stage in (batch, decode)]
    assert batch["ratio"] == pytest.approx(medians[0] / medians[1])
    assert "8 sequences together" in call(*command).stdout


def test_bench_of_more_sequences_than_a_step_takes_is_refused(gemma_artifact: Path) -> None:
    command = ["bench", gemma_artifact, "-p", 4, "-n", 4, "-r", 1, "--batch", 100_000]
    assert_one_line_error(call(*command), "256 sequences", "--batch")


def test_bench_profiles_kernels(compile_gemma: Callable[..., Path]) -> None:
    pytest.importorskip("tvm")
    command = ["bench", compile_gemma("tvm", "int8"), "-p", 8, "-n", 2, "-r", 1, "--profile"]
    report = json.loads(call(*command, "--json").stdout)
    for stage in ("decode", "prefill"):
        kernels = report["profile"][stage]
        times = [kernel["microseconds"] for kernel in kernels]
        assert times == sorted(times, reverse=True)
        assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1)
        assert {"summarise_262144"} <= {kernel["kernel"] for kernel in kernels}
        products = [kernel for kernel in kernels if kernel["kernel"].startswith("matmul")]
        assert all(kernel["gigabytes_per_second"] > 0 for kernel in products)
    text = call(*command).stdout
    assert "\ndecode step " in text
    assert "\nprefill step " in text


def test_profile_of_an_onnx_artifact_is_refused(compile_gemma: Callable[..., Path]) -> None:
    assert_one_line_error(
        call("bench", compile_gemma("onnx", "int8"), "--profile"),
        "only artifacts of the tvm backend",
        "--backend",
    )


def test_bench_longer_than_the_context_is_refused(gemma_artifact: Path) -> None:
    assert_one_line_error(call("bench", gemma_artifact, "-p", 5000), "4096")


def test_graph_prints_text_that_parses(gemma_gguf: Path) -> None:
    from rlxc.ir import parse

    result = call("graph", gemma_gguf)
    assert result.exit_code == 0, result.output
    assert len(parse(result.stdout).nodes) > 0


def test_graph_after_a_pass_differs_from_the_last_one(gemma_gguf: Path) -> None:
    assert (
        call("graph", gemma_gguf, "--after", "resolve_tied_aliases").stdout
        != call("graph", gemma_gguf).stdout
    )


def test_graph_after_an_unknown_pass_lists_the_passes(gemma_gguf: Path) -> None:
    assert_one_line_error(
        call("graph", gemma_gguf, "--after", "magic"), "magic", "fuse_qkv", "schedule_kv_cache"
    )


def test_trace_goes_to_stderr(gemma_gguf: Path) -> None:
    result = call("graph", gemma_gguf, "--trace")
    assert "fuse_qkv" in result.stderr
    assert result.stdout == call("graph", gemma_gguf).stdout
