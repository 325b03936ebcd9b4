"""The ONNX model as a file: valid, loadable without rlxc, the same bytes each time, and with its defaults."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from layer_graph import CAPACITY, layer

from rlxc.errors import UnsupportedError

Build = Callable[..., Any]


def feeds(tokens: int = 5) -> dict[str, Any]:
    empty = np.zeros((1, 2, CAPACITY, 16), np.float32)
    ids = np.random.default_rng(4).integers(0, 96, (1, tokens))
    caches = {f"past_key_values.0.{part}": empty for part in ("key", "value")}
    return {"input_ids": ids, **caches, "past_length": np.array(0, np.int32)}


def test_logits_are_the_last_token_s_by_default(build: Build) -> None:
    built = build(layer())
    every = built.run({**feeds(), "logit_rows": np.arange(5)})["logits"]
    default = built.run(feeds())["logits"]
    assert default.shape == (1, 1, 96)
    # A matrix-vector and a matrix-matrix kernel sum in another order.
    np.testing.assert_allclose(default[0, 0], every[0, -1], rtol=0, atol=1e-5 * np.abs(every).max())


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_the_full_check_of_onnx_passes(build: Build, activations: str) -> None:
    onnx.checker.check_model(str(build(layer(), activations).folder / "model.onnx"), full_check=True)


def test_the_interface_is_the_one_of_genai(build: Build) -> None:
    model = build(layer()).model.graph
    assert [value.name for value in model.input] == [
        *("input_ids", "logit_rows", "past_key_values.0.key", "past_key_values.0.value", "attention_mask")
    ]
    assert [value.name for value in model.output] == ["logits", "present.0.key", "present.0.value"]
    assert "logit_rows" in {tensor.name for tensor in model.initializer}


def test_two_builds_give_the_same_bytes(build: Build) -> None:
    first, second = build(layer(), folder="first"), build(layer(), folder="second")
    for name in ("model.onnx", "weights.bin"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_the_model_names_no_file_outside_its_folder(build: Build) -> None:
    locations = {
        entry.value
        for tensor in build(layer()).model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"weights.bin"}


PLAIN = """
import sys
sys.modules["rlxc"] = None
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
cache = np.zeros((1, 2, 64, 16), np.float32)
feeds = {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]}
feeds |= {"past_key_values.0.key": cache, "past_key_values.0.value": cache}
print(session.run(["logits"], feeds)[0].shape)
"""


def test_plain_onnxruntime_runs_the_model_without_rlxc(build: Build, tmp_path: Path) -> None:
    model = build(layer()).folder / "model.onnx"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, str(model)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "(1, 1, 96)\n", result.stderr


@pytest.mark.parametrize("op", ["Square", "Sqrt", "Rsqrt", "Mean", "Silu", "Gelu"])
def test_elementwise_ops_equal_the_interpreter(build: Build, op: str) -> None:
    shape = "f32[batch, seq, 32]"
    built = build(f"graph one\ninput %x: {shape}\n%y = {op}(%x)\noutput %y")
    x = np.abs(np.random.default_rng(5).standard_normal((1, 3, 32))).astype(np.float32)
    x = x if op in ("Sqrt", "Rsqrt") else x - 0.7
    np.testing.assert_allclose(built.run({"x": x})["y"], built.interpret({"x": x})["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("weight", ["f32[32]", "f32[]"])
def test_arithmetic_with_a_constant_equals_the_interpreter(build: Build, op: str, weight: str) -> None:
    value = "(" + "0.5, " * 32 + ")" if weight == "f32[32]" else "0.5"
    text = f"graph one\ninput %x: f32[batch, seq, 32]\n%c = Constant(; value={value})\n%y = {op}(%x, %c)\noutput %y"
    built = build(text)
    x = np.random.default_rng(5).standard_normal((1, 3, 32)).astype(np.float32)
    np.testing.assert_allclose(built.run({"x": x})["y"], built.interpret({"x": x})["y"], rtol=1e-6)


def test_an_op_without_equivalent_is_refused(build: Build) -> None:
    text = (
        "graph one\ninput %ids: i64[batch, seq]\ninput %past: i32[]\n%p = Positions(%ids, %past)\noutput %p"
    )
    with pytest.raises(UnsupportedError, match="cannot run Positions"):
        build(text)
