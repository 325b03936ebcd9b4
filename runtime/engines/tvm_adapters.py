"""LoRA adapters as compiled kernels read them: laid out in memory, and stacked for the sequences of a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from rlxc.artifact.lora import UNIT_RANK, LoraPart, LoraPlan, UnitPart
from rlxc.dtypes import DType
from rlxc.errors import SessionError
from rlxc.runtime.engines import Mix, Pairs
from rlxc.runtime.engines.memory import aligned, private_memory
from rlxc.runtime.logits import Floats

_TYPES: dict[DType, np.dtype[Any]] = {DType.F32: np.dtype(np.float32), DType.F16: np.dtype(np.float16)}


class TvmAdapter:
    """An adapter in units of 16 ranks, one after the other, as ``plan`` says.

    Raises:
        SessionError: the plan lacks a matrix, or a number is too large for its type.
    """

    def __init__(self, plan: LoraPlan, pairs: Pairs) -> None:
        missing = pairs.keys() - {part.tensor for part in plan.parts}
        if missing:
            raise SessionError(
                "the artifact takes no adapters for this matrix",
                source=min(missing),
                remedy="compile the model with this adapter",
            )
        self.plan = plan
        self.units = max((-(-len(a) // UNIT_RANK) for a, _ in pairs.values()), default=0)
        self._memory = private_memory(max(1, self.units * plan.unit_bytes), large_pages=True)
        # What is written: pages that are only for matrices that the adapter lacks are never touched.
        self.nbytes = self.units * len(plan.parts)
        for index, (part, place) in enumerate(zip(plan.parts, plan.unit)):
            if part.tensor in pairs:
                self._fill(index, part, place, *pairs[part.tensor])

    @property
    def addresses(self) -> list[int]:
        """Where each unit begins."""
        first = self._memory.ctypes.data
        return [first + index * self.plan.unit_bytes for index in range(self.units)]

    def _fill(self, index: int, part: LoraPart, place: UnitPart, a: Floats, b: Floats) -> None:
        """Write a matrix's A ``[rank, columns]`` and B ``[rows, rank]`` into as many units as they need."""
        dtype = _TYPES[self.plan.dtype]
        # A unit's B is of whole tiles, in which there may be rows of a neighbour.
        first = part.first_row - place.first_tile * UNIT_RANK
        for unit, start in enumerate(range(0, len(a), UNIT_RANK)):
            ranks = slice(start, start + UNIT_RANK)
            a_part, b_part = _stored(part.tensor, a[ranks], dtype), _stored(part.tensor, b[:, ranks], dtype)
            down = np.zeros((part.columns, UNIT_RANK), dtype)
            down[:, : len(a_part)] = a_part.T
            rows = np.zeros((place.tiles * UNIT_RANK, UNIT_RANK), dtype)
            rows[first : first + part.rows, : b_part.shape[1]] = b_part
            up = rows.reshape(place.tiles, UNIT_RANK, UNIT_RANK).transpose(0, 2, 1)
            begin = unit * self.plan.unit_bytes
            self._memory[begin + index] = 1
            for offset, numbers in ((place.down, down), (place.up, up)):
                at = begin + offset
                self._memory[at : at + numbers.nbytes] = numbers.ravel().view(np.int8)
                self.nbytes += numbers.nbytes


def _stored(tensor: str, values: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        largest = np.abs(values).max()
        raise SessionError(
            f"the adapter has a number of size {largest:g}, which {dtype} cannot hold",
            source=tensor,
            remedy="compile the model with float32 activations, or check the adapter",
        )
    return stored


class Stacks:
    """The step's arrays that say which units each sequence uses; they stay until its stacks change."""

    def __init__(self, plan: LoraPlan | None, anchor: int) -> None:
        """Units are told by their distance from ``anchor``, an address."""
        self._plan, self._anchor = plan, anchor
        self._key: tuple[int, tuple[tuple[tuple[TvmAdapter, float], ...], ...]] | None = None
        self._tensors: list[Any] = []

    def tensors(self, sequences: int, mixes: Sequence[Mix[TvmAdapter]]) -> list[Any]:
        """``lora_starts``, ``lora_units`` and ``lora_scales`` of so many sequences.

        Raises:
            SessionError: there are not as many stacks as sequences, or one is of another model or too large.
        """
        # Its adapters live for as long as these addresses are in use.
        key = (sequences, tuple(map(tuple, mixes)))
        if key != self._key:
            arrays = self._arrays(sequences, mixes)
            # A tensor must have an element.
            filled = [array if array.size else np.zeros(1, array.dtype) for array in arrays]
            self._key, self._tensors = key, [tvm_ffi.from_dlpack(array) for array in filled]
        return self._tensors

    def _arrays(self, sequences: int, mixes: Sequence[Mix[TvmAdapter]]) -> list[npt.NDArray[Any]]:
        if mixes and len(mixes) != sequences:
            raise SessionError(
                f"{len(mixes)} stacks of adapters for {sequences} sequences",
                source="mixes",
                remedy="give one to each sequence",
            )
        counts = [self._units(mix) for mix in mixes] or [0] * sequences
        uses = [
            (address - self._anchor, scale)
            for mix in mixes
            for adapter, scale in mix
            for address in adapter.addresses
        ]
        scales = aligned(len(uses))
        scales[:] = [scale for _, scale in uses]
        return [
            np.array([0, *accumulate(counts)], np.int32),
            np.array([unit for unit, _ in uses], np.int64),
            scales,
        ]

    def _units(self, mix: Mix[TvmAdapter]) -> int:
        """How many units a stack has: kernels have room for no more than planned."""
        if any(adapter.plan is not self._plan for adapter, _ in mix):
            raise SessionError(
                "an adapter was prepared by another engine",
                source="mixes",
                remedy="prepare it with the engine of this session",
            )
        count = sum(adapter.units for adapter, _ in mix)
        most = self._plan.max_units if self._plan is not None else 0
        if count > most:
            raise SessionError(
                f"a stack of {count * UNIT_RANK} ranks, in units of {UNIT_RANK}, and {most * UNIT_RANK} fit",
                source="mixes",
                remedy="use fewer adapters at once, or compile the model for more ranks",
            )
        return count
