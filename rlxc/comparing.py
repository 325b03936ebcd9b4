"""How far two artifacts are apart: the divergence of their predictions on a text."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlxc.errors import OptionError
from rlxc.runtime import Session, load

TEXT = """The harbour wakes before the town does. By five the first boats are back, low in the water, and the people who
unload them talk little, because there is little time. Ice is shovelled over the fish, scales are read twice, and a
number is written on every box. What is sold here in the morning is on a plate four hundred kilometres away in the
evening. That this works at all is owed to a timetable which nobody wrote: each driver knows when the next one needs the
ramp, and each buyer knows what the weather did to the catch. In 1962 the town wanted to build a larger hall. The plans
were good, the money was there, and still nothing came of it, since no place could be found that was both close to the
water and safe from it. Engineers measured the tides for two years. Their report ends with a sentence that the harbour
master later had painted on his door: "The sea has no average." Whoever asks for him today finds a woman of thirty who
studied mathematics and laughs about the door. She keeps the sentence, she says, because it is the best definition of
risk that she knows. Then the telephone rings, a ship is early, and she has to go.
"""
"""What is compared unless a text is given."""

_LEAST_TOKENS = 2
_ROWS = 16  # of logits at a time: 34 MB in f64 for a vocabulary of 262k, several times over


@dataclass(frozen=True)
class Divergence:
    """How far the second artifact's predictions are from the first's.

    Attributes:
        tokens: predictions that were compared.
        mean_kl: mean Kullback-Leibler divergence, in nats: what using the second's probabilities costs if the first's
            are true.
        max_kl: the largest one.
        same_top: the fraction whose most likely token is the same.
    """

    tokens: int
    mean_kl: float
    max_kl: float
    same_top: float


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    text: str = TEXT,
    threads: int | None = None,
) -> Divergence:
    """Compare two artifacts' predictions after every token of a text; each starts with its compiled-in adapters.

    Raises:
        OptionError: their vocabularies differ, or the text is too short.
        RlxcError: an artifact is damaged, or the text does not fit its context.
    """
    with load(first, threads=threads) as one, load(second, threads=threads) as other:
        return divergence(one, other, text)


def divergence(one: Session, other: Session, text: str) -> Divergence:
    """As :func:`compare`, of two sessions, with the adapters that they have now.

    Raises:
        OptionError: their vocabularies differ, or the text is too short.
    """
    ids = one.tokenizer.encode(text)
    if one.vocab_size != other.vocab_size or other.tokenizer.encode(text) != ids:
        raise OptionError(
            "the two artifacts have different vocabularies", remedy="compare artifacts of one model"
        )
    if len(ids) < _LEAST_TOKENS:
        raise OptionError(f"the text has {len(ids)} tokens", remedy="give a longer one")
    values, same = [], 0
    expected, found = one.score(ids), other.score(ids)
    for start in range(0, len(ids), _ROWS):
        p, q = (_log_softmax(logits[start : start + _ROWS]) for logits in (expected, found))
        values.append((np.exp(p) * (p - q)).sum(-1))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    kl = np.concatenate(values)
    return Divergence(len(ids), float(kl.mean()), float(kl.max()), same / len(ids))


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
