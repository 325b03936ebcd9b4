"""Which weights a model has, which of them are one and the same, and how many bytes they come to.

Metadata only: bytes stay in the file that a weight's key names them in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.formats import FORMATS
from rlxc.weights.source import ModelFile


@dataclass(frozen=True)
class F32:
    """A plain f32 weight, such as a norm ``[in]`` or a matrix ``[out, in]``."""

    key: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_shape(self)

    @property
    def dtype(self) -> DType:
        """Always F32."""
        return DType.F32

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class Packed:
    """A weight ``[out, in]`` in the blocks of ``scheme``; F16 and BF16 are schemes with blocks of one.

    Raises:
        WeightError: the scheme is no block format, or ``in`` is not a whole number of its blocks.
    """

    key: str
    scheme: DType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_shape(self)
        if self.scheme is DType.F32 or self.scheme not in FORMATS:
            raise WeightError(
                f"{self.scheme} is no packed scheme", source=self.key, remedy="use F32 for f32 weights"
            )
        FORMATS[self.scheme].row_bytes(self.shape[-1])

    @property
    def dtype(self) -> DType:
        """The scheme."""
        return self.scheme

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return math.prod(self.shape[:-1]) * FORMATS[self.scheme].row_bytes(self.shape[-1])


MatWeight = F32 | Packed


@dataclass(frozen=True)
class Base:
    """A weight of the model itself."""


@dataclass(frozen=True)
class LoraAdapter:
    """A weight of the adapter of this name."""

    adapter: str


@dataclass(frozen=True)
class TiedAlias:
    """No weight of its own, but another name for ``target``: it takes no bytes."""

    target: str


WeightKind = Base | LoraAdapter | TiedAlias


class WeightRegistry:
    """Weights by key, in the order they were added.

    An alias may be added before its target: `resolve` and `validate` are where a chain has to hold together.
    """

    def __init__(self) -> None:
        self._weights: dict[str, MatWeight] = {}
        self._kinds: dict[str, WeightKind] = {}
        self._pins: Counter[str] = Counter()

    def __contains__(self, key: object) -> bool:
        return key in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, weight: MatWeight, kind: WeightKind = Base()) -> None:
        """Register a weight under its key.

        Raises:
            WeightError: the key is taken.
        """
        if weight.key in self._weights:
            raise WeightError(
                "is already registered", source=weight.key, remedy="give each weight its own name"
            )
        self._weights[weight.key] = weight
        self._kinds[weight.key] = kind

    def kind(self, key: str) -> WeightKind:
        """What the weight is.

        Raises:
            WeightError: there is no such weight.
        """
        self._require(key)
        return self._kinds[key]

    def resolve(self, key: str) -> MatWeight:
        """The weight that holds the bytes of ``key``: itself, or where its chain of aliases ends.

        Raises:
            WeightError: there is no such weight, or its chain dangles, is circular or changes dtype or shape.
        """
        self._require(key)
        chain = [key]
        weight = self._weights[key]
        while isinstance(kind := self._kinds[weight.key], TiedAlias):
            target = self._weights.get(kind.target)
            if target is None:
                raise WeightError(
                    f"is tied to {kind.target!r}, which does not exist",
                    source=weight.key,
                    remedy="add the target",
                )
            if target.key in chain:
                raise WeightError(
                    f"is an alias of itself: {' -> '.join([*chain, target.key])}",
                    source=key,
                    remedy="tie it to a weight that has bytes",
                )
            if (target.dtype, target.shape) != (weight.dtype, weight.shape):
                raise WeightError(
                    f"is {weight.dtype} {list(weight.shape)}, but tied to {target.key!r}, "
                    f"which is {target.dtype} {list(target.shape)}",
                    source=weight.key,
                    remedy="tie only weights of equal dtype and shape",
                )
            chain.append(target.key)
            weight = target
        return weight

    def validate(self) -> None:
        """Resolve every weight.

        Raises:
            WeightError: as `resolve` does.
        """
        for key in self._weights:
            self.resolve(key)

    def nbytes(self, kind: WeightKind | None = None) -> int:
        """Bytes of all weights, or of one kind's, such as ``LoraAdapter("chat")``; aliases count nothing."""
        return sum(
            weight.nbytes
            for key, weight in self._weights.items()
            if not isinstance(self._kinds[key], TiedAlias) and kind in (None, self._kinds[key])
        )

    def remove(self, key: str) -> None:
        """Forget a weight.

        Raises:
            WeightError: there is no such weight, an alias refers to it, or it is pinned.
        """
        self._require(key)
        aliases = [name for name, kind in self._kinds.items() if kind == TiedAlias(key) and name != key]
        if aliases:
            raise WeightError(
                f"is still the target of {', '.join(map(repr, aliases))}",
                source=key,
                remedy="remove the aliases first",
            )
        if self._pins[key]:
            raise WeightError("is pinned", source=key, remedy="release the pins first")
        del self._weights[key], self._kinds[key]

    def pin(self, key: str) -> Pin:
        """Keep a weight, and so what it is an alias of, from being removed until the pin is released.

        Raises:
            WeightError: there is no such weight.
        """
        self._require(key)
        self._pins[key] += 1
        return Pin(self._pins, key)

    def _require(self, key: str) -> None:
        if key not in self._weights:
            raise WeightError("there is no weight of this name", source=key, remedy="add it first")


class Pin:
    """Holds a weight in its registry until `release`, or until the ``with`` block ends."""

    def __init__(self, pins: Counter[str], key: str) -> None:
        self.key = key
        self._pins: Counter[str] | None = pins

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._pins is not None:
            self._pins[self.key] -= 1
            self._pins = None

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def base_registry(file: ModelFile) -> WeightRegistry:
    """All tensors of a model as base weights, keyed by their GGUF names; tying is the model's business."""
    registry = WeightRegistry()
    for info in file.tensors.values():
        if info.dtype is DType.F32:
            registry.add(F32(info.name, info.shape))
        else:
            registry.add(Packed(info.name, info.dtype, info.shape))
    return registry


def _check_shape(weight: MatWeight) -> None:
    if not weight.shape or any(dim < 1 for dim in weight.shape):
        raise WeightError(
            f"shape {list(weight.shape)} holds no weights", source=weight.key, remedy="give a shape [out, in]"
        )
