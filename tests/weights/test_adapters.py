"""LoRA pairs against numpy in float64; GGUF adapters, whether they fit a model, and their weights in the registry."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxc.errors import FormatError, ModelError, OptionError, RlxcError, UnsupportedError, WeightError
from rlxc.weights.adapters import (
    Adapter,
    AdapterBase,
    LoraPair,
    check_fits,
    inspect_adapter,
    open_adapter,
    register,
)
from rlxc.weights.registry import F32, LoraAdapter, WeightRegistry
from tests.adapters import random_pairs, write_gguf_adapter, write_peft_adapter

BASE = AdapterBase("llama", layers=11, heads=4, kv_heads=2)
SHAPES = {
    "token_embd.weight": (20, 8),
    "output_norm.weight": (8,),
    "blk.0.attn_q.weight": (16, 8),
    "blk.0.attn_k.weight": (8, 8),
    "blk.0.attn_norm.weight": (8,),
    "blk.2.ffn_down.weight": (8, 12),
    "blk.10.ffn_up.weight": (12, 8),
}
Q, DOWN = "blk.0.attn_q.weight", "blk.2.ffn_down.weight"
EMBEDDING = "token_embd.weight"
FLIPPED = {EMBEDDING: SHAPES[EMBEDDING][::-1]}
"""The embedding's pair is that of a matrix [hidden, vocab]."""

F32_TOLERANCE = 1e-6
"""Of values near 1, from sums of at most a few hundred products of f32."""


def pairs(*targets: str, rank: int = 4, seed: int = 0):
    return random_pairs({target: (SHAPES | FLIPPED)[target] for target in targets}, rank, seed=seed)


def read(path: Path, **options: Any) -> Adapter:
    return open_adapter(path, BASE, **options)


def random_pair(out: int = 6, rank: int = 2, in_: int = 5, **options: Any) -> LoraPair:
    ((a, b),) = random_pairs({"x": (out, in_)}, rank, size=1).values()
    return LoraPair(a, b, **({"scale": 1.0} | options))


# A pair -----------------------------------------------------------------------------------------------------


def test_delta_is_the_scaled_product():
    pair = random_pair(200, 8, 100, scale=0.25)
    exact = 0.25 * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))
    delta = pair.delta()
    assert delta.dtype == np.float32 and pair.rank == 8
    np.testing.assert_allclose(delta, exact, atol=F32_TOLERANCE * 8)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_apply_is_the_delta_times_x(shape):
    pair = random_pair(scale=-1.5)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    exact = x.astype(np.float64) @ (-1.5 * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))).T
    result = pair.apply(x)
    assert result.dtype == np.float32 and result.shape == (*shape[:-1], 6)
    np.testing.assert_allclose(result, exact, atol=F32_TOLERANCE * 20)


def test_bytes_of_a_pair_count_its_magnitude():
    assert random_pair(6, 2, 5).nbytes == 4 * (2 * 5 + 6 * 2)
    assert random_pair(6, 2, 5, magnitude=np.ones(6, np.float32)).nbytes == 4 * (2 * 5 + 6 * 2 + 6)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("a", "b", "scale", "magnitude", "message"),
    [
        (zeros(5, 2), zeros(6, 2), 1.0, None, r"a \[5, 2\] and b \[6, 2\]: a is transposed"),
        (zeros(3, 5), zeros(6, 2), 1.0, None, r"a \[3, 5\] and b \[6, 2\]: their ranks differ"),
        (zeros(5), zeros(6, 2), 1.0, None, "are not two matrices"),
        (zeros(2, 5, 1), zeros(6, 2), 1.0, None, "are not two matrices"),
        (zeros(0, 5), zeros(6, 0), 1.0, None, "are not two matrices"),
        (zeros(2, 5), zeros(6, 2), 1.0, zeros(5), r"magnitude \[5\] is not one number for each row of b \[6, 2\]"),
        (zeros(2, 5), zeros(6, 2), 1.0, zeros(1, 6), "magnitude"),
        (zeros(2, 5, dtype=np.float64), zeros(6, 2), 1.0, None, "must be f32"),
        (zeros(2, 5), zeros(6, 2), float("nan"), None, "infinite or not a number"),
        (zeros(2, 5), zeros(6, 2), 1e39, None, "infinite or not a number"),
        (zeros(2, 5) + np.float32("inf"), zeros(6, 2), 1.0, None, "infinite or not a number"),
        (zeros(2, 5), zeros(6, 2) + np.float32("nan"), 1.0, None, "infinite or not a number"),
        (zeros(2, 5), zeros(6, 2), 1.0, zeros(6) + np.float32("nan"), "infinite or not a number"),
    ],
)  # fmt: skip
def test_pair_that_does_not_belong_together_is_refused(a, b, scale, magnitude, message):
    with pytest.raises(WeightError, match=message):
        LoraPair(a, b, scale, magnitude)


@pytest.mark.parametrize("shape", [(), (6,), (5, 6)])
def test_x_of_another_size_is_refused(shape):
    with pytest.raises(WeightError, match="does not fit a"):
        random_pair().apply(np.zeros(shape, np.float32))


# GGUF files -------------------------------------------------------------------------------------------------


def test_gguf_adapter_has_the_file_s_values_in_the_model_s_order(tmp_path):
    written = pairs("blk.10.ffn_up.weight", DOWN, Q)
    adapter = read(write_gguf_adapter(tmp_path / "chat.gguf", written, alpha=6.0))
    assert list(adapter.pairs) == [Q, DOWN, "blk.10.ffn_up.weight"]
    for target, (a, b) in written.items():
        pair = adapter.pairs[target]
        assert (pair.a == a).all() and (pair.b == b).all()
        assert pair.scale == 6 / 4 and pair.magnitude is None
    assert adapter.name == "chat" and adapter.architecture == "llama"
    assert not adapter.uses_dora and not adapter.replacements and not adapter.invocation_tokens


def test_rank_and_scale_come_from_the_shapes_of_each_pair(tmp_path):
    written = {**pairs(Q, rank=2), **pairs(DOWN, rank=16)}
    adapter = read(write_gguf_adapter(tmp_path / "a.gguf", written, alpha=16.0))
    assert adapter.ranks == {Q: 2, DOWN: 16}
    assert [pair.scale for pair in adapter.pairs.values()] == [8.0, 1.0]


@pytest.mark.parametrize("alpha", [0.0, None])
def test_alpha_of_zero_is_a_scale_of_one(tmp_path, alpha):
    adapter = read(write_gguf_adapter(tmp_path / "a.gguf", pairs(Q), alpha=alpha))
    assert adapter.pairs[Q].scale == 1.0


@pytest.mark.parametrize("tensor_type", ["F16", "BF16", "Q8_0"])
def test_packed_pairs_are_decoded_as_the_reference_does(tmp_path, tensor_type):
    shapes = {Q: (64, 32)}
    written = random_pairs(shapes, 32)
    adapter = read(write_gguf_adapter(tmp_path / "a.gguf", written, tensor_type=tensor_type))
    kind = gguf.GGMLQuantizationType[tensor_type]
    for ours, theirs in zip((adapter.pairs[Q].a, adapter.pairs[Q].b), written[Q]):
        assert (ours == gguf.dequantize(gguf.quantize(theirs, kind), kind)).all()


def test_embedding_s_a_is_turned_round(tmp_path):
    written = pairs(EMBEDDING)
    path = write_gguf_adapter(tmp_path / "a.gguf", written)
    assert tuple(gguf.GGUFReader(path).tensors[0].shape) == (4, 20)  # ggml's order: rank varies fastest
    adapter = read(path)
    pair = adapter.pairs[EMBEDDING]
    assert pair.a.shape == (4, 20) and (pair.a == written[EMBEDDING][0]).all()
    assert pair.b.shape == (8, 4)
    check_fits(adapter, SHAPES)


def test_norms_are_read_as_replacements(tmp_path):
    norm = np.arange(8, dtype=np.float32)
    path = write_gguf_adapter(tmp_path / "a.gguf", pairs(Q), tensors={"blk.0.attn_norm.weight": norm})
    adapter = read(path)
    assert list(adapter.replacements) == ["blk.0.attn_norm.weight"]
    assert (adapter.replacements["blk.0.attn_norm.weight"] == norm).all()


def test_tokens_of_an_activated_lora_are_read(tmp_path):
    adapter = read(write_gguf_adapter(tmp_path / "a.gguf", pairs(Q), invocation_tokens=[5, 19]))
    assert adapter.invocation_tokens == (5, 19)


def test_fingerprint_is_the_hash_of_the_file(tmp_path):
    path = write_gguf_adapter(tmp_path / "a.gguf", pairs(Q))
    assert read(path).fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_adapter_can_be_given_a_name(tmp_path):
    path = write_gguf_adapter(tmp_path / "a.gguf", pairs(Q))
    assert read(path, name="poems").name == "poems"
    for name in ("", "two\nlines"):
        with pytest.raises(OptionError, match="cannot be the name of an adapter"):
            read(path, name=name)


def nan() -> Any:
    return {Q: (zeros(4, 8), np.full((16, 4), np.nan, np.float32))}


REFUSED = {
    "whole model": ({"metadata": {"general.type": "model"}}, FormatError, "general.type is 'model', not 'adapter'"),
    "untyped file": ({"metadata": {"general.type": None}}, FormatError, "general.type is missing"),
    "control vector": ({"metadata": {"adapter.type": "cvec"}}, UnsupportedError, "adapter.type is 'cvec'"),
    "adapter without a type": ({"metadata": {"adapter.type": None}}, UnsupportedError, "adapter.type is None"),
    "unknown adapter key": ({"metadata": {"adapter.lora.rs": "1"}}, UnsupportedError, "'adapter.lora.rs' is not known"),
    "key of the model": ({"metadata": {"llama.rope.x": "1"}}, UnsupportedError, "'llama.rope.x' is not known"),
    "alpha that is text": (
        {"alpha": None, "metadata": {"adapter.lora.alpha": "8"}}, FormatError, "adapter.lora.alpha is '8'"
    ),
    "alpha that is infinite": ({"alpha": float("inf")}, FormatError, "adapter.lora.alpha is inf"),
    "tokens that are text": (
        {"metadata": {"adapter.alora.invocation_tokens": "5"}}, FormatError, "not an array of UINT32"
    ),
    "another architecture": ({"architecture": "gemma3"}, ModelError, "is for a gemma3 model, but the base"),
    "no architecture": (
        {"metadata": {"general.architecture": None}}, FormatError, "general.architecture is missing"
    ),
    "unknown architecture": ({"architecture": "mamba"}, ModelError, "is for a mamba model"),
    "half a pair: no a": ({"without": [f"{Q}.lora_a"]}, FormatError, f"'{Q}' has half a pair: lora_a is missing"),
    "half a pair: no b": ({"without": [f"{Q}.lora_b"]}, FormatError, f"'{Q}' has half a pair: lora_b is missing"),
    "other tensor": ({"tensors": {"blk.0.attn_q.bias": zeros(16)}}, FormatError, "'blk.0.attn_q.bias' is neither"),
    "no tensors": ({"pairs": {}}, FormatError, "holds no LoRA tensors"),
    "layer that the base lacks": (
        {"pairs": {"blk.11.attn_q.weight": (zeros(4, 8), zeros(16, 4))}}, ModelError, "base model has 11 layers"
    ),
    "tensor of no Llama": (
        {"pairs": {"blk.0.ssm_in.weight": (zeros(4, 8), zeros(16, 4))}}, ModelError, "no llama model has"
    ),
    "transposed a": ({"pairs": {Q: (zeros(8, 4), zeros(16, 4))}}, FormatError, "a is transposed"),
    "embedding's a as other pairs' are": (
        {"pairs": {EMBEDDING: (zeros(20, 4), zeros(8, 4))}}, FormatError, f"'{EMBEDDING}'.*a is transposed"
    ),
    "ranks that differ": ({"pairs": {Q: (zeros(3, 8), zeros(16, 4))}}, FormatError, "their ranks differ"),
    "vector for a": ({"pairs": {Q: (zeros(8), zeros(16, 4))}}, FormatError, r"lora_a' has shape \[8\]"),
    "experts": ({"pairs": {Q: (zeros(2, 4, 8), zeros(2, 16, 4))}}, FormatError, "not two dimensions"),
    "not a number": ({"pairs": nan()}, FormatError, f"'{Q}': a value is infinite or not a number"),
    "norm that is not a number": (
        {"tensors": {"blk.0.ffn_norm.weight": np.full(8, np.inf, np.float32)}}, FormatError, "'blk.0.ffn_norm.weight'"
    ),
}  # fmt: skip


def check_message(error: RlxcError, path: Path) -> None:
    """One line that starts with the file and ends with a remedy."""
    assert str(error).startswith(str(path))
    assert error.remedy
    assert "\n" not in str(error)


@pytest.mark.parametrize("case", REFUSED)
def test_gguf_adapter_that_cannot_be_used_is_refused(tmp_path, case):
    options, kind, message = REFUSED[case]
    path = write_gguf_adapter(tmp_path / "a.gguf", **{"pairs": pairs(Q), **options})
    with pytest.raises(kind, match=message) as caught:
        read(path)
    check_message(caught.value, path)


def test_files_that_are_no_adapter_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("LoRA")
    for name, message in (("notes.txt", "is not a GGUF file"), ("absent.gguf", "No such file")):
        with pytest.raises(FormatError, match=message):
            read(tmp_path / name)
        with pytest.raises(FormatError, match=message):
            inspect_adapter(tmp_path / name)


def test_facts_of_a_gguf_adapter(tmp_path):
    written = {**pairs(Q, rank=2), **pairs(EMBEDDING, rank=3)}
    path = write_gguf_adapter(
        tmp_path / "a.gguf",
        written,
        alpha=16.0,
        invocation_tokens=[7],
        metadata={"adapter.lora.prompt_prefix": "query: ", "adapter.lora.task_name": "search"},
        tensors={"output_norm.weight": zeros(8)},
    )
    facts = inspect_adapter(path)
    assert (facts.kind, facts.path, facts.architecture, facts.base_model) == ("gguf", path, "llama", None)
    assert facts.alpha == 16 and facts.ranks == {Q: 2, EMBEDDING: 3}
    assert facts.replaced == ("output_norm.weight",)
    assert facts.parameters == 2 * (8 + 16) + 3 * (20 + 8) + 8
    assert facts.formats == {"f32": 5} and facts.stored_bytes == 4 * facts.parameters
    assert (facts.uses_dora, facts.rank_stabilised) == (False, False)
    assert (facts.invocation_tokens, facts.prompt_prefix) == ((7,), "query: ")


@pytest.fixture(scope="module")
def adapter_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    norm = {"blk.0.attn_norm.weight": zeros(8)}
    return write_gguf_adapter(path, pairs(Q, EMBEDDING), invocation_tokens=[5], tensors=norm).read_bytes()


@settings(max_examples=500)
@given(data=st.data())
def test_damaged_gguf_adapter_is_refused_or_read(tmp_path_factory, adapter_bytes, data):
    content = bytearray(adapter_bytes)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    # A new file each time: a mapping that is still open keeps the old one.
    path = tmp_path_factory.mktemp("mutant") / "a.gguf"
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    with suppress(RlxcError):
        check_fits(read(path), SHAPES)
    with suppress(RlxcError):
        inspect_adapter(path)
    path.unlink()
    path.parent.rmdir()


# Fitting a model --------------------------------------------------------------------------------------------


def fits(tmp_path: Path, shapes: dict[str, tuple[int, ...]], **options: Any) -> None:
    check_fits(read(write_gguf_adapter(tmp_path / "a.gguf", **{"pairs": pairs(Q, DOWN), **options})), shapes)


def test_adapter_fits_its_model(tmp_path):
    norm = {"blk.0.attn_norm.weight": zeros(8)}
    fits(tmp_path, SHAPES, pairs=pairs(Q, DOWN, EMBEDDING), invocation_tokens=[19], tensors=norm)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({Q: (16, 9)}, {}, r"attn_q.weight: a \[4, 8\] and b \[16, 4\] do not fit the base model's \[16, 9\]"),
        ({Q: (17, 8)}, {}, r"b \[16, 4\] do not fit the base model's \[17, 8\]"),
        ({Q: None}, {}, f"adapts '{Q}', which the base model does not have"),
        (
            {},
            {"pairs": {"output.weight": (zeros(4, 8), zeros(20, 4))}},
            "'output.weight', which the base model does not have: its output is tied to its embedding",
        ),
        ({}, {"pairs": {"blk.0.attn_norm.weight": (zeros(1, 8), zeros(8, 1))}}, r"do not fit the base model's \[8\]"),
        ({EMBEDDING: (21, 8)}, {"pairs": pairs(EMBEDDING)}, r"do not fit the base model's \[21, 8\]"),
        ({EMBEDDING: (8, 20)}, {"pairs": pairs(EMBEDDING)}, r"do not fit the base model's \[8, 20\]"),
        ({}, {"tensors": {"output_norm.weight": zeros(9)}}, r"adapter's \[9\] cannot replace the base model's \[8\]"),
        ({"output_norm.weight": None}, {"tensors": {"output_norm.weight": zeros(8)}}, "'output_norm.weight', which"),
        ({}, {"invocation_tokens": [3, 20]}, "invocation token 20 is outside the vocabulary of 20"),
    ],
)  # fmt: skip
def test_adapter_of_another_model_does_not_fit(tmp_path, shapes, options, message):
    model = {name: shape for name, shape in (SHAPES | shapes).items() if shape is not None}
    with pytest.raises(ModelError, match=message) as caught:
        fits(tmp_path, model, **options)
    check_message(caught.value, tmp_path / "a.gguf")


# The registry -----------------------------------------------------------------------------------------------


def test_registry_knows_the_bytes_of_each_adapter(tmp_path):
    registry = WeightRegistry()
    registry.add(F32(Q, (16, 8)))
    norm = {"blk.0.attn_norm.weight": zeros(8)}
    chat = read(write_gguf_adapter(tmp_path / "chat.gguf", pairs(Q, DOWN), tensors=norm))
    poems = read(write_gguf_adapter(tmp_path / "poems.gguf", pairs(Q, rank=2)))
    register(chat, registry)
    register(poems, registry)
    assert registry.nbytes(LoraAdapter("chat")) == chat.nbytes == 4 * (4 * (16 + 8) + 4 * (8 + 12) + 8)
    assert registry.nbytes(LoraAdapter("poems")) == poems.nbytes == 4 * 2 * (16 + 8)
    assert registry.nbytes() == 4 * 16 * 8 + chat.nbytes + poems.nbytes
    assert [key for key in registry if registry.kind(key) == LoraAdapter("poems")] == [
        f"{Q}.poems.lora_a",
        f"{Q}.poems.lora_b",
    ]


def test_registered_keys_give_the_arrays(tmp_path):
    registry = WeightRegistry()
    module = "model.layers.2.mlp.down_proj"
    (pair,) = pairs(DOWN).values()
    magnitudes = {module: np.ones(8, np.float32)}
    adapter = read(write_peft_adapter(tmp_path / "dora", {module: pair}, magnitudes=magnitudes))
    register(adapter, registry)
    assert list(registry) == [f"{DOWN}.dora.{part}" for part in ("lora_a", "lora_b", "lora_magnitude")]
    for key, array in zip(registry, (*pair, magnitudes[module])):
        assert registry.resolve(key).shape == array.shape
        assert (adapter.data(key) == array).all()
    with pytest.raises(WeightError, match="has no array 'other'"):
        adapter.data("other")


def test_two_adapters_of_one_name_cannot_be_registered(tmp_path):
    registry = WeightRegistry()
    register(read(write_gguf_adapter(tmp_path / "a.gguf", pairs(Q)), name="chat"), registry)
    keys = list(registry)
    with pytest.raises(WeightError, match="give the adapter another name than 'chat'"):
        register(read(write_gguf_adapter(tmp_path / "b.gguf", pairs(DOWN, Q)), name="chat"), registry)
    assert list(registry) == keys
