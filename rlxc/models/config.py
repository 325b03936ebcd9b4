"""A model's numbers, read from GGUF metadata so that no key goes unnoticed.

Every key under the architecture's own prefix must be read by its file: a key that nobody reads may change the
arithmetic, and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlxc.errors import ModelError, Problems, UnsupportedError
from rlxc.ir import RopeSpec, Yarn
from rlxc.weights.gguf_header import quote


class Fields:
    """Typed access to the metadata keys ``{architecture}.*`` of one file, remembering which were read.

    What is wrong with the file goes to ``problems``, and reading goes on with a number that stands in for the right
    one, so that one look finds all problems. :meth:`finish` raises what leaves no numbers to build a graph of.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: object) -> None:
        self.metadata, self.source = metadata, source
        self.prefix = f"{architecture}."
        self.problems = Problems()
        self._read: set[str] = set()
        self._is_sound = True

    def has(self, key: str) -> bool:
        """Whether the file has this key (given without the prefix)."""
        return self.prefix + key in self.metadata

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """An integer in ``low..high``; without default it must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(key, value, "must be one integer")
        elif not low <= value <= high:
            self._contradiction(f"metadata {self.prefix}{key} = {value} is outside {low}..{high}")
        else:
            return value
        return max(1, low)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; without default it must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            self._wrong(key, value, "must be a positive number")
            return 1.0
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            self._wrong(key, value, "must be a string")
            return default
        return value

    def truth(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "must be true or false")
            return default
        return value

    def array(self, key: str) -> list[Any] | None:
        """The elements of an array, None if the key is missing or has one value."""
        value = self._value(key, None)
        return value.tolist() if isinstance(value, np.ndarray) else None

    def of_layers(self, key: str, layers: int, default: int | None = None) -> int:
        """A positive integer that holds for all layers, or an array of so many equal ones; others are refused."""
        values = self.array(key)
        if values is None:
            return self.integer(key, default)
        name = f"metadata {self.prefix}{key}"
        self.require(len(values) == layers, f"{name} has {len(values)} elements for {layers} layers")
        if len(set(values)) > 1:
            self.refuse(f"{name} differs from layer to layer, which is not implemented")
        value = values[0] if values else None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._wrong(key, values, "must be positive integers")
            return 1
        return value

    def ignore(self, *keys: str) -> None:
        """Mark keys that describe the file but do not change the arithmetic."""
        self._read.update(self.prefix + key for key in keys)

    def require(self, holds: bool, problem: str) -> None:
        """Take note that the file contradicts itself, unless this holds; stand-ins contradict nothing."""
        if not holds and self._is_sound:
            self._contradiction(problem)

    def refuse(self, problem: str, remedy: str = "") -> None:
        """Take note that something the file asks for is not implemented."""
        self.problems.add(UnsupportedError(problem, source=self.source, remedy=remedy))

    def finish(self) -> None:
        """Refuse keys of this architecture that were not read.

        Raises:
            ModelError: a number is missing or senseless; whatever else was found is raised after the graph is built.
        """
        for key in sorted(self.metadata):
            if key.startswith(self.prefix) and key not in self._read:
                self.refuse(
                    f"metadata {key} = {quote(self.metadata[key])} is not implemented for this architecture",
                    "it may change the model's arithmetic, so it is not ignored",
                )
        if not self._is_sound:
            raise self.problems.error()

    def _value(self, key: str, default: object) -> object:
        self._read.add(self.prefix + key)
        return self.metadata.get(self.prefix + key, default)

    def _wrong(self, key: str, value: object, must: str) -> None:
        name = f"metadata {self.prefix}{key}"
        self._contradiction(f"{name} is missing" if value is None else f"{name} {must}, got {quote(value)}")

    def _contradiction(self, problem: str) -> None:
        self._is_sound = False
        self.problems.add(ModelError(problem, source=self.source))


@dataclass(frozen=True)
class Config:
    """The numbers that every decoder-only transformer has. ``vocab``, ``hidden``, ... count elements."""

    vocab: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    trained_context: int

    @property
    def scale(self) -> float:
        """The usual scale of attention scores, ``1 / sqrt(head_dim)``."""
        return 1 / math.sqrt(self.head_dim)


def read_config(fields: Fields, vocab: int, *, eps: str = "attention.layer_norm_rms_epsilon") -> Config:
    """The common numbers, from the keys that all architectures share.

    Args:
        fields: the file's metadata.
        vocab: the embedding's row count.
        eps: the key of the norms' epsilon.
    """
    fields.ignore("vocab_size")
    layers = fields.integer("block_count", high=4096)
    hidden = fields.integer("embedding_length")
    heads = fields.of_layers("attention.head_count", layers)
    kv_heads = fields.of_layers("attention.head_count_kv", layers, heads)
    fields.require(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} key/value heads")
    head_dim = fields.integer("attention.key_length", max(1, hidden // heads))
    if fields.integer("attention.value_length", head_dim) != head_dim:
        fields.refuse("keys and values of different lengths are not implemented")
    return Config(
        vocab=vocab,
        layers=layers,
        hidden=hidden,
        ffn=fields.of_layers("feed_forward_length", layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=fields.number(eps),
        trained_context=fields.integer("context_length"),
    )


def read_rope(fields: Fields, config: Config, *, interleaved: bool, tensors: Iterable[str] = ()) -> RopeSpec:
    """Rotary embedding with the scaling that the metadata asks for: none, linear or YaRN; others are refused.

    Args:
        fields: the file's metadata.
        config: the common numbers.
        interleaved: whether neighbouring channels are pairs.
        tensors: those of the file, if the architecture uses LongRoPE's factors.
    """
    dim = fields.integer("rope.dimension_count", config.head_dim)
    fields.require(
        dim <= config.head_dim and dim % 2 == 0,
        f"metadata {fields.prefix}rope.dimension_count = {dim} does not fit a head of {config.head_dim}",
    )
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    # llama.cpp computes YaRN's magnitude from the factor whatever the second key says.
    fields.ignore("rope.scaling.finetuned", "rope.scaling.yarn_attn_factor")
    spec = RopeSpec(
        fields.number("rope.freq_base", 10000.0),
        dim,
        interleaved,
        attention=fields.number("rope.scaling.attn_factor", 1.0),
    )
    original = original_context(fields, config)
    kind = fields.text("rope.scaling.type", "linear")
    has_factors = any(name.startswith("rope_factors_") for name in tensors)
    if kind == "linear" or (kind == "longrope" and has_factors):
        return replace(spec, factor=factor)
    if kind == "yarn":
        fields.require(spec.theta != 1, f"metadata {fields.prefix}rope.freq_base = 1 makes no YaRN")
        yarn = Yarn(
            original,
            extrapolation=fields.number("rope.scaling.yarn_ext_factor", 1.0),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        return replace(spec, factor=factor, yarn=yarn)
    if kind != "none":
        remedy = "none, linear and yarn are, and longrope where its factors are in the file and have a use"
        fields.refuse(f"rope scaling {kind!r} is not implemented", remedy)
    return spec


def original_context(fields: Fields, config: Config) -> int:
    """The positions that the model was trained at before its context was stretched."""
    return fields.integer("rope.scaling.original_context_length", config.trained_context)


def windowed_layers(fields: Fields, layers: int, period: int) -> tuple[bool, ...]:
    """Which layers see no more than a window of keys.

    ``attention.sliding_window_pattern`` is a truth for each layer, or a number p: all but every p-th, or all if it is
    0. ``period`` is the p of files without that key.
    """
    key = "attention.sliding_window_pattern"
    flags = fields.array(key)
    if flags is None:
        period = fields.integer(key, period, low=0)
        return tuple(period == 0 or (i + 1) % period != 0 for i in range(layers))
    fields.require(
        len(flags) == layers and set(flags) <= {0, 1},
        f"metadata {fields.prefix}{key} must be true or false for each of {layers} layers",
    )
    return tuple(map(bool, flags))


def folder_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The window of each layer that has one, in architectures whose GGUF files tell of none.

    llama.cpp lets all layers of these architectures see everything. What is read from a Hugging Face folder names the
    layers that its configuration gives a window.
    """
    if not fields.has("attention.sliding_window_pattern"):
        return (None,) * layers
    window = fields.integer("attention.sliding_window")
    return tuple(window if has_window else None for has_window in windowed_layers(fields, layers, 0))


@dataclass(frozen=True)
class Experts:
    """How many experts a layer has, and how many of them a token uses."""

    count: int
    used: int


def read_experts(fields: Fields, *, low: int = 1) -> Experts:
    """The numbers of a mixture of experts; ``low`` is 0 where a model may have none."""
    default = None if low else 0
    count = fields.integer("expert_count", default, low=low, high=4096)
    used = fields.integer("expert_used_count", default, low=low)
    possible = 0 < used <= count or used == count == 0
    fields.require(possible, f"a token cannot use {used} of {count} experts")
    return Experts(count, used)
