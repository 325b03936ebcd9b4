"""Weights on which encoders are compared with llama.cpp's, here and where ``tests/data`` is made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import open_gguf

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SEARCHED = (*K_QUANTS, "IQ4_NL")
SIMPLE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0", "Q1_0")

REAL = ("blk.3.attn_q.weight", "blk.9.ffn_gate.weight", "token_embd.weight")
"""Tensors of Gemma 3 270M Q4_K_M that are not K-quants in the file."""


def synthetic() -> dict[str, np.ndarray]:
    """Matrices f32 ``[64, 1024]``: normal, with long tails, flat, of one sign, and with subnormal scales."""
    rng = np.random.default_rng(7)
    shape = (64, 1024)
    drawn = {
        "gauss": rng.standard_normal(shape) * 0.05,
        "laplace": rng.laplace(size=shape) * 0.05,
        "student": rng.standard_t(4, size=shape) * 0.05,
        "uniform": rng.uniform(-1, 1, shape),
        "positive": rng.exponential(0.1, shape),
        "small": rng.standard_normal(shape) * 1e-4,
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def real(model: Path) -> dict[str, np.ndarray]:
    """Some rows of tensors of Gemma 3 270M, f32 ``[64, whole blocks of 256]``."""
    cases = {}
    with open_gguf(model) as file:
        for name in REAL:
            info = file.tensors[name]
            rows = file.data(name).reshape(info.shape[0], -1)[:64]
            weights = FORMATS[info.dtype].decode(rows, info.shape[1])
            cases[name] = np.ascontiguousarray(weights[:, : info.shape[1] // 256 * 256])
    return cases


def random_blocks(block_bytes: int) -> np.ndarray:
    """Any bytes, ``uint8 [512, block_bytes]``: a block of each byte alone, and random ones."""
    blocks = np.random.default_rng(11).integers(0, 256, (512, block_bytes), dtype=np.uint8)
    blocks[:256] = np.arange(256, dtype=np.uint8)[:, None]
    return blocks


def digest_of_weights(weights: np.ndarray) -> str:
    """SHA-256 of f32 bit for bit, but that all NaN are one: which of them a product is is the processor's choice."""
    bits = weights.astype(np.float32).view(np.uint32)
    bits[np.isnan(weights)] = 0x7FC00000
    return hashlib.sha256(bits.tobytes()).hexdigest()


def errors(values: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """The root mean square of the error, and of the error times the value over the values' own."""
    values = values.astype(np.float64)
    error = decoded - values
    plain, size = np.sqrt(np.mean(error**2)), np.sqrt(np.mean(values**2))
    return float(plain), float(np.sqrt(np.mean((error * values) ** 2)) / size)
