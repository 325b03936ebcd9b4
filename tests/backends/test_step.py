"""A step of a small graph, on every backend, against the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from between import IDS, assert_close, between
from layer_graph import layer

Load = Callable[..., Any]


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_whole_layer_equals_the_interpreter(load_graph: Load, activation: str) -> None:
    loaded = load_graph(layer(activation))
    assert_close(loaded.run(IDS[:5]), loaded.interpret(IDS[:5]))


def test_int8_activations_are_close_to_f32_but_not_equal(load_graph: Load) -> None:
    loaded = load_graph(layer(), "int8")
    result, expected = loaded.run(IDS[:5]), loaded.interpret(IDS[:5])
    # Four products, each of whose inputs is rounded to a 254th of its block's range.
    assert_close(result, expected, tolerance=0.03)
    assert np.abs(result - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_steps_of_any_size_equal_one(load_graph: Load, activations: str) -> None:
    loaded = load_graph(layer(), activations)
    cache = loaded.engine.new_cache()
    sizes = [3, 1, 1, 9, 2]
    parts = [loaded.step(cache, IDS[end - size : end]) for size, end in zip(sizes, np.cumsum(sizes))]
    # Sums in another order, which may move an int8 activation by a step.
    tolerance = 1e-5 if activations == "float32" else 0.01
    assert_close(np.concatenate(parts), loaded.run(IDS[:16]), tolerance)


def test_rows_may_be_chosen_in_any_order(load_graph: Load) -> None:
    loaded = load_graph(layer())
    assert_close(loaded.run(IDS[:5], [3, 0, 4]), loaded.run(IDS[:5])[[3, 0, 4]], tolerance=1e-5)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_no_rows_give_no_logits_but_fill_the_cache(load_graph: Load, activations: str) -> None:
    loaded = load_graph(layer(), activations)
    caches = [loaded.engine.new_cache() for _ in range(2)]
    assert loaded.step(caches[0], IDS[:5], []).shape == (0, 96)
    loaded.step(caches[1], IDS[:5])
    after = [loaded.step(cache, IDS[5:6]) for cache in caches]
    np.testing.assert_array_equal(*after)
    assert not np.array_equal(after[0], loaded.run(IDS[5:6]))


def test_sequences_do_not_see_each_other(load_graph: Load) -> None:
    loaded = load_graph(layer())
    caches = [loaded.engine.new_cache() for _ in range(2)]
    for start in range(0, 6, 2):
        for cache, ids in zip(caches, (IDS, IDS[::-1])):
            last = loaded.step(cache, ids[start : start + 2])
    assert_close(last, loaded.run(IDS[::-1][:6])[4:], tolerance=1e-5)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_sequences_of_different_lengths_step_together(load_graph: Load, activations: str) -> None:
    loaded = load_graph(layer(), activations)
    caches = [loaded.engine.new_cache() for _ in range(3)]
    for cache, length in zip(caches, (0, 7, 3)):
        if length:
            loaded.step(cache, IDS[:length])
    new = [IDS[10:13], IDS[13:16], IDS[16:19]]
    together = loaded.step_together(caches, new, [2, 0])
    assert [cache.position for cache in caches] == [3, 10, 6]
    tolerance = 1e-5 if activations == "float32" else 0.01
    for logits, length, ids in zip(together, (0, 7, 3), new):
        assert_close(logits, loaded.run(IDS[:length] + ids)[[length + 2, length]], tolerance)


MIDDLES = {
    "nothing": "%y = Square(%x)",
    "norm in small steps": """
%squares = Square(%x)
%mean = Mean(%squares)
%eps = Constant(; value=1e-06)
%sum = Add(%mean, %eps)
%factor = Rsqrt(%sum)
%y = Mul(%x, %factor)
""",
    "a constant vector": f"%c = Constant(; value=({'0.5, -1.0, ' * 32}))\n%y = Add(%c, %x)",
    "a residual around a product": """
weight @w: q4_0[64, 64]
weight @norm: f32[64]
%normed = RmsNorm(%x, @norm; eps=1e-06)
%projected = DequantMatMul(%normed, @w)
%sum = Add(%x, %projected)
%y = Mul(%sum, %normed)
""",
    "a bias": """
weight @w: q5_1[64, 64]
weight @b: f32[64]
%y = DequantMatMul(%x, @w, @b)
""",
    "stacked weights": """
weight @w: q4_0[96, 64] = concat(@a: q4_0[40, 64], @b: q4_0[56, 64])
%both = DequantMatMul(%x, @w)
%rest, %z = Split(%both; sizes=(32, 64))
%y = Silu(%z)
""",
    "formats of QLoRA": """
weight @a: nf4[64, 64]
weight @b: fp4[64, 64]
weight @c: int4[64, 64]
%p = DequantMatMul(%x, @a)
%q = DequantMatMul(%p, @b)
%y = DequantMatMul(%q, @c)
""",
    "parts of a row": """
weight @w: q8_0[64, 32]
%a, %b = Split(%x; sizes=(32, 32))
%c = Mul(%a, %b)
%y = DequantMatMul(%c, @w)
""",
    "attention": "weight @w: f16[64, 32]\n%z = Add(%o, %heads)\n%y = MatMul(%z, @w)",
    "two products of one row": """
weight @a: q4_0[64, 64]
weight @b: q8_0[64, 64]
%scaled = Gelu(%x)
%p = DequantMatMul(%scaled, @a)
%q = DequantMatMul(%scaled, @b)
%y = Mul(%p, %q)
""",
}


@pytest.mark.parametrize("middle", MIDDLES)
def test_rows_of_a_small_graph_equal_the_interpreter(load_graph: Load, middle: str) -> None:
    loaded = load_graph(between(MIDDLES[middle]))
    for tokens in (1, 5, 16):
        assert_close(loaded.run(IDS[:tokens]), loaded.interpret(IDS[:tokens]), tolerance=1e-5)


@pytest.mark.parametrize("dtype", ["nf4", "fp4", "int4"])
def test_formats_of_qlora_may_be_tables_and_products_of_rounded_activations(
    load_graph: Load, dtype: str
) -> None:
    nodes = f"weight @w: {dtype}[64, 64]\n%z = Silu(%x)\n%y = DequantMatMul(%z, @w)"
    loaded = load_graph(between(nodes, f"{dtype}[96, 64]"), "int8")
    # Two products whose inputs may be rounded to a 254th of their block's range.
    assert_close(loaded.run(IDS[:5]), loaded.interpret(IDS[:5]), tolerance=0.03)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_float_models_may_have_any_even_width(load_graph: Load, dtype: str) -> None:
    weights = f"weight @w: {dtype}[42, 34]\nweight @out: {dtype}[50, 42]\n"
    text = between(f"{weights}%z = MatMul(%x, @w)\n%y = Silu(%z)", f"{dtype}[96, 34]", "MatMul", "@out")
    loaded = load_graph(text)
    assert_close(loaded.run(IDS[:5]), loaded.interpret(IDS[:5]), tolerance=1e-5)
