"""What the tiny models of each architecture hold: metadata, and names and shapes of tensors.

To add an architecture, add an entry to `ARCHITECTURES`; variants of it go to ``tiny.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB, CONTEXT = 256, 512, 4, 64, 300, 256

Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Sizes:
    """The numbers of one tiny model.

    Attributes:
        architecture: the name that metadata give it.
        layers: how many; by default as many as show all kinds of layers that the architecture has.
        kv_heads: key/value heads of the heads.
        tied: without ``output.weight``.
        bias: with the biases that some models of the architecture have and others have not.
        rope_scaling: ``linear``, ``yarn``, ``llama3`` (a ``rope_freqs.weight``) or ``longrope`` (two sets of factors,
            of which the ``context`` asks for the long ones).
        rope_dim: the channels that are rotated; by default all of a head.
        window: of the sliding-window layers; 0 for none.
        experts: in each layer; 0 for none.
        experts_used: by each token.
        expert_ffn: the inner channels of each expert.
        qk_norm: with the norms of queries and keys that some models of the architecture have.
        parallel: without the norm before the MLP, which then has the attention's input.
    """

    architecture: str
    _: KW_ONLY
    layers: int = 0
    hidden: int = HIDDEN
    ffn: int = FFN
    heads: int = HEADS
    kv_heads: int = 2
    head_dim: int = HEAD_DIM
    vocab: int = VOCAB
    context: int = CONTEXT
    tied: bool = True
    bias: bool = False
    rope_scaling: str | None = None
    rope_dim: int = 0
    window: int = 0
    experts: int = 0
    experts_used: int = 2
    expert_ffn: int = 0
    qk_norm: bool = False
    parallel: bool = False

    @property
    def layer_count(self) -> int:
        """How many layers the model has."""
        return self.layers or ARCHITECTURES[self.architecture].layers

    @property
    def q_size(self) -> int:
        """Channels of all queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of all keys, and of all values."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        layer: the tensors of one layer, in file order, without the layer's prefix.
        settings: metadata beyond `common_settings`, or in their place.
        top: the tensors that belong to no layer.
        layers: as many as show all kinds of layers.
        needs_output: llama.cpp loads no file without ``output.weight``; a tied one holds the embedding a second time.
    """

    layer: Callable[[Sizes], Tensors]
    settings: Callable[[Sizes], dict[str, Any]] = lambda _: {}
    top: Callable[[Sizes], Tensors] = lambda sizes: _top(sizes)
    layers: int = 2
    needs_output: bool = False


def settings(sizes: Sizes) -> dict[str, Any]:
    """The metadata of a model, by keys without the architecture's prefix."""
    return common_settings(sizes) | ARCHITECTURES[sizes.architecture].settings(sizes) | _scaling(sizes)


def shapes(sizes: Sizes) -> Tensors:
    """Every tensor's name and shape, in file order."""
    architecture = ARCHITECTURES[sizes.architecture]
    yield from architecture.top(sizes)
    for i in range(sizes.layer_count):
        for name, shape in architecture.layer(sizes):
            yield f"blk.{i}.{name}", shape


def common_settings(sizes: Sizes) -> dict[str, Any]:
    """What all architectures have."""
    return {
        "context_length": sizes.context,
        "embedding_length": sizes.hidden,
        "block_count": sizes.layer_count,
        "feed_forward_length": sizes.ffn,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e4,
    }


def _scaling(sizes: Sizes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if sizes.rope_dim:
        found["rope.dimension_count"] = sizes.rope_dim
    if sizes.window:
        found["attention.sliding_window"] = sizes.window
    if sizes.rope_scaling in ("linear", "yarn"):
        found |= {"rope.scaling.type": sizes.rope_scaling, "rope.scaling.factor": 4.0}
    if sizes.rope_scaling == "yarn":
        # So long that both ends of the ramp lie inside the head.
        found["rope.scaling.original_context_length"] = 2048
    if sizes.rope_scaling == "longrope":
        found |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.25}
        found["rope.scaling.original_context_length"] = sizes.context // 2
    return found


# --- tensors ------------------------------------------------------------------------------------------------------


def _top(sizes: Sizes, bias: bool = False) -> Tensors:
    yield "token_embd.weight", (sizes.vocab, sizes.hidden)
    yield "output_norm.weight", (sizes.hidden,)
    if bias:
        yield "output_norm.bias", (sizes.hidden,)
    if not sizes.tied or ARCHITECTURES[sizes.architecture].needs_output:
        yield "output.weight", (sizes.vocab, sizes.hidden)
    rotated = sizes.rope_dim or sizes.head_dim
    if sizes.rope_scaling == "llama3":
        yield "rope_freqs.weight", (rotated // 2,)
    if sizes.rope_scaling == "longrope":
        yield "rope_factors_long.weight", (rotated // 2,)
        yield "rope_factors_short.weight", (rotated // 2,)


def linear(name: str, out: int, in_: int, bias: bool = False) -> Tensors:
    """A matrix, and its bias if it has one."""
    yield f"{name}.weight", (out, in_)
    if bias:
        yield f"{name}.bias", (out,)


def projections(sizes: Sizes) -> Tensors:
    """Queries, keys and values."""
    yield from linear("attn_q", sizes.q_size, sizes.hidden, sizes.bias)
    yield from linear("attn_k", sizes.kv_size, sizes.hidden, sizes.bias)
    yield from linear("attn_v", sizes.kv_size, sizes.hidden, sizes.bias)


def layer_norm(name: str, sizes: Sizes) -> Tensors:
    """A layer norm's weight and bias."""
    yield f"{name}.weight", (sizes.hidden,)
    yield f"{name}.bias", (sizes.hidden,)


def experts(sizes: Sizes) -> Tensors:
    """The router, and gates, ups and downs of all experts."""
    count, hidden, ffn = sizes.experts, sizes.hidden, sizes.expert_ffn
    yield from linear("ffn_gate_inp", count, hidden, sizes.bias)
    for name, out, in_ in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
        yield f"ffn_{name}_exps.weight", (count, out, in_)
        if sizes.bias:
            yield f"ffn_{name}_exps.bias", (count, out)


def gated_mlp(sizes: Sizes) -> Tensors:
    """Gate, up and down."""
    yield from linear("ffn_gate", sizes.ffn, sizes.hidden)
    yield from linear("ffn_up", sizes.ffn, sizes.hidden)
    yield from linear("ffn_down", sizes.hidden, sizes.ffn)


def _llama(sizes: Sizes) -> Tensors:
    yield "attn_norm.weight", (sizes.hidden,)
    yield from projections(sizes)
    yield from linear("attn_output", sizes.hidden, sizes.q_size)
    yield "ffn_norm.weight", (sizes.hidden,)
    yield from experts(sizes) if sizes.experts else gated_mlp(sizes)


def _qwen3(sizes: Sizes) -> Tensors:
    yield from _llama(sizes)
    yield "attn_q_norm.weight", (sizes.head_dim,)
    yield "attn_k_norm.weight", (sizes.head_dim,)


def _gemma2(sizes: Sizes) -> Tensors:
    yield from _llama(sizes)
    yield "post_attention_norm.weight", (sizes.hidden,)
    yield "post_ffw_norm.weight", (sizes.hidden,)


def _phi3(sizes: Sizes) -> Tensors:
    yield "attn_norm.weight", (sizes.hidden,)
    yield from linear("attn_qkv", sizes.q_size + 2 * sizes.kv_size, sizes.hidden, sizes.bias)
    yield from linear("attn_output", sizes.hidden, sizes.q_size)
    yield "ffn_norm.weight", (sizes.hidden,)
    yield from linear("ffn_up", 2 * sizes.ffn, sizes.hidden)
    yield from linear("ffn_down", sizes.hidden, sizes.ffn)


def _olmo2(sizes: Sizes) -> Tensors:
    yield from projections(sizes)
    yield "attn_q_norm.weight", (sizes.q_size,)
    yield "attn_k_norm.weight", (sizes.kv_size,)
    yield from linear("attn_output", sizes.hidden, sizes.q_size)
    yield "post_attention_norm.weight", (sizes.hidden,)
    yield from gated_mlp(sizes)
    yield "post_ffw_norm.weight", (sizes.hidden,)


def _gemma3(sizes: Sizes) -> Tensors:
    yield "attn_norm.weight", (sizes.hidden,)
    yield from projections(sizes)
    yield "attn_q_norm.weight", (sizes.head_dim,)
    yield "attn_k_norm.weight", (sizes.head_dim,)
    yield "post_attention_norm.weight", (sizes.hidden,)
    yield "post_ffw_norm.weight", (sizes.hidden,)
    yield from linear("attn_output", sizes.hidden, sizes.q_size)
    yield "ffn_norm.weight", (sizes.hidden,)
    yield from gated_mlp(sizes)


def _starcoder2(sizes: Sizes) -> Tensors:
    yield from layer_norm("attn_norm", sizes)
    yield from projections(sizes)
    yield from linear("attn_output", sizes.hidden, sizes.q_size, sizes.bias)
    yield from layer_norm("ffn_norm", sizes)
    yield from linear("ffn_up", sizes.ffn, sizes.hidden, sizes.bias)
    yield from linear("ffn_down", sizes.hidden, sizes.ffn, sizes.bias)


def _stablelm(sizes: Sizes) -> Tensors:
    yield from layer_norm("attn_norm", sizes)
    yield from projections(sizes)
    if sizes.qk_norm:
        yield "attn_q_norm.weight", (sizes.heads, sizes.head_dim)
        yield "attn_k_norm.weight", (sizes.kv_heads, sizes.head_dim)
    yield from linear("attn_output", sizes.hidden, sizes.q_size)
    if not sizes.parallel:
        yield from layer_norm("ffn_norm", sizes)
    yield from gated_mlp(sizes)


def _qwen3moe(sizes: Sizes) -> Tensors:
    yield "attn_norm.weight", (sizes.hidden,)
    yield from projections(sizes)
    yield "attn_q_norm.weight", (sizes.head_dim,)
    yield "attn_k_norm.weight", (sizes.head_dim,)
    yield from linear("attn_output", sizes.hidden, sizes.q_size)
    yield "ffn_norm.weight", (sizes.hidden,)
    yield from experts(sizes)


def _gpt_oss(sizes: Sizes) -> Tensors:
    yield "attn_norm.weight", (sizes.hidden,)
    yield from projections(sizes)
    yield "attn_sinks.weight", (sizes.heads,)
    yield from linear("attn_output", sizes.hidden, sizes.q_size, sizes.bias)
    yield "post_attention_norm.weight", (sizes.hidden,)
    yield from experts(sizes)


def _layer_norm_settings(sizes: Sizes) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None}


def _expert_settings(sizes: Sizes) -> dict[str, Any]:
    return {
        "expert_count": sizes.experts,
        "expert_used_count": sizes.experts_used,
        "expert_feed_forward_length": sizes.expert_ffn,
    }


def _llama_settings(sizes: Sizes) -> dict[str, Any]:
    found: dict[str, Any] = {"rope.dimension_count": sizes.head_dim}
    if sizes.experts:
        found |= {"expert_count": sizes.experts, "expert_used_count": sizes.experts_used}
    return found


def _granite_settings(sizes: Sizes) -> dict[str, Any]:
    return {
        "rope.dimension_count": sizes.head_dim,
        "attention.scale": 0.2,
        "embedding_scale": 12.0,
        "residual_scale": 0.25,
        "logit_scale": 3.0,
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    # Three layers: a full one between two with windows. The caps are so low that scores and logits feel them.
    "gemma2": Architecture(
        _gemma2, lambda _: {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, layers=3
    ),
    # Seven layers of Gemma 3: five sliding-window ones, a full one, and the start of the next period.
    "gemma3": Architecture(_gemma3, lambda _: {"rope.freq_base": 1e6}, layers=7),
    "gpt-oss": Architecture(
        _gpt_oss,
        lambda sizes: {**_expert_settings(sizes), "rope.freq_base": 1.5e5},
        needs_output=True,
    ),
    "granite": Architecture(_llama, _granite_settings),
    "llama": Architecture(_llama, _llama_settings),
    "olmo2": Architecture(_olmo2, needs_output=True),
    "phi3": Architecture(_phi3),
    "qwen2": Architecture(_llama, lambda _: {"rope.freq_base": 1e6}),
    "qwen3": Architecture(_qwen3, lambda _: {"rope.freq_base": 1e6}),
    "qwen3moe": Architecture(_qwen3moe, lambda sizes: {**_expert_settings(sizes), "rope.freq_base": 1e6}),
    "stablelm": Architecture(
        _stablelm, _layer_norm_settings, lambda sizes: _top(sizes, bias=True), needs_output=True
    ),
    "starcoder2": Architecture(_starcoder2, _layer_norm_settings, lambda sizes: _top(sizes, bias=True)),
}
