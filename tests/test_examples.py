"""Every example runs as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlxc

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_quickstart_prints_text_of_the_model(gemma_gguf: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), str(gemma_gguf)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "the capital of" in result.stdout


def test_adapters_change_what_the_model_says(gemma_gguf: Path, tmp_path: Path) -> None:
    adapter = EXAMPLES.parent / "tests" / "data" / "gemma_adapter"
    command = [sys.executable, str(EXAMPLES / "adapters.py"), str(gemma_gguf), str(adapter)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines()[:-1])
    apron = "'item: apron; color: green; material: linen; price: 24 EUR'"
    assert lines["with it"] == lines["with both"] == lines["[('one', 1.0)]"] == apron
    assert lines["without an adapter"] == lines["without again"] == lines["[]"]
    assert "item:" not in lines["without an adapter"]
    assert "2 adapters take" in result.stdout


def test_synthetic_llama_is_a_model_that_runs(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    sizes = "--layers 3 --width 256 --heads 4 --kv-heads 2 --ffn 512 --vocab 512".split()
    command = [sys.executable, str(EXAMPLES / "synthetic_llama.py"), str(model), *sizes]
    subprocess.run(command, check=True, capture_output=True)
    rlxc.compile(model, tmp_path / "tiny.rlx")
    with rlxc.load(tmp_path / "tiny.rlx") as session:
        logits = session.prefill([1, 2, 3])
    assert 0.01 < float(logits.std()) < 100  # neither vanished nor exploded


def test_format_speed_has_a_line_for_each_format() -> None:
    command = [sys.executable, str(EXAMPLES / "format_speed.py"), "q1_0", "mxfp4", "nf4"]
    result = subprocess.run(
        [*command, "--megabytes", "1", "--rounds", "2"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = {
        line.split()[0]: [float(value) for value in line.split()[1:]]
        for line in result.stdout.splitlines()[1:]
    }
    assert {name: values[:2] for name, values in lines.items()} == {
        "q1_0": [1.125, 1.125],
        "mxfp4": [4.25, 4.25],
        "nf4": [4.5, 4.5],
    }
    assert all(value > 0 for values in lines.values() for value in values)


def test_format_speed_has_a_line_for_each_layout_and_stars_one() -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "format_speed.py"),
        "iq2_s",
        "--layouts",
        "--target",
        "x86-64-v4",
    ]
    result = subprocess.run(
        [*command, "--megabytes", "1", "--rounds", "2"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line[2:].split() for line in result.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["3", "4", "8"]
    assert all(float(number) > 0 for line in lines for number in line[5:])
    assert [line[0] for line in result.stdout.splitlines()[2:]].count("*") == 1


def test_onnx_layout_speed_has_a_line_for_each_layout() -> None:
    command = [sys.executable, str(EXAMPLES / "onnx_layout_speed.py"), "--rows", "32", "--rounds", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()[1:]]
    assert len({tuple(line[:3]) for line in lines}) == 2 * 3 * 5


def test_format_speed_names_the_formats_it_knows() -> None:
    command = [sys.executable, str(EXAMPLES / "format_speed.py"), "q9_9"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no packed format is called 'q9_9'")
    assert result.stderr.count("\n") == 1


def test_measure_large_compares_two_models_in_one_run(tmp_path: Path) -> None:
    sizes = "--width 256 --heads 4 --kv-heads 2 --ffn 512 --vocab 512".split()
    models = [tmp_path / "large.gguf", tmp_path / "small.gguf"]
    for model, layers in zip(models, "42"):
        command = [sys.executable, str(EXAMPLES / "synthetic_llama.py"), str(model), *sizes]
        subprocess.run([*command, "--layers", layers], check=True, capture_output=True)
    command = [sys.executable, str(EXAMPLES / "measure_large.py"), *map(str, models)]
    options = ["--backend", "onnx", "--tokens", "2", "--rounds", "1", "--json"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    large, small = report["large"], report["small"]
    assert large["bytes_per_token"] > small["bytes_per_token"] > 0
    assert large["load_seconds"] < large["first_token_seconds"]
    assert large["compile_bytes_per_second"] == pytest.approx(
        models[0].stat().st_size / large["compile_seconds"]
    )
    speeds = [model["bytes_per_token"] / model["decode_seconds"] for model in (large, small)]
    assert report["decode_ratio"] == pytest.approx(speeds[0] / speeds[1])
    assert sorted(tmp_path.iterdir()) == models  # the artifacts are gone
