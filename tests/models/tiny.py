"""Tiny random models of every architecture, written with the ``gguf`` package alone.

`VARIANTS` are the models whose logits ``tests/data/make_tiny_logits.py`` takes from llama.cpp. Weights come from a
generator whose stream is frozen, so that the files are the same bytes everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

# Its parts lie beside it, also where a test runs this file from another folder.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_blocks import FORMATS, Ggml, decode, random_matrix
from tiny_shapes import (
    ARCHITECTURES,
    CONTEXT,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    VOCAB,
    Sizes,
    settings,
    shapes,
)

TensorTypes = str | Mapping[str, str] | tuple[str, ...]


@dataclass(frozen=True)
class Tiny(Sizes):
    """One tiny model.

    Attributes:
        tensor_types: the matrices' format; or formats by the tensor's kind (``attn_v``) with a ``default``; or formats
            that the matrices have in turn, leaving out those whose blocks do not fit a row.
        metadata: keys to add or change, without the architecture's prefix; None takes a key away.
        seed: of the weights.
    """

    tensor_types: TensorTypes = "F32"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def write(
        self,
        path: Path,
        *,
        decoded: bool = False,
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, npt.NDArray[np.float32] | None] | None = None,
    ) -> Path:
        """Write the model's file.

        Args:
            path: the file to write.
            decoded: store every matrix as F32, with the values that its format decodes to.
            metadata: like the model's, beyond it.
            tensors: f32 tensors to add or change; None takes a tensor away.
        """
        rng = np.random.RandomState(self.seed)
        changes = tensors or {}
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in (settings(self) | {**self.metadata, **(metadata or {})}).items():
            if value is not None:
                _add_value(writer, f"{self.architecture}.{key}", value)
        _add_tokenizer(writer, self.vocab)
        for name, shape, kind in self.tensors():
            if len(shape) == 1 or name.endswith(".bias"):
                packed = _vector(name, shape, rng)
            else:
                packed = random_matrix(kind, shape, self.hidden**-0.5, rng)
            if name == "token_embd.weight":
                table = packed
            elif name == "output.weight" and self.tied:
                packed = table
            if name in changes:
                continue
            if decoded:
                packed, kind = decode(kind, packed), Ggml.F32
            writer.add_tensor(name, packed, raw_dtype=kind)
        for name, array in changes.items():
            if array is not None:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Ggml]]:
        """Every tensor's name, shape and format, in file order."""
        types = self.tensor_types
        turns = cycle(types if isinstance(types, tuple) else ())
        of_table = "F32"
        for name, shape in shapes(self):
            kind = "F32"
            if name == "output.weight" and self.tied:
                kind = of_table
            elif len(shape) > 1 and name.split(".")[-2] not in ALWAYS_F32 and not name.endswith(".bias"):
                if isinstance(types, tuple):
                    kind = next(
                        turn for turn in turns if not shape[-1] % gguf.GGML_QUANT_SIZES[Ggml[turn]][0]
                    )
                else:
                    by_kind = types if isinstance(types, Mapping) else {"default": types}
                    kind = by_kind.get(name.split(".")[-2], by_kind["default"])
            if name == "token_embd.weight":
                of_table = kind
            yield name, shape, Ggml[kind]


ALWAYS_F32 = ("ffn_gate_inp", "attn_q_norm", "attn_k_norm")
"""Kinds of matrices that no file has in another format."""

K_M = {"default": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
GEMMA_K_M = {
    "default": "Q5_0",
    "ffn_down": "Q4_K",
    "attn_v": "Q8_0",
    "ffn_gate": "Q6_K",
    "token_embd": "Q8_0",
}


def _every_format(architecture: str, seed: int, **sizes: Any) -> Tiny:
    """A model whose matrices have all formats in turn, beginning with another one in each architecture."""
    turned = FORMATS[seed % len(FORMATS) :] + FORMATS[: seed % len(FORMATS)]
    return Tiny(architecture, turned, seed=seed, **{"layers": 4, **sizes})


def _odd(architecture: str, seed: int, **sizes: Any) -> Tiny:
    """A model of odd sizes: three heads, and no size that is a multiple of 64, or of 4 in the vocabulary."""
    types = {"default": "Q4_1", "attn_v": "Q8_0", "ffn_down": "IQ4_NL", "ffn_down_exps": "MXFP4"}
    odd = {"hidden": 96, "ffn": 160, "heads": 3, "kv_heads": 1, "head_dim": 32, "vocab": 301, "tied": False}
    return Tiny(architecture, types, seed=seed, **{**odd, **sizes})


_EXPERTS = {"experts": 6, "experts_used": 2, "expert_ffn": 256}
_ODD_EXPERTS = {"experts": 5, "experts_used": 3, "expert_ffn": 160}
_EVERY_SECOND = {"attention.sliding_window_pattern": 2}

VARIANTS: Mapping[str, Tiny] = {
    "llama-plain": Tiny("llama", kv_heads=HEADS, seed=1),
    "llama-gqa": Tiny("llama", "F16", seed=2),
    "llama-bias-mins": Tiny("llama", "Q5_K", bias=True, seed=5),
    "llama-linear": Tiny("llama", "Q4_0", rope_scaling="linear", seed=6),
    "llama-yarn": Tiny("llama", "Q4_1", rope_scaling="yarn", seed=7),
    "llama-llama3": Tiny("llama", "Q5_0", rope_scaling="llama3", seed=8),
    "llama-untied": Tiny("llama", "Q5_1", tied=False, seed=9),
    "llama-k-m": Tiny("llama", K_M, seed=10),
    "gemma3-window": Tiny("gemma3", GEMMA_K_M, kv_heads=1, window=8, seed=11),
    "gemma3-linear": Tiny("gemma3", "Q3_K", rope_scaling="linear", window=8, seed=12),
    "gemma3-no-window": Tiny("gemma3", "Q8_0", seed=13),
    "gemma2-formats": _every_format("gemma2", 30, window=8),
    "gemma3-formats": _every_format("gemma3", 32, window=8, metadata=_EVERY_SECOND),
    "gpt-oss-formats": _every_format("gpt-oss", 34, bias=True, window=8, rope_scaling="yarn", **_EXPERTS),
    "granite-formats": _every_format("granite", 36),
    "llama-formats": _every_format("llama", 38),
    "olmo2-formats": _every_format("olmo2", 40),
    "phi3-formats": _every_format("phi3", 42, layers=7, rope_scaling="longrope"),
    "qwen2-formats": _every_format("qwen2", 44, bias=True),
    "qwen3-formats": _every_format("qwen3", 46, rope_scaling="yarn"),
    "qwen3moe-formats": _every_format("qwen3moe", 48, **_EXPERTS),
    "stablelm-formats": _every_format("stablelm", 50, rope_dim=16),
    "starcoder2-formats": _every_format("starcoder2", 52, layers=5, bias=True),
    # The vocabulary of the Gemmas is always tied.
    "gemma2-odd": _odd("gemma2", 31, layers=2, heads=5, tied=True, window=8),
    "gemma3-odd": _odd("gemma3", 33, layers=2, heads=5, tied=True, window=8, metadata=_EVERY_SECOND),
    "gpt-oss-odd": _odd("gpt-oss", 35, bias=True, window=8, heads=5, **_ODD_EXPERTS),
    "granite-odd": _odd("granite", 37, heads=6, kv_heads=2, head_dim=48),
    "llama-experts": _odd("llama", 39, experts=5, experts_used=3, expert_ffn=160),
    "olmo2-odd": _odd("olmo2", 41, rope_scaling="yarn", layers=4, window=8),
    "phi3-odd": _odd("phi3", 43, rope_dim=24, bias=True),
    "qwen2-odd": _odd("qwen2", 45, bias=True),
    "qwen3-odd": _odd("qwen3", 47, heads=6, kv_heads=2, head_dim=48),
    "qwen3moe-odd": _odd("qwen3moe", 49, heads=5, **_ODD_EXPERTS),
    "stablelm-odd": _odd("stablelm", 51, rope_dim=16, kv_heads=3, parallel=True),
    "starcoder2-odd": _odd("starcoder2", 53, bias=True),
}
"""Of each architecture one with all formats, which is tied, and one of odd sizes, which is not."""

TEXT = [1, *np.random.RandomState(0).randint(3, VOCAB, 23).tolist()]
"""The token ids whose logits are compared: ``<s>`` and 23 others, three times the window."""

ROWS = slice(2, None, 3)
"""The positions whose logits are stored, the last one among them."""

INT8 = ("llama-bias-mins", "llama-k-m", "gemma3-window", "llama-formats", "gpt-oss-odd", "qwen3moe-odd")
"""The variants that are compiled with int8 activations, too: all formats, in both backends' kernels for them."""


def write_tiny_model(path: Path, architecture: str, **options: Any) -> Path:
    """Write a tiny random model; options as of `Tiny` and `Tiny.write`."""
    of_file = {key: options.pop(key) for key in ("decoded", "metadata", "tensors") if key in options}
    return Tiny(architecture, **options).write(path, **of_file)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    add[list] = writer.add_array
    add[type(value)](key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """SentencePiece: three special tokens, all bytes, and letters."""
    letters = ["\u2581", *map(chr, range(ord("a"), ord("z") + 1)), *map(chr, range(ord("A"), ord("Z") + 1))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters][:vocab]
    assert len(tokens) == vocab
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(vocab)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocab - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _vector(name: str, shape: tuple[int, ...], rng: np.random.RandomState) -> npt.NDArray[np.float32]:
    if name.startswith(("rope_freqs", "rope_factors")):
        return np.geomspace(1, 2 if "short" in name else 8, *shape).astype(np.float32)
    noise = rng.standard_normal(shape)
    if name.endswith("attn_sinks.weight"):
        return noise.astype(np.float32)
    if name.endswith(("gate_exps.bias", "up_exps.bias")):
        return (3 * noise).astype(np.float32)  # so that some reach gpt-oss's clamps
    return ((0 if name.endswith(".bias") else 1) + 0.2 * noise).astype(np.float32)


__all__ = [
    "ARCHITECTURES",
    "CONTEXT",
    "FFN",
    "FORMATS",
    "HEADS",
    "HEAD_DIM",
    "HIDDEN",
    "INT8",
    "ROWS",
    "TEXT",
    "VARIANTS",
    "VOCAB",
    "Tiny",
    "shapes",
    "write_tiny_model",
]
