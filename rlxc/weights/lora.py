"""Low-rank adapters in memory, the same whatever file they came from.

LoRA (Hu et al. 2021): ``y = W x + scale * b (a x)``.  The scale is ``alpha / rank``; in rank-stabilised LoRA
(Kalajdzievski 2023) ``alpha / sqrt(rank)``.  DoRA (Liu et al. 2024) also sets the length of each row of the sum
``W + scale * b a`` to a learned magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rlxc.errors import FormatError, ModelError, OptionError, UnsupportedError, WeightError
from rlxc.weights.gguf_header import DAMAGED, quote
from rlxc.weights.names import is_of_experts, layer_of, to_huggingface

Floats = npt.NDArray[np.float32]
Item = TypeVar("Item")

EMBEDDING = "token_embd.weight"
"""The one target that is looked up, not multiplied with."""


_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter is for: what its names and the order of its rows depend on."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, eq=False)
class LoraPair:
    """What an adapter adds to one weight ``[out, in]``: ``scale * b @ (a @ x)``.

    The embedding counts as a weight ``[hidden, vocab]`` that is multiplied with a one-hot token: its ``a`` is
    ``[rank, vocab]`` and its ``b`` is ``[hidden, rank]``.

    Attributes:
        a: f32 ``[rank, in]``.
        b: f32 ``[out, rank]``.
        scale: ``alpha / rank``, or what the adapter has instead.
        magnitude: DoRA's length of each row of the adapted weight, f32 ``[out]``; None for plain LoRA.

    Raises:
        WeightError: the shapes do not belong together, or a value is not finite.
    """

    a: Floats
    b: Floats
    scale: float
    magnitude: Floats | None = None

    def __post_init__(self) -> None:
        arrays = [self.a, self.b] + ([] if self.magnitude is None else [self.magnitude])
        if any(array.dtype != np.float32 for array in arrays):
            raise WeightError("a, b and magnitude must be f32", remedy="convert them first")
        shapes = f"a {list(self.a.shape)} and b {list(self.b.shape)}"
        if self.a.ndim != 2 or self.b.ndim != 2 or 0 in self.a.shape + self.b.shape:
            raise WeightError(f"{shapes} are not two matrices", remedy="a is [rank, in], b is [out, rank]")
        if self.a.shape[0] != self.b.shape[1]:
            transposed = self.a.shape[1] == self.b.shape[1]
            why = "a is transposed" if transposed else "their ranks differ"
            raise WeightError(f"{shapes}: {why}", remedy="a is [rank, in], b is [out, rank]")
        if self.magnitude is not None and self.magnitude.shape != self.b.shape[:1]:
            raise WeightError(
                f"magnitude {list(self.magnitude.shape)} is not one number for each row of b "
                f"{list(self.b.shape)}",
                remedy="it is [out]",
            )
        if not (abs(self.scale) <= _LARGEST and all(np.isfinite(array).all() for array in arrays)):
            raise WeightError("a value is infinite or not a number", remedy="train or convert it again")

    @property
    def rank(self) -> int:
        """The common dimension of a and b."""
        rank: int = self.a.shape[0]
        return rank

    @property
    def nbytes(self) -> int:
        """Bytes of a, b and the magnitude."""
        return self.a.nbytes + self.b.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)

    def delta(self) -> Floats:
        """The low-rank part as a whole matrix: ``scale * b a``, f32 ``[out, in]``; no magnitude is applied."""
        product: Floats = self.b @ self.a
        return product * np.float32(self.scale)

    def apply(self, x: Floats) -> Floats:
        """The low-rank part times ``x``: f32 ``[..., in]`` to f32 ``[..., out]``; no magnitude is applied.

        Raises:
            WeightError: ``x`` has another last dimension.
        """
        if not x.ndim or x.shape[-1] != self.a.shape[1]:
            raise WeightError(
                f"x {list(x.shape)} does not fit a {list(self.a.shape)}", remedy="pass x as [..., in]"
            )
        down: Floats = x @ self.a.T
        product: Floats = down @ self.b.T
        return product * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as read, with GGUF's names and row order whatever file it came from.

    Attributes:
        name: what it is called; its weights are registered under this name.
        source: the GGUF file or the folder.
        fingerprint: SHA-256 (hex) of the files that it was read from.
        architecture: of the base model.
        pairs: by the base model's tensor, in the model's order.
        invocation_tokens: an activated LoRA acts from where these tokens last begin; empty for others.
        replacements: weights that the adapter brings whole, f32, in the place of the base model's.

    Raises:
        OptionError: the name is empty or not printable.
        FormatError: it changes nothing, or a replacement has a value that is not finite.
    """

    name: str
    source: Path
    fingerprint: str
    architecture: str
    pairs: Mapping[str, LoraPair]
    invocation_tokens: tuple[int, ...] = ()
    replacements: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise OptionError(
                f"{quote(self.name)} cannot be the name of an adapter",
                source=self.source,
                remedy="give it a name of printable characters",
            )
        if not self.pairs and not self.replacements:
            raise FormatError("holds no LoRA tensors", source=self.source, remedy=DAMAGED)
        for target, array in self.replacements.items():
            if not np.isfinite(array).all():
                raise FormatError(
                    f"{quote(target)}: a value is infinite or not a number",
                    source=self.source,
                    remedy="train or convert it again",
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays in memory."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each target."""
        return {target: pair.rank for target, pair in self.pairs.items()}

    @property
    def uses_dora(self) -> bool:
        """Whether any target has a magnitude."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def apply(self, tensor: str, x: Floats) -> Floats | None:
        """What the adapter adds to a tensor's product with ``x``: f32 ``[..., out]``, or None if it has no such target.

        Args:
            tensor: the base model's tensor, by its GGUF name.
            x: f32 ``[..., in]``.

        Raises:
            UnsupportedError: the target has a magnitude (DoRA), which takes the base weight.
            WeightError: ``x`` has another last dimension.
        """
        pair = self.pairs.get(tensor)
        if pair is None:
            return None
        if pair.magnitude is not None:
            raise UnsupportedError(
                f"{tensor} is changed by DoRA, which adds nothing to a product",
                source=self.source,
                remedy="fold the adapter",
            )
        return pair.apply(x)

    def arrays(self) -> Mapping[str, Floats]:
        """Every array, by the key it is registered under: ``{tensor}.{name}.lora_a`` and so on."""
        found: dict[str, Floats] = {}
        for target, pair in self.pairs.items():
            found[f"{target}.{self.name}.lora_a"] = pair.a
            found[f"{target}.{self.name}.lora_b"] = pair.b
            if pair.magnitude is not None:
                found[f"{target}.{self.name}.lora_magnitude"] = pair.magnitude
        for target, array in self.replacements.items():
            found[f"{target}.{self.name}.replacement"] = array
        return found

    def data(self, key: str) -> Floats:
        """The array of a registered key.

        Raises:
            WeightError: the adapter has no such array.
        """
        found = self.arrays().get(key)
        if found is None:
            raise WeightError(f"has no array {quote(key)}", source=self.source, remedy="list `arrays()`")
        return found


def lora_scale(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """``alpha / rank``, or ``alpha / sqrt(rank)``; an alpha of 0 leaves the product as it is, a scale of 1."""
    if alpha == 0:
        return 1.0
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def check_target(base: AdapterBase, target: str, source: Path) -> None:
    """Refuse a tensor, given by its GGUF name, that no model like ``base`` has, or that is of experts.

    Raises:
        ModelError: naming it.
        UnsupportedError: likewise.
    """
    if is_of_experts(target):
        raise no_experts(target, source)
    if to_huggingface(base.architecture, target) is None:
        raise ModelError(
            f"adapts {quote(target)}, which no {base.architecture} model has",
            source=source,
            remedy="use the base model that it was trained for",
        )
    layer = layer_of(target)
    if layer is not None and layer >= base.layers:
        raise ModelError(
            f"adapts {target}, but the base model has {base.layers} layers",
            source=source,
            remedy="use the base model that it was trained for",
        )


def no_experts(target: str, source: Path) -> UnsupportedError:
    """The error that an adapter changes experts."""
    return UnsupportedError(
        f"adapts {quote(target)}, which is of experts",
        source=source,
        remedy="adapters of single matrices are implemented: train one that leaves the experts as they are",
    )


def make_pair(
    source: Path, target: str, a: Floats, b: Floats, scale: float, magnitude: Floats | None = None
) -> LoraPair:
    """A pair of a file.

    Raises:
        FormatError: as `LoraPair`, naming file and target.
    """
    try:
        return LoraPair(a, b, scale, magnitude)
    except WeightError as error:
        raise FormatError(f"{quote(target)}: {error.problem}", source=source, remedy=error.remedy) from None


def in_model_order(by_target: Mapping[str, Item]) -> Mapping[str, Item]:
    """The same, the whole model's tensors first and then layer by layer."""
    return MappingProxyType({target: by_target[target] for target in sorted(by_target, key=_place_in_model)})


def _place_in_model(target: str) -> tuple[int, str]:
    layer = layer_of(target)
    return (-1 if layer is None else layer), target
