"""What a cache of fewer bits costs: on the real model, with f32 activations, so that only the cache differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import rlxc
from rlxc.artifact import KvCacheType
from rlxc.comparing import TEXT, Divergence, divergence
from rlxc.runtime import Session

Load = Callable[[KvCacheType], Session]


@pytest.fixture(scope="module")
def load(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """``load(kv_cache)``: the real model on TVM."""
    pytest.importorskip("tvm")
    folder = tmp_path_factory.mktemp("caches")
    opened: list[Session] = []

    @cache
    def load_(kv_cache: KvCacheType) -> Session:
        path = folder / f"{kv_cache}.rlx"
        rlxc.compile(gemma_gguf, path, backend="tvm", activations="float32", kv_cache=kv_cache, context=512)
        opened.append(rlxc.load(path))
        return opened[-1]

    yield load_
    for session in opened:
        session.close()


@pytest.fixture(scope="module")
def against_f32(load: Load) -> Callable[[KvCacheType], Divergence]:
    return cache(lambda kv_cache: divergence(load("f32"), load(kv_cache), TEXT))


# Four of its artifacts take a minute to compile.
@pytest.mark.slow
def test_int8_costs_no_more_than_a_thousandth_of_a_nat(
    against_f32: Callable[[KvCacheType], Divergence],
) -> None:
    assert 0 < against_f32("f16").mean_kl < 1e-5
    assert against_f32("int8").mean_kl <= against_f32("f16").mean_kl + 0.001
    assert against_f32("int8").mean_kl > against_f32("f16").mean_kl


@pytest.mark.slow
def test_bf16_is_between_the_two(against_f32: Callable[[KvCacheType], Divergence]) -> None:
    assert against_f32("f16").mean_kl < against_f32("bf16").mean_kl < 0.001


@pytest.mark.slow
def test_int8_takes_half_the_bytes(load: Load) -> None:
    sizes = {
        name: load(name).artifact.manifest.kv_cache.bytes_per_token for name in ("f32", "f16", "bf16", "int8")
    }
    # 18 layers, each with one head of 256 channels, keys and values; a scale of 4 bytes for each.
    assert sizes == {"f32": 36864, "f16": 18432, "bf16": 18432, "int8": 9216 + 144}
