"""What families of Hugging Face models are described with: sizes, tensors of a layer, and sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlxc.errors import UnsupportedError
from rlxc.weights.gguf_header import MetaValue
from rlxc.weights.hf_keys import Keys
from rlxc.weights.hf_rope import Rope

Shapes = dict[str, tuple[int, ...]]
"""Tensors by GGUF name; those of a layer without ``blk.N.``."""

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Sizes:
    """The numbers that every configuration has."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int


@dataclass(frozen=True)
class Traits:
    """What sets a model apart from others of its sizes.

    Attributes:
        rope: its rotation.
        layer: the tensors of one layer.
        metadata: GGUF's keys and values, without the architecture's prefix.
        norm_bias: whether the last norm has a bias.
    """

    rope: Rope
    layer: Shapes
    metadata: dict[str, MetaValue] = field(default_factory=dict)
    norm_bias: bool = False


def linear(name: str, out: int, in_: int, bias: bool = False) -> Shapes:
    """The tensors of one linear layer."""
    return {f"{name}.weight": (out, in_), **({f"{name}.bias": (out,)} if bias else {})}


def norms(size: int, *names: str, bias: bool = False) -> Shapes:
    """The tensors of norms over ``size`` channels."""
    shapes: Shapes = {}
    for name in names:
        shapes |= {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if bias else {})}
    return shapes


def projections(sizes: Sizes, bias: bool, output_bias: bool) -> Shapes:
    """Queries, keys, values and what comes after attention."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return {
        **linear("attn_q", queries, sizes.hidden, bias),
        **linear("attn_k", keys, sizes.hidden, bias),
        **linear("attn_v", keys, sizes.hidden, bias),
        **linear("attn_output", sizes.hidden, queries, output_bias),
    }


def gated_mlp(sizes: Sizes, bias: bool = False) -> Shapes:
    """An MLP with a gate."""
    return {
        **linear("ffn_gate", sizes.ffn, sizes.hidden, bias),
        **linear("ffn_up", sizes.ffn, sizes.hidden, bias),
        **linear("ffn_down", sizes.hidden, sizes.ffn, bias),
    }


def experts(sizes: Sizes, count: int, ffn: int, bias: bool = False) -> Shapes:
    """A gated MLP for each expert, and the router."""
    shapes = linear("ffn_gate_inp", count, sizes.hidden, bias)
    for name, out, in_ in (
        ("ffn_gate_exps", ffn, sizes.hidden),
        ("ffn_up_exps", ffn, sizes.hidden),
        ("ffn_down_exps", sizes.hidden, ffn),
    ):
        shapes[f"{name}.weight"] = (count, out, in_)
        if bias:
            shapes[f"{name}.bias"] = (count, out)
    return shapes


def window_size(config: Keys, default: int | None) -> int | None:
    """``sliding_window``: None where it is null."""
    if "sliding_window" in config.values and not config.has("sliding_window"):
        return None
    return config.integer("sliding_window", default) if default or config.has("sliding_window") else None


def windows(config: Keys, sizes: Sizes, window: int | None, sliding: Sequence[bool]) -> dict[str, MetaValue]:
    """Metadata of sliding windows.

    Args:
        config: the configuration, whose ``layer_types`` count if it has them.
        sizes: the model's.
        window: what `window_size` found.
        sliding: which layers have the window where ``layer_types`` does not tell.
    """
    kinds = config.texts("layer_types")
    if kinds is not None:
        if len(kinds) != sizes.layers or set(kinds) - {FULL, SLIDING}:
            raise config.error("layer_types", f"must say {FULL} or {SLIDING} {sizes.layers} times")
        sliding = [kind == SLIDING for kind in kinds]
    if any(sliding) and window is None:
        raise UnsupportedError(
            "sliding_window is null, but the model has sliding-window layers",
            source=config.source,
            remedy="a number is implemented",
        )
    found: dict[str, MetaValue] = {"attention.sliding_window_pattern": np.array(sliding)}
    return found if window is None else {"attention.sliding_window": window, **found}


def one_window(config: Keys, sizes: Sizes, window: int | None) -> dict[str, MetaValue]:
    """Metadata of a window that all layers have, or none; without effect where it is as long as the context."""
    is_windowed = window is not None and window < sizes.context
    kinds = config.texts("layer_types")
    if kinds is not None and set(kinds) - {SLIDING if is_windowed else FULL}:
        raise config.unsupported(
            "layer_types", "for this kind of model, all layers have sliding_window or none"
        )
    if not is_windowed:
        return {}
    assert window is not None  # which is what makes it windowed
    return {
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": np.full(sizes.layers, True),
    }
