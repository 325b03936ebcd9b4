"""Steps of a small graph with LoRA adapters, on every backend, against the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from random_adapters import Pairs, random_pairs

Load = Callable[..., Any]
Array = npt.NDArray[Any]
IDS = np.random.default_rng(4).integers(0, 96, 24).tolist()

# Products of one, two and three matrices: of a value that others read too, with a bias, and tied to the embedding.
MODEL = """
graph small
input %input_ids: i64[batch, seq]
input %logit_rows: i64[rows]
input %past_key_values.0.key: f32[batch, 1, 64, 16]
input %past_key_values.0.value: f32[batch, 1, 64, 16]
input %past_length: i32[]
weight @table: q8_0[96, 64]
weight @qkv: q4_0[72, 64] = concat(@q: q4_0[40, 64], @k: q4_0[16, 64], @v: q4_0[16, 64])
weight @o: f16[64, 32]
weight @gate: q5_1[64, 64]
weight @up: q8_0[64, 64]
weight @up_bias: f32[64]
%small = Embed(%input_ids, @table)
%scale = Constant(; value=100.0)
%x = Mul(%small, %scale)
%projected = DequantMatMul(%x, @qkv)
%q, %rest, %k, %v = Split(%projected; sizes=(32, 8, 16, 16))
%heads, %present.0.key, %present.0.value = GroupQueryAttention(%q, %k, %v, {caches}; {attention})
%attended = MatMul(%heads, @o)
%sum = Add(%attended, %x)
%a = DequantMatMul(%sum, @gate)
%b = DequantMatMul(%sum, @up, @up_bias)
%both = Mul(%a, %b)
%y = Add(%both, %sum)
%last = SelectRows(%y, %logit_rows)
%logits = DequantMatMul(%last, @table)
output %logits
output %present.0.key
output %present.0.value
""".format(
    caches="%past_key_values.0.key, %past_key_values.0.value, %past_length",
    attention="heads=2, scale=0.25, layout='linear'",
)
EVERY = ("q", "k", "v", "o", "gate", "up", "output.weight", "table")


def assert_close(result: Array, expected: Array, tolerance: float = 1e-5) -> None:
    """Equal but for the rounding of f32 sums, relative to the largest logit."""
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture(scope="session")
def model(load_graph: Load) -> Any:
    """The graph with side paths for everything."""
    return load_graph(MODEL, lora=EVERY)


def adapter(model: Any, rank: int, seed: int, tensors: Sequence[str] | None = None) -> tuple[Pairs, Any]:
    """A random adapter, and the same in the engine's memory."""
    pairs = random_pairs(model.plan, rank, seed, tensors)
    return pairs, model.engine.prepare(pairs)


def test_adapters_change_every_matrix(model: Any) -> None:
    assert {part.tensor for part in model.plan.parts} == set(EVERY)
    plain = model.interpret(IDS[:5])
    for tensor in EVERY:
        pairs = random_pairs(model.plan, 4, 1, [tensor])
        assert np.abs(model.interpret(IDS[:5], [(pairs, 1.0)]) - plain).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_empty_stack_changes_nothing(model: Any, load_graph: Load, tokens: int) -> None:
    base = load_graph(MODEL)
    np.testing.assert_array_equal(model.run(IDS[:tokens]), base.run(IDS[:tokens]))


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("rank", [1, 5, 16, 20])
def test_one_adapter_equals_the_interpreter(model: Any, rank: int, tokens: int) -> None:
    pairs, prepared = adapter(model, rank, seed=rank)
    assert prepared.units == -(-rank // 16)
    assert_close(
        model.run(IDS[:tokens], mix=[(prepared, 0.7)]), model.interpret(IDS[:tokens], [(pairs, 0.7)])
    )


@pytest.mark.parametrize("tokens", [1, 7])
def test_stacked_adapters_add_up_as_in_the_interpreter(model: Any, tokens: int) -> None:
    (one, first), (two, second) = adapter(model, 5, seed=1), adapter(model, 17, seed=2)
    result = model.run(IDS[:tokens], mix=[(first, 0.7), (second, -0.4)])
    assert_close(result, model.interpret(IDS[:tokens], [(one, 0.7), (two, -0.4)]))


def test_adapter_may_be_stacked_on_itself(model: Any) -> None:
    pairs, prepared = adapter(model, 5, seed=1)
    twice = model.run(IDS[:5], mix=[(prepared, 0.5), (prepared, 0.25)])
    assert_close(twice, model.interpret(IDS[:5], [(pairs, 0.75)]))


@pytest.mark.parametrize("tensor", EVERY)
def test_matrices_without_an_adapter_stay_as_they_are(model: Any, tensor: str) -> None:
    pairs, prepared = adapter(model, 5, seed=3, tensors=[tensor])
    assert_close(model.run(IDS[:5], mix=[(prepared, 1.0)]), model.interpret(IDS[:5], [(pairs, 1.0)]))


def test_adapters_of_a_stack_may_change_different_matrices(model: Any) -> None:
    (one, first) = adapter(model, 5, seed=1, tensors=["q", "gate", "table"])
    (two, second) = adapter(model, 18, seed=2, tensors=["v", "q", "o", "output.weight"])
    result = model.run(IDS[:5], mix=[(first, 1.0), (second, 0.5)])
    assert_close(result, model.interpret(IDS[:5], [(one, 1.0), (two, 0.5)]))


def test_ranks_of_one_adapter_may_differ(model: Any) -> None:
    pairs = {
        **random_pairs(model.plan, 3, 1, ["q", "o"]),
        **random_pairs(model.plan, 19, 2, ["k", "up", "table"]),
    }
    prepared = model.engine.prepare(pairs)
    assert prepared.units == 2
    assert_close(model.run(IDS[:5], mix=[(prepared, 1.0)]), model.interpret(IDS[:5], [(pairs, 1.0)]))


def test_stack_may_change_from_step_to_step(model: Any) -> None:
    (one, first), (two, second) = adapter(model, 5, seed=1), adapter(model, 16, seed=2)
    stacks = [
        [],
        [(one, first, 1.0)],
        [(one, first, 0.5)],
        [(one, first, 0.5), (two, second, 1.0)],
        [(two, second, 1.0), (one, first, 0.5)],
        [(two, second, 1.0)],
        [],
    ]
    cache = model.engine.new_cache()
    for stack in stacks:
        # Each step begins the sequence anew: what it sees is its own adapters' work alone.
        cache.truncate(0)
        result = model.step(cache, IDS[:4], mix=[(prepared, scale) for _, prepared, scale in stack])
        expected = model.interpret(IDS[:4], [(pairs, scale) for pairs, _, scale in stack])
        assert_close(result, expected)


def test_cached_tokens_keep_the_adapters_that_they_were_made_with(model: Any) -> None:
    _, prepared = adapter(model, 5, seed=1)
    cache = model.engine.new_cache()
    model.step(cache, IDS[:4], mix=[(prepared, 1.0)])
    after = model.step(cache, IDS[4:5])
    assert np.abs(after - model.run(IDS[:5])[4:]).max() > 1e-3 * np.abs(after).max()


@pytest.mark.parametrize("tokens", [1, 4])
def test_sequences_of_one_step_have_their_own_adapters(model: Any, tokens: int) -> None:
    (one, first), (two, second) = adapter(model, 5, seed=1), adapter(model, 30, seed=2)
    stacks = [[(two, second, 1.0)], [], [(one, first, 0.5), (two, second, 0.3)], [(one, first, 1.0)]]
    ids = [IDS[start : start + tokens] for start in range(4)]
    caches = [model.engine.new_cache() for _ in ids]
    mixes = [[(prepared, scale) for _, prepared, scale in stack] for stack in stacks]
    together = model.step_together(caches, ids, mixes=mixes)
    for logits, tokens_of, stack in zip(together, ids, stacks):
        assert_close(logits, model.interpret(tokens_of, [(pairs, scale) for pairs, _, scale in stack]))


def test_steps_of_any_size_equal_one_with_adapters(model: Any) -> None:
    _, prepared = adapter(model, 5, seed=1)
    mix = [(prepared, 0.8)]
    cache = model.engine.new_cache()
    sizes = [3, 1, 1, 9, 2]
    parts = [model.step(cache, IDS[end - size : end], mix=mix) for size, end in zip(sizes, np.cumsum(sizes))]
    assert_close(np.concatenate(parts), model.run(IDS[:16], mix=mix))


def test_no_rows_give_no_logits_but_fill_the_cache_with_adapters(model: Any) -> None:
    _, prepared = adapter(model, 5, seed=1)
    mix = [(prepared, 1.0)]
    caches = [model.engine.new_cache() for _ in range(2)]
    assert model.step(caches[0], IDS[:5], [], mix=mix).shape == (0, 96)
    model.step(caches[1], IDS[:5], mix=mix)
    after = [model.step(cache, IDS[5:6], mix=mix) for cache in caches]
    np.testing.assert_array_equal(*after)


def test_int8_activations_with_adapters_are_close_to_f32(load_graph: Load) -> None:
    model = load_graph(MODEL, "int8", lora=EVERY)
    pairs, prepared = adapter(model, 5, seed=1)
    result = model.run(IDS[:5], mix=[(prepared, 1.0)])
    # Each product's inputs are rounded to a 254th of their block's range; the side paths round to f16 at most.
    assert_close(result, model.interpret(IDS[:5], [(pairs, 1.0)]), tolerance=0.03)


def test_memory_of_an_adapter_is_counted(model: Any) -> None:
    sizes = [
        adapter(model, rank, seed=1, tensors=tensors)[1].nbytes
        for rank, tensors in ((5, ["o"]), (16, ["o"]), (32, ["o"]), (16, ["o", "up"]))
    ]
    assert 0 < sizes[0] == sizes[1] < sizes[2]
    assert sizes[1] <= sizes[3]
