"""Makes ``gemma_adapter_logits.npz`` in this folder with PEFT. Run as README.md says; the tests read the result."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "examples"))

from train_adapter import HELD_OUT, load_model  # noqa: E402 - not a package

TEXT = f"{HELD_OUT[0]}\nitem: apron; color: green"
"""A sentence and the beginning of its label."""

LAST = 12
"""Positions whose logits are kept: those where the adapter matters most."""

SCALES = {"half": 0.5, "full": 1.0}


def main() -> None:
    """Write the ids, and of every scale some logits, what all of them come to, and the best token at each position."""
    torch.set_num_threads(1)
    base, tokenizer = load_model(Path(sys.argv[1]))
    ids = tokenizer.encode(TEXT).ids
    made = {"base": logits(base, ids)}
    tuned = PeftModel.from_pretrained(base, HERE / "gemma_adapter")
    for name, scale in SCALES.items():
        for module in tuned.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", scale)
        made[name] = logits(tuned, ids)

    vocab = base.config.vocab_size
    likely = np.concatenate([rows[-LAST:].argsort(axis=1)[:, -4:].ravel() for rows in made.values()])
    kept = np.unique(np.concatenate([likely, np.arange(0, vocab, vocab // 256)]))
    arrays = {
        "ids": np.array(ids, np.int32),
        "positions": np.arange(len(ids) - LAST, len(ids)),
        "vocab": kept,
    }
    for name, rows in made.items():
        best = np.partition(rows, -2)[:, -2:]
        arrays[f"{name}_logits"] = rows[-LAST:, kept]
        arrays[f"{name}_log_sum"] = np.logaddexp.reduce(rows[-LAST:].astype(np.float64), axis=1)
        arrays[f"{name}_best"] = rows.argmax(axis=1).astype(np.int32)
        arrays[f"{name}_gap"] = best[:, 1] - best[:, 0]
    np.savez_compressed(HERE / "gemma_adapter_logits.npz", **arrays)


def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """After each token, from weights decoded to f32 and computed in f32: ``f32 [tokens, vocab]``."""
    with torch.no_grad():
        rows: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return rows


if __name__ == "__main__":
    main()
