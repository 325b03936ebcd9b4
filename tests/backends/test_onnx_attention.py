"""Attention in ONNX over many steps on one buffer, which is past and present at once, against the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from rlxc.errors import UnsupportedError

Build = Callable[..., Any]
Arrays = dict[str, npt.NDArray[Any]]

HEADS, KV_HEADS, DIM = 4, 2, 16
STEPS = [5, 1, 3, 1, 1, 4, 1, 2, 1, 1, 4, 1, 1]
WINDOW = 6
RING = WINDOW + max(STEPS) - 1
"""The fewest rows that let every token of the longest step see its window."""

GRAPH = """
graph attention
input %q: f32[batch, seq, {q}]
input %k: f32[batch, seq, {kv}]
input %v: f32[batch, seq, {kv}]
input %past.key: {dtype}[batch, {heads}, {capacity}, {dim}]
input %past.value: {dtype}[batch, {heads}, {capacity}, {dim}]
input %past_length: i32[]
{weight}
%y, %present.key, %present.value = GroupQueryAttention(%q, %k, %v, %past.key, %past.value, %past_length{factors}; {op})
output %y
output %present.key
output %present.value
"""


def graph(
    capacity: int, op: str, *, kv_heads: int = KV_HEADS, factors: bool = False, dtype: str = "f32"
) -> str:
    return GRAPH.format(
        q=HEADS * DIM,
        kv=kv_heads * DIM,
        heads=kv_heads,
        dim=DIM,
        capacity=capacity,
        dtype=dtype,
        weight=f"weight @factors: f32[{DIM // 2}]" if factors else "",
        factors=", @factors" if factors else "",
        op=f"heads={HEADS}, scale=0.3, {op}",
    )


def in_place_steps(built: Any, capacity: int, kv_heads: int, dtype: str) -> list[Arrays]:
    """Run all steps on the same two buffers, as an engine does; ``y`` and both caches after each."""
    session = built.open()
    empty = np.zeros((1, kv_heads, capacity, DIM), np.float16 if dtype == "f16" else np.float32)
    caches = {part: ort.OrtValue.ortvalue_from_numpy(empty.copy()) for part in ("key", "value")}
    results, past = [], 0
    for feeds in step_feeds(kv_heads):
        binding = session.io_binding()
        for part, buffer in caches.items():
            binding.bind_ortvalue_input(f"past.{part}", buffer)
            binding.bind_ortvalue_output(f"present.{part}", buffer)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        past += feeds["q"].shape[1]
        binding.bind_cpu_input("attention_mask", np.ones((1, past), np.int64))
        y = ort.OrtValue.ortvalue_from_numpy(np.empty_like(feeds["q"]))
        binding.bind_ortvalue_output("y", y)
        session.run_with_iobinding(binding)
        results.append(
            {"y": y.numpy().copy(), **{part: rows.numpy().copy() for part, rows in caches.items()}}
        )
    return results


def interpreted_steps(built: Any, capacity: int, kv_heads: int) -> list[Arrays]:
    empty = np.zeros((1, kv_heads, capacity, DIM))
    caches: Arrays = {"key": empty, "value": empty}
    results, past = [], 0
    for feeds in step_feeds(kv_heads):
        given = {
            "past_length": np.array(past, np.int32),
            "past.key": caches["key"],
            "past.value": caches["value"],
        }
        outputs = built.interpret({**feeds, **given})
        caches = {part: outputs[f"present.{part}"] for part in caches}
        results.append({"y": outputs["y"], **caches})
        past += feeds["q"].shape[1]
    return results


def step_feeds(kv_heads: int) -> list[Arrays]:
    rng = np.random.default_rng(3)
    sizes = {"q": HEADS * DIM, "k": kv_heads * DIM, "v": kv_heads * DIM}
    return [
        {name: rng.standard_normal((1, step, size)).astype(np.float32) for name, size in sizes.items()}
        for step in STEPS
    ]


LAYOUTS = {
    "linear": (sum(STEPS) + 3, "layout='linear'"),
    "linear, no row left": (sum(STEPS), "layout='linear'"),
    "window": (sum(STEPS) + 3, f"layout='linear', window={WINDOW}"),
    "ring": (RING, f"layout='ring', window={WINDOW}"),
    "ring with room": (RING + 4, f"layout='ring', window={WINDOW}"),
}
LAYOUT_CASES = [
    pytest.param(name, marks=pytest.mark.needs_ring) if "ring" in name else name for name in LAYOUTS
]
ROPES = {
    "no rope": "",
    "neox": f", rope=RopeSpec(theta=100.0, dim={DIM})",
    "interleaved": f", rope=RopeSpec(theta=100.0, dim={DIM}, interleaved=True)",
    "linear scaling": f", rope=RopeSpec(theta=100.0, dim={DIM}, factor=4.0)",
    "yarn": f", rope=RopeSpec(theta=100.0, dim={DIM}, factor=4.0, yarn=Yarn(original_context=16))",
}


def assert_same_steps(
    built: Any, capacity: int, kv_heads: int = KV_HEADS, dtype: str = "f32", atol: float = 1e-5
) -> None:
    """By default, for values near 1 in f32 with sums over at most 40 keys."""
    results = in_place_steps(built, capacity, kv_heads, dtype)
    expected = interpreted_steps(built, capacity, kv_heads)
    # Where a row of a ring lies is ONNX Runtime's affair: only what attention makes of them is compared.
    compared = ["y"] if capacity < sum(STEPS) else ["y", "key", "value"]
    for step, (result, wanted) in enumerate(zip(results, expected)):
        for name in compared:
            message = f"{name} of step {step}"
            np.testing.assert_allclose(result[name], wanted[name], rtol=0, atol=atol, err_msg=message)


def test_steps_pass_the_ring_more_than_once() -> None:
    assert sum(STEPS) > 2 * RING


@pytest.mark.parametrize("layout", LAYOUT_CASES)
@pytest.mark.parametrize("rope", ROPES)
def test_steps_equal_the_interpreter(build: Build, layout: str, rope: str) -> None:
    capacity, op = LAYOUTS[layout]
    assert_same_steps(build(graph(capacity, op + ROPES[rope])), capacity)


@pytest.mark.parametrize("layout", LAYOUT_CASES)
@pytest.mark.parametrize("kv_heads", [1, HEADS])
def test_any_grouping_of_heads_equals_the_interpreter(build: Build, layout: str, kv_heads: int) -> None:
    capacity, op = LAYOUTS[layout]
    built = build(graph(capacity, op + ROPES["neox"], kv_heads=kv_heads))
    assert_same_steps(built, capacity, kv_heads)


@pytest.mark.parametrize("layout", LAYOUT_CASES)
@pytest.mark.parametrize("rope", ["no rope", "neox", "yarn"])
def test_f16_caches_equal_the_interpreter(build: Build, layout: str, rope: str) -> None:
    capacity, op = LAYOUTS[layout]
    built = build(graph(capacity, op + ROPES[rope], dtype="f16"))
    # The op computes in f16 too: q, k, v and rope's tables are right to 2**-11 of values up to 4, a score to about
    # 0.3 * sqrt(16) * 2**-9, and the output to that share of values near 1.
    assert_same_steps(built, capacity, dtype="f16", atol=4e-3)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_types_that_the_op_does_not_take_are_refused(build: Build, dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"%y: the ONNX backend has no caches of {dtype}"):
        build(graph(48, "layout='linear'", dtype=dtype))


def test_pages_are_refused(build: Build) -> None:
    text = graph(16, "layout='paged'").replace(
        "past_length: i32[]", "past_length: i32[]\ninput %table: i32[batch, 4]"
    )
    text = text.replace("batch, 2, 16, 16", "pages, 2, 16, 16").replace(
        "%past_length;", "%past_length, %table;"
    )
    with pytest.raises(UnsupportedError, match="%y: the ONNX backend has no paged caches"):
        build(text)


def test_rope_factors_equal_the_interpreter(build: Build) -> None:
    capacity, op = LAYOUTS["linear"]
    assert_same_steps(build(graph(capacity, op + ROPES["interleaved"], factors=True)), capacity)


def test_layers_that_rotate_alike_share_their_tables(build: Build) -> None:
    capacity, op = LAYOUTS["linear"]
    text = graph(capacity, op + ROPES["neox"])
    node = next(line for line in text.splitlines() if "GroupQueryAttention" in line)
    twice = text.replace(node, node + "\n" + node.replace("%y", "%z").replace("%present", "%second"))
    names = {tensor.name for tensor in build(twice).model.graph.initializer}
    assert {name for name in names if name.startswith("rope.")} == {"rope.0.cos", "rope.0.sin"}
