"""What no output needs goes; the interface stays."""

from __future__ import annotations

from typing import Any

from rlxc.passes.remove_dead import RemoveDead

BEFORE = """
graph dead
input %x: f32[batch, 4]
input %unused: f32[batch, 4]
weight @w: f32[4]
weight @idle: f32[4]
weight @only_for_dead: f32[4]
weight @tied: f32[4] = alias(@target)
weight @target: f32[4]
%a = Silu(%x)
%dead = Mul(%a, @only_for_dead)
%deader = Silu(%dead)
%b, %half_used = Split(%a; sizes=(2, 2))
%n = RmsNorm(%a, @tied; eps=1.0)
%y = Mul(%n, @w)
output %y
output %b
"""

AFTER = """
graph dead
input %x: f32[batch, 4]
input %unused: f32[batch, 4]
weight @w: f32[4]
weight @tied: f32[4] = alias(@target)
weight @target: f32[4]
%a = Silu(%x)
%b, %half_used = Split(%a; sizes=(2, 2))
%n = RmsNorm(%a, @tied; eps=1.0)
%y = Mul(%n, @w)
output %y
output %b
"""


def test_nodes_and_weights_without_use_go(becomes: Any) -> None:
    becomes(RemoveDead(), BEFORE, AFTER)


def test_numbers_are_kept(keeps_numbers: Any) -> None:
    keeps_numbers(RemoveDead(), BEFORE)


def test_second_run_changes_nothing(is_done_in_one_run: Any) -> None:
    is_done_in_one_run(RemoveDead(), BEFORE)


def test_graph_without_dead_parts_is_left_alone(stays: Any) -> None:
    stays(RemoveDead(), AFTER)
