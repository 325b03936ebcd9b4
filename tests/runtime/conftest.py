"""A tiny artifact with a real tokenizer, and an engine whose logits are known."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
    LoraGroup,
    LoraPart,
    LoraPlan,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
)
from rlxc.backends.onnx.runtime import installed_runtime
from rlxc.dtypes import DType
from rlxc.passes import LoraMode
from rlxc.runtime import Session
from rlxc.runtime.engines import KvRows, Mix, Pairs
from rlxc.runtime.loaded import Loaded
from rlxc.runtime.logits import StepLogits
from rlxc.runtime.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters import random_pairs, write_gguf_adapter

BOS, EOS, FIRST_BYTE = 0, 1, 2
VOCAB = FIRST_BYTE + 256
CONTEXT, MAX_STEP, ROLLBACK = 40, 8, 6
SHAPES = {
    "blk.0.attn_q.weight": (8, 4),
    "blk.0.attn_k.weight": (4, 4),
    "blk.0.ffn_down.weight": (4, 12),
    "token_embd.weight": (4, VOCAB),
}
"""What adapters of the tiny model change: ``[out, in]``."""


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
    kv_cache=KvPlan(
        CONTEXT, MAX_STEP, ROLLBACK, None, 32, (KvLayer(0, "linear", CONTEXT, None, 1, 4, DType.F32, 32),)
    ),
    tokenizer=TokenizerFacts(bos_id=BOS, eos_ids=(EOS,), add_bos=True, add_eos=False),
    weights=(),
)

Q, K, DOWN, EMBEDDING = (
    LoraPart(name, rows, columns, f"{name}.up", 0, rows) for name, (rows, columns) in SHAPES.items()
)
SPLIT = replace(
    MANIFEST,
    lora=LoraPlan(
        DType.F32,
        48,
        (
            LoraGroup("embedding", "embedding.down", (EMBEDDING,)),
            LoraGroup("linear", "qk.down", (Q, K)),
            LoraGroup("linear", "down.down", (DOWN,)),
        ),
    ),
)
"""As `MANIFEST`, and adapters of up to 48 ranks together may come and go."""


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
    """Keeps everything; with a ``window``, it can go back by `ROLLBACK` tokens from the furthest it has been."""

    ids: list[int] = field(default_factory=list)
    mixes: list[Mix[Any]] = field(default_factory=list)  # what each token was read with
    window: bool = False
    furthest: int = 0

    @property
    def position(self) -> int:
        return len(self.ids)

    @property
    def oldest(self) -> int:
        return max(0, self.furthest - ROLLBACK) if self.window else 0

    def truncate(self, position: int) -> None:
        assert self.oldest <= position <= self.position
        del self.ids[position:], self.mixes[position:]

    def fork(self) -> FakeCache:
        return replace(self, ids=self.ids[:], mixes=self.mixes[:])

    @property
    def memory(self) -> dict[int, int]:
        """Pages of four tokens; caches that hold the same tokens up to a page's end share it."""
        ends = range(4, self.position + 4, 4)
        return {hash((end, tuple(self.ids[:end]))): 64 for end in ends}

    def rows(self) -> list[KvRows]:
        """Keys are the ids, values what each was read with."""
        keys = np.repeat(np.array(self.ids, np.float32)[:, None], 4, axis=1)
        return [KvRows(0, keys, np.zeros_like(keys))]


class FakeAdapter:
    """Told apart from others by its numbers alone."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = dict(pairs)
        arrays = [array for _, pair in sorted(pairs.items()) for array in pair]
        assert all(array.dtype == np.float32 for array in arrays)
        self.units = max((-(-len(a) // 16) for a, _ in pairs.values()), default=0)
        self.nbytes = sum(array.nbytes for array in arrays)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()
        self.number = int.from_bytes(digest[:8], "little")


class FakeEngine:
    """Obeys the engine protocol, and checks that the session does.

    After a history, the best token is ``script[len(history)]`` where there is one; the other logits are noise that
    the whole history seeds, with what each token was read with.
    """

    vocab_size, context, max_step, ticks = VOCAB, CONTEXT, MAX_STEP, None

    def __init__(self, script: Sequence[int] = (), window: bool = False) -> None:
        self.script, self.window = script, window
        self.steps: list[int] = []  # tokens of each sequence
        self.mixes: list[list[Mix[Any]]] = []  # of each step, one for each sequence
        self.prepared: list[FakeAdapter] = []
        self.closed = False

    def logits(self, history: Sequence[int], mixes: Sequence[Mix[Any]] = ()) -> npt.NDArray[np.float32]:
        seed = list(history)
        for position, mix in enumerate(mixes):
            for adapter, scale in mix:
                seed += [position, adapter.number, int(np.float32(scale).view(np.uint32))]
        row = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
        if len(history) < len(self.script):
            row[self.script[len(history)]] = 10.0
        return row

    def new_cache(self) -> FakeCache:
        return FakeCache(window=self.window)

    def load_cache(self, position: int, layers: Sequence[KvRows]) -> FakeCache:
        (rows,) = layers
        assert rows.first == 0 and len(rows.keys) == position
        ids = [int(key[0]) for key in rows.keys]
        return FakeCache(ids, [()] * position, self.window, position)

    def prepare(self, pairs: Pairs) -> FakeAdapter:
        self.prepared.append(FakeAdapter(pairs))
        return self.prepared[-1]

    def step(
        self,
        caches: Sequence[FakeCache],
        ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        mixes: Sequence[Mix[Any]] = (),
    ) -> StepLogits:
        assert not self.closed
        assert ids.dtype == rows.dtype == np.int64
        assert ids.flags.c_contiguous
        assert 1 <= ids.size <= MAX_STEP
        assert len(caches) == len(ids) == len({id(cache) for cache in caches})
        assert len(mixes) in (0, len(caches))
        each = list(mixes) or [()] * len(caches)
        values = [self._read(cache, row, rows, mix) for cache, row, mix in zip(caches, ids.tolist(), each)]
        self.steps.append(ids.shape[1])
        self.mixes.append(each)
        return StepLogits(np.array(values, np.float32).reshape(len(caches), -1, VOCAB))

    def _read(
        self, cache: FakeCache, tokens: list[int], rows: npt.NDArray[np.int64], mix: Mix[Any]
    ) -> list[npt.NDArray[np.float32]]:
        assert cache.position + len(tokens) <= CONTEXT
        assert all(0 <= token < VOCAB for token in tokens)
        assert all(0 <= row < len(tokens) for row in rows)
        assert sum(adapter.units for adapter, _ in mix) <= 3
        assert len({id(adapter) for adapter, _ in mix}) == len(mix)
        assert all(scale and np.isfinite(scale) for _, scale in mix)
        start = cache.position
        cache.ids += tokens
        cache.furthest = max(cache.furthest, len(cache.ids))
        cache.mixes += [tuple(mix)] * len(tokens)
        ends = [start + int(row) + 1 for row in rows]
        return [self.logits(cache.ids[:end], cache.mixes[:end]) for end in ends]

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

    def open_it(engine: Any = None, artifact: Artifact | None = None, prefix_cache: int = 0) -> Session:
        artifact = artifact or make_artifact(f"{len(opened)}.rlx")
        path = artifact.file("tokenizer.json")
        loaded = Loaded(
            artifact,
            engine or FakeEngine(),
            artifact.start_verification(),
            lambda: Tokenizer(path, bos_id=BOS, eos_ids=(EOS,)),
            prefix_cache,
        )
        session = Session(loaded)
        opened.append(session)
        return session

    yield open_it
    for session in opened:
        session.close()


WriteAdapter = Callable[..., Path]


@pytest.fixture
def write_adapter(tmp_path: Path) -> WriteAdapter:
    """``write_adapter("a", rank=4, seed=0)``: a GGUF adapter ``a.gguf``, by default for all that can be changed."""

    def write(
        name: str,
        rank: int = 4,
        *,
        seed: int = 0,
        targets: Sequence[str] = tuple(SHAPES),
        architecture: str = "gemma3",
        size: float = 0.1,
        **options: Any,
    ) -> Path:
        shapes = {target: SHAPES.get(target, (4, 4)) for target in targets}
        pairs = random_pairs(shapes, rank, seed=seed, size=size)
        return write_gguf_adapter(tmp_path / f"{name}.gguf", pairs, architecture=architecture, **options)

    return write


@pytest.fixture
def split_session(open_session: Callable[..., Session], make_artifact: Any, engine: FakeEngine) -> Session:
    """A session on `engine` that takes adapters."""
    return open_session(engine, make_artifact("split.rlx", manifest=SPLIT))


@pytest.fixture
def split_manifest() -> Manifest:
    return SPLIT


CompileTiny = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_tiny(tmp_path_factory: pytest.TempPathFactory) -> CompileTiny:
    """``compile_tiny(backend)``: the artifact of a tiny Gemma 3 with windows, compiled once for each ``lora``."""
    tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "tiny.py"))
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny["VARIANTS"]["gemma3-window"].write(folder / "model.gguf")

    def compile_(backend: BackendName, lora: LoraMode = "auto") -> Path:
        path = folder / f"{backend}.{lora}.rlx"
        if not path.exists():
            rlxc.compile(model, path, backend=backend, lora=lora)
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
