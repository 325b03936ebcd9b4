"""Names of tensors against llama.cpp's own map, and the order of rows against its definition."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from rlxc.errors import UnsupportedError, WeightError
from rlxc.models import ARCHITECTURES
from rlxc.weights.names import (
    adds_one,
    gguf_rows,
    is_of_experts,
    is_permuted,
    layer_of,
    permute,
    to_gguf,
    to_huggingface,
    unpermute,
)

MODEL = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
NORMS = ["input_layernorm", "post_attention_layernorm"]
HEAD_NORMS = ["self_attn.q_norm", "self_attn.k_norm"]
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA = [*NORMS, *PROJECTIONS, *MLP]
GEMMA2 = [*LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
PARTS = {
    "llama": [*LLAMA, "block_sparse_moe.gate", *(f"block_sparse_moe.experts.*.w{i}" for i in (1, 2, 3))],
    "gemma2": GEMMA2,
    "gemma3": [*GEMMA2, *HEAD_NORMS],
    "gpt-oss": [*NORMS, *PROJECTIONS, "mlp.router"],
    "granite": LLAMA,
    "olmo2": [*PROJECTIONS, *HEAD_NORMS, *MLP, "post_attention_layernorm", "post_feedforward_layernorm"],
    "phi3": [*NORMS, "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "qwen2": LLAMA,
    "qwen3": [*LLAMA, *HEAD_NORMS],
    "qwen3moe": [
        *(*NORMS, *HEAD_NORMS, *PROJECTIONS, "mlp.gate"),
        *(f"mlp.experts.*.{name}_proj" for name in ("gate", "up", "down")),
    ],
    "stablelm": LLAMA,
    "starcoder2": [*NORMS, *PROJECTIONS, "mlp.c_fc", "mlp.c_proj"],
}
NAMES = [
    (architecture, name)
    for architecture in PARTS
    for name in (
        *MODEL,
        *(f"model.layers.{i}.{part}.weight" for i in (0, 11) for part in PARTS[architecture]),
        *(f"model.layers.{i}.{part}.bias" for i in (0, 11) for part in PARTS[architecture]),
    )
]
NAMES_IN_GGUF = {to_gguf(architecture, name) for architecture, name in NAMES}


@pytest.mark.parametrize("architecture", PARTS)
def test_names_are_those_of_the_reference_converter(architecture):
    reference = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper().replace("-", "_")], 12)
    found = {name: to_gguf(architecture, name) for of, name in NAMES if of == architecture}
    # There, the matrices of all experts have one name from the start.
    expected = {name: reference.get_name(name.replace(".*", ""), (".weight", ".bias")) for name in found}
    if architecture == "gemma2":  # whose output is always tied, there
        expected["lm_head.weight"] = "output.weight"
    assert found == expected


def test_there_and_back_is_the_same_name():
    assert [(a, to_huggingface(a, to_gguf(a, name))) for a, name in NAMES] == NAMES


def test_every_architecture_has_names():
    assert set(PARTS) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("qwen3moe", "model.layers.3.mlp.experts.127.up_proj.weight", "blk.3.ffn_up_exps.weight"),
        ("llama", "model.layers.0.block_sparse_moe.experts.0.w2.weight", "blk.0.ffn_down_exps.weight"),
        ("qwen3moe", "model.layers.3.mlp.experts.01.up_proj.weight", None),
        ("qwen3moe", "model.layers.3.mlp.experts.up_proj.weight", None),
        ("qwen3", "model.layers.3.mlp.experts.1.up_proj.weight", None),
        ("llama", "model.layers.3.mlp.experts.1.up_proj.weight", None),
    ],
)
def test_matrix_of_an_expert_is_a_part_of_one_tensor(architecture, name, expected):
    assert to_gguf(architecture, name) == expected


def test_tensors_of_experts_are_told():
    experts = {name for name in NAMES_IN_GGUF if is_of_experts(name)}
    assert experts == {
        f"blk.{i}.ffn_{part}_exps.{end}"
        for i in (0, 11)
        for part in ("gate", "up", "down")
        for end in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "blk.3.ffn_up.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "blk.3.ffn_up.weight"),
        ("language_model.model.embed_tokens.weight", "token_embd.weight"),
        ("model.language_model.norm.weight", "output_norm.weight"),
        ("language_model.lm_head.weight", "output.weight"),
    ],
)
def test_text_part_of_a_model_of_text_and_images_has_the_same_names(name, expected):
    assert to_gguf("gemma3", name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.01.self_attn.q_proj.weight",
        "model.layers.123456.self_attn.q_proj.weight",
        "model.layers.٣.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight.absmax",
        "layers.0.self_attn.q_proj.weight",
        "vision_tower.layers.0.self_attn.q_proj.weight",
        "embed_tokens.weight",
        "model.lm_head.weight",
        "",
    ],
)
def test_what_no_llama_model_has_is_none(name):
    assert to_gguf("llama", name) is None


@pytest.mark.parametrize(
    "name", ["blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "attn_q.weight", "output", ""]
)
def test_gguf_tensor_that_no_llama_model_has_is_none(name):
    assert to_huggingface("llama", name) is None


@pytest.mark.parametrize("translate", [to_gguf, to_huggingface])
def test_unknown_architecture_is_refused(translate):
    with pytest.raises(UnsupportedError, match=r"'mamba'.*known: gemma2, gemma3, gpt-oss"):
        translate("mamba", "model.norm.weight")


def test_layer_of_a_tensor():
    assert [layer_of(n) for n in ("blk.0.attn_q.weight", "blk.17.ffn_up.weight", "output.weight")] == [
        0,
        17,
        None,
    ]


def test_only_q_and_k_of_llama_and_granite_are_permuted():
    permuted = {(a, to_gguf(a, n)) for a, n in NAMES if is_permuted(a, to_gguf(a, n))}
    assert permuted == {
        (architecture, f"blk.{i}.{part}.{end}")
        for architecture in ("llama", "granite")
        for i in (0, 11)
        for part in ("attn_q", "attn_k")
        for end in ("weight", "bias")
    }


def test_only_gemma_s_norms_have_one_added():
    added = {(a, to_gguf(a, n)) for a, n in NAMES if adds_one(a, to_gguf(a, n))}
    norms = ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"]
    of_layers = {"gemma2": norms, "gemma3": [*norms, "attn_q_norm", "attn_k_norm"]}
    assert added == {
        (architecture, name)
        for architecture, parts in of_layers.items()
        for name in ("output_norm.weight", *(f"blk.{i}.{part}.weight" for i in (0, 11) for part in parts))
    }


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 4), (4, 6)])
def test_row_of_each_half_goes_beside_its_partner(heads, head_dim):
    rows = np.arange(heads * head_dim * 5).reshape(heads * head_dim, 5)
    permuted = permute(rows, heads)
    for head in range(heads):
        for half in range(2):
            for j in range(head_dim // 2):
                source = head * head_dim + half * head_dim // 2 + j
                assert (permuted[head * head_dim + 2 * j + half] == rows[source]).all()


@pytest.mark.parametrize("shape", [(24,), (24, 7), (24, 2, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_unpermute_undoes_permute_whatever_a_row_is(shape, dtype):
    rows = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    permuted = permute(rows, 4)
    assert permuted.dtype == dtype and not (permuted == rows).all()
    assert (unpermute(permuted, 4) == rows).all()
    assert (permute(unpermute(rows, 4), 4) == rows).all()


def test_keys_are_permuted_by_their_own_heads_and_values_not_at_all():
    rows = np.arange(16.0)
    assert (gguf_rows("llama", "blk.0.attn_q.weight", rows, 4, 2) == permute(rows, 4)).all()
    assert (gguf_rows("llama", "blk.0.attn_k.bias", rows, 4, 2) == permute(rows, 2)).all()
    assert gguf_rows("llama", "blk.0.attn_v.weight", rows, 4, 2) is rows
    assert (gguf_rows("granite", "blk.0.attn_k.weight", rows, 4, 2) == permute(rows, 2)).all()
    assert gguf_rows("gemma3", "blk.0.attn_q.weight", rows, 4, 2) is rows


@pytest.mark.parametrize(("shape", "heads"), [((12, 2), 4), ((12, 2), 0), ((0, 2), 2), ((), 1), ((12,), -1)])
@pytest.mark.parametrize("reorder", [permute, unpermute])
def test_rows_that_are_no_whole_heads_are_refused(reorder, shape, heads):
    with pytest.raises(WeightError, match=f"are not {heads} heads of an even size"):
        reorder(np.zeros(shape), heads)
