"""PEFT folders: scales and rows against their formulas in numpy, and every setting that is refused."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rlxc.errors import FormatError, ModelError, RlxcError, UnsupportedError
from rlxc.weights.adapters import Adapter, AdapterBase, check_fits, inspect_adapter, open_adapter
from tests.adapters import random_pairs, write_peft_adapter

BASE = AdapterBase("llama", layers=3, heads=4, kv_heads=2)
GEMMA = AdapterBase("gemma3", layers=3, heads=4, kv_heads=2)
LAYER = "model.layers.1"
Q, K, V = (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
UP = f"{LAYER}.mlp.up_proj"
EMBEDDING = "model.embed_tokens"
SHAPES = {Q: (16, 8), K: (8, 8), V: (8, 8), UP: (12, 8), EMBEDDING: (8, 20), "lm_head": (20, 8)}
GGUF = {
    Q: "blk.1.attn_q.weight",
    K: "blk.1.attn_k.weight",
    V: "blk.1.attn_v.weight",
    UP: "blk.1.ffn_up.weight",
    EMBEDDING: "token_embd.weight",
    "lm_head": "output.weight",
}


def pairs(*modules: str, rank: int = 4):
    return random_pairs({module: SHAPES[module] for module in modules}, rank)


def read(folder: Path, base: AdapterBase = BASE) -> Adapter:
    return open_adapter(folder, base)


def paired_rows(heads: int, rows: int) -> list[int]:
    """For each row of a GGUF matrix of heads, the row of Hugging Face's: halves of a head take turns."""
    dim = rows // heads
    return [h * dim + half * dim // 2 + j for h in range(heads) for j in range(dim // 2) for half in (0, 1)]


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


# What is read -----------------------------------------------------------------------------------------------


def test_pairs_have_gguf_names_and_the_file_s_values(tmp_path):
    written = pairs(UP, V, "lm_head")
    adapter = read(write_peft_adapter(tmp_path / "chat", written, config={"lora_alpha": 10}))
    assert list(adapter.pairs) == ["output.weight", GGUF[V], GGUF[UP]]
    for module, (a, b) in written.items():
        pair = adapter.pairs[GGUF[module]]
        assert (pair.a == a).all() and (pair.b == b).all()
        assert pair.scale == 2.5 and pair.magnitude is None
    assert (adapter.name, adapter.source, adapter.architecture) == ("chat", tmp_path / "chat", "llama")


def test_rows_of_llama_s_q_and_k_are_permuted_and_gemma_s_are_not(tmp_path):
    written = pairs(Q, K)
    folder = write_peft_adapter(tmp_path / "a", written)
    for module, heads in ((Q, 4), (K, 2)):
        a, b = written[module]
        llama, gemma = read(folder).pairs[GGUF[module]], read(folder, GEMMA).pairs[GGUF[module]]
        assert (llama.a == a).all() and (gemma.a == a).all()
        assert (llama.b == b[paired_rows(heads, len(b))]).all()
        assert (gemma.b == b).all()


def test_magnitudes_are_read_and_permuted_with_their_rows(tmp_path):
    written = pairs(Q, V)
    magnitudes = {Q: np.arange(16, dtype=np.float32), V: np.arange(8, dtype=np.float32)}
    adapter = read(write_peft_adapter(tmp_path / "a", written, magnitudes=magnitudes))
    assert adapter.uses_dora
    assert adapter.pairs[GGUF[Q]].magnitude.tolist() == paired_rows(4, 16)
    assert adapter.pairs[GGUF[V]].magnitude.tolist() == list(range(8))


def test_embedding_keeps_its_shapes(tmp_path):
    written = pairs(EMBEDDING)
    adapter = read(write_peft_adapter(tmp_path / "a", written))
    pair = adapter.pairs["token_embd.weight"]
    assert (pair.a == written[EMBEDDING][0]).all() and (pair.b == written[EMBEDDING][1]).all()
    check_fits(adapter, {"token_embd.weight": (20, 8)})


def test_frozen_copy_of_an_adapted_embedding_is_left_out(tmp_path):
    tensors = {f"{EMBEDDING}.base_layer.weight": zeros(20, 8), "lm_head.base_layer.weight": zeros(20, 8)}
    adapter = read(write_peft_adapter(tmp_path / "a", pairs(EMBEDDING, "lm_head"), tensors=tensors))
    assert list(adapter.pairs) == ["output.weight", "token_embd.weight"]
    assert not adapter.replacements


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_decoded(tmp_path, dtype):
    written = pairs(V)
    folder = write_peft_adapter(tmp_path / "a", written)
    kind = gguf.GGMLQuantizationType[dtype]
    header, data = {}, b""
    for name, array in load_file(folder / "adapter_model.safetensors").items():
        packed = gguf.quantize(array, kind).tobytes()
        entry = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(packed)],
        }
        header[name], data = entry, data + packed
    raw = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    pair = read(folder).pairs[GGUF[V]]
    for ours, theirs in zip((pair.a, pair.b), written[V]):
        assert (ours == gguf.dequantize(gguf.quantize(theirs, kind), kind)).all()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 0.5}, 0.125),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"v_proj": 1}}, 0.5),
        ({"lora_alpha": 0}, 1.0),
        ({"lora_alpha": 0, "use_rslora": True}, 1.0),
        ({"lora_alpha": ...}, 2.0),
        ({"alpha_pattern": {"v_proj": 2}}, 0.5),
        ({"alpha_pattern": {"self_attn.v_proj": 2}}, 0.5),
        ({"alpha_pattern": {"model.layers.1.self_attn.v_proj": 2}}, 0.5),
        ({"alpha_pattern": {"^model.layers.1.self_attn.v_proj": 2}}, 0.5),
        ({"alpha_pattern": {r"layers\.[0-9]+\.self_attn\..*": 2}}, 0.5),
        ({"alpha_pattern": {"(q_proj|v_proj)": 2}}, 0.5),
        ({"alpha_pattern": {"v_proj": 2, "self_attn.v_proj": 3}}, 0.5),
        ({"alpha_pattern": {"proj": 2, "v_pro": 3, "layers.1": 5, "^v_proj": 7}}, 2.0),
    ],
)
def test_scale_of_a_module(tmp_path, config, scale):
    adapter = read(write_peft_adapter(tmp_path / "a", pairs(V), config=config))
    assert adapter.pairs[GGUF[V]].scale == scale


def test_patterns_give_single_modules_a_rank_of_their_own(tmp_path):
    written = {**pairs(Q, V, rank=4), **pairs(UP, rank=3)}
    config = {"rank_pattern": {"mlp.up_proj": 3}, "lora_alpha": 6, "use_rslora": True}
    adapter = read(write_peft_adapter(tmp_path / "a", written, config=config))
    assert adapter.ranks == {GGUF[Q]: 4, GGUF[V]: 4, GGUF[UP]: 3}
    assert adapter.pairs[GGUF[UP]].scale == pytest.approx(6 / math.sqrt(3), rel=1e-15)


def test_modules_that_are_stored_whole_are_replacements(tmp_path):
    k, head = np.arange(64, dtype=np.float32).reshape(8, 8), np.ones((20, 8), np.float32)
    norm = np.full(8, 0.5, np.float32)
    tensors = {f"{K}.weight": k, "lm_head.weight": head, f"{LAYER}.input_layernorm.weight": norm}
    config = {"modules_to_save": ["k_proj", "lm_head", "norm"]}
    folder = write_peft_adapter(tmp_path / "a", pairs(V), tensors=tensors, config=config)
    llama, gemma = read(folder).replacements, read(folder, GEMMA).replacements
    assert list(llama) == list(gemma) == ["output.weight", GGUF[K], "blk.1.attn_norm.weight"]
    assert (llama[GGUF[K]] == k[paired_rows(2, 8)]).all() and (gemma[GGUF[K]] == k).all()
    assert (llama["blk.1.attn_norm.weight"] == 0.5).all() and (gemma["blk.1.attn_norm.weight"] == 1.5).all()
    assert (llama["output.weight"] == 1).all()


def test_module_within_a_saved_one_is_a_replacement(tmp_path):
    config = {"modules_to_save": ["self_attn"]}
    tensors = {f"{K}.weight": zeros(8, 8)}
    assert (
        GGUF[K]
        in read(write_peft_adapter(tmp_path / "a", pairs(UP), tensors=tensors, config=config)).replacements
    )


def test_resized_embedding_is_a_replacement_without_being_named(tmp_path):
    tensors = {f"{EMBEDDING}.weight": zeros(22, 8)}
    adapter = read(write_peft_adapter(tmp_path / "a", pairs(V), tensors=tensors))
    with pytest.raises(ModelError, match=r"\[22, 8\] cannot replace the base model's \[20, 8\]"):
        check_fits(adapter, {GGUF[V]: (8, 8), "token_embd.weight": (20, 8)})


def test_tokens_of_an_activated_lora_are_read(tmp_path):
    config = {"alora_invocation_tokens": [4, 2]}
    assert read(write_peft_adapter(tmp_path / "a", pairs(V), config=config)).invocation_tokens == (4, 2)


def test_fingerprint_depends_on_both_files(tmp_path):
    plain = write_peft_adapter(tmp_path / "a", pairs(V))
    same = write_peft_adapter(tmp_path / "b", pairs(V))
    assert read(plain).fingerprint == read(same).fingerprint
    other_scale = write_peft_adapter(tmp_path / "c", pairs(V), config={"lora_alpha": 1})
    other_values = write_peft_adapter(tmp_path / "d", {V: (zeros(4, 8), zeros(8, 4))})
    assert len({read(folder).fingerprint for folder in (plain, other_scale, other_values)}) == 3


def test_facts_of_a_peft_adapter(tmp_path):
    config = {"base_model_name_or_path": "org/model", "use_rslora": True, "modules_to_save": ["norm"]}
    folder = write_peft_adapter(
        tmp_path / "a",
        {**pairs(V, EMBEDDING, rank=4)},
        config=config,
        tensors={"model.norm.weight": zeros(8)},
    )
    facts = inspect_adapter(folder)
    assert (facts.kind, facts.path, facts.architecture, facts.base_model) == (
        "peft",
        folder,
        None,
        "org/model",
    )
    assert facts.ranks == {EMBEDDING: 4, V: 4} and facts.alpha == 8
    assert facts.replaced == ("model.norm.weight",)
    assert facts.parameters == 4 * (8 + 8) + 4 * (20 + 8) + 8
    assert facts.formats == {"f32": 5} and facts.stored_bytes == 4 * facts.parameters
    assert (facts.uses_dora, facts.rank_stabilised) == (False, True)
    assert (facts.invocation_tokens, facts.prompt_prefix) == ((), "")


# Settings ---------------------------------------------------------------------------------------------------

HARMLESS = {
    "auto_mapping": None, "revision": "main", "peft_version": "0.21.2", "inference_mode": True, "lora_dropout": 0.1,
    "task_type": "CAUSAL_LM", "layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["lm_head"],
    "init_lora_weights": "gaussian", "loftq_config": {}, "eva_config": {"rho": 2.0}, "qalora_group_size": 16,
    "megatron_config": None, "layer_replication": None, "trainable_token_indices": None, "use_qalora": False,
    "lora_bias": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": None, "modules_to_save": None,
    "ensure_weight_tying": True, "a_key_of_the_next_release": None, "another": False, "a_third": {},
}  # fmt: skip


def test_settings_that_change_nothing_are_accepted(tmp_path):
    plain = read(write_peft_adapter(tmp_path / "a", pairs(V)))
    busy = read(write_peft_adapter(tmp_path / "b", pairs(V), config=HARMLESS))
    assert busy.pairs[GGUF[V]].scale == plain.pairs[GGUF[V]].scale
    assert (busy.pairs[GGUF[V]].b == plain.pairs[GGUF[V]].b).all()


@pytest.mark.parametrize("init", [True, False, None, "eva", "gaussian", "orthogonal", "mica"])
def test_initial_values_that_leave_the_base_model_alone_are_accepted(tmp_path, init):
    assert read(write_peft_adapter(tmp_path / "a", pairs(V), config={"init_lora_weights": init})).pairs


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.(q_proj|v_proj)", None, [V], ["self_attn.v_proj", "x"]]
)
def test_target_modules_that_mean_the_module_are_accepted(tmp_path, targets):
    assert read(write_peft_adapter(tmp_path / "a", pairs(V), config={"target_modules": targets})).pairs


UNSUPPORTED: dict[str, Any] = {
    "peft_type": "ADALORA", "fan_in_fan_out": True, "bias": "all", "lora_bias": True, "use_qalora": True,
    "layer_replication": [[0, 2], [1, 3]], "megatron_config": {"x": 1}, "trainable_token_indices": [5],
    "target_parameters": ["experts"], "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 3},
    "kasa_config": {"r": 1}, "monteclora_config": {"num_samples": 8}, "invocation_string": "go", "new_option": 3,
}  # fmt: skip


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_setting_that_is_not_implemented_is_refused(tmp_path, key):
    folder = write_peft_adapter(tmp_path / "a", pairs(V), config={key: UNSUPPORTED[key]})
    with pytest.raises(UnsupportedError, match=key) as caught:
        read(folder)
    check_message(caught.value, folder)
    with pytest.raises(UnsupportedError, match=key):
        inspect_adapter(folder)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 2, ["gaussian"], {}]
)
def test_initial_values_that_change_the_base_model_are_refused(tmp_path, init):
    folder = write_peft_adapter(tmp_path / "a", pairs(V), config={"init_lora_weights": init})
    with pytest.raises(UnsupportedError, match="init_lora_weights"):
        read(folder)


WRONG: list[tuple[str, Any]] = [
    ("r", 0), ("r", -4), ("r", "4"), ("r", 4.0), ("r", True), ("r", None), ("r", 2**40),
    ("lora_alpha", "8"), ("lora_alpha", None), ("lora_alpha", True), ("lora_alpha", 10**400), ("lora_alpha", [8]),
    ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
    ("rank_pattern", [4]), ("rank_pattern", {"v_proj": "4"}), ("rank_pattern", {"v_proj": 0}),
    ("alpha_pattern", "v_proj"), ("alpha_pattern", {"v_proj": None}),
    ("use_rslora", "yes"), ("use_dora", 1), ("modules_to_save", "lm_head"), ("modules_to_save", [1]),
    ("target_modules", {"v_proj": 1}), ("target_modules", [None]), ("base_model_name_or_path", 5),
    ("alora_invocation_tokens", [-1]), ("alora_invocation_tokens", ["a"]), ("alora_invocation_tokens", 7),
    ("alora_invocation_tokens", [True]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_setting_of_the_wrong_type_is_refused(tmp_path, key, value):
    folder = write_peft_adapter(tmp_path / "a", pairs(V), config={key: value})
    with pytest.raises(FormatError, match=f"adapter_config.json: {key} is ") as caught:
        read(folder)
    check_message(caught.value, folder)


@pytest.mark.parametrize("pattern", ["(", "[[a]", "a{2,1}", "(?P<x"])
def test_pattern_that_is_no_regular_expression_is_refused(tmp_path, pattern):
    folder = write_peft_adapter(tmp_path / "a", pairs(V), config={"rank_pattern": {pattern: 4}})
    with pytest.raises(FormatError, match="is no sound regular expression") as caught:
        read(folder)
    check_message(caught.value, folder)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|b)*c", "(.*){9}", ".*.*.*x", "a?" * 20, "(o|o)" * 20, "x" * 501],
    ids=lambda p: p[:9],
)
def test_pattern_that_could_take_for_ever_is_refused(tmp_path, pattern):
    folder = write_peft_adapter(tmp_path / "a", pairs(V), config={"alpha_pattern": {pattern: 1}})
    with pytest.raises(UnsupportedError, match="too complex"):
        read(folder)


# Folders that contradict themselves -------------------------------------------------------------------------


def check_message(error: RlxcError, folder: Path) -> None:
    """One line that starts with the file and ends with a remedy."""
    assert str(error).startswith(str(folder))
    assert error.remedy
    assert "\n" not in str(error)


DORA = {"magnitudes": {V: zeros(8)}}
REFUSED: dict[str, tuple[dict[str, Any], type[RlxcError], str]] = {
    "half a pair: no A": ({"without": ["lora_A.weight"]}, FormatError, "half a pair: lora_A.weight is missing"),
    "half a pair: no B": ({"without": ["lora_B.weight"]}, FormatError, "half a pair: lora_B.weight is missing"),
    "half an embedding": (
        {"pairs": pairs(EMBEDDING), "without": ["lora_embedding_B"]}, FormatError, "lora_embedding_B is missing"
    ),
    "magnitude without a pair": ({**DORA, "pairs": {}, "config": {"r": 4}}, FormatError, "but no pair"),
    "both kinds of pairs": (
        {"tensors": {f"{V}.lora_embedding_A": zeros(4, 8)}}, FormatError, "has both kinds of pairs"
    ),
    "embedding as a matrix": (
        {"pairs": {}, "config": {"target_modules": None, "r": 4},
         "tensors": {f"{EMBEDDING}.lora_A.weight": zeros(4, 8), f"{EMBEDDING}.lora_B.weight": zeros(20, 4)}},
        FormatError, "lora_embedding_A is how such a module is adapted",
    ),
    "matrix as an embedding": (
        {"pairs": {}, "config": {"target_modules": None, "r": 4},
         "tensors": {f"{V}.lora_embedding_A": zeros(4, 8), f"{V}.lora_embedding_B": zeros(8, 4)}},
        FormatError, "lora_A.weight is how such a module is adapted",
    ),
    "magnitude without use_dora": ({**DORA, "config": {"use_dora": False}}, FormatError, "has a magnitude, but"),
    "use_dora without a magnitude": ({"config": {"use_dora": True}}, FormatError, "has no magnitude, but"),
    "magnitude of another length": ({"magnitudes": {V: zeros(7)}}, FormatError, r"magnitude \[7\] is not one number"),
    "embedding with DoRA": (
        {"pairs": pairs(EMBEDDING), "magnitudes": {EMBEDDING: zeros(8)}}, UnsupportedError, "an embedding with DoRA"
    ),
    "rank other than r": ({"config": {"r": 8}}, FormatError, "has rank 4, but the configuration says 8"),
    "rank other than the pattern's": (
        {"config": {"rank_pattern": {"v_proj": 2}}}, FormatError, "has rank 4, but the configuration says 2"
    ),
    "transposed A": ({"pairs": {V: (zeros(9, 4), zeros(8, 4))}}, FormatError, "a is transposed"),
    "vector for A": ({"pairs": {V: (zeros(8), zeros(8, 4))}}, FormatError, r"has shape \[8\], not two dimensions"),
    "convolution": ({"pairs": {V: (zeros(4, 8, 1), zeros(8, 4, 1))}}, FormatError, "not two dimensions"),
    "not a number": ({"pairs": {V: (zeros(4, 8) + np.float32("nan"), zeros(8, 4))}}, FormatError, "not a number"),
    "whole weight that is not a number": (
        {"tensors": {"lm_head.weight": zeros(20, 8) + np.float32("inf")}}, FormatError, "'output.weight'.*not a number"
    ),
    "integers": ({"tensors": {"lm_head.weight": np.zeros((20, 8), np.int8)}}, UnsupportedError, "element type I8"),
    "no tensors": ({"pairs": {}}, FormatError, "holds no LoRA tensors"),
    "module that is no target": (
        {"config": {"target_modules": ["q_proj", "proj"]}}, FormatError, "target_modules does not name it"
    ),
    "whole module that is not saved": ({"tensors": {f"{K}.weight": zeros(8, 8)}}, FormatError, "modules_to_save does"),
    "saved module without tensors": ({"config": {"modules_to_save": ["k_proj"]}}, FormatError, "there is no tensor"),
    "name with the adapter's in it": (
        {"tensors": {f"{V}.lora_A.default.weight": zeros(4, 8)}}, FormatError, "is no part of a LoRA"
    ),
    "trained tokens": (
        {"tensors": {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": zeros(1, 8)}},
        FormatError, "is no part of a LoRA",
    ),
    "module of no Llama": (
        {"pairs": {f"{LAYER}.self_attn.qkv_proj": (zeros(4, 8), zeros(24, 4))}}, ModelError, "qkv_proj.*no llama model"
    ),
    "layer that the base lacks": (
        {"pairs": {"model.layers.3.mlp.up_proj": (zeros(4, 8), zeros(12, 4))}}, ModelError, "base model has 3 layers"
    ),
    "rows that are no heads": ({"pairs": {Q: (zeros(4, 8), zeros(18, 4))}}, ModelError, "not 4 heads of an even size"),
    "tensor adapted twice": (
        {"pairs": {f"{prefix}{V}": (zeros(4, 8), zeros(8, 4)) for prefix in ("", "language_model.")}},
        FormatError, "adapts a tensor twice",
    ),
    "pair and whole weight of one tensor": (
        {"tensors": {f"{V}.weight": zeros(8, 8)}, "config": {"modules_to_save": ["v_proj"]}},
        FormatError, "adapts a tensor twice",
    ),
    "base layer of another shape": (
        {"pairs": pairs(EMBEDDING), "tensors": {f"{EMBEDDING}.base_layer.weight": zeros(8, 20)}},
        FormatError, r"base layer of shape \[8, 20\], but the pair makes it \[20, 8\]",
    ),
    "tied weights": (
        {"pairs": pairs(EMBEDDING), "config": {"ensure_weight_tying": True}}, UnsupportedError, "ensure_weight_tying is"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_folder_that_contradicts_itself_or_the_base_is_refused(tmp_path, case):
    options, kind, message = REFUSED[case]
    folder = write_peft_adapter(tmp_path / "a", **{"pairs": pairs(V), **options})
    with pytest.raises(kind, match=message) as caught:
        read(folder)
    check_message(caught.value, folder)


def test_tensor_that_is_not_named_as_peft_does_is_refused(tmp_path):
    folder = write_peft_adapter(tmp_path / "a", pairs(V))
    for name in (f"{V}.lora_A.weight", "base_model.model." + "x" * 300):
        save_file({name: zeros(4, 8)}, folder / "adapter_model.safetensors")
        with pytest.raises(FormatError, match="is not named as PEFT does") as caught:
            read(folder)
        check_message(caught.value, folder)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"adapter_config.json: cannot be read: No such file"):
        read(tmp_path)
    folder = write_peft_adapter(tmp_path / "a", pairs(V))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: cannot be read: No such file"):
        read(folder)


def test_pickle_is_refused_unread(tmp_path):
    folder = write_peft_adapter(tmp_path / "a", pairs(V))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsupportedError, match="is a pickle, which runs code"):
        read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "is not sound JSON"),
        (b"\xff{}", "is not sound JSON"),
        (b"[]", "is not a JSON object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"r": 1, "r": 2}', "key 'r' appears twice"),
        (b'{"r": ' + b"9" * 5000 + b"}", "is not sound JSON"),
        (b"{}", "peft_type is None"),
    ],
    ids=["empty", "cut", "not UTF-8", "list", "deep", "key twice", "long number", "nothing"],
)
def test_damaged_configuration_is_refused(tmp_path, content, message):
    folder = write_peft_adapter(tmp_path / "a", pairs(V))
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises((FormatError, UnsupportedError), match=message) as caught:
        read(folder)
    check_message(caught.value, folder)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder with a bit of everything, and the bytes of its two files."""
    folder = write_peft_adapter(
        tmp_path_factory.mktemp("damaged") / "a",
        {**pairs(Q, V), **pairs(EMBEDDING)},
        config={
            "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 4}, "modules_to_save": ["k_proj"],
            "alora_invocation_tokens": [1],
        },
        tensors={f"{K}.weight": zeros(8, 8)},
    )  # fmt: skip
    return folder, {path: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(max_examples=500)
@given(data=st.data())
def test_damaged_folder_is_refused_or_read(damaged, data):
    folder, files = damaged
    victim = data.draw(st.sampled_from(list(files)))
    content = bytearray(files[victim])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.one_of(st.sampled_from(b'{}[]",:0192'), st.integers(0, 255)))
    for path, whole in files.items():
        path.unlink()  # a mapping that is still open keeps the old one
        path.write_bytes(content if path == victim else whole)
    with suppress(RlxcError):
        check_fits(read(folder), {GGUF[module]: shape for module, shape in SHAPES.items()})
    with suppress(RlxcError):
        inspect_adapter(folder)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from([V, "v_proj", ".*"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)
KEYS = [*UNSUPPORTED, *HARMLESS, *(key for key, _ in WRONG)]


@settings(max_examples=500)
@given(config=st.dictionaries(st.sampled_from(sorted(set(KEYS))), VALUES, min_size=1, max_size=3))
def test_any_configuration_is_refused_or_read(damaged, config):
    folder, files = damaged
    for path, whole in files.items():
        path.unlink()
        path.write_bytes(whole)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with suppress(RlxcError):
        read(folder)
