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
%y, %present.key, %present.value = GroupQueryAttention(%q, %k, %v, %past.key, %past.value, %past_length{given}; {op})
output %y
output %present.key
output %present.value
"""


def graph(
    capacity: int,
    op: str,
    *,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    factors: bool = False,
    sinks: bool = False,
    dtype: str = "f32",
) -> str:
    given = {"factors": dim // 2} if factors else {}
    if sinks:
        given["sinks"], op = HEADS, f"{op}, sinks=True"
    return GRAPH.format(
        q=HEADS * dim,
        kv=kv_heads * dim,
        heads=kv_heads,
        dim=dim,
        capacity=capacity,
        dtype=dtype,
        weight="\n".join(f"weight @{name}: f32[{size}]" for name, size in given.items()),
        given="".join(f", @{name}" for name in given),
        op=f"heads={HEADS}, scale=0.3, {op}",
    )


def in_place_steps(built: Any, capacity: int, kv_heads: int, dtype: str) -> list[Arrays]:
    """Run all steps on the same two buffers, as an engine does; ``y`` and both caches after each."""
    session, dim = built.open(), head_dim(built)
    empty = np.zeros((1, kv_heads, capacity, dim), np.float16 if dtype == "f16" else np.float32)
    caches = {part: ort.OrtValue.ortvalue_from_numpy(empty.copy()) for part in ("key", "value")}
    results, past = [], 0
    for feeds in step_feeds(kv_heads, dim):
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
    dim = head_dim(built)
    empty = np.zeros((1, kv_heads, capacity, dim))
    caches: Arrays = {"key": empty, "value": empty}
    results, past = [], 0
    for feeds in step_feeds(kv_heads, dim):
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


def head_dim(built: Any) -> int:
    return int(built.graph.types["past.key"].shape[-1])


def step_feeds(kv_heads: int, dim: int) -> list[Arrays]:
    rng = np.random.default_rng(3)
    sizes = {"q": HEADS * dim, "k": kv_heads * dim, "v": kv_heads * dim}
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


SCORES = {
    "soft cap": {"cap": ", soft_cap=0.7"},
    "sinks": {"sinks": True},
    "soft cap and sinks": {"cap": ", soft_cap=0.7", "sinks": True},
}


def with_scores(layout: str, scores: str, dtype: str = "f32") -> str:
    capacity, op = LAYOUTS[layout]
    cap, sinks = SCORES[scores].get("cap", ""), SCORES[scores].get("sinks", False)
    return graph(capacity, op + ROPES["neox"] + cap, sinks=sinks, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUT_CASES)
@pytest.mark.parametrize("scores", SCORES)
def test_soft_caps_and_sinks_equal_the_interpreter(build: Build, layout: str, scores: str) -> None:
    assert_same_steps(build(with_scores(layout, scores)), LAYOUTS[layout][0])


@pytest.mark.parametrize("layout", [case for case in LAYOUT_CASES if case != "linear, no row left"])
@pytest.mark.parametrize("scores", SCORES)
def test_soft_caps_and_sinks_with_f16_caches_equal_the_interpreter(
    build: Build, layout: str, scores: str
) -> None:
    # As above: the op computes in f16 too.
    assert_same_steps(build(with_scores(layout, scores, "f16")), LAYOUTS[layout][0], dtype="f16", atol=4e-3)


HEADS_OF = {
    "whole": (64, 64),
    "a quarter": (64, 16),
    "a quarter that the op does not rotate": (80, 20),
    "few channels": (32, 8),
    "a head that the op does not rotate": (24, 24),
    "part of such a head": (40, 12),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["linear", pytest.param("ring", marks=pytest.mark.needs_ring)])
@pytest.mark.parametrize("size", HEADS_OF)
def test_heads_that_are_rotated_in_part_equal_the_interpreter(
    build: Build, size: str, layout: str, interleaved: bool
) -> None:
    (capacity, op), (dim, rotated) = LAYOUTS[layout], HEADS_OF[size]
    rope = f", rope=RopeSpec(theta=100.0, dim={rotated}, interleaved={interleaved})"
    # Scores are sums of up to 80 products: 3 times as large as those of 16.
    assert_same_steps(build(graph(capacity, op + rope, dim=dim)), capacity, atol=3e-5)


def test_f16_caches_of_heads_that_are_rotated_apart_equal_the_interpreter(build: Build) -> None:
    capacity, op = LAYOUTS["linear"]
    built = build(graph(capacity, f"{op}, rope=RopeSpec(theta=100.0, dim=24)", dim=24, dtype="f16"))
    assert_same_steps(built, capacity, dtype="f16", atol=5e-3)


@pytest.mark.parametrize("dim", [16, 24])
def test_sequences_of_different_lengths_have_positions_of_their_own(build: Build, dim: int) -> None:
    built = build(graph(16, f"layout='linear', rope=RopeSpec(theta=100.0, dim={dim})", dim=dim))
    session, rng = built.open(), np.random.default_rng(8)
    lengths, step = (7, 2), 1  # of more tokens, the op takes one sequence only
    alone, together = [], {}
    for past in lengths:
        feeds = {
            name: rng.standard_normal((1, step, size * dim)).astype(np.float32)
            for name, size in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items()
        }
        for part in ("key", "value"):
            rows = rng.standard_normal((1, KV_HEADS, 16, dim)).astype(np.float32)
            feeds[f"past.{part}"] = rows * (np.arange(16) < past)[:, None]
        alone.append(built.run({**feeds, "past_length": np.array(past)}, session)["y"])
        for name, array in feeds.items():
            together[name] = np.concatenate([together[name], array]) if name in together else array
    ends = np.array(lengths)[:, None] + step
    mask = (np.arange(ends.max()) < ends).astype(np.int64)
    y = session.run(["y"], {**together, "attention_mask": mask})[0]
    # The same sums; a batch may be cut into other pieces.
    np.testing.assert_allclose(y, np.concatenate(alone), rtol=0, atol=1e-6)


def test_heads_that_the_op_does_not_take_are_refused(build: Build) -> None:
    with pytest.raises(UnsupportedError, match=r"%y: .*heads of 20 channels, only of multiples of 8"):
        build(graph(48, "layout='linear'", dim=20))


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
