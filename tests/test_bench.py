"""What the numbers of ``rlxc bench`` are, from times that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlxc.artifact import KvPlan, Manifest, ModelFacts, Options, TargetFacts, TokenizerFacts, WeightEntry
from rlxc.cli import adapter_costs
from rlxc.cli.adapter_costs import AdapterCosts, Comparison, _compare, _swap_seconds, lines
from rlxc.cli.measuring import KernelTime, _kernel_times, bytes_per_token, streaming_bandwidth
from rlxc.dtypes import DType
from rlxc.errors import ContextError

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
    kv_cache=KvPlan(8, 8, 0, None, 32, ()),
    tokenizer=TokenizerFacts(None, (), add_bos=False, add_eos=False),
    weights=(
        WeightEntry("token_embd.weight", DType.F32, (10, 4), "", 160, 160, "f32"),
        WeightEntry("blk.0.ffn_up.weight", DType.F32, (8, 4), "", 128, 128, "f32"),
    ),
)


def test_table_that_gives_logits_is_read_for_every_token() -> None:
    assert bytes_per_token(MANIFEST) == 288


def test_table_that_is_only_looked_up_is_not_read() -> None:
    output = WeightEntry("output.weight", DType.F32, (10, 4), "", 160, 160, "f32")
    assert bytes_per_token(replace(MANIFEST, weights=(*MANIFEST.weights, output))) == 288


def test_only_the_experts_that_a_token_uses_are_read() -> None:
    experts = WeightEntry("blk.0.ffn_up_exps.weight", DType.Q8_0, (8, 4, 32), "", 1088, 1600, "int8")
    mixture = replace(
        MANIFEST,
        model=replace(MANIFEST.model, experts_used=2),
        weights=(*MANIFEST.weights, experts),
    )
    assert bytes_per_token(mixture) == 288 + 1600 * 2 // 8


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_at_a_credible_rate(threads: int) -> None:
    assert 1e8 < streaming_bandwidth(threads) < 1e13


# --- adapters -----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that work moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Callable[..., None]:
        """Work that takes so long, call by call, and then as long as the last one."""
        left = list(seconds)

        def work(*_: object) -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(adapter_costs, "time", made)
    return made


def test_two_ways_are_compared_in_turns_after_a_warm_up(clock: Clock) -> None:
    progress: list[tuple[str, int, int]] = []
    found = _compare(
        "both", 12, 3, lambda *call: progress.append(call), clock.takes(99, 1, 2, 4), clock.takes(9, 2, 2, 6)
    )
    # Rates are 12, 6, 3 and 6, 6, 2; their ratios turn by turn 1/2, 1 and 2/3.
    assert found == Comparison(6.0, 6.0, pytest.approx(2 / 3))
    assert progress == [("both", done, 4) for done in (1, 2, 3, 4)]


def session_of(clock: Clock, pushed: list[Any], context: int = 64) -> Any:
    """A session in which pushing an adapter takes 3 s, a step 10 s, and the first step after a push 4 s more."""
    push = clock.takes(3)

    def pushing(*entry: Any) -> None:
        pushed.append(entry)
        push()

    return SimpleNamespace(
        context=context,
        vocab_size=8,
        reset=lambda: None,
        prefill=clock.takes(10),
        decode=lambda *_: step(clock, pushed),
        adapters=SimpleNamespace(pop=lambda: None, push=pushing, clear=lambda: None),
    )


def step(clock: Clock, pushed: list[Any]) -> None:
    clock.now += 10
    if pushed[-1] is not None:
        clock.now += 4
        pushed.append(None)


def test_swap_is_the_change_and_what_the_next_step_takes_more(clock: Clock) -> None:
    pushed: list[Any] = []
    entries = [("a", 1.0), ("b", 0.5)]
    assert _swap_seconds(session_of(clock, pushed), entries, [1], repetitions=1) == pytest.approx(7)
    swaps = [entry for entry in pushed if entry is not None]
    assert swaps == entries * 8


def test_swaps_fit_the_context(clock: Clock) -> None:
    pushed: list[Any] = []
    _swap_seconds(session_of(clock, pushed, context=8), [("a", 1.0)], [1], repetitions=5)
    assert len([entry for entry in pushed if entry is not None]) == 3  # after one token, two for each swap


def test_context_too_short_for_a_swap_is_refused(clock: Clock) -> None:
    with pytest.raises(ContextError, match="takes 3 tokens, which do not fit the context of 2"):
        _swap_seconds(session_of(clock, [], context=2), [("a", 1.0)], [1], repetitions=1)


def test_costs_of_adapters_are_told_in_a_line_each() -> None:
    costs = AdapterCosts(Comparison(100.0, 95.0, 0.95), 12.3, Comparison(400.0, 320.0, 0.8))
    first, second = lines(costs, 8)
    assert "95.0 tokens/s with an adapter, 100.0 without" in first
    assert "0.950 times as fast; a swap takes 12 µs" in first
    assert "320.0 tokens/s in 8 sequences with adapters in turn, 400.0 with one: 0.800 times" in second
    assert len(list(lines(replace(costs, batch=None), None))) == 1
