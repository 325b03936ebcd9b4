"""Steps of small graphs with what mixtures and other architectures need, on every backend, against the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from between import IDS, assert_close, between

from rlxc.runtime.logits import Logits

Load = Callable[..., Any]

MIXTURE = """
weight @router: f32[{experts}, 64]
weight @gate: {format}[{experts}, {ffn}, 64]
weight @up: {format}[{experts}, {ffn}, 64]
weight @down: {down}[{experts}, 64, {ffn}]
weight @norm: f32[64]
{biases}
%normed = RmsNorm(%x, @norm; eps=1e-06)
%scores = MatMul(%normed, @router)
%chosen, %weights = Route(%scores; used={used})
%g = ExpertMatMul(%normed, @gate, %chosen{gate_bias})
%u = ExpertMatMul(%normed, @up, %chosen{up_bias})
{gated}
%d = ExpertMatMul(%h, @down, %chosen{down_bias})
%mixed = MixExperts(%d, %weights)
%y = Add(%mixed, %x)
"""
SILU = "%a = Silu(%g)\n%h = Mul(%a, %u)"
CLAMPED = "%h = ClampedSwiglu(%g, %u; alpha=1.702, limit=7.0)"


def mixture(
    format: str, down: str, *, experts: int = 5, used: int = 2, ffn: int = 96, biases: bool = False
) -> str:
    """A gated MLP of experts around which there is a residual."""
    given = [("gate", ffn), ("up", ffn), ("down", 64)]
    added = {f"{name}_bias": f", @{name}_bias" if biases else "" for name, _ in given}
    lines = [f"weight @{name}_bias: f32[{experts}, {width}]" for name, width in given] if biases else []
    return MIXTURE.format(
        format=format,
        down=down,
        experts=experts,
        used=used,
        ffn=ffn,
        biases="\n".join(lines),
        gated=CLAMPED if biases else SILU,
        **added,
    )


MIXTURES = {
    "packed": mixture("q4_0", "q8_0"),
    "with biases": mixture("q8_0", "mxfp4", biases=True),
    "floats, of an odd size": mixture("f32", "bf16", ffn=42, biases=True),
    "one expert for each token": mixture("q4_1", "q5_0", experts=3, used=1),
    "many experts": mixture("q4_0", "q4_0", experts=40, used=4, ffn=32),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_of_experts_equals_the_interpreter(load_graph: Load, case: str) -> None:
    loaded = load_graph(between(MIXTURES[case]))
    for tokens in (1, 3, 16):  # with 40 experts, most are chosen by nobody
        assert_close(loaded.run(IDS[:tokens]), loaded.interpret(IDS[:tokens]), tolerance=1e-5)


def test_experts_of_tokens_that_are_alike_are_the_same(load_graph: Load) -> None:
    """All tokens want the same experts."""
    loaded = load_graph(between(MIXTURES["packed"]))
    same = [IDS[0]] * 16
    assert_close(loaded.run(same), loaded.interpret(same), tolerance=1e-5)


def test_experts_of_rounded_activations_are_close(load_graph: Load) -> None:
    loaded = load_graph(between(MIXTURES["with biases"]), "int8")
    for tokens in (1, 16):
        # Three products, each of whose inputs is rounded to a 254th of its block's range.
        assert_close(loaded.run(IDS[:tokens]), loaded.interpret(IDS[:tokens]), tolerance=0.03)


@pytest.mark.parametrize("case", ["many experts", "with biases"])
def test_a_token_gives_the_same_in_a_step_of_its_own(load_graph: Load, backend: str, case: str) -> None:
    """Kernels of our own give the same bits, whoever else wants a token's experts."""
    loaded = load_graph(between(MIXTURES[case]), "float32" if case == "many experts" else "int8")
    cache, together = loaded.engine.new_cache(), loaded.run(IDS[:16])
    alone = np.concatenate([loaded.step(cache, [token]) for token in IDS[:16]])
    if backend == "tvm":
        np.testing.assert_array_equal(alone, together)
    else:
        assert_close(alone, together, tolerance=1e-5)


OTHERS = """
weight @n: f32[64]
weight @b: f32[64]
weight @w: q8_0[128, 64]
%a = LayerNorm(%x, @n, @b; eps=1e-05)
%c = SoftCap(%a; cap=0.5)
%both = DequantMatMul(%c, @w)
%gate, %up = Split(%both; sizes=(64, 64))
%d = ClampedSwiglu(%gate, %up; alpha=1.702, limit=0.05)
%y = LayerNorm(%d, @n; eps=1e-05)
"""


def test_other_row_wise_ops_equal_the_interpreter(load_graph: Load) -> None:
    loaded = load_graph(between(OTHERS))
    for tokens in (1, 16):
        assert_close(loaded.run(IDS[:tokens]), loaded.interpret(IDS[:tokens]), tolerance=1e-5)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_capped_logits_equal_the_interpreter(load_graph: Load, activations: str) -> None:
    text = between("%y = Square(%x)")
    capped = text.replace("%logits =", "%raw =").replace(
        "output %logits", "%logits = SoftCap(%raw; cap=0.02)\noutput %logits"
    )
    loaded = load_graph(capped, activations)
    logits = loaded.engine.step([loaded.engine.new_cache()], np.array([IDS[:5]]), np.arange(5), [()])
    result, expected = logits.values[0], loaded.interpret(IDS[:5])
    assert np.abs(expected).max() > 0.01, "the cap must matter"
    assert_close(result, expected, tolerance=1e-5 if activations == "float32" else 0.03)
    assert np.abs(result).max() < 0.02
    for index, values in enumerate(result):
        summary, expected = logits.row(0, index), Logits.of(values)
        np.testing.assert_array_equal(summary.maxima, expected.maxima)
        # Sums of at most 64 powers, in two orders.
        np.testing.assert_allclose(summary.sums, expected.sums, rtol=1e-5)


def test_caps_and_sinks_of_scores_equal_the_interpreter(load_graph: Load) -> None:
    text = between("weight @w: f16[64, 32]\n%z = Add(%o, %heads)\n%y = MatMul(%z, @w)")
    text = text.replace("weight @other", "weight @sinks: f32[2]\nweight @other")
    text = text.replace("%past_length;", "%past_length, @sinks;")
    text = text.replace("layout='linear'", "layout='linear', window=3, soft_cap=0.5, sinks=True")
    loaded = load_graph(text)
    assert_close(loaded.run(IDS[:16]), loaded.interpret(IDS[:16]), tolerance=1e-5)
