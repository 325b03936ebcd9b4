"""How far apart two models' predictions are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def mean_divergence(reference: Floats, logits: Floats) -> float:
    """Kullback-Leibler divergence of next-token distributions ``[n, vocab]``, in nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def log_softmax(logits: Floats) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
