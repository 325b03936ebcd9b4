"""Adapters folded into weights, as recipes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import interp, parse
from rlxc.passes import Delta, Pass, PassResult, Replacement
from rlxc.passes.fold_lora import FoldLora

Becomes = Callable[[Pass, str, str], PassResult]

LINEAR = """
    graph linear
    input %x: f32[batch, seq, 32]
    weight @w: q8_0[6, 32]
    %y = DequantMatMul(%x, @w)
    output %y
    """

TIED = """
    graph tied
    input %ids: i64[batch, seq]
    weight @token_embd.weight: q8_0[16, 32]
    weight @output.weight: q8_0[16, 32] = alias(@token_embd.weight)
    %x = Embed(%ids, @token_embd.weight)
    %logits = DequantMatMul(%x, @output.weight)
    output %logits
    """

DELTA = Delta("a", "b", 2, 0.5)


def test_weight_keeps_its_format(becomes: Becomes) -> None:
    after = """
    graph linear
    input %x: f32[batch, seq, 32]
    weight @w: q8_0[6, 32] = encode(@w.folded.0: f32[6, 32] = fold(@w.base: q8_0[6, 32] = source("w"),
    @w.folded.0.a: f32[2, 32] = source("a"), @w.folded.0.b: f32[6, 2] = source("b"), 0.5))
    %y = DequantMatMul(%x, @w)
    output %y
    """.replace(",\n    @w.folded", ", @w.folded")
    becomes(FoldLora({"w": [DELTA]}, {}), LINEAR, after)


def test_float_result_is_read_by_a_plain_product() -> None:
    graph = FoldLora({"w": [DELTA]}, {"w": DType.F32}).run(parse(LINEAR)).graph
    assert graph.nodes[0].op.name == "MatMul"
    assert str(graph.weight["w"].type) == "f32[6, 32]"


def test_adapters_add_up_in_order() -> None:
    second = Delta("c", "d", 1, -2.0)
    graph = FoldLora({"w": [DELTA, second]}, {"w": DType.F32}).run(parse(LINEAR)).graph
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=shape) for name, shape in _SHAPES.items()}
    found = interp.weight_array(graph, graph.weight["w"], data.__getitem__)
    expected = data["w"] + 0.5 * data["b"] @ data["a"] - 2 * data["d"] @ data["c"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # float64


def test_dora_sets_the_length_of_rows() -> None:
    delta = Delta("a", "b", 2, 0.5, magnitude="m")
    graph = FoldLora({"w": [delta]}, {"w": DType.F32}).run(parse(LINEAR)).graph
    rng = np.random.default_rng(1)
    data = {name: rng.normal(size=shape) for name, shape in _SHAPES.items()}
    found = interp.weight_array(graph, graph.weight["w"], data.__getitem__)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.abs(data["m"]), rtol=1e-12)  # float64
    plain = data["w"] + 0.5 * data["b"] @ data["a"]
    cosine = (found * plain).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(plain, axis=1)
    np.testing.assert_allclose(cosine, np.sign(data["m"]), rtol=1e-12)


def test_table_that_an_adapter_changes_is_tied_no_more(becomes: Becomes) -> None:
    after = """
    graph tied
    input %ids: i64[batch, seq]
    weight @token_embd.weight: f32[16, 32] = fold_transposed(@token_embd.weight.base: q8_0[16, 32] = source("token_embd.weight"), @token_embd.weight.folded.0.a: f32[2, 16] = source("a"), @token_embd.weight.folded.0.b: f32[32, 2] = source("b"), 0.5)
    weight @output.weight: q8_0[16, 32] = source("token_embd.weight")
    %x = Embed(%ids, @token_embd.weight)
    %logits = DequantMatMul(%x, @output.weight)
    output %logits
    """  # noqa: E501 - a weight is one line
    becomes(FoldLora({"token_embd.weight": [DELTA]}, {"token_embd.weight": DType.F32}), TIED, after)


def test_output_that_an_adapter_changes_is_tied_no_more() -> None:
    graph = FoldLora({"output.weight": [DELTA]}, {}).run(parse(TIED)).graph
    assert graph.weight["output.weight"].tensors == ("token_embd.weight", "a", "b")
    assert graph.weight["token_embd.weight"].tensors == ("token_embd.weight",)


def test_replacement_takes_the_place_of_the_weight() -> None:
    graph = FoldLora({"w": [Replacement("new")]}, {}).run(parse(LINEAR)).graph
    assert graph.weight["w"].tensors == ("new",)
    assert graph.weight["w"].type.dtype is DType.Q8_0


def test_matrix_that_is_not_there_is_refused() -> None:
    with pytest.raises(GraphError, match="no matrix 'v'"):
        FoldLora({"v": [DELTA]}, {}).run(parse(LINEAR))


_SHAPES = {"w": (6, 32), "a": (2, 32), "b": (6, 2), "c": (1, 32), "d": (6, 1), "m": (6,)}
