"""A model's numbers, read from GGUF metadata so that no key goes unnoticed.

Every key under the architecture's own prefix must be read by its file: a key that nobody reads may change the
arithmetic, and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlxc.errors import ModelError, UnsupportedError
from rlxc.ir import RopeSpec, Yarn


class Fields:
    """Typed access to the metadata keys ``{architecture}.*`` of one file, remembering which were read."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: object) -> None:
        self.metadata, self.source = metadata, source
        self.prefix = f"{architecture}."
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file has this key (given without the prefix)."""
        return self.prefix + key in self.metadata

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """An integer in ``low..high``; a missing one without default raises ModelError."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(
                f"metadata {self.prefix}{key} must be one integer, got {value!r}", source=self.source
            )
        if not low <= value <= high:
            raise ModelError(
                f"metadata {self.prefix}{key} = {value} is outside {low}..{high}", source=self.source
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; a missing one without default raises ModelError."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ModelError(
                f"metadata {self.prefix}{key} must be a positive number, got {value!r}", source=self.source
            )
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise ModelError(
                f"metadata {self.prefix}{key} must be a string, got {value!r}", source=self.source
            )
        return value

    def ignore(self, *keys: str) -> None:
        """Mark keys that describe the file but do not change the arithmetic."""
        self._read.update(self.prefix + key for key in keys)

    def finish(self) -> None:
        """Refuse keys of this architecture that were not read.

        Raises:
            UnsupportedError: naming the first of them.
        """
        unread = sorted(key for key in self.metadata if key.startswith(self.prefix) and key not in self._read)
        if unread:
            raise UnsupportedError(
                f"metadata {unread[0]} = {self.metadata[unread[0]]!r} is not implemented for this architecture",
                source=self.source,
                remedy="it may change the model's arithmetic, so it is not ignored",
            )

    def _value(self, key: str, default: object) -> object:
        self._read.add(self.prefix + key)
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise ModelError(f"metadata {self.prefix}{key} is missing", source=self.source)
        return value


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


def read_config(fields: Fields, vocab: int) -> Config:
    """The common numbers, from the keys that all architectures share; ``vocab`` is the embedding's row count."""
    fields.ignore("vocab_size")
    hidden = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    kv_heads = fields.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} heads cannot share {kv_heads} key/value heads", source=fields.source)
    head_dim = fields.integer("attention.key_length", max(1, hidden // heads))
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(
            "keys and values of different lengths are not implemented", source=fields.source
        )
    return Config(
        vocab=vocab,
        layers=fields.integer("block_count", high=4096),
        hidden=hidden,
        ffn=fields.integer("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=fields.number("attention.layer_norm_rms_epsilon"),
        trained_context=fields.integer("context_length"),
    )


def read_rope(fields: Fields, config: Config, *, interleaved: bool) -> RopeSpec:
    """Rotary embedding with the scaling that the metadata asks for: none, linear or YaRN.

    Raises:
        UnsupportedError: another kind of scaling, by its name.
    """
    dim = fields.integer("rope.dimension_count", config.head_dim)
    if dim > config.head_dim or dim % 2:
        raise ModelError(
            f"metadata {fields.prefix}rope.dimension_count = {dim} does not fit a head of {config.head_dim}",
            source=fields.source,
        )
    theta = fields.number("rope.freq_base", 10000.0)
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    original = fields.integer("rope.scaling.original_context_length", config.trained_context)
    # llama.cpp computes YaRN's magnitude from the factor whatever the second key says.
    fields.ignore("rope.scaling.finetuned", "rope.scaling.yarn_attn_factor")
    kind = fields.text("rope.scaling.type", "linear")
    if kind == "none":
        return RopeSpec(theta, dim, interleaved)
    if kind == "linear":
        return RopeSpec(theta, dim, interleaved, factor)
    if kind == "yarn":
        yarn = Yarn(
            original,
            extrapolation=fields.number("rope.scaling.yarn_ext_factor", 1.0),
            attention=fields.number("rope.scaling.attn_factor", 1.0),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        return RopeSpec(theta, dim, interleaved, factor, yarn)
    raise UnsupportedError(
        f"rope scaling {kind!r} is not implemented", source=fields.source, remedy="none, linear and yarn are"
    )
