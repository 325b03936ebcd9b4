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

from rlxc.errors import UnsupportedError

Build = Callable[..., Any]

LAYER = """
graph layer
input %input_ids: i64[batch, seq]
input %logit_rows: i64[rows]
input %past.key: f32[batch, 2, {capacity}, 16]
input %past.value: f32[batch, 2, {capacity}, 16]
input %past_length: i32[]
weight @table: q8_0[96, 256]
weight @norm: f32[256]
weight @head_norm: f32[16]
weight @factors: f32[8]
weight @qkv: q4_k[128, 256]
weight @o: q5_0[256, 64]
weight @gate_up: q5_k[512, 256]
weight @down: bf16[256, 256]
%embedded = Embed(%input_ids, @table)
%scale = Constant(; value=16.0)
%x = Mul(%embedded, %scale)
%normed = RmsNorm(%x, @norm; eps=1e-06)
%projected = DequantMatMul(%normed, @qkv)
%q, %k, %v = Split(%projected; sizes=(64, 32, 32))
%qn = RmsNorm(%q, @head_norm; eps=1e-06, heads=4)
%kn = RmsNorm(%k, @head_norm; eps=1e-06, heads=2)
%heads, %present.key, %present.value = GroupQueryAttention({cached}; {attention})
%attended = DequantMatMul(%heads, @o)
%sum = Add(%attended, %x)
%last = SelectRows(%sum, %logit_rows)
%both = DequantMatMul(%last, @gate_up)
%gated = Glu(%both; activation='{activation}')
%out = MatMul(%gated, @down)
%logits = DequantMatMul(%out, @table)
output %logits
output %present.key
output %present.value
"""
CAPACITY = 64


def layer(activation: str = "gelu") -> str:
    """A whole decoder layer with every op that models need."""
    cached = "%qn, %kn, %v, %past.key, %past.value, %past_length, @factors"
    attention = "heads=4, scale=0.25, layout='linear', rope=RopeSpec(theta=10000.0, dim=16)"
    return LAYER.format(capacity=CAPACITY, activation=activation, cached=cached, attention=attention)


def feeds(tokens: int = 5) -> dict[str, Any]:
    empty = np.zeros((1, 2, CAPACITY, 16), np.float32)
    ids = np.random.default_rng(4).integers(0, 96, (1, tokens))
    return {"input_ids": ids, "past.key": empty, "past.value": empty, "past_length": np.array(0, np.int32)}


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_whole_layer_equals_the_interpreter(build: Build, activation: str) -> None:
    built = build(layer(activation))
    fed = {**feeds(), "logit_rows": np.arange(5)}
    expected = built.interpret(fed)["logits"]
    # A chain of five f32 products; the logits are thousands of times a unit, so that the bound is relative.
    np.testing.assert_allclose(built.run(fed)["logits"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_logits_are_the_last_token_s_by_default(build: Build) -> None:
    built = build(layer())
    every = built.run({**feeds(), "logit_rows": np.arange(5)})["logits"]
    default = built.run(feeds())["logits"]
    assert default.shape == (1, 1, 96)
    # A matrix-vector and a matrix-matrix kernel sum in another order.
    np.testing.assert_allclose(default[0, 0], every[0, -1], rtol=0, atol=1e-5 * np.abs(every).max())


def test_rows_may_be_chosen_in_any_order(build: Build) -> None:
    built = build(layer())
    every = built.run({**feeds(), "logit_rows": np.arange(5)})["logits"]
    chosen = built.run({**feeds(), "logit_rows": np.array([3, 0, -1])})["logits"]
    np.testing.assert_allclose(chosen[0], every[0, [3, 0, 4]], rtol=0, atol=1e-5 * np.abs(every).max())


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_no_rows_give_no_logits_but_fill_the_cache(build: Build, activations: str) -> None:
    built = build(layer(), activations)
    some, none = (built.run({**feeds(), "logit_rows": np.arange(rows)}) for rows in (5, 0))
    assert none["logits"].shape == (1, 0, 96)
    np.testing.assert_array_equal(none["present.key"], some["present.key"])
    np.testing.assert_array_equal(none["present.value"], some["present.value"])


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_the_full_check_of_onnx_passes(build: Build, activations: str) -> None:
    onnx.checker.check_model(str(build(layer(), activations).folder / "model.onnx"), full_check=True)


def test_the_interface_is_the_one_of_genai(build: Build) -> None:
    model = build(layer()).model.graph
    assert [value.name for value in model.input] == [
        *("input_ids", "logit_rows", "past.key", "past.value", "attention_mask")
    ]
    assert [value.name for value in model.output] == ["logits", "present.key", "present.value"]
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
feeds = {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]], "past.key": cache, "past.value": cache}
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
