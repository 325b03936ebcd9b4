"""What the user wants done to a model's weights: adapters folded in or split off, matrices encoded anew.

Everything here is metadata: it ends in :class:`~rlxc.passes.WeightChanges`, which the passes carry out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from rlxc.artifact import DEFAULT_MAX_RANK, UNIT_RANK, AdapterEntry, LoraGroup, LoraPart, LoraPlan
from rlxc.dtypes import ENCODABLE, DType
from rlxc.errors import OptionError, UnsupportedError
from rlxc.ir import Graph
from rlxc.ir.ops import DequantMatMul, Embed, ExpertMatMul, MatMul, Route
from rlxc.models import Config
from rlxc.passes import Change, ChooseLoraStrategy, Delta, LoraMode, Replacement, WeightChanges, run_passes
from rlxc.runtime.adapters import checked_scale
from rlxc.weights.adapters import Adapter, AdapterBase, check_fits, open_adapter, register
from rlxc.weights.encode import changeable, fitting
from rlxc.weights.registry import WeightRegistry

AdapterArgument = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
"""A GGUF adapter or PEFT folder, with the scale that its delta is multiplied by; 1 if none is given.

What an adapter brings whole (a norm, or PEFT's ``modules_to_save``) takes the model's place whatever the scale.
"""

QUANTIZE_FORMATS = ("none", *(dtype.value for dtype in ENCODABLE if dtype is not DType.F32))
"""What matrices can be encoded in."""

_LARGEST_RANK = 4096
_FOR_PRODUCTS = (DType.NF4, DType.FP4, DType.INT4)


@dataclass(frozen=True)
class AdapterOptions:
    """The user's choices; see :func:`rlxc.compile`."""

    adapters: Sequence[AdapterArgument] = ()
    mode: LoraMode = "auto"
    max_rank: int = DEFAULT_MAX_RANK
    fold_to: str | None = None
    quantize: str = "none"

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if isinstance(self.adapters, str) or not isinstance(self.adapters, Sequence):
            raise OptionError(
                f"adapters must be a list, got {self.adapters!r:.80}",
                remedy="write [path] or [(path, scale), ...]",
            )
        if self.mode not in get_args(LoraMode):
            raise OptionError(
                f"lora {self.mode!r} is unknown", remedy=f"choose one of: {', '.join(get_args(LoraMode))}"
            )
        if self.mode == "fold" and not self.adapters:
            raise OptionError("there is no adapter to fold", remedy="name one, or leave the mode out")
        if type(self.max_rank) is not int or not 1 <= self.max_rank <= _LARGEST_RANK:
            raise OptionError(
                f"lora rank must be an integer in 1..{_LARGEST_RANK}, got {self.max_rank!r:.40}"
            )
        if self.fold_to is not None and self.fold_to not in [dtype.value for dtype in ENCODABLE]:
            raise OptionError(
                f"cannot fold to {self.fold_to!r}",
                remedy=f"choose one of: {', '.join(map(str, ENCODABLE))}",
            )
        if self.fold_to is not None and (self.mode == "split" or not self.adapters):
            raise OptionError(
                f"nothing is folded to {self.fold_to}", remedy="name an adapter, and lora mode fold or auto"
            )
        if self.quantize not in QUANTIZE_FORMATS:
            raise OptionError(
                f"cannot quantize to {self.quantize!r}",
                remedy=f"choose one of: {', '.join(QUANTIZE_FORMATS)}",
            )


@dataclass(frozen=True)
class Adapted:
    """What becomes of a model's weights.

    Attributes:
        changes: for the passes.
        adapters: those that were opened, and their scales.
        decisions: for each matrix that they change: folded or not, and why.
    """

    changes: WeightChanges
    adapters: tuple[tuple[Adapter, float], ...]
    decisions: Mapping[str, Mapping[str, Any]]

    def read(self, base: Callable[[str], npt.NDArray[np.uint8]]) -> Callable[[str], npt.NDArray[np.uint8]]:
        """Gives the bytes of the model file's tensors and of the adapters'."""
        ours = {key: array for adapter, _ in self.adapters for key, array in adapter.arrays().items()}
        return lambda key: ours[key].reshape(-1).view(np.uint8) if key in ours else base(key)

    @property
    def split(self) -> list[tuple[int, Adapter]]:
        """What the adapters change at run time, as adapters of that alone, with their numbers."""
        kept = self.changes.split
        parts = [
            (i, adapter, {name: pair for name, pair in adapter.pairs.items() if name in kept})
            for i, (adapter, _) in enumerate(self.adapters)
        ]
        return [(i, replace(adapter, pairs=pairs, replacements={})) for i, adapter, pairs in parts if pairs]

    def entries(self) -> tuple[AdapterEntry, ...]:
        """What the manifest says of them."""
        files = {number: adapter_file(number) for number, _ in self.split}
        folded = {name for name, decision in self.decisions.items() if decision["fold"]}
        return tuple(
            AdapterEntry(
                adapter.name,
                adapter.fingerprint,
                scale,
                folded=tuple(sorted(folded.intersection([*adapter.pairs, *adapter.replacements]))),
                file=files.get(number),
            )
            for number, (adapter, scale) in enumerate(self.adapters)
        )


def adapter_file(number: int) -> str:
    """The artifact's file for an adapter that is not folded."""
    return f"adapter.{number}.gguf"


def adapt(
    options: AdapterOptions,
    graph: Graph,
    config: Config,
    registry: WeightRegistry,
    trace: Callable[[str], None] | None = None,
) -> Adapted:
    """Open the adapters, check that they fit the model, and decide about every matrix.

    Raises:
        RlxcError: an adapter is damaged, does not fit, or asks for what is not implemented.
    """
    base = AdapterBase(graph.name, config.layers, config.heads, config.kv_heads)
    shapes = {weight.name: tuple(map(int, weight.type.shape)) for weight in graph.weights}
    adapters: list[tuple[Adapter, float]] = []
    for path, scale in map(_with_scale, options.adapters):
        adapter = open_adapter(path, base)
        if any(adapter.name == other.name for other, _ in adapters):
            raise OptionError(
                f"two adapters are called {adapter.name!r}", source=path, remedy="rename one of the files"
            )
        check_fits(adapter, shapes)
        scaled = [name for name in adapter.pairs if _scale_of(name) in shapes]
        if scaled:
            raise UnsupportedError(
                f"{scaled[0]} has a scale of its own, with which adapters are not implemented",
                source=adapter.source,
            )
        register(adapter, registry)
        adapters.append((adapter, scale))
    formats = _formats(options.quantize, graph)
    wanted = _changes(adapters)
    fold_to = _fold_formats(options, graph, wanted, formats)
    choice = run_passes(graph, [ChooseLoraStrategy(wanted, options.mode, fold_to)], trace=trace)
    decisions = choice.facts.get("lora_strategy", {})
    folded = {name for name, decision in decisions.items() if decision["fold"]}
    split = set(decisions) - folded
    if options.mode == "split":
        split |= _linear_weights(graph)
    changes = WeightChanges(
        formats={name: dtype for name, dtype in formats.items() if name not in folded},
        folded={name: wanted[name] for name in wanted if name in folded},
        fold_to=fold_to,
        split=frozenset(split),
    )
    adapted = Adapted(changes, tuple(adapters), decisions)
    _check_rank(adapted, options.max_rank)
    return adapted


def lora_plan(groups: Iterable[Mapping[str, Any]], dtype: DType, max_rank: int) -> LoraPlan:
    """The plan that an artifact's manifest holds, from the fact ``lora`` of the pass."""
    return LoraPlan(
        dtype,
        -(-max_rank // UNIT_RANK) * UNIT_RANK,
        tuple(
            LoraGroup(group["kind"], group["down"], tuple(LoraPart(**part) for part in group["parts"]))
            for group in groups
        ),
    )


def _check_rank(adapted: Adapted, max_rank: int) -> None:
    """Refuse adapters that a session of the artifact could not start with."""
    units = sum(-(-max(adapter.ranks.values()) // UNIT_RANK) for _, adapter in adapted.split)
    if units > -(-max_rank // UNIT_RANK):
        needed = units * UNIT_RANK
        raise OptionError(
            f"the adapters have {needed} ranks, counted in units of {UNIT_RANK}; lora rank is {max_rank}",
            remedy=f"give a lora rank of {needed} or more, or fold them",
        )


def _with_scale(argument: AdapterArgument) -> tuple[Path, float]:
    path, scale = argument if isinstance(argument, tuple) and len(argument) == 2 else (argument, 1.0)
    if not isinstance(path, str | os.PathLike):
        raise OptionError(
            f"an adapter must be a path, or a path and a scale, got {argument!r:.80}",
            remedy="write [path] or [(path, scale), ...]",
        )
    return Path(path), checked_scale(scale)


def _changes(adapters: Iterable[tuple[Adapter, float]]) -> dict[str, list[Change]]:
    """What changes each matrix, in the adapters' order.

    Raises:
        OptionError: an adapter would undo what one before it does.
    """
    changes: dict[str, list[Change]] = {}
    for adapter, scale in adapters:
        for tensor in adapter.replacements:
            if tensor in changes:
                raise OptionError(
                    f"replaces {tensor}, which an adapter before it changes",
                    source=adapter.source,
                    remedy="name it first, or leave one of them out",
                )
            changes[tensor] = [Replacement(f"{tensor}.{adapter.name}.replacement")]
        for tensor, pair in adapter.pairs.items():
            key = f"{tensor}.{adapter.name}"
            magnitude = None if pair.magnitude is None else f"{key}.lora_magnitude"
            delta = Delta(
                f"{key}.lora_a",
                f"{key}.lora_b",
                pair.rank,
                scale * pair.scale,
                magnitude,
                activated=bool(adapter.invocation_tokens),
            )
            changes.setdefault(tensor, []).append(delta)
    return changes


def _fold_formats(
    options: AdapterOptions, graph: Graph, names: Iterable[str], formats: Mapping[str, DType]
) -> dict[str, DType]:
    """What each matrix is encoded in if it is folded: the format asked for, or else its own or one that it can have."""
    result = {}
    for name in names:
        given = graph.stored(graph.weight[name]).type
        if len(given.shape) == 1:
            continue  # a norm stays as it is stored
        wanted = DType(options.fold_to) if options.fold_to else formats.get(name, changeable(given.dtype))
        result[name] = fitting(wanted, int(given.shape[-1]))
    return result


def _formats(quantize: str, graph: Graph) -> dict[str, DType]:
    """What each matrix is encoded in, but for those that choose experts: a few bytes, whose errors would weigh much.

    The 4-bit formats with blocks of 64 are for products, not for tables.
    """
    if quantize == "none":
        return {}
    dtype = DType(quantize)
    experts = {node.inputs[1] for node in graph.nodes if isinstance(node.op, ExpertMatMul)}
    linear = _linear_weights(graph) | experts
    routers = {graph.producer[node.inputs[0]].inputs[1] for node in graph.nodes if isinstance(node.op, Route)}
    readers = (node for node in graph.nodes if isinstance(node.op, Embed | MatMul | DequantMatMul))
    matrices = {node.inputs[1] for node in readers} - routers | experts
    return {
        weight.name: fitting(dtype, int(weight.type.shape[-1]))
        for weight in graph.weights
        if weight.name in matrices and (weight.name in linear or dtype not in _FOR_PRODUCTS)
    }


def _linear_weights(graph: Graph) -> set[str]:
    """The matrices of the layers' products, but for those whose products are scaled, which adapters' are not."""
    users = (node for node in graph.nodes if isinstance(node.op, MatMul | DequantMatMul))
    names = {node.inputs[1] for node in users if node.inputs[1].startswith("blk.")}
    return {name for name in names if _scale_of(name) not in graph.weight}


def _scale_of(matrix: str) -> str:
    """What files call the number that a matrix's product is multiplied by, where they have one."""
    return f"{matrix.removesuffix('.weight')}.scale"
