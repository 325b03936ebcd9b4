"""What the tests of passes share: run a pass on text, compare with text, compare numbers."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rlxc.dtypes import DType
from rlxc.ir import Graph, Source, interp, parse, show, verify
from rlxc.ir.target import TargetFeatures
from rlxc.passes import Pass, PassResult

# The small models lie beside the folders of the tests that share them.
sys.path.insert(0, str(Path(__file__).parent.parent))

Arrays = dict[str, npt.NDArray[Any]]

DIMS = {"batch": 2, "seq": 5, "rows": 2, "past": 4}
"""What symbolic dimensions are when numbers are compared."""

TOLERANCE = 1e-12
"""The interpreter works in float64: rewrites only reorder its sums."""


@pytest.fixture
def features() -> TargetFeatures:
    """A target that has everything; Q5_0 and Q8_0 are stored alike, and so are Q4_K and Q4_1, without a widest one."""
    storage = {
        DType.Q5_0: "u8",
        DType.Q8_0: "u8",
        DType.Q4_K: "u4-min",
        DType.Q4_1: "u4-min",
        DType.Q6_K: "u8x16",
    }
    return TargetFeatures(
        add_rms_norm=True,
        glu=True,
        group_query_attention=True,
        ring_cache=True,
        storage=storage,
        widest={"u8": DType.Q8_0},
    )


def _run(one: Pass, before: str | Graph) -> tuple[Graph, PassResult]:
    """The graph before and the result, both verified, the claim to have changed something checked."""
    graph = parse(before) if isinstance(before, str) else before
    verify(graph)
    result = one.run(graph)
    verify(result.graph, after=one.name)
    assert result.modified == (result.graph != graph)
    return graph, result


@pytest.fixture
def becomes() -> Callable[[Pass, str, str], PassResult]:
    """``becomes(pass, before, after)``: the pass makes this text of that one; types may be left out."""

    def check(one: Pass, before: str, after: str) -> PassResult:
        result = _run(one, before)[1]
        assert show(result.graph) == show(parse(after))
        return result

    return check


@pytest.fixture
def stays() -> Callable[..., None]:
    """``stays(pass, text, reason="")``: the pass leaves the graph alone, and says why if a reason is given."""

    def check(one: Pass, before: str, reason: str = "") -> None:
        graph, result = _run(one, before)
        assert show(result.graph) == show(graph)
        assert [miss.reason for miss in result.missed if reason in miss.reason] or not reason, result.missed

    return check


@pytest.fixture
def is_done_in_one_run() -> Callable[[Pass, str], None]:
    """``is_done_in_one_run(pass, before)``: a second run finds nothing to do."""

    def check(one: Pass, before: str) -> None:
        _, first = _run(one, before)
        assert first.modified
        assert not _run(one, first.graph)[1].modified

    return check


@pytest.fixture
def keeps_numbers() -> Callable[[Pass, str], None]:
    """``keeps_numbers(pass, before)``: equal outputs for the same random inputs and tensors."""

    def check(one: Pass, before: str) -> None:
        graph, result = _run(one, before)
        assert result.modified
        feeds, data = _feeds(graph), tensors(graph)
        expected = interp.run(graph, feeds, data.__getitem__)
        found = interp.run(result.graph, feeds, data.__getitem__)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)

    return check


def tensors(graph: Graph) -> dict[str, npt.NDArray[np.float32]]:
    """Random tensors for every source of a graph, by their names alone the same in every graph."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    pending = list(graph.weights)
    while pending:
        weight = pending.pop()
        if isinstance(weight.recipe, Source):
            rng = np.random.default_rng(zlib.crc32(weight.recipe.tensor.encode()))
            shape = tuple(map(int, weight.type.shape))
            # Of a size that keeps activations near 1.
            size = shape[1] ** -0.5 if len(shape) == 2 else 1.0
            array = size * rng.standard_normal(shape)
            if weight.recipe.tensor.startswith(("factors", "rope_")):  # what frequencies are divided by
                array = 1 + abs(array)
            found[weight.recipe.tensor] = array.astype(np.float32)
        else:
            pending += getattr(weight.recipe, "parts", ())
    return found


def _feeds(graph: Graph) -> Arrays:
    rng = np.random.default_rng(0)
    feeds: Arrays = {}
    for value in graph.inputs:
        shape = tuple(DIMS[dim] if isinstance(dim, str) else dim for dim in value.type.shape)
        if value.type.dtype is DType.F32:
            feeds[value.name] = rng.standard_normal(shape)
        elif value.type.dtype is DType.I32:
            feeds[value.name] = np.array(DIMS["past"], np.int32)
        else:
            # Token ids are small enough for every table, and rows count from either end.
            feeds[value.name] = rng.integers(0 if len(shape) == 2 else -DIMS["seq"], DIMS["seq"], shape)
    return feeds


@pytest.fixture
def same_logits_in_steps() -> Callable[[Graph, Graph, Sequence[int]], None]:
    """``same_logits_in_steps(functional, scheduled, sizes)``: logits in steps of these sizes equal those of one pass.

    Outputs are ``logits`` for all rows and caches named as models name them. Buffers start as NaN, so that a row
    which was never written cannot be read unnoticed, and block tables name pages in a random order.
    """

    def check(functional: Graph, scheduled: Graph, sizes: Sequence[int]) -> None:
        data = tensors(functional)
        total = sum(sizes)
        ids = np.random.default_rng(7).integers(0, 16, (DIMS["batch"], total))
        expected = interp.run(
            functional, {**_caches(functional, 0.0), **_step(ids, 0, total)}, data.__getitem__
        )["logits"]
        caches, past, found = _caches(scheduled, np.nan), 0, []
        tables = random_tables(scheduled)
        for size in sizes:
            results = interp.run(scheduled, {**caches, **tables, **_step(ids, past, size)}, data.__getitem__)
            found.append(results["logits"])
            caches = {name: results[name.replace("past_key_values", "present")] for name in caches}
            past += size
        np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=0, atol=TOLERANCE)

    return check


PAGES = 64
"""Pages of a pool, more than any table lists."""


def random_tables(graph: Graph, seed: int = 0) -> Arrays:
    """Block tables of pages in a random order, none of them twice."""
    rng = np.random.default_rng(seed)
    tables: Arrays = {}
    for value in graph.inputs:
        if value.name.startswith("block_table."):
            entries = int(value.type.shape[1])
            pages = rng.permutation(PAGES)[: DIMS["batch"] * entries]
            tables[value.name] = pages.reshape(DIMS["batch"], entries).astype(np.int32)
    return tables


def _caches(graph: Graph, fill: float) -> Arrays:
    lengths: Mapping[int | str, int] = {"past": 0, "batch": DIMS["batch"], "pages": PAGES}
    return {
        value.name: np.full([lengths.get(dim, dim) for dim in value.type.shape], fill)
        for value in graph.inputs
        if len(value.type.shape) == 4
    }


def _step(ids: npt.NDArray[np.int64], past: int, size: int) -> Arrays:
    return {
        "input_ids": ids[:, past : past + size],
        "logit_rows": np.arange(size),
        "past_length": np.array(past, np.int32),
    }


@pytest.fixture
def model_graph() -> Callable[..., Graph]:
    """``model_graph(architecture, layers, bias=False, factors=False)``: a whole small model."""
    import model_graphs

    return model_graphs.model_graph
