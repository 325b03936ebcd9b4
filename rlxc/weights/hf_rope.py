"""Rotary embedding as Hugging Face's configurations describe it, in the terms of GGUF metadata.

Transformers 5 writes one ``rope_parameters``, older releases ``rope_theta`` and ``rope_scaling``. Formulas:
Transformers' ``modeling_rope_utils.py``; Peng et al. 2023 (YaRN); Llama 3.1's factors as llama.cpp's converter
writes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlxc.errors import UnsupportedError
from rlxc.weights.hf_keys import Keys

THETA = 10000.0
GEMMA_THETA = 1e6
"""Of Gemma's full layers; its sliding-window layers have `THETA`."""


@dataclass(frozen=True)
class Rope:
    """The metadata, without the architecture's prefix, and what ``rope_freqs.weight`` holds, f32 ``[head_dim / 2]``."""

    metadata: dict[str, int | float | str]
    factors: npt.NDArray[np.float32] | None = None


def llama_rope(config: Keys, head_dim: int, context: int) -> Rope:
    """The one rotation of Llama's layers.

    Args:
        config: the whole configuration.
        head_dim: channels of a head.
        context: ``max_position_embeddings``.

    Raises:
        UnsupportedError: a kind of scaling, or an option of it, that is not implemented.
        ModelError: keys that are missing or contradict each other.
    """
    config.only("partial_rotary_factor", 1.0)
    given = config.group("rope_parameters")
    scaling = config.group("rope_scaling")
    if scaling is not None and given is not None and scaling.values != given.values:
        raise config.error("rope_scaling", "differs from rope_parameters")
    return _scaled(config, given or scaling, "rope_theta", THETA, head_dim, context)


def gemma3_rope(config: Keys, head_dim: int, context: int) -> Rope:
    """The two rotations of Gemma 3's layers, of which only the full ones' is scaled; arguments as `llama_rope`.

    Raises:
        UnsupportedError: a kind of scaling, or an option of it, that is not implemented.
        ModelError: keys that are missing or contradict each other.
    """
    config.only("partial_rotary_factor", 1.0)
    given = config.group("rope_parameters")
    full, sliding = config.group("rope_scaling"), None
    if given is not None:
        if full is not None:
            raise config.error("rope_scaling", "is given besides rope_parameters")
        full, sliding = given.group("full_attention"), given.group("sliding_attention")
        given.finish()
    rope = _scaled(config, full, "rope_theta", GEMMA_THETA, head_dim, context)
    local = _scaled(config, sliding, "rope_local_base_freq", THETA, head_dim, context)
    if rope.factors is not None or local.factors is not None or "rope.scaling.type" in local.metadata:
        raise UnsupportedError(
            "this kind of rope scaling is not implemented for gemma3",
            source=config.source,
            remedy="its full layers may have linear or yarn scaling, its sliding-window layers none",
        )
    return Rope({**rope.metadata, "rope.freq_base_swa": local.metadata["rope.freq_base"]})


def _scaled(
    config: Keys, scaling: Keys | None, theta_key: str, default: float, head_dim: int, context: int
) -> Rope:
    theta = config.number(theta_key, default)
    # Transformers reads it here too, and for other models than these.
    outer = (
        config.integer("original_max_position_embeddings")
        if config.has("original_max_position_embeddings")
        else None
    )
    if scaling is None:
        return Rope({"rope.freq_base": theta})
    if scaling.has("rope_theta"):
        inner = scaling.number("rope_theta")
        if config.has(theta_key) and inner != theta:
            raise scaling.error("rope_theta", f"is {inner}, but {theta_key} is {theta}")
        theta = inner
    metadata: dict[str, int | float | str] = {"rope.freq_base": theta}
    scaling.only("partial_rotary_factor", 1.0)
    old_kind = scaling.text("type", "default")
    kind = scaling.text("rope_type", old_kind)
    if scaling.has("type") and kind != old_kind:
        raise scaling.error("rope_type", f"is {kind!r}, but type is {old_kind!r}")

    factors = None
    if kind == "linear":
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": _factor(scaling)}
    elif kind == "yarn":
        metadata |= _yarn(scaling, _original(scaling, outer, context), context)
    elif kind == "llama3":
        factors = _llama3_factors(scaling, theta, head_dim, _original(scaling, outer, context))
    elif kind != "default":
        raise UnsupportedError(
            f"{scaling.where}rope_type = {kind!r} is not implemented",
            source=scaling.source,
            remedy="default, linear, yarn and llama3 are",
        )
    scaling.finish()
    return Rope(metadata, factors)


def _original(scaling: Keys, outer: int | None, context: int) -> int:
    """The context length that the model was trained at before it was stretched."""
    inner = scaling.integer("original_max_position_embeddings", outer or context)
    if outer not in (None, inner):
        raise scaling.error("original_max_position_embeddings", f"is {inner}, but outside it is {outer}")
    return inner


def _factor(scaling: Keys, default: float | None = None) -> float:
    factor = scaling.number("factor", default)
    if factor < 1:
        raise scaling.error("factor", f"is {factor}; a context can only be stretched")
    return factor


def _yarn(scaling: Keys, original: int, context: int) -> dict[str, int | float | str]:
    factor = _factor(scaling, context / original)
    scaling.only("truncate", True)
    scaling.only("finetuned", True, False)  # tells how the model came about, nothing else
    usual = magnitude = _magnitude(factor)
    one_dim, every_dim = (
        scaling.number(key) if scaling.has(key) else 0 for key in ("mscale", "mscale_all_dim")
    )
    if one_dim and every_dim:  # one alone is without effect
        magnitude = _magnitude(factor, one_dim) / _magnitude(factor, every_dim)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        # GGUF's is a factor to the usual magnitude, not the whole.
        "rope.scaling.attn_factor": scaling.number("attention_factor", magnitude) / usual,
        "rope.scaling.yarn_beta_fast": scaling.number("beta_fast", 32.0),
        "rope.scaling.yarn_beta_slow": scaling.number("beta_slow", 1.0),
    }


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1 + 0.1 * mscale * math.log(factor)


def _llama3_factors(scaling: Keys, theta: float, head_dim: int, original: int) -> npt.NDArray[np.float32]:
    """By how much each frequency is divided: 1 for the fast, ``factor`` for the slow, and a ramp between."""
    factor = _factor(scaling)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise scaling.error("high_freq_factor", f"is {high}, not more than low_freq_factor, {low}")
    turns = original / (2 * math.pi) * theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - kept) / factor + kept)).astype(np.float32)
    return factors
