"""What the numbers of ``rlxc bench`` are, from times that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlxc.artifact import KvPlan, Manifest, ModelFacts, Options, TargetFacts, TokenizerFacts, WeightEntry
from rlxc.cli.measuring import KernelTime, _kernel_times, bytes_per_token, streaming_bandwidth
from rlxc.dtypes import DType

CALLS = [
    {"kernel": "round", "amount": "tokens", "bytes_read": 0, "multiplications": 0},
    {"kernel": "matmul", "amount": "tokens", "bytes_read": 3_000_000, "multiplications": 1_000_000},
    {"kernel": "matmul", "amount": "tokens", "bytes_read": 3_000_000, "multiplications": 1_000_000},
    {"kernel": "logits", "amount": "rows", "bytes_read": 1_000_000, "multiplications": 500_000},
]


def test_ticks_are_shares_of_the_step() -> None:
    times = _kernel_times(CALLS, 0.01, np.array([10, 30, 50, 10]), tokens=4)
    assert times == [
        KernelTime("matmul", 2, *map(pytest.approx, (8000, 0.8, 0.75, 2.0))),
        KernelTime("round", 1, pytest.approx(1000), pytest.approx(0.1), None, None),
        KernelTime("logits", 1, *map(pytest.approx, (1000, 0.1, 1.0, 1.0))),
    ]


MANIFEST = Manifest(
    rlxc="0.1.0",
    model=ModelFacts(
        "llama", "tiny", "0" * 64, layers=1, heads=4, kv_heads=2, vocab_size=10, trained_context=8
    ),
    target=TargetFacts("onnx", "onnxruntime>=1.0"),
    options=Options("int8", context=8),
    kv_cache=KvPlan(8, 8, 32, ()),
    tokenizer=TokenizerFacts(None, (), add_bos=False, add_eos=False),
    weights=(
        WeightEntry("token_embd.weight", DType.F32, (10, 4), "", 160),
        WeightEntry("blk.0.ffn_up.weight", DType.F32, (8, 4), "", 128),
    ),
)


def test_table_that_gives_logits_is_read_for_every_token() -> None:
    assert bytes_per_token(MANIFEST) == 288


def test_table_that_is_only_looked_up_is_not_read() -> None:
    output = WeightEntry("output.weight", DType.F32, (10, 4), "", 160)
    assert bytes_per_token(replace(MANIFEST, weights=(*MANIFEST.weights, output))) == 288


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_at_a_credible_rate(threads: int) -> None:
    assert 1e8 < streaming_bandwidth(threads) < 1e13
