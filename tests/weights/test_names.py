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
    is_permuted,
    layer_of,
    permute,
    to_gguf,
    to_huggingface,
    unpermute,
)

MODEL = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
LLAMA = (
    "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj".split()
)
PARTS = {
    "llama": LLAMA,
    "gemma3": [
        *LLAMA,
        "self_attn.q_norm",
        "self_attn.k_norm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ],
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


@pytest.mark.parametrize(("architecture", "name"), NAMES)
def test_names_are_those_of_the_reference_converter(architecture, name):
    reference = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 12)
    assert to_gguf(architecture, name) == reference.get_name(name, (".weight", ".bias"))


@pytest.mark.parametrize(("architecture", "name"), NAMES)
def test_there_and_back_is_the_same_name(architecture, name):
    assert to_huggingface(architecture, to_gguf(architecture, name)) == name


def test_every_architecture_has_names():
    assert {architecture for architecture in ARCHITECTURES if to_gguf(architecture, MODEL[0])} == set(
        ARCHITECTURES
    )


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
    with pytest.raises(UnsupportedError, match=r"'mamba'.*known: gemma3, llama"):
        translate("mamba", "model.norm.weight")


def test_layer_of_a_tensor():
    assert [layer_of(n) for n in ("blk.0.attn_q.weight", "blk.17.ffn_up.weight", "output.weight")] == [
        0,
        17,
        None,
    ]


def test_only_llama_s_q_and_k_are_permuted():
    permuted = {(a, to_gguf(a, n)) for a, n in NAMES if is_permuted(a, to_gguf(a, n))}
    assert permuted == {
        ("llama", f"blk.{i}.{part}.{end}")
        for i in (0, 11)
        for part in ("attn_q", "attn_k")
        for end in ("weight", "bias")
    }


def test_only_gemma_s_norms_have_one_added():
    added = {(a, to_gguf(a, n)) for a, n in NAMES if adds_one(a, to_gguf(a, n))}
    norms = "attn_norm ffn_norm attn_q_norm attn_k_norm post_attention_norm post_ffw_norm".split()
    assert added == {
        ("gemma3", "output_norm.weight"),
        *(("gemma3", f"blk.{i}.{norm}.weight") for i in (0, 11) for norm in norms),
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
    assert gguf_rows("gemma3", "blk.0.attn_q.weight", rows, 4, 2) is rows


@pytest.mark.parametrize(("shape", "heads"), [((12, 2), 4), ((12, 2), 0), ((0, 2), 2), ((), 1), ((12,), -1)])
@pytest.mark.parametrize("reorder", [permute, unpermute])
def test_rows_that_are_no_whole_heads_are_refused(reorder, shape, heads):
    with pytest.raises(WeightError, match=f"are not {heads} heads of an even size"):
        reorder(np.zeros(shape), heads)
