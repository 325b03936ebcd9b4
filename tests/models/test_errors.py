"""Files that are not the model they claim to be, or ask for what is not implemented: refused, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Floats, build, tied_registry
from tiny import CONTEXT, HEAD_DIM, HIDDEN, TEXT, VARIANTS, VOCAB, Tiny, shapes, write_tiny_model

import rlxc
from rlxc.artifact import BackendName
from rlxc.errors import ModelError, OptionError, RlxcError, UnsupportedError
from rlxc.models import ARCHITECTURES, build_model
from rlxc.weights.gguf import GgufFile, open_gguf
from rlxc.weights.registry import F32

Files = Callable[[str], GgufFile]
SOUND = {
    **{name: Tiny(name) for name in ("llama", "gemma3")},
    **{name: VARIANTS[f"{name}-odd"] for name in ARCHITECTURES if name not in ("llama", "gemma3")},
}
"""A model of each architecture."""

NAMES = [
    (architecture, name)
    for architecture, tiny in SOUND.items()
    for name, _ in shapes(tiny)
    if not name.startswith("blk.") or name.startswith("blk.1.")
]
# A model may have been trained without biases, and have three matrices in the place of one.
NEEDED = [pair for pair in NAMES if not pair[1].endswith((".bias", ".attn_qkv.weight"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """One open file of each architecture."""
    folder = tmp_path_factory.mktemp("sound")
    made = {}
    for architecture, tiny in SOUND.items():
        made[architecture] = open_gguf(tiny.write(folder / f"{architecture}.gguf"))
    yield made.__getitem__
    for file in made.values():
        file.close()


def refuse(file: GgufFile, kind: type[RlxcError], **metadata: Any) -> str:
    """What the error says when the file's metadata is changed like this."""
    with pytest.raises(kind) as caught:
        build(file, **metadata)
    assert caught.value.source == file.path
    return caught.value.problem


def test_unknown_architecture_is_refused(files: Files) -> None:
    problem = refuse(files("llama"), UnsupportedError, **{"general.architecture": "mamba"})
    assert "'mamba'" in problem


@pytest.mark.parametrize("value", [None, 7])
def test_architecture_that_is_no_text_is_refused(files: Files, value: object) -> None:
    assert "general.architecture" in refuse(files("llama"), ModelError, **{"general.architecture": value})


@pytest.mark.parametrize(("architecture", "name"), NEEDED, ids=lambda value: value)
def test_missing_tensor_is_named(files: Files, architecture: str, name: str) -> None:
    file = files(architecture)
    registry = tied_registry(file)
    if name == "token_embd.weight":
        registry.remove("output.weight")
    registry.remove(name)
    with pytest.raises(ModelError, match=f"tensor {name} is missing"):
        build_model(file.metadata, registry, file.path, CONTEXT)


@pytest.mark.parametrize(("architecture", "name"), NAMES, ids=lambda value: value)
def test_wrong_shape_is_named(files: Files, architecture: str, name: str) -> None:
    file = files(architecture)
    registry = tied_registry(file)
    shape = registry.resolve(name).shape
    if name == "token_embd.weight":
        registry.remove("output.weight")
    registry.remove(name)
    registry.add(F32(name, (*shape[:-1], shape[-1] + 32)))
    with pytest.raises(ModelError, match=f"tensor {name} has shape"):
        build_model(file.metadata, registry, file.path, CONTEXT)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.ffn_gate_inp.weight",
        "blk.2.attn_norm.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_norm.bias",
    ],
)
def test_surplus_tensor_is_named(files: Files, name: str) -> None:
    registry = tied_registry(files("llama"))
    registry.add(F32(name, (HIDDEN,)))
    with pytest.raises(ModelError, match=name):
        build_model(files("llama").metadata, registry, "model.gguf", CONTEXT)


@pytest.mark.parametrize("size", [HEAD_DIM // 2 - 1, HEAD_DIM])
def test_rope_factors_of_another_size_are_refused(files: Files, size: int) -> None:
    registry = tied_registry(files("llama"))
    registry.add(F32("rope_freqs.weight", (size,)))
    with pytest.raises(ModelError, match=r"tensor rope_freqs\.weight has shape"):
        build_model(files("llama").metadata, registry, "model.gguf", CONTEXT)


@pytest.mark.parametrize(
    "key",
    ["llama.expert_shared_count", "llama.attention.clamp_kqv", "llama.rope.scaling.yarn_log_multiplier"],
)
def test_unknown_metadata_key_is_refused(files: Files, key: str) -> None:
    assert key in refuse(files("llama"), UnsupportedError, **{key: 8})


def test_keys_of_other_architectures_are_not_read(files: Files) -> None:
    build(files("llama"), **{"gemma3.attention.sliding_window": 4, "general.name": "tiny"})


@pytest.mark.parametrize("kind", ["longrope", "su", ""])
def test_unknown_rope_scaling_is_refused(files: Files, kind: str) -> None:
    assert repr(kind) in refuse(files("llama"), UnsupportedError, **{"llama.rope.scaling.type": kind})


def test_heads_that_cannot_share_are_refused(files: Files) -> None:
    problem = refuse(files("llama"), ModelError, **{"llama.attention.head_count_kv": 3})
    assert problem == "4 heads cannot share 3 key/value heads"


def test_values_longer_than_keys_are_refused(files: Files) -> None:
    refuse(files("llama"), UnsupportedError, **{"llama.attention.value_length": 2 * HEAD_DIM})


@pytest.mark.parametrize("dim", [HEAD_DIM + 2, HEAD_DIM - 1])
def test_rotated_channels_that_do_not_fit_are_refused(files: Files, dim: int) -> None:
    assert str(dim) in refuse(files("llama"), ModelError, **{"llama.rope.dimension_count": dim})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 2**31),
        ("block_count", "2"),
        ("block_count", True),
        ("block_count", None),
        ("embedding_length", -1),
        ("attention.key_length", np.array([4, 4])),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("attention.layer_norm_rms_epsilon", -1e-6),
        ("rope.freq_base", 0.0),
        ("rope.scaling.factor", float("inf")),
        ("rope.scaling.type", 1),
    ],
    ids=str,
)
def test_senseless_numbers_are_named(files: Files, key: str, value: object) -> None:
    assert f"llama.{key}" in refuse(files("llama"), ModelError, **{f"llama.{key}": value})


@pytest.mark.parametrize("count", [1, 3])
def test_another_block_count_than_the_file_has_is_refused(files: Files, count: int) -> None:
    assert "tensor" in refuse(files("llama"), ModelError, **{"llama.block_count": count})


# --- what only the whole compiler can tell ------------------------------------------------------------------------


def logits(model: Path) -> Floats:
    """The compiled model's logits."""
    artifact = model.with_suffix(".rlx")
    rlxc.compile(model, artifact, activations="float32", context=CONTEXT)
    with rlxc.load(artifact, threads=1) as session:
        return session.score(TEXT)


def table(seed: int, rows: int = VOCAB) -> Floats:
    return (np.random.RandomState(seed).standard_normal((rows, HIDDEN)) / 16).astype(np.float32)


def test_context_beyond_the_trained_one_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf", "llama")
    with pytest.raises(OptionError, match=f"context {CONTEXT + 1} is outside 1..{CONTEXT}"):
        rlxc.compile(model, tmp_path / "model.rlx", context=CONTEXT + 1)


def test_a_refused_model_leaves_no_artifact(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf", "llama", tensors={"blk.1.ffn_up.weight": None})
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is missing"):
        rlxc.compile(model, tmp_path / "model.rlx", context=CONTEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": table(0, VOCAB - 1)}
    model = write_tiny_model(tmp_path / "model.gguf", "llama", tensors=tensors)
    with pytest.raises(ModelError, match="the tokenizer has 300 tokens, the embedding 299 rows"):
        rlxc.compile(model, tmp_path / "model.rlx", context=CONTEXT)


def test_embedding_may_have_rows_without_a_token(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": table(0, VOCAB + 20)}
    model = write_tiny_model(tmp_path / "model.gguf", "llama", tensors=tensors)
    assert logits(model).shape == (len(TEXT), VOCAB + 20)


def test_output_that_differs_from_the_embedding_is_not_tied(tmp_path: Path) -> None:
    embedding, output = table(0), table(1)
    tied = write_tiny_model(tmp_path / "tied.gguf", "llama", tensors={"token_embd.weight": embedding})
    both = {"token_embd.weight": embedding, "output.weight": output}
    untied = write_tiny_model(tmp_path / "untied.gguf", "llama", tensors=both)
    assert np.abs(logits(untied) - logits(tied)).max() > 0.1


def test_output_that_equals_the_embedding_is_stored_once(tmp_path: Path, backend: BackendName) -> None:
    embedding = table(0)
    weights = {"onnx": "weights.bin", "tvm": "weights.safetensors"}[backend]
    sizes = {}
    for name, output in (("equal", embedding), ("other", table(1)), ("none", None)):
        tensors = {"token_embd.weight": embedding, "output.weight": output}
        model = write_tiny_model(tmp_path / f"{name}.gguf", "llama", tensors=tensors)
        artifact = rlxc.compile(model, tmp_path / f"{name}.rlx", backend=backend, context=CONTEXT)
        sizes[name] = artifact.manifest.files[weights].size
    assert sizes["equal"] == sizes["none"] <= sizes["other"] - embedding.nbytes
