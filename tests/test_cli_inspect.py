"""``rlxc inspect``: whether a model compiles, the table of weights, exit codes, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models"))

from adapters import random_pairs, write_gguf_adapter
from command_line import assert_done, assert_one_line_error, assert_wrong_usage, call
from tiny import VARIANTS, write_tiny_model

from rlxc.cli.terminal import print_table

Q = "blk.0.attn_q.weight"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return VARIANTS["llama-k-m"].write(tmp_path / "sound.gguf")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    tensors = {"blk.0.attn_q.weight": None, "\x1b[31mred": np.ones(4, np.float32)}
    return write_tiny_model(tmp_path / "broken.gguf", "llama", metadata={"colour": 3}, tensors=tensors)


def test_sound_model_is_said_to_compile(sound: Path) -> None:
    lines = assert_done(call("inspect", sound, "--backend", "onnx", "--context", 64)).splitlines()
    assert lines[-2] == "compiles"
    # Keys and values of 2 heads of 64 channels in f32, of 64 positions in 2 layers.
    assert lines[-1] == "  onnx: yes, with a context of 64 tokens, whose caches take 0.1 MB"


def test_all_that_is_missing_is_said_once_for_all_backends_and_is_no_error(broken: Path) -> None:
    output = assert_done(call("inspect", broken))
    lines = output[output.index("compiles\n") :].splitlines()
    assert lines[1] == "  tvm, onnx: no"
    assert [line.split(";")[0].strip() for line in lines[2:]] == [
        "metadata llama.colour = 3 is not implemented for this architecture",
        "tensor blk.0.attn_q.weight is missing",
        r"tensor '\x1b[31mred' has no place in a llama model",
    ]
    assert "\x1b" not in output


def test_check_exits_with_1_where_the_model_does_not_compile(sound: Path, broken: Path) -> None:
    assert_done(call("inspect", sound, "--check", "--backend", "onnx"))
    result = call("inspect", broken, "--check")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "is missing" in result.stdout


def test_check_asks_the_backend_that_would_compile(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    model = write_tiny_model(tmp_path / "m.gguf", "llama", head_dim=12)  # which onnx has no attention for
    assert_done(call("inspect", model, "--check"))
    assert_done(call("inspect", model, "--check", "--backend", "tvm"))
    assert call("inspect", model, "--check", "--backend", "onnx").exit_code == 1


def test_only_a_model_can_be_checked(tmp_path: Path) -> None:
    adapter = write_gguf_adapter(tmp_path / "a.gguf", random_pairs({Q: (8, 8)}, 2), alpha=1.0)
    assert_wrong_usage(call("inspect", adapter, "--check"), "is no model")


def test_json_has_readiness_and_weights(sound: Path, broken: Path) -> None:
    facts = json.loads(assert_done(call("inspect", sound, "--json", "--weights", "--backend", "onnx")))
    (onnx,) = facts["readiness"]
    assert onnx.keys() == {"backend", "compiles", "context", "problems", "cache_bytes"}
    assert (onnx["backend"], onnx["compiles"], onnx["problems"]) == ("onnx", True, [])
    rows = {row["name"]: row for row in facts["weights"]["rows"]}
    assert rows["output.weight"]["kind"] == "alias of token_embd.weight"
    assert facts["weights"]["total"]["nbytes"] == facts["tensor_bytes"]
    facts = json.loads(assert_done(call("inspect", broken, "--json")))
    assert [(one["backend"], one["compiles"], len(one["problems"])) for one in facts["readiness"]] == [
        ("tvm", False, 3),
        ("onnx", False, 3),
    ]
    assert facts["weights"] is None


def test_weights_are_a_table_and_their_totals(sound: Path) -> None:
    output = assert_done(call("inspect", sound, "--weights", "--backend", "onnx"))
    rows, totals = (part.splitlines() for part in output.split("\n\n")[-2:])
    assert rows[0].split("  ")[0] == "tensor" and rows[0].endswith("kind")
    (down,) = [line for line in rows if line.startswith("blk.0.ffn_down.weight ")]
    # Q6_K has 210 bytes for 256 weights; as 8 bits and a scale for 16, they are 320.
    size = 256 * 512 // 256
    assert [cell.strip() for cell in down.split("  ") if cell] == [
        *("blk.0.ffn_down.weight", "256x512", "q6_k", str(210 * size), str(320 * size)),
        *("MatMulNBits 8 bits, blocks of 16", "base"),
    ]
    cells = {line.split()[0]: line.split()[1:] for line in totals}
    assert cells.keys() == {"format", "f32", "q4_k", "q6_k", "all"}
    assert cells["q6_k"][3] == "6.56" and cells["q6_k"][5] == "10.00"
    parts = [[int(cells[name][i]) for name in ("f32", "q4_k", "q6_k", "all")] for i in (0, 1, 2, 4)]
    assert all(sum(part[:-1]) == part[-1] for part in parts)


def test_weights_of_a_model_that_does_not_compile_are_those_of_the_file(broken: Path) -> None:
    output = assert_done(call("inspect", broken, "--weights"))
    rows = output.split("\n\n")[-2].splitlines()
    assert rows[0].split() == ["tensor", "shape", "format", "in", "the", "file", "kind"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--context", 257], "context 257 is outside 1..256, what the model was trained for"),
        (["--batch", 2], "only artifacts have a size of caches"),
    ],
    ids=str,
)
def test_option_that_does_not_fit_is_one_line(sound: Path, arguments: list[object], part: str) -> None:
    assert_one_line_error(call("inspect", sound, *arguments), str(sound), part)


@pytest.mark.parametrize(
    "arguments", [["--backend", "abacus"], ["--context", 0], ["--activations", "int4"]], ids=str
)
def test_option_that_there_is_not_is_wrong_usage(sound: Path, arguments: list[object]) -> None:
    assert_wrong_usage(call("inspect", sound, *arguments))


def test_table_on_a_pipe_is_aligned_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", ">size"], [["a", "1"], ["long name", "1234567"]])
    assert capsys.readouterr().out.splitlines() == [
        "name          size",
        "a                1",
        "long name  1234567",
    ]


def test_table_on_a_terminal_obeys_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_table(["name", ">size"], [["[red]a[/red]", "1"]])
    output = capsys.readouterr().out
    assert "[red]a[/red]" in output and "\u2500" in output
