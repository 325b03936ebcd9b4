"""Stacks of adapters against the formula in float64: ``Δ = Σ sᵢ · (αᵢ / rᵢ) · Bᵢ (Aᵢ x)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlxc.errors import OptionError, SessionError, WeightError
from rlxc.runtime import LoraStack, TargetModule

Q, K, IN, OUT = "blk.0.attn_q.weight", "blk.0.attn_k.weight", 24, 40

# Two products and a sum of a few terms in float32, of values around 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}


@dataclass
class Lora:
    """The least that an adapter can be."""

    name: str
    rank: int
    alpha: float = 8.0
    tensor: str = Q
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, self.rank])
        self.a = rng.standard_normal((self.rank, IN)).astype(np.float32)
        self.b = rng.standard_normal((OUT, self.rank)).astype(np.float32)

    def apply(self, tensor: str, x: Any) -> Any:
        if tensor != self.tensor:
            return None
        return np.float32(self.alpha / self.rank) * (x @ self.a.T) @ self.b.T

    def delta(self) -> Any:
        """The matrix, in float64."""
        return self.alpha / self.rank * (self.b.astype(np.float64) @ self.a.astype(np.float64))


class Dora:
    """An adapter that also knows the weight: rows of ``W + B A`` get a learned length."""

    name = "dora"

    def __init__(self, weight: Any, lora: Lora, magnitude: Any) -> None:
        self.weight, self.lora, self.magnitude = weight, lora, magnitude

    def adapted(self) -> Any:
        whole = self.weight + self.lora.delta()
        return self.magnitude[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)

    def apply(self, tensor: str, x: Any) -> Any:
        return x @ (self.adapted() - self.weight).T


def inputs(*shape: int) -> Any:
    return np.random.default_rng(9).standard_normal((*shape, IN)).astype(np.float32)


def stack_of(*entries: tuple[Any, float]) -> LoraStack:
    stack = LoraStack()
    for adapter, scale in entries:
        stack.push(adapter, scale)
    return stack


@given(
    entries=st.lists(st.tuples(st.integers(1, 20), st.floats(-2, 2, width=32), st.integers(0, 3)), max_size=4)
)
def test_changes_of_adapters_add_up(entries: list[tuple[int, float, int]]) -> None:
    adapters = [(Lora(str(i), rank, seed=seed), scale) for i, (rank, scale, seed) in enumerate(entries)]
    x = inputs(3)
    expected = sum((scale * x.astype(np.float64) @ a.delta().T for a, scale in adapters), np.zeros((3, OUT)))
    got = stack_of(*adapters).apply(Q, x, OUT)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, **TOLERANCE)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_leading_dimensions_of_x_stay(shape: tuple[int, ...]) -> None:
    adapter, x = Lora("a", 4), inputs(*shape)
    got = stack_of((adapter, 1.0)).apply(Q, x, OUT)
    assert got.shape == (*shape, OUT)
    np.testing.assert_allclose(got, x.astype(np.float64) @ adapter.delta().T, **TOLERANCE)


def test_adapters_that_leave_a_matrix_alone_are_skipped() -> None:
    q, k = Lora("q", 4, tensor=Q), Lora("k", 8, tensor=K)
    x = inputs(2)
    got = stack_of((k, 3.0), (q, 0.5), (k, 1.0)).apply(Q, x, OUT)
    np.testing.assert_allclose(got, 0.5 * x.astype(np.float64) @ q.delta().T, **TOLERANCE)


def test_matrix_that_no_adapter_changes_gets_zeros() -> None:
    got = stack_of((Lora("q", 4), 1.0)).apply("blk.1.attn_q.weight", inputs(2), OUT)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.zeros((2, OUT)))


def test_applied_delta_is_that_of_the_module_s_tensor() -> None:
    stack, x = stack_of((Lora("q", 4, tensor="blk.7.ffn_gate.weight"), 1.0)), inputs(2)
    got = stack.applied_delta(TargetModule.FFN_GATE, 7, x, OUT)
    assert got is not None
    np.testing.assert_array_equal(got, stack.apply("blk.7.ffn_gate.weight", x, OUT))
    assert np.abs(got).max() > 0


@pytest.mark.parametrize(("module", "layer"), [(TargetModule.ATTN_Q, 1), (TargetModule.OUTPUT, None)])
def test_applied_delta_of_an_unchanged_module_is_none(module: TargetModule, layer: int | None) -> None:
    assert stack_of((Lora("q", 4), 1.0)).applied_delta(module, layer, inputs(1), OUT) is None
    assert LoraStack().applied_delta(module, layer, inputs(1), OUT) is None


def test_any_object_with_the_protocol_can_be_pushed_and_scaled() -> None:
    rng = np.random.default_rng(3)
    dora = Dora(rng.standard_normal((OUT, IN)), Lora("inner", 4), 1 + rng.random(OUT))
    x = inputs(2)
    y = x @ dora.weight.T + stack_of((dora, 1.0)).apply(Q, x, OUT)
    np.testing.assert_allclose(y, x @ dora.adapted().T, **TOLERANCE)
    half = stack_of((dora, 0.5)).apply(Q, x, OUT)
    np.testing.assert_allclose(half, 0.5 * x @ (dora.adapted() - dora.weight).T, **TOLERANCE)


def test_stack_is_last_in_first_out() -> None:
    a, b = Lora("a", 1), Lora("b", 2)
    stack = stack_of((a, 0.5), (b, 2.0))
    assert (len(stack), stack.is_empty, stack.entries()) == (2, False, [(a, 0.5), (b, 2.0)])
    assert stack.pop() == (b, 2.0)
    assert stack.pop() == (a, 0.5)
    assert stack.pop() is None
    assert (len(stack), stack.is_empty, stack.entries()) == (0, True, [])


def test_clear_takes_all_off() -> None:
    stack = stack_of((Lora("a", 1), 0.5), (Lora("b", 2), 2.0))
    stack.clear()
    assert stack.is_empty


def test_entries_are_the_caller_s_to_change() -> None:
    stack = stack_of((Lora("a", 1), 0.5))
    stack.entries().clear()
    assert len(stack) == 1


def test_scale_is_1_unless_given() -> None:
    stack = LoraStack()
    stack.push(Lora("a", 1))
    assert stack.entries()[0][1] == 1.0


def test_same_adapter_twice_counts_twice() -> None:
    adapter, x = Lora("a", 4), inputs(2)
    got = stack_of((adapter, 0.5), (adapter, 1.0)).apply(Q, x, OUT)
    np.testing.assert_allclose(got, 1.5 * x.astype(np.float64) @ adapter.delta().T, **TOLERANCE)


def test_set_scale_changes_the_topmost_of_that_name_in_its_place() -> None:
    a, b = Lora("a", 1), Lora("b", 2)
    stack = stack_of((a, 1.0), (b, 1.0), (a, 1.0), (b, 1.0))
    stack.set_scale("a", 0.25)
    assert stack.entries() == [(a, 1.0), (b, 1.0), (a, 0.25), (b, 1.0)]


def test_set_scale_of_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(SessionError, match="no adapter called 'b' is on the stack; push it first"):
        stack_of((Lora("a", 1), 1.0)).set_scale("b", 1.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, None, "1", 1j, 1e39, 10**400])
def test_scale_that_is_no_finite_float32_is_refused(scale: Any) -> None:
    stack = stack_of((Lora("a", 1), 0.5))
    with pytest.raises(OptionError, match="an adapter's scale must"):
        stack.push(Lora("b", 1), scale)
    with pytest.raises(OptionError, match="an adapter's scale must"):
        stack.set_scale("a", scale)
    assert [entry[1] for entry in stack.entries()] == [0.5]


@pytest.mark.parametrize("scale", [0, -2, np.float32(0.5), np.int64(3)])
def test_scale_may_be_any_real_number(scale: Any) -> None:
    assert stack_of((Lora("a", 1), scale)).entries()[0][1] == float(scale)


def test_adapter_of_other_rows_is_refused() -> None:
    with pytest.raises(WeightError, match=rf"{Q}: adapter 'a' adds \[2, 40\] to a product \[2, 41\]"):
        stack_of((Lora("a", 4), 1.0)).apply(Q, inputs(2), OUT + 1)


def test_adapter_of_other_columns_is_refused() -> None:
    with pytest.raises(WeightError, match=rf"{Q}: adapter 'a' does not take x \[2, 23\]"):
        stack_of((Lora("a", 4), 1.0)).apply(Q, inputs(2)[:, 1:], OUT)


def test_x_without_a_dimension_is_refused() -> None:
    with pytest.raises(WeightError, match="x has no dimension"):
        stack_of((Lora("a", 4), 1.0)).apply(Q, np.float32(1), OUT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "layer", "tensor"),
    [
        (TargetModule.ATTN_Q, 0, "blk.0.attn_q.weight"),
        (TargetModule.ATTN_K, 1, "blk.1.attn_k.weight"),
        (TargetModule.ATTN_V, 2, "blk.2.attn_v.weight"),
        (TargetModule.ATTN_OUTPUT, 3, "blk.3.attn_output.weight"),
        (TargetModule.FFN_GATE, 4, "blk.4.ffn_gate.weight"),
        (TargetModule.FFN_UP, 5, "blk.5.ffn_up.weight"),
        (TargetModule.FFN_DOWN, 60, "blk.60.ffn_down.weight"),
        (TargetModule.OUTPUT, None, "output.weight"),
        (TargetModule.TOKEN_EMBD, None, "token_embd.weight"),
    ],
)
def test_modules_have_the_names_of_gguf(module: TargetModule, layer: int | None, tensor: str) -> None:
    assert module.tensor(layer) == tensor


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (TargetModule.ATTN_Q, None),
        (TargetModule.ATTN_Q, -1),
        (TargetModule.ATTN_Q, True),
        (TargetModule.OUTPUT, 0),
        (TargetModule.TOKEN_EMBD, 0),
    ],
)
def test_layer_that_a_module_cannot_have_is_refused(module: TargetModule, layer: int | None) -> None:
    with pytest.raises(OptionError, match="layer"):
        module.tensor(layer)
