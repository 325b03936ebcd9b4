"""What every architecture can do beside computing logits: adapters, sequences, short contexts, equal bits.

Tiny models of odd sizes, whose plain logits ``tests/models`` compares with llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from adapter_cases import TEXT, VARIANTS
from adapters import Pairs, random_pairs, write_gguf_adapter
from gguf import GGUFReader
from gguf.quants import dequantize
from playing import Fresh, Player
from tiny import Tiny, shapes

import rlxc
from rlxc.artifact import BackendName
from rlxc.backends import default_backend
from rlxc.merging import merge
from rlxc.runtime.sequence import Span

Floats = npt.NDArray[np.floating[Any]]
Write = Callable[..., Path]

ODD = [name for name in VARIANTS if name.endswith("-odd") or name == "llama-experts"]
MIXTURES = ["gpt-oss-odd", "llama-experts", "qwen3moe-odd"]
ALPHA, RANK = 8.0, 4

# f32 throughout: what is left are sums in another order, 1e-6 of the logits' range.
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """``write(variant)``: its file, written once."""
    folder = tmp_path_factory.mktemp("odd")
    return cache(lambda name: VARIANTS[name].write(folder / f"{name}.gguf"))


def score(artifact: Path, ids: list[int] = TEXT) -> Floats:
    with rlxc.load(artifact, threads=1) as session:
        return session.score(ids)


def distance(logits: Floats, expected: Floats) -> float:
    """The largest difference, in parts of the expected logits' range."""
    return float(np.abs(logits - expected).max() / np.ptp(expected))


# --- adapters ---------------------------------------------------------------------------------------------------------


def pairs_for(tiny: Tiny) -> Pairs:
    """For every matrix that adapters can change, the router and an output of its own among them."""
    matrices = {
        name: shape
        for name, shape in shapes(tiny)
        if len(shape) == 2
        and name.endswith(".weight")
        and "_norm" not in name
        and name != "token_embd.weight"
    }
    return random_pairs(matrices, RANK)


def merged_tensors(file: Path, pairs: Pairs) -> dict[str, npt.NDArray[np.float32]]:
    """``W + alpha / rank * B A`` in float64, of weights that the ``gguf`` package decodes."""
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    merged = {}
    for name, (a, b) in pairs.items():
        weight = dequantize(found[name].data, found[name].tensor_type).astype(np.float64)
        delta = ALPHA / RANK * b.astype(np.float64) @ a.astype(np.float64)
        merged[name] = (weight.reshape(delta.shape) + delta).astype(np.float32)
    return merged


@pytest.mark.parametrize("variant", ODD)
def test_adapters_beside_and_in_the_weights_are_the_merged_model(
    variant: str, write: Write, compile_exact: Callable[..., Path], tmp_path: Path
) -> None:
    tiny, model = VARIANTS[variant], write(variant)
    pairs = pairs_for(tiny)
    adapter = write_gguf_adapter(tmp_path / "a.gguf", pairs, architecture=tiny.architecture, alpha=ALPHA)
    exact = tiny.write(tmp_path / "exact.gguf", decoded=True, tensors=merged_tensors(model, pairs))
    expected = score(compile_exact(exact, "onnx"))
    assert distance(score(compile_exact(model, "onnx")), expected) > 0.05
    given: Mapping[str, Any] = {"adapters": [adapter]}
    split = compile_exact(model, "onnx", lora="split", **given)
    folded = compile_exact(model, "onnx", lora="fold", fold_to="f32", **given)
    written = merge(model, [adapter], tmp_path / "merged.gguf", fold_to="f32").path
    for artifact in (split, folded, compile_exact(written, "onnx")):
        assert distance(score(artifact), expected) < TOLERANCE


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["gemma2-odd", "gpt-oss-odd", "olmo2-odd", "qwen3moe-odd", "stablelm-odd"]
)
def test_logits_are_those_of_a_fresh_run(
    variant: str, write: Write, compile_exact: Callable[..., Path], tmp_path: Path
) -> None:
    """Soft caps, sinks, norms of all kinds and experts, with rings and caches of the whole context."""
    artifact = compile_exact(write(variant), "onnx", rollback=8, context=160)
    with (
        rlxc.load(artifact, threads=1, prefix_cache=1 << 20) as session,
        rlxc.load(artifact, threads=1, prefix_cache=0) as other,
    ):
        # As in test_kv_cache_sequences.py. Only a router's tie would make more of it.
        player = Player(session, Fresh(other), tmp_path, 1e-4)
        for seed in range(8):
            player.play(seed)


@pytest.mark.parametrize("variant", ["gemma2-odd", "gemma3-odd", "gpt-oss-odd", "olmo2-odd"])
@pytest.mark.parametrize("context", [1, 2, 7])
def test_contexts_may_be_shorter_than_the_window(
    variant: str, context: int, write: Write, compile_exact: Callable[..., Path]
) -> None:
    window = VARIANTS[variant].window
    assert context < window
    ids = TEXT[:context]
    expected = score(compile_exact(write(variant), "onnx"), ids)
    with rlxc.load(compile_exact(write(variant), "onnx", context=context), threads=1) as session:
        assert distance(session.score(ids), expected) < TOLERANCE
        session.reset()
        steps = np.stack([session.decode(token) for token in ids])
        assert distance(steps, expected) < TOLERANCE
        session.reset()
        assert distance(session.prefill(ids), expected[-1]) < TOLERANCE


# --- compiled kernels -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(default_backend() != "tvm", reason="TVM is not installed")
@pytest.mark.parametrize(("variant", "activations"), [("gpt-oss-odd", "int8"), ("llama-gqa", "float32")])
def test_a_token_has_the_same_bits_alone_and_among_others(
    variant: str, activations: str, write: Write, compile_exact: Callable[..., Path]
) -> None:
    """Experts, sinks, and weights in f16 and f32; so guesses that are verified change nothing."""
    artifact = compile_exact(write(variant), "tvm", activations=activations, kv_cache="f16", rollback=16)
    ids = np.random.RandomState(1).randint(3, 300, 24)
    with rlxc.load(artifact, prefix_cache=0) as session:
        model = session._model
        session.prefill(ids[:8])
        start = session.snapshot()
        alone = np.stack([session.decode(int(token)) for token in ids[8:]])
        for size in (2, 4, 5, 16):
            step = ids[None, 8 : 8 + size].astype(np.int64)
            logits = model.step([start.begin(model)], step, np.arange(size), [Span(0, ())])
            np.testing.assert_array_equal(logits.values[0], alone[:size])
        prompt = [1, *np.resize(ids[:4], 30).tolist()]
        plain = session.generate(prompt, 40)
        guessed = session.generate(prompt, 40, speculate="ngram")
        assert guessed.ids == plain.ids and guessed.logprobs == plain.logprobs
        assert guessed.drafted > 0


# --- rounded activations ----------------------------------------------------------------------------------------------


def divergences(model: Path, backend: BackendName, compile_exact: Callable[..., Path]) -> Floats:
    """What int8 activations cost: the Kullback-Leibler divergence of each token's prediction, in nats."""
    rng = np.random.RandomState(5)
    texts = [[1, *rng.randint(3, 300, 60).tolist()] for _ in range(3)]
    logs = []
    for activations in ("float32", "int8"):
        with rlxc.load(compile_exact(model, backend, activations=activations), threads=1) as session:
            logits = np.concatenate([session.score(text) for text in texts]).astype(np.float64)
        logs.append(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    exact, rounded = logs
    found: Floats = (np.exp(exact) * (exact - rounded)).sum(-1)
    return found


@pytest.mark.parametrize("variant", MIXTURES)
def test_rounding_costs_a_mixture_more_only_where_it_changes_the_choice_of_experts(
    variant: str, write: Write, compile_exact: Callable[..., Path], tmp_path: Path
) -> None:
    """With all experts in use, no choice can change: then rounding costs what it costs a model without experts."""
    dense = divergences(write("qwen3-odd"), "onnx", compile_exact)
    some = divergences(write(variant), "onnx", compile_exact)
    count = {"expert_used_count": VARIANTS[variant].experts}
    all_used = VARIANTS[variant].write(tmp_path / "all.gguf", metadata=count)
    every = divergences(all_used, "onnx", compile_exact)
    # A choice near a tie changes for a few tokens, for which this may be a hundred times as much.
    assert some.max() > 10 * every.max()
    assert np.median(some) < 2 * np.median(dense)
    assert every.max() < 2 * dense.max()
