"""What is wrong with many tensors, in few lines."""

from __future__ import annotations

import pytest

from rlxc.errors import ModelError, Problems, UnsupportedError
from rlxc.weights.tensor_problems import TensorProblems


def told(wrong: TensorProblems) -> list[str]:
    problems = Problems()
    wrong.report(problems)
    assert {error.source for error in problems.found} == {"m.gguf"}
    return [error.problem for error in problems.found]


@pytest.fixture
def wrong() -> TensorProblems:
    return TensorProblems("m.gguf", "the metadata", "a llama model")


def test_one_tensor_is_named(wrong: TensorProblems) -> None:
    wrong.missing("blk.3.attn_q.weight")
    wrong.surplus("score.weight")
    assert told(wrong) == [
        "tensor blk.3.attn_q.weight is missing",
        "tensor score.weight has no place in a llama model",
    ]


def test_layers_with_one_problem_are_one_line(wrong: TensorProblems) -> None:
    for layer in (0, 1, 2, 5, 7, 8):
        wrong.missing(f"blk.{layer}.attn_q.weight")
    assert told(wrong) == ["6 tensors are missing: blk.{0-2,5,7-8}.attn_q.weight"]


def test_tensors_of_the_same_layers_are_one_line(wrong: TensorProblems) -> None:
    for layer in (11, 10):
        for name in ("attn_q", "attn_k"):
            wrong.surplus(f"blk.{layer}.{name}.weight")
    wrong.surplus("blk.0.attn_v.weight")
    assert told(wrong) == [
        "4 tensors have no place in a llama model: blk.{10-11}.attn_q.weight, blk.{10-11}.attn_k.weight",
        "tensor blk.0.attn_v.weight has no place in a llama model",
    ]


def test_tensors_of_one_layer_are_one_line(wrong: TensorProblems) -> None:
    wrong.missing("blk.4.attn_q.weight")
    wrong.missing("blk.4.attn_k.weight")
    assert told(wrong) == ["2 tensors are missing: blk.4.attn_q.weight, blk.4.attn_k.weight"]


def test_tensors_of_no_layer_are_named_one_by_one(wrong: TensorProblems) -> None:
    wrong.missing("token_embd.weight")
    wrong.missing("attn_q.weight")
    wrong.missing("blk.0.attn_q.weight")
    assert told(wrong) == [
        "tensor token_embd.weight is missing",
        "tensor attn_q.weight is missing",
        "tensor blk.0.attn_q.weight is missing",
    ]


def test_other_shapes_are_other_lines(wrong: TensorProblems) -> None:
    for layer, rows in enumerate((4, 4, 8)):
        wrong.misshapen(f"blk.{layer}.attn_q.weight", (rows, 2), (2, 2))
    assert told(wrong) == [
        "2 tensors have shape [4, 2], but the metadata asks for [2, 2]: blk.{0-1}.attn_q.weight",
        "tensor blk.2.attn_q.weight has shape [8, 2], but the metadata asks for [2, 2]",
    ]


def test_names_of_hugging_face_are_counted_by_layer(wrong: TensorProblems) -> None:
    for layer in range(12):
        wrong.missing(f"model.layers.{layer}.mlp.up_proj.weight")
    assert told(wrong) == ["12 tensors are missing: model.layers.{0-11}.mlp.up_proj.weight"]


@pytest.mark.parametrize("name", ["blk.0.a\nb.weight", "\x1b[2J", "a" * 500, "blk.9999999999999.x"])
def test_strange_name_is_shown_on_one_short_line(wrong: TensorProblems, name: str) -> None:
    wrong.surplus(name)
    (line,) = told(wrong)
    assert line.isprintable() and len(line) < 200


def test_kind_of_error_can_be_chosen(wrong: TensorProblems) -> None:
    wrong.missing("a")
    wrong.add("b", "has element type F64", "have element type F64", "use F32", UnsupportedError)
    problems = Problems()
    wrong.report(problems)
    assert [type(error) for error in problems.found] == [ModelError, UnsupportedError]
    assert problems.found[1].remedy == "use F32"
