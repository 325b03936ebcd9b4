"""LoRA adapters from files: open one for a base model, look at one, check that it fits, register its weights."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from rlxc.errors import ModelError, WeightError
from rlxc.weights.gguf_adapter import GgufAdapter, open_gguf_adapter
from rlxc.weights.gguf_header import quote
from rlxc.weights.lora import EMBEDDING, Adapter, AdapterBase, LoraPair
from rlxc.weights.peft import PeftAdapter, open_peft_adapter
from rlxc.weights.registry import F32, LoraAdapter, WeightRegistry

__all__ = [
    "Adapter",
    "AdapterBase",
    "AdapterFacts",
    "LoraPair",
    "check_fits",
    "inspect_adapter",
    "open_adapter",
    "register",
]


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor of an adapter, as its file has it; ``format`` is its element type, such as ``f32``."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter says of itself, without a base model.

    Attributes:
        kind: a GGUF file or a PEFT folder.
        path: where it is.
        architecture: of the base model, in a GGUF file.
        base_model: name or path of the base model, if a PEFT folder notes one.
        alpha: of targets without an alpha of their own.
        ranks: by target, as the file names it: a GGUF tensor or a Hugging Face module.
        replaced: what it brings whole, likewise.
        tensors: all of them, in the file's order.
        uses_dora: whether rows are scaled to learned magnitudes.
        rank_stabilised: whether the scale is ``alpha / sqrt(rank)``.
        invocation_tokens: those of an activated LoRA.
        prompt_prefix: text that prompts shall begin with.
    """

    kind: Literal["gguf", "peft"]
    path: Path
    architecture: str | None
    base_model: str | None
    alpha: float
    ranks: Mapping[str, int]
    replaced: tuple[str, ...]
    tensors: tuple[AdapterTensor, ...]
    uses_dora: bool
    rank_stabilised: bool
    invocation_tokens: tuple[int, ...]
    prompt_prefix: str

    @property
    def parameters(self) -> int:
        """How many values its tensors hold."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def formats(self) -> dict[str, int]:
        """How many tensors have each element type, such as ``{"f32": 28}``."""
        return dict(Counter(tensor.format for tensor in self.tensors))

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tensors in the file."""
        return sum(tensor.nbytes for tensor in self.tensors)


def open_adapter(path: str | PathLike[str], base: AdapterBase, *, name: str | None = None) -> Adapter:
    """Read a LoRA adapter: a GGUF file, or a folder that PEFT wrote.

    Args:
        path: the file or the folder.
        base: the model that it is for.
        name: what to call it; the file's or folder's name unless given.

    Raises:
        FormatError: a file is missing or damaged, or contradicts itself.
        UnsupportedError: it asks for something that is not implemented.
        ModelError: it is for another model.
        OptionError: the name is empty or not printable.
    """
    found = _open(Path(path))
    with found.file:
        return found.read(base, _default_name(Path(path)) if name is None else name)


def inspect_adapter(path: str | PathLike[str]) -> AdapterFacts:
    """What an adapter says of itself; its weights are not read.

    Raises:
        FormatError: as `open_adapter`.
        UnsupportedError: likewise.
    """
    found = _open(Path(path))
    with found.file as file:
        tensors = tuple(
            AdapterTensor(tensor.name, str(tensor.dtype).lower(), tensor.shape, tensor.nbytes)
            for tensor in file.tensors.values()
        )
    if isinstance(found, GgufAdapter):
        return AdapterFacts(
            kind="gguf",
            path=Path(path),
            architecture=found.architecture,
            base_model=None,
            alpha=found.alpha,
            ranks={target: found.rank(target) for target in found.targets},
            replaced=found.replaced,
            tensors=tensors,
            uses_dora=False,
            rank_stabilised=False,
            invocation_tokens=found.invocation_tokens,
            prompt_prefix=found.prompt_prefix,
        )
    return AdapterFacts(
        kind="peft",
        path=Path(path),
        architecture=None,
        base_model=found.config.base_model,
        alpha=found.config.alpha,
        ranks={module: found.rank(module) for module in sorted(found.modules)},
        replaced=tuple(sorted(found.saved)),
        tensors=tensors,
        uses_dora=found.config.uses_dora,
        rank_stabilised=found.config.rank_stabilised,
        invocation_tokens=found.config.invocation_tokens,
        prompt_prefix="",
    )


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check an adapter against the base model's tensors.

    Args:
        adapter: the adapter.
        shapes: shape ``[out, in]`` (or ``[n]``) of every tensor of the base model.

    Raises:
        ModelError: a target is missing in the base model or has another shape, or a token is outside its vocabulary.
    """
    for target, pair in adapter.pairs.items():
        shape = _shape_of(adapter, target, shapes)
        delta = (pair.b.shape[0], pair.a.shape[1])
        if (delta[::-1] if target == EMBEDDING else delta) != shape:
            raise _misfit(
                adapter,
                f"{target}: a {list(pair.a.shape)} and b {list(pair.b.shape)} do not fit the base model's "
                f"{list(shape)}",
            )
    for target, array in adapter.replacements.items():
        shape = _shape_of(adapter, target, shapes)
        if array.shape != shape:
            raise _misfit(
                adapter,
                f"{target}: the adapter's {list(array.shape)} cannot replace the base model's {list(shape)}",
            )
    vocab = shapes[EMBEDDING][0] if EMBEDDING in shapes else 0
    outside = [token for token in adapter.invocation_tokens if token >= vocab]
    if outside:
        raise _misfit(adapter, f"invocation token {outside[0]} is outside the vocabulary of {vocab}")


def register(adapter: Adapter, registry: WeightRegistry) -> None:
    """Add every array of an adapter as an f32 weight, of kind ``LoraAdapter(adapter.name)``.

    The keys are those of `Adapter.arrays`, such as ``blk.0.attn_q.weight.chat.lora_a``.

    Raises:
        WeightError: a key is taken, which is so when another adapter has the name; nothing is added then.
    """
    arrays = adapter.arrays()
    taken = next((key for key in arrays if key in registry), None)
    if taken is not None:
        raise WeightError(
            "is already registered",
            source=taken,
            remedy=f"give the adapter another name than {adapter.name!r}",
        )
    for key, array in arrays.items():
        registry.add(F32(key, array.shape), LoraAdapter(adapter.name))


def _open(path: Path) -> GgufAdapter | PeftAdapter:
    return open_peft_adapter(path) if os.path.isdir(path) else open_gguf_adapter(path)


def _default_name(path: Path) -> str:
    # `.` and `..` have no name of their own.
    resolved = path.resolve()
    return resolved.name if os.path.isdir(path) else resolved.stem


def _shape_of(adapter: Adapter, target: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes.get(target)
    if shape is None:
        why = ": its output is tied to its embedding" if target == "output.weight" else ""
        raise _misfit(adapter, f"adapts {quote(target)}, which the base model does not have{why}")
    return shape


def _misfit(adapter: Adapter, problem: str) -> ModelError:
    return ModelError(
        problem, source=adapter.source, remedy="use the base model that the adapter was trained for"
    )
