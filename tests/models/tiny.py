"""Tiny random models of every architecture, written with the ``gguf`` package alone.

`VARIANTS` are the models whose logits ``tests/data/make_tiny_logits.py`` takes from llama.cpp. Weights come from a
generator whose stream is frozen, so that the files are the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Ggml = gguf.GGMLQuantizationType
Arrays = dict[str, npt.NDArray[np.float32]]

HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB, CONTEXT = 256, 512, 4, 64, 300, 256
LAYERS = {"llama": 2, "gemma3": 7}
"""Seven layers of Gemma 3: five sliding-window ones, a full one, and the start of the next period."""

WEIGHT_SIZE = HIDDEN**-0.5
"""Standard deviation of the weights: activations and attention scores stay near 1."""

_SUPER_BLOCK = 256
_K_QUANTS = {Ggml.Q2_K: (80, 82, 1.5), Ggml.Q3_K: (108, None, 0), Ggml.Q4_K: (0, 2, 7.5)}
_K_QUANTS |= {Ggml.Q5_K: (0, 2, 15.5), Ggml.Q6_K: (208, None, 0)}
"""The offsets of a block's f16 scale and minimum, and the mean code, which the minimum shall take away."""


@dataclass(frozen=True)
class Tiny:
    """One tiny model; the fields are the arguments of `write_tiny_model`."""

    architecture: str
    tensor_types: str | Mapping[str, str] = "F32"
    kv_heads: int = 2
    tied: bool = True
    bias: bool = False
    rope_scaling: str | None = None
    window: int = 0
    seed: int = 0

    def write(self, path: Path, **changes: Any) -> Path:
        """The file of this model."""
        return write_tiny_model(path, **{**vars(self), **changes})


K_M = {"default": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
GEMMA_K_M = {
    "default": "Q5_0",
    "ffn_down": "Q4_K",
    "attn_v": "Q8_0",
    "ffn_gate": "Q6_K",
    "token_embd": "Q8_0",
}

VARIANTS: Mapping[str, Tiny] = {
    "llama-plain": Tiny("llama", kv_heads=HEADS, seed=1),
    "llama-gqa": Tiny("llama", "F16", seed=2),
    "llama-one-kv-head": Tiny("llama", "Q2_K", kv_heads=1, seed=3),
    "llama-bias": Tiny("llama", "BF16", bias=True, seed=4),
    "llama-bias-mins": Tiny("llama", "Q5_K", bias=True, seed=5),
    "llama-linear": Tiny("llama", "Q4_0", rope_scaling="linear", seed=6),
    "llama-yarn": Tiny("llama", "Q4_1", rope_scaling="yarn", seed=7),
    "llama-llama3": Tiny("llama", "Q5_0", rope_scaling="llama3", seed=8),
    "llama-untied": Tiny("llama", "Q5_1", tied=False, seed=9),
    "llama-k-m": Tiny("llama", K_M, seed=10),
    "gemma3-window": Tiny("gemma3", GEMMA_K_M, kv_heads=1, window=8, seed=11),
    "gemma3-linear": Tiny("gemma3", "Q3_K", rope_scaling="linear", window=8, seed=12),
    "gemma3-no-window": Tiny("gemma3", "Q8_0", seed=13),
}

TEXT = [1, *np.random.RandomState(0).randint(3, VOCAB, 23).tolist()]
"""The token ids whose logits are compared: ``<s>`` and 23 others, three times the window."""


def write_tiny_model(
    path: Path,
    architecture: str,
    *,
    tensor_types: str | Mapping[str, str] = "F32",
    kv_heads: int = 2,
    tied: bool = True,
    bias: bool = False,
    rope_scaling: str | None = None,
    window: int = 0,
    seed: int = 0,
    decoded: bool = False,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[np.float32] | None] | None = None,
) -> Path:
    """Write a tiny random model.

    Args:
        path: the file to write.
        architecture: ``llama`` or ``gemma3``.
        tensor_types: the matrices' format, or formats by the tensor's kind (``attn_v``) with a ``default``.
        kv_heads: key/value heads of the 4 heads.
        tied: without ``output.weight``.
        bias: with biases of q, k and v.
        rope_scaling: ``linear``, ``yarn``, or ``llama3`` (a ``rope_freqs.weight``).
        window: of the sliding-window layers; 0 for none.
        seed: of the weights.
        decoded: store every matrix as F32, with the values that its format decodes to.
        metadata: keys to add or change, without the architecture's prefix; None takes a key away.
        tensors: f32 tensors to add or change; None takes a tensor away.
    """
    rng = np.random.RandomState(seed)
    types = tensor_types if isinstance(tensor_types, Mapping) else {"default": tensor_types}
    writer = gguf.GGUFWriter(path, architecture)
    settings = _settings(architecture, kv_heads, rope_scaling, window) | (metadata or {})
    for key, value in settings.items():
        if value is not None:
            _add_value(writer, f"{architecture}.{key}", value)
    _add_tokenizer(writer)
    for name, shape in shapes(architecture, kv_heads, tied, bias, rope_scaling):
        if len(shape) == 1:
            kind, packed = Ggml.F32, _vector(name, shape[0], rng)
        else:
            kind = Ggml[types.get(name.split(".")[-2], types["default"])]
            packed = _matrix(kind, shape, rng)
        if name in (tensors or {}):
            continue
        if decoded:
            packed, kind = gguf.dequantize(packed, kind).astype(np.float32), Ggml.F32
        writer.add_tensor(name, packed, raw_dtype=kind)
    for name, array in (tensors or {}).items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(architecture: str, kv_heads: int, rope_scaling: str | None, window: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": LAYERS[architecture],
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6 if architecture == "gemma3" else 1e4,
    }
    if architecture == "llama":
        settings["rope.dimension_count"] = HEAD_DIM
    if window:
        settings["attention.sliding_window"] = window
    if rope_scaling in ("linear", "yarn"):
        settings |= {"rope.scaling.type": rope_scaling, "rope.scaling.factor": 4.0}
    if rope_scaling == "yarn":
        # So long that both ends of the ramp lie inside the head.
        settings["rope.scaling.original_context_length"] = 2048
    return settings


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    add[type(value)](key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """SentencePiece: three special tokens, all bytes, and a few letters."""
    letters = ["\u2581", *map(chr, range(ord("a"), ord("z") + 1)), *"ABCDEFGHIJKLMN"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    assert len(tokens) == VOCAB
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(letters)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def shapes(
    architecture: str, kv_heads: int, tied: bool, bias: bool, rope_scaling: str | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in file order."""
    heads, kv = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    yield "token_embd.weight", (VOCAB, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    if not tied:
        yield "output.weight", (VOCAB, HIDDEN)
    if rope_scaling == "llama3":
        yield "rope_freqs.weight", (HEAD_DIM // 2,)
    for i in range(LAYERS[architecture]):
        yield f"blk.{i}.attn_norm.weight", (HIDDEN,)
        for name, size in (("attn_q", heads), ("attn_k", kv), ("attn_v", kv)):
            yield f"blk.{i}.{name}.weight", (size, HIDDEN)
            if bias:
                yield f"blk.{i}.{name}.bias", (size,)
        if architecture == "gemma3":
            yield f"blk.{i}.attn_q_norm.weight", (HEAD_DIM,)
            yield f"blk.{i}.attn_k_norm.weight", (HEAD_DIM,)
            yield f"blk.{i}.post_attention_norm.weight", (HIDDEN,)
            yield f"blk.{i}.post_ffw_norm.weight", (HIDDEN,)
        yield f"blk.{i}.attn_output.weight", (HIDDEN, heads)
        yield f"blk.{i}.ffn_norm.weight", (HIDDEN,)
        yield f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN)
        yield f"blk.{i}.ffn_up.weight", (FFN, HIDDEN)
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, FFN)


def _vector(name: str, size: int, rng: np.random.RandomState) -> npt.NDArray[np.float32]:
    if name == "rope_freqs.weight":
        return np.geomspace(1, 8, size).astype(np.float32)
    noise = 0.2 * rng.standard_normal(size)
    return (noise if name.endswith(".bias") else 1 + noise).astype(np.float32)


def _matrix(kind: Ggml, shape: tuple[int, ...], rng: np.random.RandomState) -> npt.NDArray[Any]:
    """Random normal weights, packed; in a K-quant any codes, with the scales that give weights of that size."""
    if kind not in _K_QUANTS:
        values = (WEIGHT_SIZE * rng.standard_normal(shape)).astype(np.float32)
        return values if kind is Ggml.F32 else gguf.quantize(values, kind)
    scale_at, min_at, mean_code = _K_QUANTS[kind]
    count = shape[0] * shape[1] // _SUPER_BLOCK
    blocks = rng.randint(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1])).astype(np.uint8)
    size = rng.uniform(0.7, 1.3, (count, 1))

    def set_scales(unit: float) -> None:
        _put_half(blocks, scale_at, unit * size)
        if min_at is not None:
            _put_half(blocks, min_at, unit * mean_code * size)

    set_scales(1e-3)
    set_scales(1e-3 * WEIGHT_SIZE / float(gguf.dequantize(blocks, kind).std(dtype=np.float64)))
    return blocks.reshape(shape[0], -1)


def _put_half(blocks: npt.NDArray[np.uint8], offset: int, values: npt.NDArray[np.float64]) -> None:
    blocks[:, offset : offset + 2] = values.astype("<f2").view(np.uint8)
