"""Vector functions against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rlxc.backends.tvm.kernels import math as vector_math
from rlxc.backends.tvm.kernels.kernel import Expr, Kernel, Number, Pointer, serial
from rlxc.backends.tvm.kernels.vector import Vectors

Doubles = npt.NDArray[np.float64]

pytestmark = pytest.mark.parametrize("lanes", [4, 8, 16])


def elementwise(lanes: int, function: Callable[[Vectors, Expr], Expr]) -> Kernel:
    vectors = Vectors(lanes, "multiply")

    def body(x: Any, y: Any, n: Any) -> None:
        with serial(n // lanes) as i:
            vectors.store(y, i * lanes, function(vectors, vectors.load(x, i * lanes)))

    params = (Pointer("x", "float32"), Pointer("y", "float32"), Number("n"))
    return Kernel(f"{function.__name__}_{lanes}", params, body)


def run(run_kernel: Any, lanes: int, name: str, x: Doubles) -> tuple[Doubles, Doubles]:
    """The inputs as f32 rounds them, and the results, both in float64."""
    given = x.astype(np.float32)
    out = np.zeros_like(given)
    run_kernel(elementwise(lanes, getattr(vector_math, name)), given, out, len(given))
    return given.astype(np.float64), out.astype(np.float64)


def test_exp_is_right_to_two_in_ten_million(run_kernel: Any, lanes: int) -> None:
    x, got = run(run_kernel, lanes, "exp", np.linspace(-87, 88, 1 << 18))
    np.testing.assert_allclose(got, np.exp(x), rtol=2e-7)


def test_exp_of_very_negative_numbers_is_tiny_and_normal(run_kernel: Any, lanes: int) -> None:
    _, got = run(run_kernel, lanes, "exp", np.array([-88, -100, -1e4, -3e38, -np.inf, -87.5, -103, -745] * 2))
    assert (got > np.finfo(np.float32).tiny).all() and (got < 2e-38).all()


def signed_sizes(count: int, least: float, most: float) -> Doubles:
    sizes = np.geomspace(least, most, count // 2)
    return np.concatenate([-sizes[::-1], sizes])


def silu(x: Doubles) -> Doubles:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu_tanh(x: Doubles) -> Doubles:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "gelu_tanh"])
def test_functions_are_right_to_one_in_a_million(run_kernel: Any, lanes: int, name: str) -> None:
    references = {
        "tanh": np.tanh,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "silu": silu,
        "gelu_tanh": gelu_tanh,
    }
    x, got = run(run_kernel, lanes, name, signed_sizes(1 << 16, 1e-6, 50))
    # Far below zero an exponent of 16 and more was rounded to 24 bits first; gelu is below 1e-4 there.
    np.testing.assert_allclose(got, references[name](x), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "gelu_tanh"])
def test_functions_of_large_numbers_reach_their_limits(run_kernel: Any, lanes: int, name: str) -> None:
    x, got = run(run_kernel, lanes, name, signed_sizes(64, 200, 3.4e38))
    limits = {"tanh": np.sign(x), "sigmoid": x > 0, "silu": x * (x > 0), "gelu_tanh": x * (x > 0)}
    # A sigmoid ends at e^-88, so a product with it ends at 3.4e38 * 6e-39.
    np.testing.assert_allclose(got, limits[name], rtol=1e-7, atol=0 if name == "tanh" else 3)


@pytest.mark.parametrize(("name", "reduce"), [("reduce_max", np.max), ("reduce_sum", np.sum)])
def test_reductions_take_every_lane_once(
    run_kernel: Any, lanes: int, name: str, reduce: Callable[..., Doubles]
) -> None:
    function = getattr(vector_math, name)

    def spread(vectors: Vectors, x: Expr) -> Expr:
        return vectors.splat(function(vectors, x))

    spread.__name__ = name
    x = np.random.default_rng(0).permutation(16 * lanes).astype(np.float32) - 100
    out = np.zeros_like(x)
    run_kernel(elementwise(lanes, spread), x, out, len(x))
    # Small integers: their sums are exact.
    expected = np.repeat(reduce(x.reshape(-1, lanes), 1), lanes)
    np.testing.assert_array_equal(out, expected)
