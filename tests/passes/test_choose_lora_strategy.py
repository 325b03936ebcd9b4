"""Fold or split, matrix by matrix, with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlxc.dtypes import ENCODABLE, DType
from rlxc.errors import OptionError
from rlxc.ir import parse
from rlxc.passes import ChooseLoraStrategy, Delta, LoraMode, Replacement
from rlxc.passes.choose_lora_strategy import _ERRORS
from rlxc.weights.encode import encode
from rlxc.weights.formats import FORMATS

GRAPH = """
    graph two
    input %x: f32[batch, seq, 256]
    weight @coarse: q4_k[512, 256]
    weight @fine: bf16[512, 256]
    %a = DequantMatMul(%x, @coarse)
    %b = MatMul(%x, @fine)
    output %a
    output %b
    """
DELTAS = {"coarse": [Delta("a", "b", 8, 1.0)], "fine": [Delta("c", "d", 8, 1.0)]}


def decide(mode: LoraMode = "auto", changes: Any = DELTAS, **options: Any) -> dict[str, Any]:
    result = ChooseLoraStrategy(changes, mode, options.pop("to", {}), **options).run(parse(GRAPH))
    assert not result.modified
    decisions: dict[str, Any] = dict(result.facts["lora_strategy"])
    return decisions


def folds(decisions: dict[str, Any]) -> dict[str, bool]:
    return {name: decision["fold"] for name, decision in decisions.items()}


def test_float_matrix_is_folded_and_a_coarse_one_is_not() -> None:
    assert folds(decide()) == {"coarse": False, "fine": True}


def test_reason_names_what_encoding_costs_and_what_a_side_path_reads() -> None:
    reason = decide()["coarse"]["reason"]
    assert "q4_k anew would cost an error of 7.1%" in reason
    assert f"rank 16 reads {16 * (512 + 256) * 2} bytes a token" in reason


def test_finer_target_format_makes_folding_cheap() -> None:
    assert folds(decide(to={"coarse": DType.Q8_0}))["coarse"]


def test_budget_decides() -> None:
    assert folds(decide(budget=0.1)) == {"coarse": True, "fine": True}
    assert folds(decide(budget=0.0)) == {"coarse": False, "fine": False}


def test_what_the_user_asks_for_is_done() -> None:
    assert folds(decide("fold")) == {"coarse": True, "fine": True}
    assert folds(decide("split")) == {"coarse": False, "fine": False}


ONLY_FOLDS = {
    "DoRA": Delta("a", "b", 8, 1.0, magnitude="m"),
    "trained as a whole": Replacement("new"),
}


@pytest.mark.parametrize("reason", ONLY_FOLDS)
def test_what_no_side_path_can_do_is_folded_or_refused(reason: str) -> None:
    changes = {"coarse": [ONLY_FOLDS[reason]]}
    decision = decide("auto", changes)["coarse"]
    assert decision["fold"] and reason in decision["reason"]
    with pytest.raises(OptionError, match=reason):
        decide("split", changes)


def test_without_adapters_there_is_nothing_to_decide() -> None:
    assert "lora_strategy" not in ChooseLoraStrategy({}, "auto", {}).run(parse(GRAPH)).facts


@pytest.mark.parametrize("dtype", ENCODABLE)
def test_error_of_a_format_is_what_encoding_costs(dtype: DType) -> None:
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    encoded = FORMATS[dtype].decode(encode(dtype, values), 1024)
    error = np.linalg.norm(encoded - values) / np.linalg.norm(values)
    # Another sample of 65536 values gives an error that differs by half a percent.
    assert _ERRORS[dtype] == pytest.approx(error, rel=0.02)


def test_tied_output_is_judged_by_the_format_that_it_would_get() -> None:
    tied = """
    graph tied
    input %ids: i64[batch, seq]
    weight @token_embd.weight: q4_k[512, 256]
    weight @output.weight: q4_k[512, 256] = alias(@token_embd.weight)
    %x = Embed(%ids, @token_embd.weight)
    %logits = DequantMatMul(%x, @output.weight)
    output %logits
    """
    one = ChooseLoraStrategy({"output.weight": DELTAS["coarse"]}, "auto", {"output.weight": DType.Q8_0})
    assert one.run(parse(tied)).facts["lora_strategy"]["output.weight"]["fold"]
