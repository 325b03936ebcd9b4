"""The table of weights: of models, of what backends make of them, of artifacts and of adapters."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models"))

from one_layer import EMBEDDING, OUTPUT, write_adapter, write_model
from tiny import HIDDEN, VARIANTS, VOCAB

import rlxc
from rlxc.artifact import BackendName
from rlxc.errors import ArtifactError
from rlxc.weight_table import WeightRow, WeightTable, WeightTotals

Q, V, DOWN = "blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"


def table(path: Path, **options: str) -> WeightTable:
    """The weights of a path; they can be written as JSON."""
    info = rlxc.inspect(path, weights=True, **options)  # type: ignore[arg-type]
    json.dumps(info.to_dict())
    assert info.weights is not None
    return info.weights


def by_name(found: WeightTable) -> dict[str, WeightRow]:
    rows = {row.name: row for row in found.rows}
    assert len(rows) == len(found.rows)
    return rows


def test_artifact_has_what_was_told_of_the_model(tmp_path: Path, backend: BackendName) -> None:
    types = "Q4_K" if backend == "tvm" else {"default": "Q4_K", "attn_v": "Q6_K", "ffn_down": "IQ4_XS"}
    model = write_model(tmp_path / "m.gguf", types)  # on tvm, each format takes seconds
    told = table(model, backend=backend)
    artifact = rlxc.compile(model, tmp_path / "m.rlx", backend=backend)
    assert table(artifact.path) == told
    assert told.backend == backend
    assert told.total.stored_bytes == rlxc.inspect(artifact.path).tensor_bytes
    # And it accounts for every byte of the model, in which an alias is none.
    assert told.total.nbytes == rlxc.inspect(model).tensor_bytes


def test_tied_output_is_an_alias_that_counts_nothing(tmp_path: Path, backend: BackendName) -> None:
    tied = VARIANTS["llama-k-m"]
    found = table(tied.write(tmp_path / "tied.gguf"), backend=backend)
    alias, target = (by_name(found)[name] for name in (OUTPUT, EMBEDDING))
    assert (alias.kind, alias.nbytes, alias.stored_bytes) == (f"alias of {EMBEDDING}", 0, 0)
    assert (alias.shape, alias.format, alias.route) == (target.shape, target.format, target.route)
    assert (target.kind, target.shape) == ("base", (VOCAB, HIDDEN))
    untied = table(replace(tied, tied=False).write(tmp_path / "untied.gguf"), backend=backend)
    assert by_name(untied)[OUTPUT].kind == "base"
    assert untied.total.tensors == found.total.tensors + 1
    assert untied.total.parameters == found.total.parameters + VOCAB * HIDDEN


def test_stacked_products_are_one_row_that_names_its_parts(tmp_path: Path) -> None:
    found = table(VARIANTS["llama-linear"].write(tmp_path / "m.gguf"), backend="onnx")
    (row,) = [row for row in found.rows if V in row.parts]
    assert row.parts == (Q, "blk.0.attn_k.weight", V)
    assert row.label == "blk.0.{attn_q,attn_k,attn_v}.weight"
    assert row.nbytes == math.prod(row.shape) // 32 * 18  # Q4_0
    assert {row.label for row in found.rows if not row.parts} >= {DOWN, EMBEDDING}


def test_rows_come_layer_by_layer(tmp_path: Path, backend: BackendName) -> None:
    found = table(VARIANTS["llama-untied"].write(tmp_path / "m.gguf"), backend=backend)
    places = [row.label.split(".")[1] if row.label.startswith("blk.") else row.name for row in found.rows]
    assert list(dict.fromkeys(places)) == [EMBEDDING, "0", "1", "output_norm.weight", OUTPUT]


def test_totals_are_those_of_each_format_and_of_all() -> None:
    rows = [
        WeightRow("a", (4, 32), "q8_0", 136, 140, "r"),
        WeightRow("b", (2, 32), "q8_0", 68, 68, "r"),
        WeightRow("c", (5,), "f32", 20, 20, "r"),
        WeightRow("d", (4, 32), "q8_0", 0, 0, "r", "alias of a"),
    ]
    found = WeightTable.of(rows, "tvm")
    assert found.by_format == {"f32": WeightTotals(1, 5, 20, 20), "q8_0": WeightTotals(2, 192, 204, 208)}
    assert found.total == WeightTotals(3, 197, 224, 228)


def test_model_that_does_not_compile_is_listed_as_its_file_has_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", "Q8_0", tensors={DOWN: None})
    found = table(model)
    assert found.backend is None
    assert {(row.stored_bytes, row.route, row.kind) for row in found.rows} == {(None, "", "base")}
    assert by_name(found)[Q].nbytes == 256 * 256 // 32 * 34
    assert found.total.stored_bytes is None


def test_adapter_s_tensors_are_its_own(tmp_path: Path) -> None:
    found = table(write_adapter(tmp_path / "style.gguf", {Q: (256, 256)}, rank=4))
    rows = by_name(found)
    assert {row.kind for row in found.rows} == {"adapter style"}
    assert rows[f"{Q}.lora_a"].shape == (4, 256)
    assert found.total.nbytes == 4 * 2 * 4 * 256


def test_artifact_tells_folded_adapters_from_those_beside(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", "Q8_0")
    style = write_adapter(tmp_path / "style.gguf", {Q: (256, 256)}, rank=4)
    options = {"backend": "onnx", "adapters": [style]}
    folded = table(rlxc.compile(model, tmp_path / "f.rlx", lora="fold", **options).path)  # type: ignore[arg-type]
    kinds = {row.label: row.kind for row in folded.rows}
    assert {kind for label, kind in kinds.items() if "attn_q" in label} == {"base with adapter style"}
    assert {kind for label, kind in kinds.items() if "ffn" in label} == {"base"}
    split = table(rlxc.compile(model, tmp_path / "s.rlx", lora="split", **options).path)  # type: ignore[arg-type]
    beside = [row for row in split.rows if row.kind == "adapter style"]
    assert [row.name for row in beside] == [f"{Q}.lora_a", f"{Q}.lora_b"]
    assert [row.stored_bytes for row in beside] == [4 * 4 * 256] * 2
    assert {row.kind for row in split.rows} == {"adapter style", "base", f"alias of {EMBEDDING}"}


@pytest.mark.parametrize(
    ("field", "value"), [("recipe", "stir(well)"), ("name", "a b"), ("name", "a: f32[1]\nweight @b")]
)
def test_weight_that_cannot_be_read_is_an_error_of_one_line(tmp_path: Path, field: str, value: str) -> None:
    artifact = rlxc.compile(write_model(tmp_path / "m.gguf"), tmp_path / "m.rlx", backend="onnx").path
    manifest = json.loads((artifact / "manifest.json").read_text())
    (weight,) = [weight for weight in manifest["weights"] if weight["name"] == DOWN]
    weight[field] = value
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="cannot be read: ") as caught:
        rlxc.inspect(artifact, weights=True)
    assert "\n" not in str(caught.value)
