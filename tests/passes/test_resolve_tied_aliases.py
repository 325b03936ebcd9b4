"""Tied weights: one matrix, read by all."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.errors import GraphError
from rlxc.ir import parse
from rlxc.passes.resolve_tied_aliases import ResolveTiedAliases

BEFORE = """
graph tied
input %ids: i64[batch, seq]
weight @second: q8_0[8, 32] = alias(@output)
weight @table: q8_0[8, 32]
weight @output: q8_0[8, 32] = alias(@table)
%x = Embed(%ids, @table)
%logits = DequantMatMul(%x, @output)
%more = DequantMatMul(%x, @second)
output %logits
output %more
"""

AFTER = """
graph tied
input %ids: i64[batch, seq]
weight @table: q8_0[8, 32]
%x = Embed(%ids, @table)
%logits = DequantMatMul(%x, @table)
%more = DequantMatMul(%x, @table)
output %logits
output %more
"""

UNTIED = """
graph untied
input %ids: i64[batch, seq]
weight @table: q8_0[8, 32]
weight @output: q8_0[8, 32]
%x = Embed(%ids, @table)
%logits = DequantMatMul(%x, @output)
output %logits
"""


def test_users_of_aliases_read_the_stored_weight(becomes: Any) -> None:
    becomes(ResolveTiedAliases(), BEFORE, AFTER)


def test_numbers_are_kept(keeps_numbers: Any) -> None:
    keeps_numbers(ResolveTiedAliases(), BEFORE)


def test_second_run_changes_nothing(is_done_in_one_run: Any) -> None:
    is_done_in_one_run(ResolveTiedAliases(), BEFORE)


def test_untied_weights_are_left_alone(stays: Any) -> None:
    stays(ResolveTiedAliases(), UNTIED)


def test_alias_cycle_is_refused() -> None:
    graph = parse(BEFORE.replace("@table: q8_0[8, 32]", "@table: q8_0[8, 32] = alias(@second)"))
    with pytest.raises(GraphError, match="cycle of aliases"):
        ResolveTiedAliases().run(graph)


def test_dangling_alias_is_refused() -> None:
    graph = parse(BEFORE.replace("alias(@table)", "alias(@nowhere)"))
    with pytest.raises(GraphError, match="@output is an alias of @nowhere"):
        ResolveTiedAliases().run(graph)
