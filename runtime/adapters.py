"""Adapters on top of each other: in which order they lie, how strong each is, and what they add to a product.

Nothing here needs a session or an engine: a :class:`LoraStack` is the arithmetic, in numpy.
"""

from __future__ import annotations

from enum import Enum
from numbers import Real
from typing import Generic, Protocol, TypeVar

import numpy as np

from rlxc.errors import OptionError, SessionError, WeightError
from rlxc.runtime.logits import Floats

_LARGEST = float(np.finfo(np.float32).max)


class TargetModule(Enum):
    """The matrices of a model that adapters change, by the names they have in GGUF files."""

    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_OUTPUT = "attn_output"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    OUTPUT = "output"
    TOKEN_EMBD = "token_embd"

    def tensor(self, layer: int | None = None) -> str:
        """The tensor's name: ``blk.3.attn_q.weight``, or ``output.weight``, which belongs to no layer.

        Raises:
            OptionError: the module is in every layer and none is named, or the other way round.
        """
        if self in (TargetModule.OUTPUT, TargetModule.TOKEN_EMBD):
            if layer is not None:
                raise OptionError(f"{self.value} belongs to no layer, got {layer!r}", remedy="give None")
            return f"{self.value}.weight"
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise OptionError(f"the layer of {self.value} must be 0 or more, got {layer!r}")
        return f"blk.{layer}.{self.value}.weight"


class Named(Protocol):
    """What can lie on a stack."""

    @property
    def name(self) -> str:
        """What it is called."""


class Adapter(Named, Protocol):
    """Anything that adds to the products of some matrices: LoRA, DoRA, or your own."""

    def apply(self, tensor: str, x: Floats) -> Floats | None:
        """What it adds to ``W x`` at scale 1.

        Args:
            tensor: the name of W in GGUF files, such as ``blk.0.attn_q.weight``.
            x: f32 ``[..., in]``.

        Returns:
            f32 ``[..., out]``, or None if it leaves this matrix alone.
        """


Item = TypeVar("Item", bound=Named)


class ScaledStack(Generic[Item]):
    """Named things on top of each other, each with a scale. The same one may lie there twice: scales add up."""

    def __init__(self) -> None:
        self._entries: list[tuple[Item, float]] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_empty(self) -> bool:
        """Whether nothing lies here."""
        return not self._entries

    def entries(self) -> list[tuple[Item, float]]:
        """What lies here, the lowest first, with its scale; a list of the caller's own."""
        return list(self._entries)

    def copy(self) -> ScaledStack[Item]:
        """Another stack of the same things."""
        other: ScaledStack[Item] = ScaledStack()
        other._entries = self.entries()
        return other

    def push(self, item: Item, scale: float = 1.0) -> None:
        """Put ``item`` on top.

        Raises:
            OptionError: the scale is not a finite number.
        """
        self._entries.append((item, checked_scale(scale)))

    def pop(self) -> tuple[Item, float] | None:
        """Take off the top one; returns it with its scale, or None from an empty stack."""
        return self._entries.pop() if self._entries else None

    def set_scale(self, name: str, scale: float) -> None:
        """Give the item of this name, the topmost if there are several, another scale. The order stays.

        Raises:
            OptionError: the scale is not a finite number.
            SessionError: there is none of this name.
        """
        scale = checked_scale(scale)
        for i in reversed(range(len(self._entries))):
            item = self._entries[i][0]
            if item.name == name:
                self._entries[i] = (item, scale)
                return
        raise SessionError(f"no adapter called {name!r} is on the stack", remedy="push it first")

    def clear(self) -> None:
        """Take all off."""
        self._entries.clear()


class LoraStack(ScaledStack[Adapter]):
    """Adapters whose changes to a matrix product add up: ``y = W x + Δ(x)``.

    For LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685), ``Δ = Σ sᵢ · (αᵢ / rᵢ) · Bᵢ (Aᵢ x)``, with the scale
    sᵢ that adapter i was pushed with. Adapters that leave a matrix alone add nothing to it.

        stack = LoraStack()
        stack.push(adapter, 0.5)
        y = x @ W.T + stack.apply("blk.0.attn_q.weight", x, len(W))
    """

    def apply(self, tensor_name: str, x: Floats, out_features: int) -> Floats:
        """What the stack adds to the product of a matrix ``[out, in]`` and ``x``.

        Args:
            tensor_name: the matrix's name in GGUF files.
            x: f32 ``[..., in]``; for ``token_embd.weight``, tokens one-hot ``[..., vocab]``.
            out_features: ``out``.

        Returns:
            f32 ``[..., out]``; zeros if no adapter changes the matrix.

        Raises:
            WeightError: an adapter does not fit the matrix, which is named.
        """
        delta = self._delta(tensor_name, x, out_features)
        return np.zeros((*np.shape(x)[:-1], out_features), np.float32) if delta is None else delta

    def applied_delta(
        self, module: TargetModule, layer: int | None, x: Floats, out_features: int
    ) -> Floats | None:
        """As :meth:`apply`, for a module of a layer (None for those that belong to no layer).

        Returns:
            None if no adapter changes the matrix.
        """
        return self._delta(module.tensor(layer), x, out_features)

    def _delta(self, tensor: str, x: Floats, out_features: int) -> Floats | None:
        x = np.asarray(x, np.float32)
        if x.ndim == 0:
            raise WeightError("x has no dimension", source=tensor, remedy="pass x as [..., in]")
        total: Floats | None = None
        for adapter, scale in self._entries:
            try:
                delta = adapter.apply(tensor, x)
            except ValueError as error:  # numpy's, of a product whose sizes differ
                raise WeightError(
                    f"adapter {adapter.name!r} does not take x {list(x.shape)} ({error})", source=tensor
                ) from error
            if delta is None:
                continue
            expected = (*x.shape[:-1], out_features)
            if np.shape(delta) != expected:
                raise WeightError(
                    f"adapter {adapter.name!r} adds {list(np.shape(delta))} to a product {list(expected)}",
                    source=tensor,
                    remedy="push an adapter of this model",
                )
            scaled = np.float32(scale) * np.asarray(delta, np.float32)
            total = scaled if total is None else total + scaled
        return total


def checked_scale(scale: float) -> float:
    """The scale of an adapter.

    Raises:
        OptionError: it is not a finite number, or too large for float32.
    """
    is_number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not is_number or not abs(scale) <= _LARGEST:  # not a number is not in the range either
        raise OptionError(f"an adapter's scale must be a finite number of float32, got {scale!r:.40}")
    return float(scale)
