"""A tiny artifact with a real tokenizer, and an engine whose logits are known."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import rlxc
from rlxc.artifact import (
    Artifact,
    ArtifactWriter,
    BackendName,
    KvLayer,
    KvPlan,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
)
from rlxc.backends.onnx.runtime import installed_runtime
from rlxc.dtypes import DType
from rlxc.runtime import Session
from rlxc.runtime.logits import StepLogits
from rlxc.runtime.tokenizer import Tokenizer

BOS, EOS, FIRST_BYTE = 0, 1, 2
VOCAB = FIRST_BYTE + 256
CONTEXT, MAX_STEP = 40, 8


def tokenizer_json() -> bytes:
    """A vocabulary of bytes, as SentencePiece spells them, that begins every text with ``<s>``."""
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {"<s>": BOS, "</s>": EOS, **{f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": t, **special} for i, t in ((BOS, "<s>"), (EOS, "</s>"))],
            "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []},
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "ByteFallback"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
            },
        }
    ).encode()


MANIFEST = Manifest(
    rlxc="0.1.0",
    model=ModelFacts(
        "gemma3", "tiny", "0" * 64, layers=1, heads=4, kv_heads=2, vocab_size=VOCAB, trained_context=CONTEXT
    ),
    target=TargetFacts("onnx", installed_runtime().name),
    options=Options("int8", context=CONTEXT),
    kv_cache=KvPlan(CONTEXT, MAX_STEP, 32, (KvLayer(0, "linear", CONTEXT, None, 1, 4, DType.F32, 32),)),
    tokenizer=TokenizerFacts(bos_id=BOS, eos_ids=(EOS,), add_bos=True, add_eos=False),
    weights=(),
)


def write_artifact(path: Path, manifest: Manifest = MANIFEST, **files: bytes) -> Artifact:
    """An artifact of the tiny vocabulary; ``files`` by name, with ``__`` for the dot."""
    content = {"model.onnx": b"graph", "weights.bin": bytes(4096), "tokenizer.json": tokenizer_json()}
    with ArtifactWriter(path) as writer:
        for name, data in {
            **content,
            **{name.replace("__", "."): data for name, data in files.items()},
        }.items():
            with writer.file(name) as file:
                file.write(data)
        return writer.commit(manifest)


@dataclass
class FakeCache:
    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.ids)


class FakeEngine:
    """Obeys the engine protocol, and checks that the session does.

    After a history, the best token is ``script[len(history)]`` where there is one; the other logits are noise that
    the whole history seeds.
    """

    vocab_size, context, max_step, ticks = VOCAB, CONTEXT, MAX_STEP, None

    def __init__(self, script: Sequence[int] = ()) -> None:
        self.script = script
        self.steps: list[int] = []
        self.closed = False

    def logits(self, history: Sequence[int]) -> npt.NDArray[np.float32]:
        row = np.random.default_rng(list(history)).standard_normal(VOCAB).astype(np.float32)
        if len(history) < len(self.script):
            row[self.script[len(history)]] = 10.0
        return row

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def step(
        self, caches: Sequence[FakeCache], ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> StepLogits:
        assert not self.closed
        assert ids.dtype == rows.dtype == np.int64
        assert ids.flags.c_contiguous
        assert 1 <= ids.size <= MAX_STEP
        (cache,), (tokens,) = caches, ids
        assert cache.position + len(tokens) <= CONTEXT
        assert all(0 <= token < VOCAB for token in tokens)
        assert all(0 <= row < len(tokens) for row in rows)
        wanted = [self.logits(cache.ids + tokens[: row + 1].tolist()) for row in rows]
        self.steps.append(len(tokens))
        cache.ids.extend(tokens.tolist())
        return StepLogits(np.array(wanted, np.float32).reshape(1, -1, VOCAB))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="session")
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Artifact]:
    """Writes ``name`` in a temporary folder; see :func:`write_artifact`."""
    return lambda name="tiny.rlx", **changes: write_artifact(tmp_path / name, **changes)


@pytest.fixture
def open_session(make_artifact: Callable[..., Artifact]) -> Iterator[Callable[..., Session]]:
    """Opens a session on an engine and an artifact; all sessions are closed afterwards."""
    opened: list[Session] = []

    def open_it(engine: Any = None, artifact: Artifact | None = None) -> Session:
        artifact = artifact or make_artifact(f"{len(opened)}.rlx")
        path = artifact.file("tokenizer.json")
        session = Session(
            artifact,
            engine or FakeEngine(),
            artifact.start_verification(),
            lambda: Tokenizer(path, bos_id=BOS, eos_ids=(EOS,)),
        )
        opened.append(session)
        return session

    yield open_it
    for session in opened:
        session.close()


CompileTiny = Callable[[BackendName], Path]


@pytest.fixture(scope="session")
def compile_tiny(tmp_path_factory: pytest.TempPathFactory) -> CompileTiny:
    """``compile_tiny(backend)``: the artifact of a tiny Gemma 3 with ring caches, compiled once."""
    tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "tiny.py"))
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny["VARIANTS"]["gemma3-window"].write(folder / "model.gguf")

    def compile_(backend: BackendName) -> Path:
        path = folder / f"{backend}.rlx"
        if not path.exists():
            rlxc.compile(model, path, backend=backend)
        return path

    return compile_


@pytest.fixture
def tvm_artifact(compile_tiny: CompileTiny) -> Path:
    pytest.importorskip("tvm")
    return compile_tiny("tvm")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def session(open_session: Callable[..., Session], engine: FakeEngine) -> Session:
    return open_session(engine)
