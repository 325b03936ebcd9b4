"""What decides the keys and values of a model, and so which snapshots it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from snapshots import MakeModel, RowsEngine, assert_refused

from rlxc.artifact import AdapterEntry, FileEntry, LoraPlan, Manifest, WeightEntry
from rlxc.dtypes import DType
from rlxc.runtime.identity import identity
from rlxc.runtime.model import Model


def changed_layer(manifest: Manifest, index: int, **changes: Any) -> Manifest:
    layers = list(manifest.kv_cache.layers)
    layers[index] = replace(layers[index], **changes)
    return replace(manifest, kv_cache=replace(manifest.kv_cache, layers=tuple(layers)))


FOLDED = AdapterEntry("a", "1" * 64, 1.0, ("blk.0.attn_q.weight",), None)
WEIGHT = WeightEntry("w", DType.F32, (4, 4), "", 64, 64, "f32")

DIFFERENT: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "model": (lambda m: replace(m, model=replace(m.model, fingerprint="1" * 64)), "is of another model"),
    "backend": (lambda m: replace(m, target=replace(m.target, backend="tvm")), "with another backend"),
    "activations": (
        lambda m: replace(m, options=replace(m.options, activations="float32")),
        "other activations",
    ),
    "adapters' type": (lambda m: replace(m, lora=LoraPlan(DType.F16, 16, ())), "another type of adapters"),
    "weights": (lambda m: replace(m, weights=(WEIGHT,)), "with other weights"),
    "folded": (lambda m: replace(m, adapters=(FOLDED,)), "with other adapters in the weights"),
    "rollback": (
        lambda m: replace(m, kv_cache=replace(m.kv_cache, rollback=3)),
        "another plan of the KV cache",
    ),
    "dtype": (lambda m: changed_layer(m, 0, dtype=DType.F16), "another plan of the KV cache"),
    "heads": (lambda m: changed_layer(m, 0, heads=1, head_dim=9), "another plan of the KV cache"),
    "window": (lambda m: changed_layer(m, 3, window=5), "another plan of the KV cache"),
    "layout": (lambda m: changed_layer(m, 0, layout="paged"), "another plan of the KV cache"),
    "ring": (lambda m: changed_layer(m, 1, capacity=11), "another plan of the KV cache"),
    "shared": (lambda m: changed_layer(m, 5, shares=None), "another plan of the KV cache"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_snapshot_of_something_else_is_refused(
    every: Model, saved: Path, make_model: MakeModel, name: str
) -> None:
    change, match = DIFFERENT[name]
    other = make_model(RowsEngine(), **vars(change(every.manifest)))
    assert_refused(saved, other, f"{match}.* \\(it was made with 'tiny'\\); ")


def test_each_difference_gives_another_identity(every: Model) -> None:
    found = {identity(change(every.manifest)) for change, _ in DIFFERENT.values()}
    assert len(found | {identity(every.manifest)}) == len(DIFFERENT) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, rlxc="9.9.9"),
        lambda m: replace(m, model=replace(m.model, name="other")),
        lambda m: replace(m, target=replace(m.target, runs_on="elsewhere")),
        lambda m: replace(m, options=replace(m.options, context=7)),
        lambda m: replace(m, kv_cache=replace(m.kv_cache, context=7, max_step=2, page_size=16)),
        lambda m: changed_layer(m, 0, capacity=99),
        lambda m: replace(m, tokenizer=replace(m.tokenizer, eos_ids=())),
        lambda m: replace(m, adapters=(replace(FOLDED, folded=(), file="a.gguf"),)),
        lambda m: replace(m, files={"weights.bin": FileEntry(1, "1" * 64)}),
    ],
)
def test_identity_leaves_out_what_keys_and_values_do_not_depend_on(every: Model, change: Any) -> None:
    assert change(every.manifest) != every.manifest
    assert identity(change(every.manifest)) == identity(every.manifest)
