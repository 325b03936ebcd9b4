"""Texts that come and go in one batch are what they are alone, token for token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from adapter_cases import Files

import rlxc
from rlxc.artifact import BackendName
from rlxc.runtime import Completion, Request, Session

TOKEN_BUDGET = 7
STACKS = ((), (("rank-5", 1.0),), (("rank-5", 0.7), ("rank-16", -0.3)), (("q-and-v", 0.5),))
LENGTHS = (1, 40, 3, 90, 12, 66, 5, 25, 2, 70, 9, 33, 17, 1, 50, 8)
"""Of prompts: many take several rounds, some leave a page and all windows behind."""


@pytest.fixture(scope="module")
def session(
    compile_exact: Callable[..., Path], backend: BackendName, tiny_files: Callable[[str], Files]
) -> Iterator[Session]:
    """A model with windows, in f32 throughout, and adapters for it."""
    files = tiny_files("gemma3-window")
    artifact = compile_exact(files.model, backend, lora="split", adapters=[], rollback=8)
    with rlxc.load(artifact, threads=1) as session:
        for path in files.adapters.values():
            session.adapters.load(path)
        yield session


def requests() -> list[Request]:
    """Sixteen prompts, some of which begin alike; texts of 4 to 23 tokens."""
    rng = np.random.RandomState(7)
    shared = rng.randint(3, 300, 100).tolist()
    made = []
    for i, length in enumerate(LENGTHS):
        prompt = [1, *(shared if i % 3 == 0 else rng.randint(3, 300, 100).tolist())[: length - 1]]
        made.append(Request(prompt, adapters=STACKS[i % len(STACKS)], max_tokens=4 + 5 * i % 20))
    return made


def alone(session: Session, request: Request) -> Completion:
    session.adapters.clear()
    for name, scale in request.adapters or ():
        session.adapters.push(name, scale)
    made = session.generate(request.prompt, request.max_tokens)
    session.adapters.clear()
    return made


def assert_alone(session: Session, texts: Sequence[Completion], wanted: Sequence[Request]) -> None:
    for text, request in zip(texts, wanted):
        expected = alone(session, request)
        assert (text.ids, text.text, text.stop_reason) == (expected.ids, expected.text, expected.stop_reason)
        # f32 sums in another order; logits have a standard deviation of 1.
        np.testing.assert_allclose(text.logprobs, expected.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_batch", [2, 16])
def test_texts_of_a_batch_are_what_they_are_alone(session: Session, max_batch: int) -> None:
    wanted = requests()
    assert_alone(session, session.generate_batch(wanted, max_batch), wanted)


@pytest.mark.parametrize("max_batch", [3, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_texts_that_arrive_one_after_the_other_are_what_they_are_alone(
    session: Session, max_batch: int, seed: int
) -> None:
    """Some come while others run, some are cancelled, and the session itself is used in between."""
    rng = np.random.RandomState(seed)
    wanted = requests()
    waiting = list(rng.permutation(len(wanted)))
    tickets: dict[int, int] = {}  # requests by ticket
    texts: dict[int, Completion] = {}
    cancelled: set[int] = set()
    session.reset()
    session.prefill(wanted[3].prompt)
    with session.batch(max_batch=max_batch, token_budget=TOKEN_BUDGET) as batch:
        while waiting or len(batch):
            for _ in range(min(len(waiting), rng.randint(3))):
                number = waiting.pop()
                tickets[batch.submit(wanted[number])] = number
            if rng.rand() < 0.03 and tickets.keys() - texts.keys():
                ticket = sorted(tickets.keys() - texts.keys())[0]
                assert batch.cancel(ticket)
                cancelled.add(tickets[ticket])
            for event in batch.step():
                assert event.error is None
                if event.completion is not None:
                    texts[event.ticket] = event.completion
            if rng.rand() < 0.2:
                session.decode(5)
    assert sorted(tickets[ticket] for ticket in texts) == list(range(len(wanted)))
    complete = {tickets[t]: text for t, text in texts.items() if tickets[t] not in cancelled}
    assert len(complete) >= len(wanted) - 3
    assert_alone(session, list(complete.values()), [wanted[number] for number in complete])
    for ticket, text in texts.items():
        if tickets[ticket] in cancelled:
            assert text.stop_reason == "cancelled"
            whole = alone(session, wanted[tickets[ticket]])
            assert text.ids == whole.ids[: len(text.ids)]


def test_a_long_prompt_is_read_between_the_tokens_of_others(session: Session) -> None:
    short = Request([1, 5, 6], max_tokens=30)
    long = Request([1, *range(3, 100)], max_tokens=1)
    order: list[int] = []
    with session.batch(max_batch=2, token_budget=TOKEN_BUDGET) as batch:
        tickets = [batch.submit(short), batch.submit(long)]
        order = [event.ticket for event in batch.run() if event.piece is not None]
    before = order.index(tickets[1])
    # 98 tokens at 7 in a round: the short text had one in each.
    assert 98 // TOKEN_BUDGET - 1 <= before < 30
