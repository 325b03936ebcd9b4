"""Tiny random models as Hugging Face folders, written with the ``safetensors`` library alone.

`VARIANTS` are the models whose logits ``tests/data/make_hf_logits.py`` takes from Transformers. Weights come from a
generator whose stream is frozen, so that the folders are the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from adapters import random_pairs, write_peft_adapter
from hf_kinds import BIAS_KEYS, KINDS, Sizes, layer_shapes, norm_shapes
from safetensors.numpy import save_file

Arrays = dict[str, npt.NDArray[Any]]

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 128, 4, 2, 128, 256
LAYERS = {name: kind.layers for name, kind in KINDS.items()}
HEAD_DIM = {name: kind.head_dim for name, kind in KINDS.items()}

WEIGHT_SIZE = HIDDEN**-0.5
"""Standard deviation of the weights: activations and attention scores stay near 1."""

TEXT = [1, *np.random.RandomState(0).randint(3, VOCAB, 23).tolist()]
"""The token ids whose logits are compared: three times Gemma's window."""

# The published values of NF4 (Dettmers et al. 2023, appendix E) and of FP4: sign, two bits of exponent, one of
# fraction, over 12.
CODEBOOKS = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": [
        0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
        -0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12,
    ],
}  # fmt: skip


@dataclass(frozen=True)
class HfTiny:
    """One tiny folder.

    Attributes:
        model_type: as in ``config.json``.
        dtype: of every tensor, as safetensors spells it.
        config: keys of ``config.json`` to add or change.
        bias: with the biases that the kind of model may have.
        four_bit: ``nf4`` or ``fp4`` for the linear layers; ``nested`` with double quantisation. ``mxfp4`` for
            gpt-oss's experts.
        shards: how many files the weights are in.
        seed: of the weights.
    """

    model_type: str = "llama"
    dtype: str = "F32"
    config: Mapping[str, Any] = field(default_factory=dict)
    bias: bool = False
    four_bit: str | None = None
    nested: bool = False
    shards: int = 1
    seed: int = 0

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", KINDS[self.model_type].tied))

    def arrays(self) -> Arrays:
        """Every weight by its name in the folder, in f32 but of values that ``dtype`` can hold."""
        rng = np.random.RandomState(self.seed)
        arrays: Arrays = {}
        parallel = bool(self.config.get("use_parallel_residual"))
        for name, shape in shapes(self.model_type, self.tied, self.bias, parallel):
            noise = rng.standard_normal(shape)
            if len(shape) > 1 and not name.endswith("bias"):
                values = WEIGHT_SIZE * noise
            elif name.endswith("norm.weight"):
                # Gemma adds the one itself.
                values = 0.2 * noise + (not self.model_type.startswith("gemma"))
            else:
                values = 0.2 * noise
            arrays[name] = as_float(as_stored(values.astype(np.float32), self.dtype), self.dtype)
        return arrays

    def write(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, tuple[str, npt.NDArray[Any]] | None] | None = None,
    ) -> Path:
        """The folder of this model.

        Args:
            folder: to be made.
            config: keys of ``config.json`` to add or change beyond the model's own; None takes a key away.
            tensors: element type and array of tensors to add or change; None takes a tensor away.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stored: dict[str, tuple[str, npt.NDArray[Any]]] = {}
        for name, values in self.arrays().items():
            if self.four_bit == "mxfp4" and values.ndim == 3:
                stored |= pack_mxfp4(name, values)
            elif self.four_bit in CODEBOOKS and name.endswith("proj.weight"):
                stored |= pack_four_bit(name, values, self.four_bit, nested=self.nested)
            else:
                stored[name] = (self.dtype, as_stored(values, self.dtype))
        changed = {**stored, **(tensors or {})}
        write_weights(folder, {name: one for name, one in changed.items() if one is not None}, self.shards)
        keys = {**self.config_json(), **(config or {})}
        dropped = {key for key, value in (config or {}).items() if value is None}
        write_json(folder / "config.json", {key: keys[key] for key in keys if key not in dropped})
        return folder

    def config_json(self) -> dict[str, Any]:
        """The configuration, with the keys that Transformers writes for every model."""
        kind = KINDS[self.model_type]
        config: dict[str, Any] = {
            "architectures": [kind.causal_lm],
            "attention_bias": self.bias,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": HEAD_DIM[self.model_type],
            "hidden_size": HIDDEN,
            "initializer_range": 0.02,
            "intermediate_size": FFN,
            "max_position_embeddings": CONTEXT,
            "model_type": self.model_type,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS[self.model_type],
            "num_key_value_heads": KV_HEADS,
            "pad_token_id": None,
            "rms_norm_eps": 1e-6,
            "transformers_version": "5.0.0",
            "use_cache": True,
            "vocab_size": VOCAB,
        }
        config |= kind.keys
        dropped = {key for key, value in kind.keys.items() if value is None and key in _NOT_EVERYWHERE}
        config = {key: value for key, value in config.items() if key not in dropped}
        config |= dict.fromkeys(BIAS_KEYS.get(self.model_type, ()), self.bias)
        if self.four_bit == "mxfp4":
            skipped = [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ]
            config["quantization_config"] = {"modules_to_not_convert": skipped, "quant_method": "mxfp4"}
        elif self.four_bit:
            config["quantization_config"] = {
                "_load_in_4bit": True,
                "_load_in_8bit": False,
                "bnb_4bit_compute_dtype": "float32",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": self.four_bit,
                "bnb_4bit_use_double_quant": self.nested,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": None,
                "llm_int8_threshold": 6.0,
                "load_in_4bit": True,
                "load_in_8bit": False,
                "quant_method": "bitsandbytes",
            }
        return {**config, **self.config}


_NOT_EVERYWHERE = ("attention_bias", "rms_norm_eps")

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    # So long that both ends of the ramp lie inside the head.
    "original_max_position_embeddings": 4096,
    "beta_fast": 16.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
}
_UNROUNDED = {**_YARN, "truncate": False, "rope_theta": 150000.0}
del _UNROUNDED["mscale"], _UNROUNDED["mscale_all_dim"]
_LONG = {"max_position_embeddings": 16384}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def _factors(count: int) -> dict[str, list[float]]:
    """LongRoPE's, all different."""
    return {name: [first + 0.3 * i for i in range(count)] for name, first in _FIRST.items()}


_FIRST = {"short_factor": 1.0, "long_factor": 1.5}
_KINDS = [
    "sliding_attention",
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
]

VARIANTS: Mapping[str, HfTiny] = {
    "llama-old": HfTiny(config={"rope_theta": 500.0, "rope_scaling": None, "torch_dtype": "float32"}, seed=1),
    "llama-new": HfTiny(
        dtype="BF16",
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
        seed=2,
    ),
    "llama-bias": HfTiny(dtype="F16", bias=True, seed=3),
    "llama-linear": HfTiny(config={"rope_scaling": {"type": "linear", "factor": 4.0}}, seed=4),
    "llama-yarn": HfTiny(config={"rope_parameters": _YARN, **_LONG}, seed=5),
    "llama-yarn-attention": HfTiny(
        config={"rope_scaling": {**_YARN, "attention_factor": 0.8}, **_LONG}, seed=6
    ),
    "llama-llama3": HfTiny(config={"rope_theta": 10000.0, "rope_scaling": _LLAMA3}, seed=7),
    "mistral-shards": HfTiny("mistral", shards=3, seed=8),
    "gemma3-old": HfTiny(
        "gemma3_text",
        config={"sliding_window_pattern": 3, "rope_theta": 1e5, "rope_local_base_freq": 500.0},
        seed=9,
    ),
    "gemma3-new": HfTiny(
        "gemma3_text",
        dtype="BF16",
        bias=True,
        config={
            "layer_types": _KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "use_bidirectional_attention": False,
        },
        seed=10,
    ),
    "llama-nf4": HfTiny(four_bit="nf4", nested=True, seed=11),
    "llama-fp4": HfTiny(dtype="F16", four_bit="fp4", seed=12),
    "llama-longrope": HfTiny(
        config={"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16, **_factors(8)}},
        seed=13,
    ),
    "mistral-window": HfTiny("mistral", config={"sliding_window": 8}, seed=14),
    "mixtral": HfTiny("mixtral", dtype="BF16", shards=2, seed=15),
    "qwen2": HfTiny("qwen2", dtype="BF16", config={"rope_theta": 1e6, "tie_word_embeddings": True}, seed=16),
    "qwen2-windows": HfTiny(
        "qwen2",
        config={
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "rope_parameters": _YARN,
            **_LONG,
        },
        seed=17,
    ),
    "qwen3": HfTiny("qwen3", bias=True, config={"rope_scaling": {"type": "linear", "factor": 3.0}}, seed=18),
    "qwen3-moe": HfTiny("qwen3_moe", dtype="BF16", seed=19),
    "gemma2": HfTiny("gemma2", dtype="F16", config={"sliding_window_size": 8}, seed=21),
    "gemma2-new": HfTiny(
        "gemma2",
        bias=True,
        config={
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
        seed=22,
    ),
    "phi3": HfTiny("phi3", dtype="BF16", config={"sliding_window": 9}, seed=23),
    "phi3-long": HfTiny(
        "phi3",
        config={
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", **_factors(6)},
            "tie_word_embeddings": True,
            "full_attn_mod": 1,
            "lm_head_bias": False,
        },
        seed=24,
    ),
    # The context that tests compile for is as long as the original one.
    "phi3-short": HfTiny(
        "phi3",
        config={
            "max_position_embeddings": 1024,
            "rope_scaling": {"type": "longrope", "attention_factor": 1.3, **_factors(8)},
        },
        seed=25,
    ),
    "granite": HfTiny("granite", dtype="F16", bias=True, seed=26),
    "olmo2": HfTiny("olmo2", dtype="BF16", seed=27),
    "olmo3": HfTiny(
        "olmo3",
        config={
            "rope_parameters": {
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            **_LONG,
        },
        seed=28,
    ),
    "starcoder2": HfTiny("starcoder2", dtype="BF16", bias=True, config={"rope_theta": 999999.44}, seed=29),
    "starcoder2-plain": HfTiny(
        "starcoder2", config={"sliding_window": None, "tie_word_embeddings": False}, seed=30
    ),
    "stablelm": HfTiny("stablelm", dtype="F16", bias=True, config={"partial_rotary_factor": 0.25}, seed=31),
    "stablelm-parallel": HfTiny(
        "stablelm",
        config={
            "use_parallel_residual": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
        seed=32,
    ),
    "gpt-oss": HfTiny(
        "gpt_oss", dtype="BF16", bias=True, config={"rope_scaling": _UNROUNDED, **_LONG}, seed=33
    ),
    "gpt-oss-mxfp4": HfTiny(
        "gpt_oss",
        bias=True,
        four_bit="mxfp4",
        config={"rope_parameters": {"rope_theta": 150000.0, **_YARN}, "layer_types": _KINDS[1:4]},
        shards=2,
        seed=34,
    ),
}


ADAPTED = (
    *("gemma2", "phi3-long", "granite", "olmo2", "qwen2", "qwen3", "qwen3-moe", "mixtral", "starcoder2"),
    *("stablelm", "gpt-oss"),
)
"""Variants whose logits are taken with an adapter, too: as ``{variant}+adapter``."""


def shapes(
    model_type: str, tied: bool, bias: bool, parallel: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight's name and shape."""
    dim = HEAD_DIM[model_type]
    sizes = Sizes(HIDDEN, FFN, HEADS, dim, HEADS * dim, KV_HEADS * dim)
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    yield from norm_shapes(model_type, "model.norm", HIDDEN)
    if not tied:
        yield "lm_head.weight", (VOCAB, HIDDEN)
    for i in range(LAYERS[model_type]):
        for name, shape in layer_shapes(model_type, sizes, bias, parallel):
            yield f"model.layers.{i}.{name}", shape


def linear_modules(tiny: HfTiny) -> dict[str, tuple[int, int]]:
    """Every linear layer of the layers, ``[out, in]`` by the module's name: neither experts nor routers."""
    return {
        name.removesuffix(".weight"): (array.shape[0], array.shape[1])
        for name, array in tiny.arrays().items()
        if name.endswith(("_proj.weight", "c_fc.weight")) and ".experts." not in name
    }


def write_adapter(folder: Path, tiny: HfTiny) -> Path:
    """A PEFT adapter of every linear layer, whose scale is 2."""
    return write_peft_adapter(folder, random_pairs(linear_modules(tiny), 3))


def as_stored(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """f32 values as the element type's; BF16 as uint16, cut off after 16 bits."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype])


def as_float(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """What `as_stored` stores, as f32."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def pack_four_bit(
    name: str, values: npt.NDArray[np.float32], kind: str, *, nested: bool, blocksize: int = 64
) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    """A weight as bitsandbytes stores it: codes of nearest values, absmax per block, and what says so."""
    codebook = np.array(CODEBOOKS[kind], np.float32)
    blocks = values.reshape(-1, blocksize)
    absmax = np.abs(blocks).max(axis=1).astype(np.float32)
    codes = (
        np.abs((blocks / absmax[:, None])[..., None] - codebook)
        .argmin(axis=-1)
        .astype(np.uint8)
        .reshape(-1, 2)
    )
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": blocksize,
        "dtype": "float32",
        "shape": list(values.shape),
    }
    parts: dict[str, tuple[str, npt.NDArray[Any]]] = {
        name: ("U8", (codes[:, :1] << 4) | codes[:, 1:]),
        f"{name}.quant_map": ("F32", codebook),
    }
    if nested:
        nested_map = np.linspace(-1, 1, 256, dtype=np.float32)
        offset = float(absmax.mean())
        padded = np.zeros(-(-absmax.size // 256) * 256, np.float32)
        padded[: absmax.size] = absmax - np.float32(offset)
        outer = np.abs(padded.reshape(-1, 256)).max(axis=1).astype(np.float32)
        scaled = (padded.reshape(-1, 256) / outer[:, None]).reshape(-1)[: absmax.size]
        inner = np.abs(scaled[:, None] - nested_map).argmin(axis=1).astype(np.uint8)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {
            f"{name}.absmax": ("U8", inner),
            f"{name}.nested_absmax": ("F32", outer),
            f"{name}.nested_quant_map": ("F32", nested_map),
        }
    else:
        parts[f"{name}.absmax"] = ("F32", absmax)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {**parts, f"{name}.quant_state.bitsandbytes__{kind}": ("U8", text)}


def pack_mxfp4(name: str, values: npt.NDArray[np.float32]) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    """Experts' matrices ``[E, in, out]`` as gpt-oss stores them: rows of codes, two in a byte, and exponents."""
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP Microscaling Formats v1.0, section 5.3.3
    blocks = values.swapaxes(1, 2).reshape(*values.shape[:1], values.shape[2], -1, 32).astype(np.float64)
    exponents = np.ceil(np.log2(np.abs(blocks).max(axis=-1) / 6))
    scaled = np.abs(blocks) / np.exp2(exponents)[..., None]
    codes = np.abs(scaled[..., None] - sizes).argmin(axis=-1) + 8 * (blocks < 0)
    pairs = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return {f"{name}_blocks": ("U8", pairs), f"{name}_scales": ("U8", (exponents + 127).astype(np.uint8))}


def write_weights(folder: Path, tensors: Mapping[str, tuple[str, npt.NDArray[Any]]], shards: int = 1) -> None:
    """``model.safetensors``, or as many shards with their index; BF16 comes as uint16."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = sorted(tensors)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        places |= dict.fromkeys(names[i::shards], file)
        write_safetensors(folder / file, {name: tensors[name] for name in names[i::shards]})
    total = sum(array.nbytes for _, array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, npt.NDArray[Any]]]) -> None:
    """One file by the library, which knows no BF16 of numpy: those go through its header as U16, renamed there."""
    save_file(
        {name: np.ascontiguousarray(array) for name, (_, array) in tensors.items()}, path, {"format": "pt"}
    )
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, (dtype, _) in tensors.items():
        header[name]["dtype"] = dtype
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def write_json(path: Path, value: Any) -> None:
    """As Transformers writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
