"""Rotary embedding as Hugging Face's configurations describe it, in the terms of GGUF metadata.

Transformers 5 writes one ``rope_parameters``, older releases ``rope_theta`` and ``rope_scaling``. Formulas:
Transformers' ``modeling_rope_utils.py``; Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE); Llama 3.1's factors as
llama.cpp's converter writes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rlxc.errors import UnsupportedError
from rlxc.weights.hf_keys import Keys

THETA = 10000.0
GEMMA_THETA = 1e6
"""Of Gemma 3's full layers; its sliding-window layers have `THETA`."""
OLMO3_THETA = 5e5

SCALINGS = ("default", "linear", "yarn")
"""What needs no more than metadata."""
FACTOR_SCALINGS = (*SCALINGS, "llama3", "longrope")
"""Of architectures that divide frequencies one by one, by what a tensor says."""

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_OLD_NAMES = {"su": "longrope"}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rope:
    """The metadata, without the architecture's prefix, and tensors of factors, f32 ``[dim / 2]``, by GGUF name."""

    metadata: dict[str, int | float | str]
    factors: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class RopeClass:
    """What a class of Transformers does where the configuration does not say.

    Attributes:
        theta: the default of ``rope_theta``.
        scalings: what ``rope_type`` may be.
        share: of a head that is rotated, where models differ in that; None where it is all of it.
        original: the default of ``original_max_position_embeddings``; None for the whole context.
    """

    theta: float = THETA
    scalings: Collection[str] = SCALINGS
    share: float | None = None
    original: int | None = None


def one_rope(config: Keys, head_dim: int, context: int, kind: RopeClass) -> Rope:
    """The one rotation of all layers.

    Args:
        config: the whole configuration.
        head_dim: channels of a head.
        context: ``max_position_embeddings``.
        kind: the model's class.

    Raises:
        UnsupportedError: a kind of scaling, or an option of it, that is not implemented.
        ModelError: keys that are missing or contradict each other.
    """
    given = config.group("rope_parameters")
    scaling = config.group("rope_scaling")
    if scaling is not None and given is not None and scaling.values != given.values:
        raise config.error("rope_scaling", "differs from rope_parameters")
    return _Reader(config, head_dim, context, kind).read(given or scaling, "rope_theta")


def gemma3_rope(config: Keys, head_dim: int, context: int) -> Rope:
    """The two rotations of Gemma 3's layers, of which only the full ones' is scaled; arguments as `one_rope`.

    Raises:
        UnsupportedError: a kind of scaling, or an option of it, that is not implemented.
        ModelError: keys that are missing or contradict each other.
    """
    full, sliding = _two_groups(config)
    rope = _Reader(config, head_dim, context, RopeClass(GEMMA_THETA)).read(full, "rope_theta")
    local = _Reader(config, head_dim, context, RopeClass(scalings=("default",)))
    theta = local.read(sliding, "rope_local_base_freq").metadata["rope.freq_base"]
    return Rope({**rope.metadata, "rope.freq_base_swa": theta})


def olmo3_rope(config: Keys, head_dim: int, context: int) -> Rope:
    """The rotation of OLMo 3's layers, which is scaled in the full ones only; arguments as `one_rope`.

    Raises:
        UnsupportedError: a kind of scaling, or an option of it, that is not implemented.
        ModelError: keys that are missing or contradict each other.
    """
    full, sliding = _two_groups(config)
    rope = _Reader(config, head_dim, context, RopeClass(OLMO3_THETA)).read(full, "rope_theta")
    local = _Reader(config, head_dim, context, RopeClass(OLMO3_THETA, ("default",)))
    if local.read(sliding, "rope_theta").metadata["rope.freq_base"] != rope.metadata["rope.freq_base"]:
        raise UnsupportedError(
            "rope_parameters has two values of rope_theta",
            source=config.source,
            remedy="for this architecture, one for all layers is implemented",
        )
    return rope


def _two_groups(config: Keys) -> tuple[Keys | None, Keys | None]:
    """What is said of full and of sliding-window layers."""
    given = config.group("rope_parameters")
    full, sliding = config.group("rope_scaling"), None
    if given is not None:
        if full is not None:
            raise config.error("rope_scaling", "is given besides rope_parameters")
        full, sliding = given.group("full_attention"), given.group("sliding_attention")
        given.finish()
    return full, sliding


@dataclass(frozen=True)
class _Reader:
    config: Keys
    head_dim: int
    context: int
    kind: RopeClass

    def read(self, scaling: Keys | None, theta_key: str) -> Rope:
        """One rotation: ``scaling`` is what the configuration says of it, besides the key of its base."""
        theta, dim = self._theta(scaling, theta_key), self._dim(scaling)
        basic: dict[str, int | float | str] = {"rope.dimension_count": dim, "rope.freq_base": theta}
        # Transformers reads it here too, and for other models than these.
        outer = self.config.integer("original_max_position_embeddings", self.kind.original or self.context)
        if scaling is None:
            return Rope(basic)
        name = scaling.text("type", "default")
        name = scaling.text("rope_type", name)
        if scaling.has("type") and scaling.text("type") != name:
            raise scaling.error("rope_type", f"is {name!r}, but type is {scaling.text('type')!r}")
        name = _OLD_NAMES.get(name, name)
        if name not in self.kind.scalings:
            raise UnsupportedError(
                f"{scaling.where}rope_type = {name!r} is not implemented for this architecture",
                source=scaling.source,
                remedy=f"implemented: {', '.join(self.kind.scalings)}",
            )
        rope = Rope({})
        if name == "linear":
            rope = Rope({"rope.scaling.type": name, "rope.scaling.factor": _factor(scaling)})
        elif name == "yarn":
            rope = self._yarn(scaling, theta, dim, self._original(scaling, outer))
        elif name == "llama3":
            factors = _llama3_factors(scaling, theta, dim, self._original(scaling, outer))
            rope = Rope({}, {_FREQUENCIES: factors})
        elif name == "longrope":
            rope = self._longrope(scaling, dim, self._original(scaling, outer))
        scaling.finish()
        return Rope({**basic, **rope.metadata}, rope.factors)

    def _theta(self, scaling: Keys | None, key: str) -> float:
        keys, theta = self.config, self.config.number(key, self.kind.theta)
        if scaling is not None and scaling.has("rope_theta"):
            inner = scaling.number("rope_theta")
            if self.config.has(key) and inner != theta:
                raise scaling.error("rope_theta", f"is {inner}, but {key} is {theta}")
            keys, key, theta = scaling, "rope_theta", inner
        if theta <= 1:
            raise keys.error(key, f"is {theta}, not more than 1")
        return theta

    def _dim(self, scaling: Keys | None) -> int:
        """Channels of a head that are rotated."""
        key, share = "partial_rotary_factor", 1.0 if self.kind.share is None else self.kind.share
        for keys in (self.config, *([scaling] if scaling is not None else [])):
            if self.kind.share is None:
                keys.only(key, 1.0)
            share = keys.number(key, share)
        dim = int(self.head_dim * share)
        if share > 1 or dim < 2 or dim % 2:
            raise self.config.error(
                key, f"rotates {dim} channels of {self.head_dim}, not an even part of them"
            )
        return dim

    def _original(self, scaling: Keys, outer: int) -> int:
        """The context length that the model was trained at before it was stretched."""
        inner = scaling.integer("original_max_position_embeddings", outer)
        is_said = self.kind.original or self.config.has("original_max_position_embeddings")
        if is_said and inner != outer:
            raise scaling.error("original_max_position_embeddings", f"is {inner}, but outside it is {outer}")
        return inner

    def _yarn(self, scaling: Keys, theta: float, dim: int, original: int) -> Rope:
        factor = _factor(scaling, self.context / original)
        scaling.only("finetuned", True, False)  # tells how the model came about, nothing else
        usual = magnitude = _magnitude(factor)
        one_dim, every_dim = (
            scaling.number(key) if scaling.has(key) else 0 for key in ("mscale", "mscale_all_dim")
        )
        if one_dim and every_dim:  # one alone is without effect
            magnitude = _magnitude(factor, one_dim) / _magnitude(factor, every_dim)
        magnitude = scaling.number("attention_factor", magnitude)
        fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
        if "llama3" not in self.kind.scalings:
            scaling.only("truncate", True)
        if not scaling.flag("truncate", True):
            # GGUF's YaRN rounds the ends of the ramp to whole channels: without it, each frequency has a factor.
            factors = _yarn_factors(factor, fast, slow, theta, dim, original)
            return Rope(
                {"rope.scaling.type": "none", "rope.scaling.attn_factor": magnitude}, {_FREQUENCIES: factors}
            )
        return Rope(
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": factor,
                "rope.scaling.original_context_length": original,
                # GGUF's is a factor to the usual magnitude, not the whole.
                "rope.scaling.attn_factor": magnitude / usual,
                "rope.scaling.yarn_beta_fast": fast,
                "rope.scaling.yarn_beta_slow": slow,
            }
        )

    def _longrope(self, scaling: Keys, dim: int, original: int) -> Rope:
        factor = _factor(scaling, max(1.0, self.context / original))
        magnitude = 1.0
        if factor > 1:
            if original < 2:
                raise scaling.error(
                    "original_max_position_embeddings", f"is {original}, too short to stretch"
                )
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original))
        return Rope(
            {
                "rope.scaling.type": "longrope",
                "rope.scaling.original_context_length": original,
                "rope.scaling.attn_factor": scaling.number("attention_factor", magnitude),
            },
            {
                _LONG: np.array(scaling.numbers("long_factor", dim // 2), np.float32),
                _SHORT: np.array(scaling.numbers("short_factor", dim // 2), np.float32),
            },
        )


def _factor(scaling: Keys, default: float | None = None) -> float:
    factor = scaling.number("factor", default)
    if factor < 1:
        raise scaling.error("factor", f"is {factor}; a context can only be stretched")
    return factor


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1 + 0.1 * mscale * math.log(factor)


def _llama3_factors(scaling: Keys, theta: float, dim: int, original: int) -> Floats:
    """By how much each frequency is divided: 1 for the fast, ``factor`` for the slow, and a ramp between."""
    factor = _factor(scaling)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise scaling.error("high_freq_factor", f"is {high}, not more than low_freq_factor, {low}")
    turns = original / (2 * math.pi) * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors: Floats = (1 / ((1 - kept) / factor + kept)).astype(np.float32)
    return factors


def _yarn_factors(factor: float, fast: float, slow: float, theta: float, dim: int, original: int) -> Floats:
    """As `_llama3_factors`, with YaRN's ramp, which is one over channels."""

    def channel_of(turns: float) -> float:
        wavelength = math.log(original) - math.log(turns) - math.log(2 * math.pi)
        return dim * wavelength / (2 * math.log(theta))

    low, high = max(channel_of(fast), 0.0), min(channel_of(slow), dim - 1.0)
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 1e-3), 0, 1)
    factors: Floats = (1 / (slowed / factor + 1 - slowed)).astype(np.float32)
    return factors
