"""What holds for every architecture: shapes, steps that equal one full pass, a backend that equals the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oracle import OpenModel
from tiny import TEXT, VARIANTS, VOCAB

import rlxc
from rlxc.artifact import Artifact
from rlxc.ir.ops import Attention

Open = Callable[[str], OpenModel]
Compile = Callable[..., Path]

CHUNKS = [5, 1, 7, 1, 1, 13, 1, 1, 1, 11, 1, 17, 1, 13, 1, 40, 1, 1, 23]
"""Odd steps and single ones, some longer than the engine takes at once; together they fill two pages of 64."""
LONG = [1, *np.random.RandomState(1).randint(3, VOCAB, sum(CHUNKS) - 1).tolist()]


def test_result_shapes(variant: str, open_tiny: Open) -> None:
    model = open_tiny(variant)
    logits, caches = model.step(TEXT, model.empty_caches())
    tiny = VARIANTS[variant]
    assert logits.shape == (len(TEXT), tiny.vocab)
    assert {rows.shape for rows in caches.values()} == {(1, tiny.kv_heads, len(TEXT), tiny.head_dim)}
    assert len(caches) == 2 * tiny.layer_count


def test_config_holds_the_metadata_s_numbers(variant: str, open_tiny: Open) -> None:
    config, tiny = open_tiny(variant).config, VARIANTS[variant]
    assert (config.vocab, config.hidden, config.head_dim) == (tiny.vocab, tiny.hidden, tiny.head_dim)
    assert (config.heads, config.kv_heads, config.ffn) == (tiny.heads, tiny.kv_heads, tiny.ffn)


def test_only_every_sixth_gemma3_layer_sees_everything(open_tiny: Open) -> None:
    ops = [node.op for node in open_tiny("gemma3-window").graph.nodes]
    assert [op.window for op in ops if isinstance(op, Attention)] == [8, 8, 8, 8, 8, None, 8]


@pytest.mark.parametrize("architecture", ["gemma2", "gpt-oss"])
def test_every_second_layer_sees_everything(architecture: str, open_tiny: Open) -> None:
    ops = [node.op for node in open_tiny(f"{architecture}-formats").graph.nodes]
    assert [op.window for op in ops if isinstance(op, Attention)] == [8, None, 8, None]


# Formats make no difference to the cache: one model of each kind of layer.
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-yarn", "gemma3-window", "gpt-oss-odd"])
def test_interpreted_steps_equal_one_pass(variant: str, open_tiny: Open) -> None:
    model = open_tiny(variant)
    caches, parts, start = model.empty_caches(), [], 0
    for size in CHUNKS:
        logits, caches = model.step(LONG[start : start + size], caches)
        parts.append(logits)
        start += size
    # Both are float64: only the order of sums differs.
    np.testing.assert_allclose(np.concatenate(parts), model.logits(LONG), rtol=0, atol=1e-10)


@pytest.mark.needs_ring
def test_steps_go_around_the_rings_and_leave_pages_behind(tiny_artifact: Compile) -> None:
    plan = Artifact.open(tiny_artifact("gemma3-window", "float32")).manifest.kv_cache
    windowed = [layer for layer in plan.layers if layer.window is not None]
    assert len(windowed) == 6
    for layer in windowed:
        if plan.page_size is None:
            assert layer.layout == "ring" and 2 * layer.capacity < sum(CHUNKS)
        else:
            assert sum(CHUNKS) - plan.rollback - 8 > plan.page_size
    assert max(CHUNKS) > plan.max_step


def test_compiled_steps_equal_the_interpreter(variant: str, open_tiny: Open, tiny_artifact: Compile) -> None:
    expected = open_tiny(variant).logits(LONG)
    ends = np.cumsum(CHUNKS)
    with rlxc.load(tiny_artifact(variant, "float32"), threads=1, prefix_cache=0) as session:
        rows = [session.prefill(LONG[end - size : end]) for size, end in zip(CHUNKS, ends)]
    # Logits have a standard deviation of 1; f32 sums in another order leave about 1e-5 of it.
    np.testing.assert_allclose(np.stack(rows), expected[ends - 1], rtol=0, atol=1e-4)


def test_score_equals_steps(variant: str, tiny_artifact: Compile) -> None:
    with rlxc.load(tiny_artifact(variant, "float32"), threads=1, prefix_cache=0) as session:
        scored = session.score(LONG[:20])
        stepped = np.stack([session.decode(token) for token in LONG[:20]])
    # Matrix-vector and matrix-matrix kernels sum in another order.
    np.testing.assert_allclose(stepped, scored, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama-k-m", "gemma3-window"])
def test_a_second_sequence_forgets_the_first(variant: str, tiny_artifact: Compile) -> None:
    with rlxc.load(tiny_artifact(variant, "float32"), threads=1, prefix_cache=0) as session:
        first = session.prefill(LONG[:30])
        session.reset()
        session.prefill(LONG[30:])
        session.reset()
        np.testing.assert_array_equal(session.prefill(LONG[:30]), first)
