"""Each op's shape rule: what it gives for the types it accepts, and what it refuses."""

from __future__ import annotations

import re

import pytest

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import RopeSpec, TensorType, ops

ROPE = RopeSpec(10000.0, 4)


def types(text: str) -> tuple[TensorType, ...]:
    """``f32[B, 3] i32[]`` as types."""
    found = []
    for dtype, shape in re.findall(r"(\w+)\[([^\]]*)\]", text):
        dims = (part.strip() for part in shape.split(",") if part.strip())
        found.append(TensorType(DType(dtype), tuple(int(dim) if dim.isdigit() else dim for dim in dims)))
    return tuple(found)


X = "f32[B, S, 8]"
CACHE = "f32[B, 2, past, 4]"
BUFFER = "f32[B, 2, 64, 4]"
PAGES = "int8[pages, 2, 16, 4]"
U = "f32[B, S, 3, R]"
CHOSEN = "i64[B, S, 3]"

ACCEPTED = [
    (ops.Constant(1.0), "", "f32[]"),
    (ops.Constant((1.0, 2.0)), "", "f32[2]"),
    (ops.Add(), f"{X} {X}", X),
    (ops.Add(), f"{X} f32[8]", X),
    (ops.Add(), f"f32[] {X}", X),
    (ops.Mul(), f"{X} f32[B, S, 1]", X),
    (ops.Mul(), f"f32[B, S, 1] {X}", X),
    (ops.Square(), X, X),
    (ops.Sqrt(), X, X),
    (ops.Rsqrt(), X, X),
    (ops.Silu(), X, X),
    (ops.Gelu(), X, X),
    (ops.SoftCap(30.0), X, X),
    (ops.ClampedSwiglu(1.702, 7.0), f"{X} {X}", X),
    (ops.Mean(), X, "f32[B, S, 1]"),
    (ops.LayerNorm(1e-6), f"{X} f32[8]", X),
    (ops.LayerNorm(1e-6), f"{X} f32[8] f32[8]", X),
    (ops.Route(3), "f32[B, S, 8]", f"{CHOSEN} f32[B, S, 3]"),
    (ops.ExpertMatMul(), f"{X} f32[6, 5, 8] {CHOSEN}", "f32[B, S, 3, 5]"),
    (ops.ExpertMatMul(), f"f32[B, S, 32] mxfp4[6, 5, 32] {CHOSEN} f32[6, 5]", "f32[B, S, 3, 5]"),
    (ops.ExpertMatMul(), f"f32[B, S, 3, 256] q4_k[6, 5, 256] {CHOSEN}", "f32[B, S, 3, 5]"),
    (ops.MixExperts(), "f32[B, S, 3, 5] f32[B, S, 3]", "f32[B, S, 5]"),
    (ops.RmsNorm(1e-6), f"{X} f32[8]", X),
    (ops.RmsNorm(1e-6, heads=2), f"{X} f32[4]", X),
    (ops.AddRmsNorm(1e-6), f"{X} {X} f32[8]", f"{X} {X}"),
    (ops.Embed(), "i64[B, S] q6_k[99, 256]", "f32[B, S, 256]"),
    (ops.Embed(), "i64[B, S] f32[99, 8]", X),
    (ops.MatMul(), f"{X} bf16[5, 8]", "f32[B, S, 5]"),
    (ops.MatMul(), f"{X} f32[5, 8] f32[5]", "f32[B, S, 5]"),
    (ops.DequantMatMul(), "f32[B, S, 256] q4_k[5, 256]", "f32[B, S, 5]"),
    (ops.DequantMatMul(), "f32[B, S, 256] q4_k[5, 256] f32[5]", "f32[B, S, 5]"),
    (ops.Split((2, 6)), X, "f32[B, S, 2] f32[B, S, 6]"),
    (ops.Glu("silu"), X, "f32[B, S, 4]"),
    (ops.Glu("gelu"), X, "f32[B, S, 4]"),
    (ops.SelectRows(), f"{X} i64[R]", "f32[B, R, 8]"),
    (ops.LoraDown(), f"{X} f32[B, 3, R, 8] f32[B, R]", U),
    (ops.LoraMatMul((5,)), f"{X} f16[5, 8] {U} f32[B, 5, R]", "f32[B, S, 5]"),
    (ops.LoraMatMul((4, 1), first=1), f"{X} f32[5, 8] f32[5] {U} f32[B, 5, R]", "f32[B, S, 5]"),
    (
        ops.LoraMatMul((2, 3)),
        "f32[B, S, 256] q4_k[5, 256] f32[B, S, 2, 16] f32[B, 5, 16]",
        "f32[B, S, 5]",
    ),
    (ops.LoraEmbed(), f"{X} i64[B, S] f32[B, 99, R] f32[B, R] f32[B, 8, R]", X),
    (ops.Positions(), "i64[B, S] i32[]", "i64[B, S]"),
    (ops.Positions(), f"i64[B, S] {CACHE}", "i64[B, S]"),
    (ops.Rope(2, ROPE), f"{X} i64[B, S]", X),
    (ops.Rope(1, ROPE), f"{X} i64[B, S] f32[2]", X),
    (ops.KvAppend(), f"{CACHE} {X}", "f32[B, 2, past+S, 4]"),
    (ops.KvAppend(), "f32[1, 2, 3, 4] f32[1, 5, 8]", "f32[1, 2, 8, 4]"),
    (ops.KvWrite("linear"), f"{BUFFER} {X} i32[]", BUFFER),
    (ops.KvWrite("ring"), f"{BUFFER} {X} i32[]", BUFFER),
    (ops.KvWrite("linear"), f"bf16[B, 2, 64, 4] {X} i32[]", "bf16[B, 2, 64, 4]"),
    (ops.KvWrite("paged"), f"{PAGES} {X} i32[] i32[B, entries]", PAGES),
    (ops.KvRead("paged"), f"{PAGES} {X} i32[] i32[B, 4]", "f32[B, 2, visible, 4]"),
    (ops.KvRead("paged", 16), f"f16[9, 2, 16, 4] {X} i32[] i32[B, 4]", "f32[B, 2, visible, 4]"),
    (ops.KvRead("linear"), f"{BUFFER} {X} i32[]", "f32[B, 2, visible, 4]"),
    (ops.KvRead("ring", 16), f"{BUFFER} {X} i32[]", "f32[B, 2, visible, 4]"),
    (ops.Attention(4, 0.5), "f32[B, S, 16] f32[B, 2, T, 4] f32[B, 2, T, 4]", "f32[B, S, 16]"),
    (
        ops.Attention(4, 0.5, soft_cap=50.0),
        "f32[B, S, 16] f32[B, 2, T, 4] f32[B, 2, T, 4] f32[4]",
        "f32[B, S, 16]",
    ),
    (
        ops.GroupQueryAttention(4, 0.5, "ring", window=16, rope=ROPE, soft_cap=50.0, sinks=True),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[] f32[2] f32[4]",
        f"f32[B, S, 16] {BUFFER} {BUFFER}",
    ),
    (
        ops.GroupQueryAttention(4, 0.5, "paged", rope=ROPE, sinks=True),
        f"f32[B, S, 16] {X} {X} {PAGES} {PAGES} i32[] i32[B, 8] f32[4]",
        f"f32[B, S, 16] {PAGES} {PAGES}",
    ),
    (
        ops.GroupQueryAttention(4, 0.5, "linear", rope=ROPE),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[] f32[2]",
        f"f32[B, S, 16] {BUFFER} {BUFFER}",
    ),
    (
        ops.GroupQueryAttention(4, 0.5, "ring", window=16),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[]",
        f"f32[B, S, 16] {BUFFER} {BUFFER}",
    ),
    (
        ops.GroupQueryAttention(4, 0.5, "paged"),
        f"f32[B, S, 16] {X} {X} {PAGES} {PAGES} i32[] i32[B, 8]",
        f"f32[B, S, 16] {PAGES} {PAGES}",
    ),
    (
        ops.GroupQueryAttention(4, 0.5, "paged", window=16, rope=ROPE),
        f"f32[B, S, 16] {X} {X} {PAGES} {PAGES} i32[] i32[B, 8] f32[2]",
        f"f32[B, S, 16] {PAGES} {PAGES}",
    ),
]

REFUSED = {
    "too few inputs": (ops.Add(), X),
    "too many inputs": (ops.Silu(), f"{X} {X}"),
    "integers added": (ops.Add(), "i64[B, S] i64[B, S]"),
    "sizes that do not broadcast": (ops.Add(), f"{X} f32[4]"),
    "both sides broadcast": (ops.Mul(), "f32[B, 1, 8] f32[B, S, 1]"),
    "different symbols": (ops.Add(), f"{X} f32[B, T, 8]"),
    "square root of integers": (ops.Sqrt(), "i64[3]"),
    "mean of a scalar": (ops.Mean(), "f32[]"),
    "norm weight of another size": (ops.RmsNorm(1e-6), f"{X} f32[4]"),
    "norm weight that is packed": (ops.RmsNorm(1e-6), f"{X} q8_0[8]"),
    "norm of integers": (ops.RmsNorm(1e-6), "i64[B, 8] f32[8]"),
    "norm over a symbolic size": (ops.RmsNorm(1e-6), "f32[B, S] f32[S]"),
    "norm over heads that do not divide": (ops.RmsNorm(1e-6, heads=3), f"{X} f32[2]"),
    "norm over no heads": (ops.RmsNorm(1e-6, heads=0), f"{X} f32[8]"),
    "norm of a scalar": (ops.RmsNorm(1e-6), "f32[] f32[1]"),
    "layer norm: a bias of another size": (ops.LayerNorm(1e-6), f"{X} f32[8] f32[4]"),
    "layer norm: a packed weight": (ops.LayerNorm(1e-6), f"{X} q8_0[8]"),
    "a cap of zero": (ops.SoftCap(0.0), X),
    "capped integers": (ops.SoftCap(1.0), "i64[3]"),
    "a gate and an input of other sizes": (ops.ClampedSwiglu(1.702, 7.0), f"{X} f32[B, S, 4]"),
    "a gate for every token": (ops.ClampedSwiglu(1.702, 7.0), f"{X} f32[8]"),
    "more experts than there are": (ops.Route(9), X),
    "no experts": (ops.Route(0), X),
    "scores of an unknown number of experts": (ops.Route(2), "f32[B, S, E]"),
    "scores without tokens": (ops.Route(2), "f32[B, 8]"),
    "scores that are integers": (ops.Route(2), "i64[B, S, 8]"),
    "experts: one matrix": (ops.ExpertMatMul(), f"{X} f32[5, 8] {CHOSEN}"),
    "experts: matrices of other columns": (ops.ExpertMatMul(), f"{X} f32[6, 5, 9] {CHOSEN}"),
    "experts: chosen by floats": (ops.ExpertMatMul(), f"{X} f32[6, 5, 8] f32[B, S, 3]"),
    "experts: chosen for other tokens": (ops.ExpertMatMul(), f"{X} f32[6, 5, 8] i64[B, T, 3]"),
    "experts: an x of other slots": (ops.ExpertMatMul(), f"f32[B, S, 2, 8] f32[6, 5, 8] {CHOSEN}"),
    "experts: matrices of integers": (ops.ExpertMatMul(), f"{X} i64[6, 5, 8] {CHOSEN}"),
    "experts: one bias for all": (ops.ExpertMatMul(), f"{X} f32[6, 5, 8] {CHOSEN} f32[5]"),
    "experts: weights of other slots": (ops.MixExperts(), "f32[B, S, 3, 5] f32[B, S, 2]"),
    "experts: nothing to mix": (ops.MixExperts(), f"{X} f32[B, S]"),
    "residual of another type": (ops.AddRmsNorm(1e-6), f"{X} f32[8] f32[8]"),
    "residual norm weight of another size": (ops.AddRmsNorm(1e-6), f"{X} {X} f32[4]"),
    "embedding of floats": (ops.Embed(), "f32[B, S] f32[99, 8]"),
    "embedding from a vector": (ops.Embed(), "i64[B, S] f32[99]"),
    "packed weight of a float product": (ops.MatMul(), f"{X} q8_0[5, 8]"),
    "integer weight of a float product": (ops.MatMul(), f"{X} i64[5, 8]"),
    "float weight of a packed product": (ops.DequantMatMul(), f"{X} f16[5, 8]"),
    "product of unequal sizes": (ops.MatMul(), f"{X} f32[8, 5]"),
    "product of integers": (ops.MatMul(), "i64[B, 8] f32[5, 8]"),
    "product of a scalar": (ops.MatMul(), "f32[] f32[5, 8]"),
    "bias of another size": (ops.MatMul(), f"{X} f32[5, 8] f32[8]"),
    "bias in a packed format": (ops.MatMul(), f"{X} f32[5, 8] q8_0[5]"),
    "split into other sizes": (ops.Split((2, 5)), X),
    "split of a symbolic size": (ops.Split((2, 5)), "f32[B, S]"),
    "gate and input of an odd size": (ops.Glu("silu"), "f32[B, S, 7]"),
    "unknown activation": (ops.Glu("relu"), X),
    "rows that are floats": (ops.SelectRows(), f"{X} f32[R]"),
    "rows of a batch": (ops.SelectRows(), f"{X} i64[B, R]"),
    "rows of a matrix": (ops.SelectRows(), "f32[S, 8] i64[R]"),
    "LoRA: an A of other columns": (ops.LoraDown(), f"{X} f32[B, 3, R, 9] f32[B, R]"),
    "LoRA: an A of another batch": (ops.LoraDown(), f"{X} f32[C, 3, R, 8] f32[C, R]"),
    "LoRA: an A in f16": (ops.LoraDown(), f"{X} f16[B, 3, R, 8] f32[B, R]"),
    "LoRA: an A of one sequence": (ops.LoraDown(), f"{X} f32[3, R, 8] f32[B, R]"),
    "LoRA: an unknown number of parts": (ops.LoraDown(), f"{X} f32[B, P, R, 8] f32[B, R]"),
    "LoRA: scales of another rank": (ops.LoraDown(), f"{X} f32[B, 3, R, 8] f32[B, Q]"),
    "LoRA: scales of one sequence": (ops.LoraDown(), f"{X} f32[B, 3, R, 8] f32[R]"),
    "LoRA: x without tokens": (ops.LoraDown(), "f32[B, 8] f32[B, 3, R, 8] f32[B, R]"),
    "LoRA: sizes that are not the weight's": (ops.LoraMatMul((4,)), f"{X} f16[5, 8] {U} f32[B, 5, R]"),
    "LoRA: more sizes than parts": (ops.LoraMatMul((2, 3), 2), f"{X} f16[5, 8] {U} f32[B, 5, R]"),
    "LoRA: a negative part": (ops.LoraMatMul((2, 3), -1), f"{X} f16[5, 8] {U} f32[B, 5, R]"),
    "LoRA: a u of other tokens": (ops.LoraMatMul((5,)), f"{X} f16[5, 8] f32[B, T, 3, R] f32[B, 5, R]"),
    "LoRA: a u of unknown parts": (ops.LoraMatMul((5,)), f"{X} f16[5, 8] f32[B, S, P, R] f32[B, 5, R]"),
    "LoRA: a u of one part": (ops.LoraMatMul((5,)), f"{X} f16[5, 8] f32[B, S, R] f32[B, 5, R]"),
    "LoRA: a B of other rows": (ops.LoraMatMul((5,)), f"{X} f16[5, 8] {U} f32[B, 4, R]"),
    "LoRA: a B of another rank": (ops.LoraMatMul((5,)), f"{X} f16[5, 8] {U} f32[B, 5, Q]"),
    "LoRA: a B of another batch": (ops.LoraMatMul((5,)), f"{X} f16[5, 8] {U} f32[C, 5, R]"),
    "LoRA: an embedding of other tokens": (
        ops.LoraEmbed(),
        f"{X} i64[B, T] f32[B, 99, R] f32[B, R] f32[B, 8, R]",
    ),
    "LoRA: an embedding's A of another batch": (
        ops.LoraEmbed(),
        f"{X} i64[B, S] f32[C, 99, R] f32[C, R] f32[C, 8, R]",
    ),
    "LoRA: an embedding's A of one sequence": (
        ops.LoraEmbed(),
        f"{X} i64[B, S] f32[99, R] f32[B, R] f32[B, 8, R]",
    ),
    "LoRA: an embedding's scales of another rank": (
        ops.LoraEmbed(),
        f"{X} i64[B, S] f32[B, 99, R] f32[B, Q] f32[B, 8, R]",
    ),
    "LoRA: an embedding's B of another width": (
        ops.LoraEmbed(),
        f"{X} i64[B, S] f32[B, 99, R] f32[B, R] f32[B, 9, R]",
    ),
    "positions of a vector": (ops.Positions(), "i64[S] i32[]"),
    "past length in i64": (ops.Positions(), "i64[B, S] i64[]"),
    "positions of other tokens": (ops.Rope(2, ROPE), f"{X} i64[B, T]"),
    "rotating without tokens": (ops.Rope(2, ROPE), "f32[B, 8] i64[B, 8]"),
    "rotating more than a head": (ops.Rope(4, ROPE), f"{X} i64[B, S]"),
    "rotating an odd number of channels": (ops.Rope(2, RopeSpec(10000.0, 3)), f"{X} i64[B, S]"),
    "rope factors of another size": (ops.Rope(2, ROPE), f"{X} i64[B, S] f32[4]"),
    "rows of another head size": (ops.KvAppend(), f"{CACHE} f32[B, S, 16]"),
    "rows of another batch": (ops.KvAppend(), f"{CACHE} f32[C, S, 8]"),
    "a cache of rank 3": (ops.KvAppend(), f"f32[B, past, 8] {X}"),
    "a cache of bf16": (ops.KvAppend(), f"bf16[B, 2, past, 4] {X}"),
    "a cache with a symbolic head dim": (ops.KvAppend(), f"f32[B, 2, past, D] {X}"),
    "a cache of packed weights": (ops.KvWrite("linear"), f"q8_0[B, 2, 64, 4] {X} i32[]"),
    "a growing cache in f16": (ops.KvAppend(), f"f16[B, 2, past, 4] {X}"),
    "keys as they are stored": (ops.Attention(4, 0.5), "f32[B, S, 16] f16[B, 2, T, 4] f16[B, 2, T, 4]"),
    "unknown layout": (ops.KvWrite("spiral"), f"{BUFFER} {X} i32[]"),
    "pages without a table": (ops.KvWrite("paged"), f"{PAGES} {X} i32[]"),
    "pages with a table of i64": (ops.KvWrite("paged"), f"{PAGES} {X} i32[] i64[B, 4]"),
    "pages with a table of one sequence": (ops.KvRead("paged"), f"{PAGES} {X} i32[] i32[4]"),
    "pages with a table of another batch": (ops.KvRead("paged"), f"{PAGES} {X} i32[] i32[C, 4]"),
    "pages of unknown size": (ops.KvWrite("paged"), f"f32[pages, 2, P, 4] {X} i32[] i32[B, 4]"),
    "rows of another size than the pages'": (ops.KvWrite("paged"), f"{PAGES} f32[B, S, 4] i32[] i32[B, 4]"),
    "rows without a batch for pages": (ops.KvWrite("paged"), f"{PAGES} f32[] i32[] i32[B, 4]"),
    "a linear cache with a table": (ops.KvWrite("linear"), f"{BUFFER} {X} i32[] i32[B, 4]"),
    "writing without a length": (ops.KvWrite("linear"), f"{BUFFER} {X} i64[]"),
    "a ring read whole": (ops.KvRead("ring"), f"{BUFFER} {X} i32[]"),
    "a linear cache read by window": (ops.KvRead("linear", 16), f"{BUFFER} {X} i32[]"),
    "more keys than values": (ops.Attention(4, 0.5), "f32[B, S, 16] f32[B, 2, T, 4] f32[B, 2, U, 4]"),
    "keys of rank 3": (ops.Attention(4, 0.5), "f32[B, S, 16] f32[B, T, 8] f32[B, T, 8]"),
    "queries of another head size": (ops.Attention(4, 0.5), f"{X} f32[B, 2, T, 4] f32[B, 2, T, 4]"),
    "queries of another batch": (ops.Attention(4, 0.5), "f32[C, S, 16] f32[B, 2, T, 4] f32[B, 2, T, 4]"),
    "heads that cannot share": (ops.Attention(3, 0.5), "f32[B, S, 12] f32[B, 2, T, 4] f32[B, 2, T, 4]"),
    "sinks of other heads": (
        ops.Attention(4, 0.5),
        "f32[B, S, 16] f32[B, 2, T, 4] f32[B, 2, T, 4] f32[2]",
    ),
    "scores with a cap of zero": (
        ops.Attention(4, 0.5, soft_cap=0.0),
        "f32[B, S, 16] f32[B, 2, T, 4] f32[B, 2, T, 4]",
    ),
    "fused: no sinks": (
        ops.GroupQueryAttention(4, 0.5, "linear", rope=ROPE, sinks=True),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[]",
    ),
    "fused: sinks that nobody asked for": (
        ops.GroupQueryAttention(4, 0.5, "linear"),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[] f32[4]",
    ),
    "fused: a negative cap": (
        ops.GroupQueryAttention(4, 0.5, "linear", soft_cap=-1.0),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[]",
    ),
    "fused: caches that differ": (
        ops.GroupQueryAttention(4, 0.5, "linear"),
        f"f32[B, S, 16] {X} {X} {BUFFER} f32[B, 2, 32, 4] i32[]",
    ),
    "fused: queries and keys of different tokens": (
        ops.GroupQueryAttention(4, 0.5, "linear"),
        f"f32[B, T, 16] {X} {X} {BUFFER} {BUFFER} i32[]",
    ),
    "fused: a ring without window": (
        ops.GroupQueryAttention(4, 0.5, "ring"),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[]",
    ),
    "fused: factors without rope": (
        ops.GroupQueryAttention(4, 0.5, "linear"),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[] f32[2]",
    ),
    "fused: factors of another size": (
        ops.GroupQueryAttention(4, 0.5, "linear", rope=ROPE),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[] f32[4]",
    ),
    "fused: pages without a table": (
        ops.GroupQueryAttention(4, 0.5, "paged", rope=ROPE),
        f"f32[B, S, 16] {X} {X} {PAGES} {PAGES} i32[] f32[2]",
    ),
    "fused: a ring with a table": (
        ops.GroupQueryAttention(4, 0.5, "ring", window=16, rope=ROPE),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[] i32[B, 8]",
    ),
    "fused: two inputs of factors": (
        ops.GroupQueryAttention(4, 0.5, "linear", rope=ROPE),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[] f32[2] f32[2]",
    ),
    "fused: rotating more than a head": (
        ops.GroupQueryAttention(4, 0.5, "linear", rope=RopeSpec(10000.0, 8)),
        f"f32[B, S, 16] {X} {X} {BUFFER} {BUFFER} i32[]",
    ),
}


@pytest.mark.parametrize(("op", "inputs", "results"), ACCEPTED, ids=lambda part: getattr(part, "name", None))
def test_results_have_these_types(op: ops.Op, inputs: str, results: str) -> None:
    assert op.infer(types(inputs)) == types(results)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    op, inputs = REFUSED[case]
    with pytest.raises(GraphError, match=f"^{op.name}: "):
        op.infer(types(inputs))


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("f16[5, 9]", "MatMul: weight f16[5, 9] for x"),
        ("f16[5, 8] f32[8]", "MatMul: bias f32[8] for weight"),
        ("q8_0[5, 9]", "DequantMatMul: weight q8_0[5, 9] for x"),
        ("i64[5, 8]", "MatMul: cannot read a weight of type i64"),
    ],
)
def test_base_of_an_adapted_product_must_be_a_product(base: str, problem: str) -> None:
    with pytest.raises(GraphError, match=f"^{re.escape(problem)}"):
        ops.LoraMatMul((5,)).infer(types(f"{X} {base} {U} f32[B, 5, R]"))


def test_every_op_is_tried() -> None:
    pending: list[type[ops.Op]] = [ops.Op]
    leaves = set()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if not cls.__subclasses__() and cls.__module__.startswith(ops.__name__):
            leaves.add(cls)
    assert leaves == {type(op) for op, _, _ in ACCEPTED}
