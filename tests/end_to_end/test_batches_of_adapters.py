"""Texts that are made together, each with adapters of its own, against each made alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from adapter_cases import Files

import rlxc
from rlxc.artifact import BackendName
from rlxc.runtime import Completion, Request, SamplingOptions, Session

STACKS = (
    [("rank-5", 1.0)],
    [],
    [("rank-16", 1.0)],
    [("rank-5", 0.7), ("rank-16", -0.3)],
    [("q-and-v", 0.5)],
    [("rank-5", 1.0)],
    [("q-and-v", 1.0), ("rank-5", 0.5), ("q-and-v", -0.25)],
    None,
)
PROMPTS = [
    [1, *np.random.RandomState(seed).randint(3, 300, 2 + 3 * seed).tolist()] for seed in range(len(STACKS))
]


@pytest.fixture(scope="module")
def session(
    compile_exact: Callable[..., Path], backend: BackendName, tiny_files: Callable[[str], Files]
) -> Iterator[Session]:
    """A tiny model in K-quants, with adapters loaded and one of them on the stack."""
    files = tiny_files("llama-k-m")
    artifact = compile_exact(files.model, backend, lora="split", adapters=[])
    with rlxc.load(artifact, threads=1) as session:
        for path in files.adapters.values():
            session.adapters.load(path)
        session.adapters.push("rank-16", 0.4)
        yield session


def alone(session: Session, request: Request) -> Completion:
    """The text of a request when its adapters are the session's, and the session's are as before."""
    before = session.adapters.entries()
    if request.adapters is not None:
        session.adapters.clear()
        for name, scale in request.adapters:
            session.adapters.push(name, scale)
    options = request.sampling
    made = session.generate(
        request.prompt, request.max_tokens, options.temperature, options.top_k, seed=options.seed
    )
    session.adapters.clear()
    for name, scale in before:
        session.adapters.push(name, scale)
    return made


@pytest.mark.parametrize("max_batch", [3, 8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_text_of_a_batch_is_what_it_is_alone(
    session: Session, max_batch: int, temperature: float
) -> None:
    requests = [
        Request(
            prompt,
            adapters=stack,
            sampling=SamplingOptions(temperature=temperature, top_k=20, seed=seed),
            max_tokens=6 + seed,
        )
        for seed, (prompt, stack) in enumerate(zip(PROMPTS, STACKS))
    ]
    together = session.generate_batch(requests, max_batch)
    expected = [alone(session, request) for request in requests]
    assert [text.ids for text in together] == [text.ids for text in expected]
    for text, other in zip(together, expected):
        # f32 sums in another order; logits have a standard deviation of 1.
        np.testing.assert_allclose(text.logprobs, other.logprobs, rtol=0, atol=1e-4)


def test_adapters_decide_what_a_batch_says(session: Session) -> None:
    """Or the test above would compare nothing."""
    different = [stack for i, stack in enumerate(STACKS) if stack not in STACKS[:i]]
    requests = [Request(PROMPTS[3], adapters=stack, max_tokens=1) for stack in different]
    logprobs = sorted(text.logprobs[0] for text in session.generate_batch(requests))
    assert len(different) == len(STACKS) - 1 and np.diff(logprobs).min() > 1e-3
