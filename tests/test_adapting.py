"""Compiling with adapters and encodings: what an artifact holds, that its numbers are right, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from adapters import write_gguf_adapter, write_peft_adapter
from hf_folders import TEXT as HF_TEXT
from hf_folders import HfTiny
from hf_folders import shapes as hf_shapes
from model_graphs import MODELS, model_graph
from one_layer import (
    ALPHA,
    EMBEDDING,
    EVERY,
    LINEAR,
    OUTPUT,
    assert_close,
    compile_exact,
    contents,
    decoded,
    delta,
    interpreted,
    pairs,
    score,
    write_adapter,
    write_folder,
    write_model,
)

import rlxc
from rlxc.adapting import QUANTIZE_FORMATS, AdapterOptions, _fold_formats, _formats
from rlxc.artifact import Artifact, BackendName, WeightEntry
from rlxc.compiler import read_losses
from rlxc.dtypes import DType
from rlxc.errors import OptionError, SessionError
from rlxc.ir import parse
from rlxc.weights.encode import encode, fitting
from rlxc.weights.formats import FORMATS

Array = npt.NDArray[Any]
Q, K, V, DOWN = (f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "ffn_down"))
NORM = "blk.0.attn_norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three formats, and adapters for it, which tests read and leave as they are."""
    root = tmp_path_factory.mktemp("adapting")
    write_model(root / "f32.gguf")
    write_model(root / "q8_0.gguf", "Q8_0")
    write_model(root / "mixed.gguf", {"default": "Q4_K", "attn_q": "F16"})
    write_adapter(root / "a.gguf", seed=1)
    write_adapter(root / "b.gguf", {Q: LINEAR[Q], DOWN: LINEAR[DOWN]}, rank=20, seed=2)
    write_adapter(root / "table.gguf", {EMBEDDING: EVERY[EMBEDDING]}, seed=3)
    write_adapter(root / "output.gguf", {OUTPUT: EVERY[OUTPUT]}, seed=4)
    return root


PAIRS = {
    "a": pairs(LINEAR, seed=1),
    "b": pairs({Q: LINEAR[Q], DOWN: LINEAR[DOWN]}, rank=20, seed=2),
    "table": pairs({EMBEDDING: EVERY[EMBEDDING]}, seed=3),
    "output": pairs({OUTPUT: EVERY[OUTPUT]}, seed=4),
}
"""What the adapters of `folder` hold."""


def weights(artifact: Artifact) -> dict[str, WeightEntry]:
    return {weight.name: weight for weight in artifact.manifest.weights}


# --- what an artifact holds ---------------------------------------------------------------------------------------


def test_split_adapter_lies_in_the_artifact_and_changes_no_weight(folder: Path, tmp_path: Path) -> None:
    base = compile_exact(folder / "q8_0.gguf", tmp_path / "base.rlx")
    split = compile_exact(
        folder / "q8_0.gguf", tmp_path / "split.rlx", adapters=[(folder / "b.gguf", 0.5)], lora="split"
    )
    (entry,) = split.manifest.adapters
    digest = rlxc.inspect(folder / "b.gguf")
    assert digest.name == entry.name == "b"
    assert (entry.scale, entry.folded, entry.file) == (0.5, (), "adapter.0.gguf")
    assert split.manifest.weights == base.manifest.weights
    assert base.manifest.lora is None
    assert split.manifest.lora is not None
    # Everything that is linear can be changed later on, not only what this adapter changes.
    assert {part.tensor: (part.rows, part.columns) for part in split.manifest.lora.parts} == LINEAR
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(split.file("adapter.0.gguf")).tensors}
    assert len(stored) == 4
    for name, pair in PAIRS["b"].items():
        product = stored[f"{name}.lora_b"].astype(np.float64) @ stored[f"{name}.lora_a"]
        np.testing.assert_allclose(product, delta(pair), atol=1e-6)


def test_folded_adapter_is_part_of_the_weights(folder: Path, tmp_path: Path) -> None:
    base = compile_exact(folder / "q8_0.gguf", tmp_path / "base.rlx")
    folded = compile_exact(
        folder / "q8_0.gguf", tmp_path / "fold.rlx", adapters=[(folder / "b.gguf", -2)], lora="fold"
    )
    (entry,) = folded.manifest.adapters
    assert (entry.name, entry.scale, entry.folded, entry.file) == ("b", -2.0, (Q, DOWN), None)
    assert folded.manifest.lora is None
    assert [name for name in folded.manifest.files if "adapter" in name] == []
    before, after = weights(base), weights(folded)
    changed = {name for name in before if before[name] != after[name]}
    # q is stacked with k and v in one matrix.
    assert changed == {name for name in before if Q in before[name].recipe or name == DOWN}
    assert all("fold(" in after[name].recipe for name in changed)
    assert {name: after[name].dtype for name in after} == {name: before[name].dtype for name in before}


def test_losses_are_kept_for_what_was_encoded_anew_and_only_that(folder: Path, tmp_path: Path) -> None:
    folded = compile_exact(
        folder / "q8_0.gguf", tmp_path / "fold.rlx", adapters=[folder / "b.gguf"], lora="fold"
    )
    losses = read_losses(folded)
    assert losses.keys() == {Q, DOWN}
    for loss in losses.values():
        # 8 bits, of the largest of 32 numbers: half a step is 1/254 of it, and the largest about 2.5 times the mean.
        assert loss["relative"] == pytest.approx(0.006, rel=0.3)
        assert loss["of_change"] is not None and loss["of_change"] < 0.05
    exact = compile_exact(
        folder / "f32.gguf", tmp_path / "f32.rlx", adapters=[folder / "b.gguf"], lora="fold"
    )
    assert read_losses(exact) == {}
    assert "losses.json" not in exact.manifest.files


def test_auto_folds_what_is_fine_and_splits_what_is_coarse(folder: Path, tmp_path: Path) -> None:
    artifact = compile_exact(folder / "mixed.gguf", tmp_path / "m.rlx", adapters=[folder / "a.gguf"])
    (entry,) = artifact.manifest.adapters
    assert (entry.folded, entry.file) == ((Q,), "adapter.0.gguf")
    stored = {tensor.name for tensor in gguf.GGUFReader(artifact.file("adapter.0.gguf")).tensors}
    assert stored == {f"{name}.lora_{side}" for name in LINEAR if name != Q for side in "ab"}
    split = compile_exact(
        folder / "mixed.gguf", tmp_path / "s.rlx", adapters=[folder / "a.gguf"], lora="split"
    )
    with rlxc.load(artifact.path, threads=1) as session:
        assert session.adapters.entries() == [("a", 1.0)]
        with pytest.raises(SessionError, match="'a' is folded into the weights and cannot be popped"):
            session.adapters.pop()
    # Folding rounds q to f16, by 1 in 4000 at most, which the softmax of attention makes larger.
    assert_close(score(artifact), score(split), tolerance=1e-3)


def test_lora_rank_is_kept_in_whole_units(folder: Path, tmp_path: Path) -> None:
    artifact = compile_exact(folder / "f32.gguf", tmp_path / "m.rlx", lora="split", lora_rank=17)
    assert artifact.manifest.lora is not None
    assert artifact.manifest.lora.max_rank == 32
    assert artifact.manifest.adapters == ()
    with rlxc.load(artifact.path, threads=1) as session:
        session.adapters.push(folder / "b.gguf")
        with pytest.raises(SessionError, match=r"would have 48 ranks.*takes 32; .*--lora-rank 48"):
            session.adapters.push(folder / "a.gguf")


@pytest.mark.parametrize("mode", ["split", "fold"])
def test_artifact_needs_neither_model_nor_adapter(folder: Path, tmp_path: Path, mode: str) -> None:
    sources = [tmp_path / "model.gguf", tmp_path / "adapter.gguf"]
    for source, name in zip(sources, ("f32", "a")):
        source.write_bytes((folder / f"{name}.gguf").read_bytes())
    artifact = compile_exact(sources[0], tmp_path / "m.rlx", adapters=[sources[1]], lora=mode)
    before = score(artifact)
    for source in sources:
        source.unlink()
    np.testing.assert_array_equal(score(artifact), before)


def test_same_input_and_options_give_the_same_bytes_that_name_no_place(folder: Path, tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        adapters = [(folder / "a.gguf", 0.5), folder / "output.gguf"]
        artifact = compile_exact(
            folder / "mixed.gguf", tmp_path / f"{name}.rlx", adapters=adapters, quantize="q5_k"
        )
        assert {entry.file is None for entry in artifact.manifest.adapters} == {False}
        made.append(contents(artifact.path))
    assert made[0] == made[1]
    assert [name for name, data in made[0].items() if str(folder).encode() in data] == []


# --- the numbers --------------------------------------------------------------------------------------------------

STACKS: Mapping[str, Sequence[tuple[str, float]]] = {
    "one": [("a", 0.7)],
    "two": [("a", 0.7), ("b", -0.4)],
    "table": [("table", 1.0)],
    "output": [("output", 0.5)],
    "table and output": [("output", 0.5), ("a", 1.0), ("table", 0.3)],
}


def adapted(root: Path, stack: Sequence[tuple[str, float]], tensors: Mapping[str, Array]) -> Path:
    """The model with the adapters added to its matrices by the formula."""
    changed = {name: array.astype(np.float64) for name, array in tensors.items()}
    changed[OUTPUT] = changed.get(OUTPUT, changed[EMBEDDING])
    for adapter, scale in stack:
        for name, pair in PAIRS[adapter].items():
            change = delta(pair, scale)
            changed[name] = changed[name] + (change.T if name == EMBEDDING else change)
    return write_model(
        root / "adapted.gguf", tied=False, tensors={name: a.astype(np.float32) for name, a in changed.items()}
    )


@pytest.mark.parametrize("mode", ["split", "fold"])
@pytest.mark.parametrize("stack", STACKS)
def test_adapters_add_what_the_formula_says(folder: Path, tmp_path: Path, stack: str, mode: str) -> None:
    artifact = compile_exact(
        folder / "f32.gguf",
        tmp_path / "m.rlx",
        adapters=[(folder / f"{name}.gguf", scale) for name, scale in STACKS[stack]],
        lora=mode,
    )
    expected = interpreted(adapted(tmp_path, STACKS[stack], decoded(folder / "f32.gguf")))
    assert_close(score(artifact), expected)
    assert np.abs(expected - interpreted(folder / "f32.gguf")).max() > 0.05 * np.ptp(expected)


def test_folded_in_f32_equals_split(folder: Path, tmp_path: Path, backend: BackendName) -> None:
    options: dict[str, Any] = {
        "backend": backend,
        "adapters": [(folder / f"{name}.gguf", 0.5) for name in ("a", "b", "table", "output")],
    }
    split = compile_exact(folder / "mixed.gguf", tmp_path / "s.rlx", lora="split", **options)
    folded = compile_exact(folder / "mixed.gguf", tmp_path / "f.rlx", lora="fold", fold_to="f32", **options)
    assert all(entry.folded for entry in folded.manifest.adapters)
    assert not any(entry.folded for entry in split.manifest.adapters)
    assert_close(score(folded), score(split))


def test_norm_that_an_adapter_brings_takes_the_model_s_place(folder: Path, tmp_path: Path) -> None:
    norm = np.random.default_rng(5).uniform(0.5, 2, 256).astype(np.float32)
    path = write_gguf_adapter(tmp_path / "n.gguf", PAIRS["b"], alpha=ALPHA, tensors={NORM: norm})
    artifact = compile_exact(folder / "f32.gguf", tmp_path / "m.rlx", adapters=[path], lora="fold")
    assert artifact.manifest.adapters[0].folded == (NORM, Q, DOWN)
    expected = adapted(tmp_path, [("b", 1.0)], {**decoded(folder / "f32.gguf"), NORM: norm})
    assert_close(score(artifact), interpreted(expected))


HF_MODELS = {
    "llama": HfTiny(config={"num_hidden_layers": 2}, seed=3),
    "gemma3": HfTiny(
        "gemma3_text", config={"sliding_window_pattern": 3, "rope_local_base_freq": 500.0}, seed=4
    ),
}


def linear_modules(model: HfTiny) -> dict[str, tuple[int, int]]:
    """Every linear layer of a folder's model: ``[out, in]`` by the module's name."""
    found = hf_shapes(model.model_type, model.tied, model.bias)
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in found
        if name.endswith("proj.weight")
    }


@pytest.mark.parametrize("mode", ["split", "fold"])
@pytest.mark.parametrize("name", HF_MODELS)
def test_peft_adapter_of_a_folder_adds_what_the_formula_says(tmp_path: Path, name: str, mode: str) -> None:
    model = HF_MODELS[name]
    made = pairs(linear_modules(model), rank=3)
    adapter = write_peft_adapter(tmp_path / "style.v1", made)  # whose alpha is twice its rank
    artifact = compile_exact(
        write_folder(tmp_path / "model", model),
        tmp_path / "m.rlx",
        adapters=[(adapter, 0.3)],
        lora=mode,
    )
    assert [entry.name for entry in artifact.manifest.adapters] == ["style.v1"]
    arrays = model.arrays()
    changed = {
        f"{module}.weight": arrays[f"{module}.weight"] + 0.6 * b.astype(np.float64) @ a
        for module, (a, b) in made.items()
    }
    expected = model.write(tmp_path / "expected", tensors=as_f32(changed))
    assert_close(score(artifact, HF_TEXT), interpreted(expected, HF_TEXT))


def test_dora_is_folded_by_its_formula(tmp_path: Path) -> None:
    model, rng = HF_MODELS["llama"], np.random.default_rng(6)
    made = pairs(linear_modules(model), rank=3)
    magnitudes = {module: rng.uniform(0.5, 2, len(b)).astype(np.float32) for module, (_, b) in made.items()}
    adapter = write_peft_adapter(tmp_path / "dora", made, magnitudes=magnitudes)
    source = write_folder(tmp_path / "model", model)
    artifact = compile_exact(source, tmp_path / "m.rlx", adapters=[(adapter, 0.5)])
    (entry,) = artifact.manifest.adapters
    assert (len(entry.folded), entry.file) == (14, None)
    arrays, changed = model.arrays(), {}
    for module, (a, b) in made.items():
        whole = arrays[f"{module}.weight"] + b.astype(np.float64) @ a  # half of alpha / rank
        length = np.sqrt((whole**2).sum(axis=1))
        changed[f"{module}.weight"] = (magnitudes[module] / length)[:, None] * whole
    expected = model.write(tmp_path / "expected", tensors=as_f32(changed))
    assert_close(score(artifact, HF_TEXT), interpreted(expected, HF_TEXT))
    with pytest.raises(
        OptionError, match=r"blk\.0\.attn_k\.weight as no side path can: DoRA scales whole rows"
    ):
        compile_exact(source, tmp_path / "s.rlx", adapters=[adapter], lora="split")


def test_modules_to_save_take_the_model_s_place(tmp_path: Path) -> None:
    model, rng = HF_MODELS["gemma3"], np.random.default_rng(7)
    own = {
        "lm_head.weight": rng.standard_normal((128, 64)).astype(np.float32) / 8,
        "model.norm.weight": rng.standard_normal(64).astype(np.float32) / 8,
    }
    adapter = write_peft_adapter(
        tmp_path / "saved",
        pairs({"model.layers.0.mlp.up_proj": (128, 64)}),
        config={"modules_to_save": ["lm_head", "norm"]},
        tensors=own,
    )
    artifact = compile_exact(
        write_folder(tmp_path / "model", model), tmp_path / "m.rlx", adapters=[(adapter, 0.0)]
    )
    expected = model.write(tmp_path / "expected", config={"tie_word_embeddings": False}, tensors=as_f32(own))
    assert_close(score(artifact, HF_TEXT), interpreted(expected, HF_TEXT))


def as_f32(arrays: Mapping[str, Array]) -> dict[str, tuple[str, Array]]:
    return {name: ("F32", array.astype(np.float32)) for name, array in arrays.items()}


# --- adapters with invocation tokens ------------------------------------------------------------------------------


def test_activated_adapter_is_never_folded(folder: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.gguf", {Q: LINEAR[Q]}, invocation_tokens=[7])
    artifact = compile_exact(folder / "f32.gguf", tmp_path / "m.rlx", adapters=[path])
    (entry,) = artifact.manifest.adapters
    assert (entry.folded, entry.file) == ((), "adapter.0.gguf")
    logits, base = score(artifact, [5, 6, 7, 8]), interpreted(folder / "f32.gguf", [5, 6, 7, 8])
    changed = np.abs(logits - base).max(axis=1) > 0.01
    assert changed.tolist() == [False, False, True, True]
    with pytest.raises(OptionError, match="cannot be folded: it acts only after its invocation tokens"):
        compile_exact(folder / "f32.gguf", tmp_path / "f.rlx", adapters=[path], lora="fold")


# --- encoding anew ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in QUANTIZE_FORMATS if name != "none"])
def test_quantized_weights_are_what_encoding_gives(folder: Path, tmp_path: Path, name: str) -> None:
    artifact = compile_exact(folder / "f32.gguf", tmp_path / "m.rlx", quantize=name)
    dtype, tables = DType(name), name not in ("nf4", "fp4", "int4")
    expected = {}
    for tensor, values in decoded(folder / "f32.gguf").items():
        if values.ndim == 2 and (tables or tensor in LINEAR):
            expected[tensor] = FORMATS[dtype].decode(encode(dtype, values), values.shape[1])
    entries = weights(artifact)
    assert entries[DOWN].dtype is dtype
    assert (entries[EMBEDDING].dtype is dtype) == tables
    assert read_losses(artifact).keys() == expected.keys()
    assert_close(score(artifact), interpreted(write_model(tmp_path / "e.gguf", tensors=expected)))


@pytest.mark.parametrize("name", ["gpt-oss", "granite", "llama with experts"])
def test_neither_biases_nor_routers_are_quantized(name: str) -> None:
    architecture, options = MODELS[name]
    graph = model_graph(architecture, 1, **options)
    kinds = {tensor.split(".")[-2] for tensor in _formats("q8_0", graph)}
    suffix = "_exps" if options.get("experts") else ""
    mlp = {f"{name}{suffix}" for name in ("ffn_gate", "ffn_up", "ffn_down")}
    assert kinds == {"token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output"} | mlp
    assert not [tensor for tensor in _formats("q8_0", graph) if not tensor.endswith(".weight")]


def test_rows_that_are_no_whole_blocks_get_a_format_that_fits(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "model", HF_MODELS["llama"])  # whose rows are 64 and 128 long
    artifact = compile_exact(source, tmp_path / "m.rlx", quantize="q4_k")
    assert fitting(DType.Q4_K, 64) is DType.Q5_0
    assert {weight.dtype for weight in artifact.manifest.weights} == {DType.Q5_0, DType.F32}


def test_quantized_model_keeps_its_adapters_exact(folder: Path, tmp_path: Path) -> None:
    adapters = [(folder / "a.gguf", 0.7)]
    split = compile_exact(
        folder / "f32.gguf", tmp_path / "s.rlx", adapters=adapters, lora="split", quantize="q4_0"
    )
    encoded = {
        name: FORMATS[DType.Q4_0].decode(encode(DType.Q4_0, values), values.shape[1])
        if values.ndim == 2
        else values
        for name, values in decoded(folder / "f32.gguf").items()
    }
    assert_close(score(split), interpreted(adapted(tmp_path, [("a", 0.7)], encoded)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, DType.F16),
        ({"fold_to": "q8_0"}, DType.Q8_0),
        ({"quantize": "q6_k"}, DType.Q6_K),
        ({"quantize": "q6_k", "fold_to": "bf16"}, DType.BF16),
    ],
    ids=str,
)
def test_folded_matrix_has_the_format_asked_for(
    folder: Path, tmp_path: Path, options: dict[str, str], expected: DType
) -> None:
    path = write_adapter(tmp_path / "o.gguf", {OUTPUT: EVERY[OUTPUT]})
    model = write_model(tmp_path / "m.gguf", "F16")
    artifact = compile_exact(model, tmp_path / "m.rlx", adapters=[path], lora="fold", **options)
    assert weights(artifact)[OUTPUT].dtype is expected


@pytest.mark.parametrize(
    ("given", "folded"),
    [("iq3_s", DType.Q3_K), ("iq4_xs", DType.IQ4_NL), ("nvfp4", DType.Q4_K), ("tq2_0", DType.Q4_K)],
)
def test_base_that_cannot_hold_a_change_is_folded_to_a_format_that_can(given: str, folded: DType) -> None:
    graph = parse(f"""
    graph g
    input %x: f32[batch, seq, 256]
    weight @w: {given}[8, 256]
    %y = DequantMatMul(%x, @w)
    output %y
    """)
    assert _fold_formats(AdapterOptions(), graph, ["w"], {}) == {"w": folded}
    asked = AdapterOptions(["a.gguf"], fold_to="tq2_0")
    assert _fold_formats(asked, graph, ["w"], {}) == {"w": DType.TQ2_0}


@pytest.mark.parametrize("options", [{"quantize": "iq2_xs"}, {"adapters": ["a.gguf"], "fold_to": "iq2_xs"}])
def test_format_that_can_only_be_read_is_refused_and_others_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(
        OptionError, match=r"cannot (quantize|fold) to 'iq2_xs'.*q2_k.*iq4_nl.*mxfp4"
    ) as caught:
        AdapterOptions(**options)
    assert "iq2_s," not in str(caught.value)


def test_losses_of_an_artifact_are_json_by_weight(folder: Path, tmp_path: Path) -> None:
    artifact = compile_exact(folder / "f32.gguf", tmp_path / "m.rlx", quantize="q8_0")
    stored = json.loads(artifact.file("losses.json").read_bytes())
    assert stored[DOWN].keys() == {"relative", "of_change"}
    assert stored[DOWN]["of_change"] is None  # no adapter changed anything
