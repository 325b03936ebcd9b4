"""Mixture of experts in ONNX: every format, any number of experts and tokens, and nothing run that was not chosen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from rlxc.backends.onnx.runtime import CURRENT
from rlxc.dtypes import DType

Build = Callable[..., Any]
Array = npt.NDArray[Any]
FLOATS = [DType.F32, DType.F16, DType.BF16]
PACKED = [dtype for dtype in DType if dtype.is_packed]
HIDDEN, FFN = 256, 512

MIXTURE = """
graph mixture
input %x: f32[batch, seq, {hidden}]
weight @router: f32[{experts}, {hidden}]
weight @gate: {dtype}[{experts}, {ffn}, {hidden}]
weight @gate_bias: f32[{experts}, {ffn}]
weight @up: {dtype}[{experts}, {ffn}, {hidden}]
weight @down: {dtype}[{experts}, {hidden}, {ffn}]
%scores = MatMul(%x, @router)
%chosen, %weights = Route(%scores; used={used})
%g = ExpertMatMul(%x, @gate, %chosen, @gate_bias)
%u = ExpertMatMul(%x, @up, %chosen)
%a = Silu(%g)
%h = Mul(%a, %u)
%d = ExpertMatMul(%h, @down, %chosen)
%y = MixExperts(%d, %weights)
output %y
"""


def mixture(
    dtype: str, experts: int = 3, used: int = 2, hidden: int = HIDDEN, ffn: int = FFN, extra: str = ""
) -> str:
    return MIXTURE.format(dtype=dtype, experts=experts, used=used, hidden=hidden, ffn=ffn) + extra


def tokens(*shape: int, hidden: int = HIDDEN) -> Array:
    return np.random.default_rng(1).standard_normal((*shape, hidden)).astype(np.float32)


def assert_equals_the_interpreter(built: Any, *inputs: Array) -> None:
    session = built.open()
    for x in inputs:
        results, expected = built.run({"x": x}, session), built.interpret({"x": x})
        for name, values in expected.items():
            # Three products after each other, each with sums of at most 512 products in f32.
            size = np.sqrt((values**2).mean())
            np.testing.assert_allclose(results[name], values, rtol=0, atol=1e-4 * size)


def products_run(built: Any, x: Array, tmp_path: Path) -> int:
    """How many matrices a step multiplies, the router's aside, as ONNX Runtime itself reports."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(built.folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    built.run({"x": x}, session)
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    return Counter(event["args"]["op_name"] for event in kernels)["MatMulNBits"]


@pytest.mark.parametrize("dtype", [*FLOATS, *PACKED])
def test_experts_of_every_format_equal_the_interpreter(build: Build, dtype: DType) -> None:
    assert_equals_the_interpreter(build(mixture(dtype)), tokens(1, 1), tokens(1, 7))


@pytest.mark.parametrize(("experts", "used"), [(1, 1), (2, 2), (8, 3), (9, 1), (9, 9), (30, 4)])
def test_any_number_of_experts_equals_the_interpreter(build: Build, experts: int, used: int) -> None:
    built = build(mixture("q4_1", experts, used, ffn=64))
    assert_equals_the_interpreter(built, tokens(1, 1), tokens(1, 20), tokens(3, 4))


def test_odd_sizes_equal_the_interpreter(build: Build) -> None:
    x = tokens(1, 5, hidden=21)
    assert_equals_the_interpreter(build(mixture("bf16", 5, 3, hidden=21, ffn=13)), x)


def test_no_tokens_give_no_rows(build: Build) -> None:
    assert build(mixture("q4_k", 9)).run({"x": tokens(1, 0)})["y"].shape == (1, 0, HIDDEN)


def test_old_topk_is_given_a_row_where_there_is_none(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = replace(CURRENT, sorts_nothing=False)
    monkeypatch.setattr("rlxc.backends.onnx.installed_runtime", lambda: runtime)
    built = build(mixture("q4_0", 9))
    assert built.run({"x": tokens(1, 0)})["y"].shape == (1, 0, HIDDEN)
    assert_equals_the_interpreter(built, tokens(2, 3))


ROUTE = """
graph route
input %scores: f32[batch, seq, 6]
%chosen, %weights = Route(%scores; used=3)
output %chosen
output %weights
"""


def test_of_equal_scores_the_first_experts_are_chosen(build: Build) -> None:
    built = build(ROUTE)
    scores = np.array([[[1, 2, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0], [5, 1, 3, 3, 3, 5]]], np.float32)
    results = built.run({"scores": scores})
    np.testing.assert_array_equal(results["chosen"], [[[1, 2, 3], [0, 1, 2], [0, 5, 2]]])
    weights = built.interpret({"scores": scores})["weights"]
    np.testing.assert_allclose(results["weights"], weights, rtol=1e-6)


def test_scores_that_are_far_apart_have_finite_weights(build: Build) -> None:
    scores = np.array([[[300, -300, 0, 299, -1e30, 1]]], np.float32)
    weights = build(ROUTE).run({"scores": scores})["weights"]
    np.testing.assert_allclose(weights, [[[1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0]]], rtol=1e-6)


@pytest.mark.parametrize("experts", [6, 40])
def test_a_token_runs_its_own_experts_only(build: Build, tmp_path: Path, experts: int) -> None:
    built = build(mixture("q4_0", experts, 4, ffn=32))
    assert products_run(built, tokens(1, 1), tmp_path) == 3 * 4


def test_an_expert_runs_once_for_all_its_tokens(build: Build, tmp_path: Path) -> None:
    built = build(mixture("q4_0", 40, 4, ffn=32))
    assert products_run(built, np.repeat(tokens(1, 1), 9, axis=1), tmp_path) == 3 * 4


def test_values_between_products_may_be_used_elsewhere(build: Build) -> None:
    built = build(mixture("q8_0", 9, 3, extra="%z = MixExperts(%h, %weights)\noutput %z\noutput %u\n"))
    assert_equals_the_interpreter(built, tokens(2, 5))


SLOTS = """
graph slots
input %x: f32[batch, seq, 64]
input %other: f32[batch, seq, 12]
weight @a: q4_0[12, 32, 64]
weight @b: q8_0[12, 64, 32]
weight @norm: f32[64]
%e, %w = Route(%other; used=2)
%p = ExpertMatMul(%x, @a, %e)
%q = ExpertMatMul(%p, @b, %e)
%n = RmsNorm(%q, @norm; eps=1e-06)
%r = ExpertMatMul(%n, @a, %e)
%s = Add(%r, %p)
%y = MixExperts(%s, %w)
output %y
"""


def test_slots_that_other_ops_made_keep_their_order(build: Build) -> None:
    built = build(SLOTS)
    x, other = tokens(2, 5, hidden=64), tokens(2, 5, hidden=12)
    result, expected = (run({"x": x, "other": other})["y"] for run in (built.run, built.interpret))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


TWO_ROUTERS = """
graph routers
input %x: f32[batch, seq, 64]
weight @a: q4_0[4, 64, 64]
weight @r: f32[4, 64]
weight @s: f32[4, 64]
%rs = MatMul(%x, @r)
%ss = MatMul(%x, @s)
%e, %w = Route(%rs; used=2)
%f, %v = Route(%ss; used=2)
%p = ExpertMatMul(%x, @a, %e)
%q = ExpertMatMul(%x, @a, %f)
%y = MixExperts(%p, %w)
%z = MixExperts(%q, %v)
output %y
output %z
"""


def test_products_with_experts_of_different_routers_stay_apart(build: Build) -> None:
    assert_equals_the_interpreter(build(TWO_ROUTERS), tokens(2, 5, hidden=64))


@pytest.mark.parametrize("experts", [3, 9])
def test_the_full_check_of_onnx_passes(build: Build, experts: int) -> None:
    built = build(mixture("q4_k", experts))
    onnx.checker.check_model(str(built.folder / "model.onnx"), full_check=True)


def test_rounded_activations_are_close_to_the_interpreter(build: Build) -> None:
    built = build(mixture("q8_0"), "int8")
    # Experts are few and their scores far apart, so that rounding changes no choice.
    result, expected = built.run({"x": tokens(1, 7)})["y"], built.interpret({"x": tokens(1, 7)})["y"]
    error = np.sqrt(((result - expected) ** 2).mean() / (expected**2).mean())
    # Two products after each other, each with an error of about 0.5%: see test_onnx_weights.py.
    assert 1e-4 < error < 0.02
