"""The kernels that have knobs, as problems for the tuner: each made from plain data, which an artifact can keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlxc.backends.tvm.kernels.activations import QuantisedRow
from rlxc.backends.tvm.kernels.attention import attention_kernel, workspace_floats
from rlxc.backends.tvm.kernels.attention_block import AttentionKnobs
from rlxc.backends.tvm.kernels.cache import CacheShape, CacheType
from rlxc.backends.tvm.kernels.experts import (
    Experts,
    exact_expert_matmul_kernel,
    expert_matmul_kernel,
)
from rlxc.backends.tvm.kernels.kernel import Kernel, Knobs
from rlxc.backends.tvm.kernels.lora import LoraUp
from rlxc.backends.tvm.kernels.matmul import FEW, matmul_kernel
from rlxc.backends.tvm.kernels.matmul_exact import exact_matmul_kernel
from rlxc.backends.tvm.kernels.output import OutputRows
from rlxc.backends.tvm.kernels.route import Groups
from rlxc.backends.tvm.kernels.vector import Vectors
from rlxc.backends.tvm.layout import Layout, PackedLayout, layout_of
from rlxc.backends.tvm.problem import Filled, Problem
from rlxc.backends.tvm.targets import CpuTarget
from rlxc.dtypes import DType
from rlxc.errors import ArtifactError
from rlxc.ir import WeightLayout

Chosen = Sequence[int] | None
"""A layout's bits, block and tile; None for that of the format."""

MEASURED_POSITIONS = 4096
"""The most positions that attention is measured with: longer sequences take more time, not other knobs."""


def matmul(
    target: CpuTarget,
    *,
    dtype: str,
    layout: Chosen = None,
    rows: int,
    columns: int,
    stride: int,
    bias: bool,
    tokens: int,
    weight: int = 1,
    cap: float | None = None,
    lora: LoraUp | None = None,
) -> Problem:
    """A product of a packed weight and int8 activations; results have ``stride`` numbers from token to token.

    It is measured without what ``lora`` makes it add.
    """
    vectors, stored = Vectors.of(target), PackedLayout(DType(dtype), rows, columns, _chosen(layout))
    row = QuantisedRow.of(stored, vectors)

    def make(knobs: Knobs) -> Kernel:
        return matmul_kernel(vectors, knobs, stored, OutputRows(rows, stride, cap), bias=bias, lora=lora)

    biases = (stored.tiles * stored.tile,) if bias else ()
    arguments = (stored.nbytes, tokens * row.stride, *biases, tokens * stride, tokens)
    return _product(target, make, stored, arguments, weight)


def matmul_exact(
    target: CpuTarget,
    *,
    dtype: str,
    layout: Chosen = None,
    rows: int,
    columns: int,
    x_stride: int,
    stride: int,
    bias: bool,
    tokens: int,
    weight: int = 1,
    cap: float | None = None,
    lora: LoraUp | None = None,
) -> Problem:
    """A product of any weight and f32 activations, ``x_stride`` numbers from token to token.

    It is measured without what ``lora`` makes it add.
    """
    vectors, stored = Vectors.of(target), layout_of(DType(dtype), rows, columns, _chosen(layout))

    def make(knobs: Knobs) -> Kernel:
        output = OutputRows(rows, stride, cap)
        return exact_matmul_kernel(vectors, knobs, stored, output, stride=x_stride, bias=bias, lora=lora)

    biases = (stored.tiles * stored.tile,) if bias else ()
    arguments = (stored.nbytes, tokens * x_stride, *biases, tokens * stride, tokens)
    return _product(target, make, stored, arguments, weight)


def expert_matmul(
    target: CpuTarget,
    *,
    dtype: str,
    layout: Chosen = None,
    experts: int,
    rows: int,
    columns: int,
    used: int,
    stride: int,
    shared: bool,
    bias: bool,
    tokens: int,
    weight: int = 1,
) -> Problem:
    """A product of packed experts and int8 activations, one row for each token if ``shared``, or for each slot."""
    vectors = Vectors.of(target)
    of = Experts(DType(dtype), experts, rows, columns, used, _chosen(layout))
    assert isinstance(of.layout, PackedLayout)
    row = QuantisedRow.of(of.layout, vectors)

    def make(knobs: Knobs) -> Kernel:
        output = OutputRows(rows, stride)
        return expert_matmul_kernel(vectors, knobs, of, output, shared=shared, bias=bias)

    return _expert_product(target, make, of, row.stride, stride, shared, bias, tokens, weight)


def expert_matmul_exact(
    target: CpuTarget,
    *,
    dtype: str,
    layout: Chosen = None,
    experts: int,
    rows: int,
    columns: int,
    used: int,
    x_stride: int,
    stride: int,
    shared: bool,
    bias: bool,
    tokens: int,
    weight: int = 1,
) -> Problem:
    """A product of any experts and f32 activations, ``x_stride`` numbers from row to row."""
    vectors = Vectors.of(target)
    of = Experts(DType(dtype), experts, rows, columns, used, _chosen(layout))

    def make(knobs: Knobs) -> Kernel:
        output = OutputRows(rows, stride)
        return exact_expert_matmul_kernel(
            vectors, knobs, of, output, stride=x_stride, shared=shared, bias=bias
        )

    return _expert_product(target, make, of, x_stride, stride, shared, bias, tokens, weight)


def _chosen(layout: Chosen) -> WeightLayout | None:
    return None if layout is None else WeightLayout(*layout)


def _expert_product(
    target: CpuTarget,
    make: Callable[[Knobs], Kernel],
    of: Experts,
    x_stride: int,
    stride: int,
    shared: bool,
    bias: bool,
    tokens: int,
    weight: int,
) -> Problem:
    """Measured with slots that want all experts alike."""
    space, slots = _matmul_space(target, tokens), tokens * of.used
    groups = Groups(of.experts).even(slots)
    biases = (of.layout.rows,) if bias else ()
    x = (tokens if shared else slots) * x_stride
    return Problem(
        name=f"{make(space[0]).name}, {_tokens(tokens)}",
        space=space,
        make=make,
        arguments=(of.layout.nbytes, x, Filled(len(groups), groups), *biases, slots * stride, tokens),
        bytes_moved=of.layout.nbytes * min(slots, of.experts) // of.experts,
        operations=2 * of.rows * of.columns * slots,
        weight=weight,
    )


def _product(
    target: CpuTarget,
    make: Callable[[Knobs], Kernel],
    layout: Layout,
    arguments: tuple[int, ...],
    weight: int,
) -> Problem:
    tokens = arguments[-1]
    space = _matmul_space(target, tokens)
    return Problem(
        name=f"{make(space[0]).name}, {_tokens(tokens)}",
        space=space,
        make=make,
        arguments=arguments,
        bytes_moved=layout.nbytes,
        operations=2 * layout.rows * layout.columns * tokens,
        weight=weight,
    )


def attention(
    target: CpuTarget,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    cache_dtype: CacheType,
    scale: float,
    window: int | None,
    out_stride: int,
    positions: int,
    tokens: int,
    weight: int = 1,
    soft_cap: float | None = None,
    sinks: bool = False,
) -> Problem:
    """Attention of a step's tokens, which are the last of so many positions; those behind the window do not count."""
    vectors = Vectors.of(target)
    shape = CacheShape(kv_heads, head_dim, page, cache_dtype)

    def make(knobs: Knobs) -> Kernel:
        return attention_kernel(
            vectors,
            _attention_knobs(target, knobs),
            heads=heads,
            shape=shape,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            out_stride=out_stride,
        )

    space = _attention_space(target, page)
    past = max(0, min(positions, window or positions) - tokens)
    held = past + tokens
    pages = -(-held // page)
    # A page's keys and its values lie in buffers of their own, as far from the first one's; so do scales.
    distances = tuple(range(0, pages * shape.nbytes, shape.nbytes))
    elements = [pages * shape.nbytes // shape.element_bytes] * 2
    scales = [pages * shape.nbytes // 4] * (2 * shape.has_scales)
    seen = tokens * (past + tokens // 2)
    return Problem(
        name=(
            f"attention {heads}x{head_dim} over {kv_heads}, {cache_dtype} pages of {page}, window {window}, "
            f"{'' if soft_cap is None else f'soft cap {soft_cap}, '}{'sinks, ' * sinks}"
            f"{held} positions, {_tokens(tokens)}"
        ),
        space=space,
        make=make,
        arguments=(
            tokens * heads * head_dim,
            1,
            Filled(pages, distances),
            *elements,
            *scales,
            Filled(1, past),
            *([heads] * sinks),
            attention_workspace(target, shape),
            tokens * out_stride,
            1,
            tokens,
        ),
        bytes_moved=2 * held * kv_heads * (head_dim * shape.element_bytes + 4 * shape.has_scales),
        operations=4 * heads * head_dim * seen,
        weight=weight,
    )


def attention_workspace(target: CpuTarget, shape: CacheShape) -> int:
    """The f32 of workspace that attention needs, whatever its knobs."""
    space = _attention_space(target, shape.page)
    return max(workspace_floats(_attention_knobs(target, knobs), shape.head_dim) for knobs in space)


_FAMILIES: Mapping[str, Callable[..., Problem]] = {
    family.__name__: family
    for family in (matmul, matmul_exact, expert_matmul, expert_matmul_exact, attention)
}


def write_entries(entries: Sequence[Entry]) -> bytes:
    """Entries as an artifact keeps them."""
    return json.dumps([asdict(entry) for entry in entries], indent=1).encode()


def read_problems(data: bytes, target: CpuTarget, source: object) -> list[Problem]:
    """The problems, for a target, that an artifact keeps.

    Raises:
        ArtifactError: another version of rlxc wrote them.
    """
    try:
        return [Entry(**entry).problem(target) for entry in json.loads(data)]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"its kernels are not those of this rlxc ({error})",
            source=source,
            remedy="compile the model again, or tune the model itself",
        ) from error


@dataclass(frozen=True)
class Entry:
    """A problem as plain data: its family, and that family's parameters."""

    family: str
    parameters: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for equal entries, and for no others."""
        return json.dumps([self.family, self.parameters], sort_keys=True)

    def times(self, count: int) -> Entry:
        """The same problem, met ``count`` times in a step."""
        return Entry(self.family, {**self.parameters, "weight": count})

    def problem(self, target: CpuTarget, **more: Any) -> Problem:
        """The problem, for a target; ``more`` are parameters that its measuring does not depend on."""
        return _FAMILIES[self.family](target, **self.parameters, **more)


def _matmul_space(target: CpuTarget, tokens: int) -> tuple[Knobs, ...]:
    """The default first; then what may be better for many tokens, or for one."""
    default = {"tokens": 10 if target.registers >= 32 else 4, "prefetch": 2048}
    if tokens > FEW:
        others = [{**default, "tokens": count} for count in range(2, 13 if target.registers >= 32 else 7)]
    else:
        others = [{**default, "prefetch": distance} for distance in (0, 1024, 4096)]
    return (default, *(knobs for knobs in others if knobs != default))


def _attention_space(target: CpuTarget, page: int) -> tuple[Knobs, ...]:
    default = AttentionKnobs.of(target)
    rows = (8, 10, 12, 14) if target.registers >= 32 else (4, 5, 6)
    # The keys of a block lie in one page.
    keys = [count for count in (16, 32, 64, 128) if count <= page][-2:]
    settings = [(default.rows, min(default.keys, page)), *((r, k) for r in rows for k in keys)]
    return tuple({"rows": r, "keys": k} for r, k in dict.fromkeys(settings))


def _attention_knobs(target: CpuTarget, knobs: Knobs) -> AttentionKnobs:
    return AttentionKnobs(knobs["rows"], knobs["keys"], target.registers)


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"
