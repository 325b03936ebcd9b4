"""Speculation changes how long a text takes, and nothing else: on both backends, on tiny models and on the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import VOCAB, write_small_model

import rlxc
from rlxc.artifact import Activations, BackendName
from rlxc.backends import default_backend
from rlxc.runtime import Completion, Session
from rlxc.runtime.drafters import ModelDrafter


def repeating(seed: int, length: int) -> list[int]:
    """A few tokens over and over."""
    tokens = np.random.RandomState(seed).randint(3, VOCAB, 3 + 2 * seed)
    return [1, *np.resize(tokens, length - 1).tolist()]


def random(seed: int, length: int) -> list[int]:
    return [1, *np.random.RandomState(seed).randint(3, VOCAB, length - 1).tolist()]


TINY_PROMPTS = [
    make(seed, length) for make in (repeating, random) for seed, length in enumerate((2, 9, 30, 61, 90))
]
TINY_TOKENS = 40
"""Of a text: enough to leave windows and a page behind."""


@pytest.fixture(scope="module")
def tiny(
    compile_exact: Callable[..., Path], backend: BackendName, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Session, Session]]:
    """A model with a window and, to draft for it, the same with rounded activations: right more often than not."""
    folder = tmp_path_factory.mktemp("tiny")
    models = {
        "target": write_small_model(folder / "target.gguf", tied=False, tensor_types="Q4_0", decoded=True),
        "draft": write_small_model(folder / "draft.gguf", tied=False, tensor_types="Q4_0"),
    }
    activations = {"target": "float32", "draft": "int8"}
    artifacts = [
        compile_exact(models[name], backend, activations=activations[name], rollback=8) for name in models
    ]
    with rlxc.load(artifacts[0], threads=1) as target, rlxc.load(artifacts[1], threads=1) as draft:
        yield target, draft


@pytest.fixture(params=["ngram", "model"])
def speculate(request: pytest.FixtureRequest, tiny: tuple[Session, Session]) -> Any:
    """What guesses for the tiny model."""
    target, draft = tiny
    return "ngram" if request.param == "ngram" else ModelDrafter(draft, target)


def assert_same(found: Completion, expected: Completion, tolerance: float) -> None:
    assert found.ids == expected.ids
    assert found.text == expected.text and found.stop_reason == expected.stop_reason
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=tolerance)


def test_greedy_texts_are_the_plain_ones(tiny: tuple[Session, Session], speculate: Any) -> None:
    target, _ = tiny
    drafted = accepted = 0
    for prompt in TINY_PROMPTS:
        expected = target.generate(prompt, TINY_TOKENS)
        found = target.generate(prompt, TINY_TOKENS, speculate=speculate)
        # f32 throughout: one token and several may be summed in another order.
        assert_same(found, expected, 1e-5)
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert 0 < accepted < drafted  # right and wrong guesses were verified


def test_penalties_see_the_tokens_of_the_draft(tiny: tuple[Session, Session], speculate: Any) -> None:
    target, _ = tiny
    for prompt in TINY_PROMPTS[2:4]:
        expected = target.generate(prompt, TINY_TOKENS, repetition_penalty=1.3)
        found = target.generate(prompt, TINY_TOKENS, repetition_penalty=1.3, speculate=speculate)
        assert_same(found, expected, 1e-5)


def test_sampled_texts_repeat_with_their_seed(tiny: tuple[Session, Session], speculate: Any) -> None:
    target, _ = tiny

    def sampled(seed: int) -> Completion:
        return target.generate(TINY_PROMPTS[2], TINY_TOKENS, 0.2, seed=seed, speculate=speculate)

    texts = [sampled(seed) for seed in (1, 2)]
    for seed, text in zip((1, 2), texts):
        assert_same(sampled(seed), text, 1e-5)
        assert text.drafted
    assert texts[0].ids != texts[1].ids


def test_the_session_goes_on_from_the_text(tiny: tuple[Session, Session], speculate: Any) -> None:
    """What was drafted in vain is gone: what follows the text is what follows its tokens."""
    target, _ = tiny
    found = target.generate(TINY_PROMPTS[3], TINY_TOKENS, speculate=speculate)
    tokens = [*TINY_PROMPTS[3], *found.ids]
    assert target.position == len(tokens) - 1
    after = target.decode(tokens[-1])
    np.testing.assert_allclose(after, target.score(tokens)[-1], rtol=0, atol=1e-4)  # as in test_steps.py


# --- the real model ---------------------------------------------------------------------------------------------------

FEW = [
    "The three most important inventions of the nineteenth century were",
    "one two three four one two three four one two three four one two",
    '{"name": "Ann", "age": 31}\n{"name": "Bob", "age":',
]
MANY = [
    *FEW,
    "def fibonacci(n):\n",
    "Die Hauptstadt von Frankreich ist",
    "The sea has no average. The sea has no average. The sea has no",
    "A recipe for pancakes:\n1.",
    "Once upon a time",
    "import numpy as np\nx = np.zeros(3)\ny = np.zeros(",
    "Q: What is the capital of Italy?\nA: Rome\nQ: What is the capital of Spain?\nA:",
]
REAL_CASES: list[Any] = [
    ("tvm", "int8", FEW, 32),
    pytest.param("tvm", "int8", MANY, 64, marks=pytest.mark.slow),
    pytest.param("tvm", "float32", MANY, 64, marks=pytest.mark.slow),
    # A second for each token.
    pytest.param("onnx", "float32", FEW[1:2], 16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("backend_name", "activations", "prompts", "count"), REAL_CASES, ids=lambda value: str(value)[:7]
)
def test_greedy_texts_of_the_real_model_are_the_plain_ones(
    compile_gemma: Callable[[BackendName, Activations], Path],
    backend_name: BackendName,
    activations: Activations,
    prompts: list[str],
    count: int,
) -> None:
    if backend_name == "tvm" != default_backend():
        pytest.skip("TVM is not installed")
    accepted = 0
    with rlxc.load(compile_gemma(backend_name, activations)) as session:
        for prompt in prompts:
            expected = session.generate(prompt, count)
            found = session.generate(prompt, count, speculate="ngram")
            # TVM's kernels add in the same order however many tokens they are given. ONNX Runtime's do not, and sums
            # of f32 in another order leave 1e-4 of logits that reach 30.
            assert_same(found, expected, 0.0 if backend_name == "tvm" else 1e-4)
            accepted += found.accepted
    assert accepted > count // 2
