"""Tiny models with LoRA adapters whose logits ``tests/data/make_tiny_adapter_logits.py`` takes from llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# What tests share, with the scripts that make their reference data too, lies in the folders above and beside this.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from adapters import Floats, write_gguf_adapter
from tiny import CONTEXT, TEXT, VARIANTS, Tiny, shapes

LAST = 8
"""How many of the text's last logits are compared; all tokens before them have had their effect."""


@dataclass(frozen=True)
class TinyAdapter:
    """A random adapter.

    Attributes:
        rank: of every pair.
        alpha: as stored.
        targets: kinds of tensors that it changes; all linear ones of the layers unless given.
        seed: of the values.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    seed: int = 0

    def pairs(self, base: Tiny) -> dict[str, tuple[Floats, Floats]]:
        """By target: a ``[rank, in]`` and b ``[out, rank]``; a product with them is of the size of its input."""
        rng = np.random.RandomState(self.seed)
        made = {}
        for name, shape in shapes(base):
            if len(shape) == 2 and name.split(".")[-2] in self.targets:
                # A table is read by its rows, which are the columns of a.
                out, in_ = shape[::-1] if name == "token_embd.weight" else shape
                a, b = rng.standard_normal((self.rank, in_)), rng.standard_normal((out, self.rank))
                made[name] = (0.05 * a).astype(np.float32), (0.1 * b).astype(np.float32)
        return made

    def write(self, path: Path, base: Tiny) -> Path:
        """The file of this adapter for a model."""
        return write_gguf_adapter(path, self.pairs(base), architecture=base.architecture, alpha=self.alpha)


ADAPTERS: Mapping[str, TinyAdapter] = {
    "rank-5": TinyAdapter(5, 8.0, seed=21),
    "rank-16": TinyAdapter(16, 24.0, seed=22),
    "no-alpha": TinyAdapter(3, 0.0, seed=23),
    "q-and-v": TinyAdapter(8, 16.0, ("attn_q", "attn_v"), seed=24),
    "vocab": TinyAdapter(4, 10.0, ("token_embd", "output", "attn_k"), seed=25),
}

Stack = tuple[tuple[str, float], ...]

STACKS: Mapping[str, Stack] = {
    "rank-5": (("rank-5", 1.0),),
    "rank-16": (("rank-16", 1.0),),
    "no-alpha": (("no-alpha", 1.0),),
    "q-and-v": (("q-and-v", 1.0),),
    "two": (("rank-5", 0.7), ("rank-16", -0.3)),
}

CASES: Mapping[str, Mapping[str, Stack]] = {
    "llama-gqa": STACKS,
    "llama-k-m": STACKS,
    "gemma3-window": STACKS,
    # Only an output that is not tied can have an adapter of its own.
    "llama-untied": {
        "vocab": (("vocab", 1.0),),
        "three": (("rank-5", 0.6), ("vocab", 0.8), ("q-and-v", 0.5)),
    },
}
"""By model of ``tests/models/tiny.py``: the stacks of adapters that it is run with."""


@dataclass(frozen=True)
class Files:
    """A model, and by name the adapters that it is run with."""

    model: Path
    adapters: Mapping[str, Path]


def write_files(variant: str, folder: Path, *, decoded: bool = False) -> Files:
    """Write a model of `CASES`, ``decoded`` to f32 or as it is, and its adapters."""
    base = VARIANTS[variant]
    names = sorted({name for stack in CASES[variant].values() for name, _ in stack})
    adapters = {name: ADAPTERS[name].write(folder / f"{name}.gguf", base) for name in names}
    return Files(base.write(folder / "model.gguf", decoded=decoded), adapters)


__all__ = ["CASES", "CONTEXT", "LAST", "TEXT", "VARIANTS", "Files", "Stack", "write_files"]
