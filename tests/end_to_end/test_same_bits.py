"""With compiled kernels, a token's logits are the same bits whatever else is in its step, and whatever was read before.

So a guess that is verified, a prompt that is read in pieces and a text in a batch are exactly what they are alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import rlxc
from rlxc.backends import default_backend
from rlxc.runtime.sequence import Span

pytestmark = pytest.mark.skipif(default_backend() != "tvm", reason="TVM is not installed")


@pytest.mark.parametrize(
    "past", [40, 505, 1015]
)  # the others come to the end of a window, and of segments of 512 keys
def test_one_token_and_several_give_the_same_bits(compile_gemma: Callable[..., Path], past: int) -> None:
    with rlxc.load(compile_gemma("tvm", "int8"), prefix_cache=0) as session:
        model = session._model
        ids = np.random.RandomState(past).randint(session.vocab_size, size=past + 17)
        session.prefill(ids[:past])
        start = session.snapshot()
        alone = np.stack([session.decode(int(token)) for token in ids[past:]])
        for size in (2, 5, 17):
            step = ids[None, past : past + size].astype(np.int64)
            logits = model.step([start.begin(model)], step, np.arange(size), [Span(0, ())])
            np.testing.assert_array_equal(logits.values[0], alone[:size])
        session.restore(start)
        longer = session.fork()  # beside it, a sequence of another length
        longer.prefill(ids[:30])
        sequences = [start.begin(model), longer._sequence, start.begin(model)]
        together = model.decode(sequences, [int(ids[past])] * 3, [(), (), ()])
        np.testing.assert_array_equal(together.values[[0, 2], 0], alone[[0, 0]])
