"""What kernels are measured with: memory that they may read, all of it, and nothing but numbers in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from rlxc.backends.tvm.build import compile_module
from rlxc.backends.tvm.families import (
    Entry,
    attention,
    attention_workspace,
    expert_matmul,
    expert_matmul_exact,
    read_problems,
    write_entries,
)
from rlxc.backends.tvm.kernels.attention import AttentionKnobs, workspace_floats
from rlxc.backends.tvm.kernels.cache import CacheShape
from rlxc.backends.tvm.kernels.kernel import Pointer
from rlxc.backends.tvm.problem import call_data, measured_module
from rlxc.backends.tvm.targets import TARGETS, CpuTarget, find_target, native_target
from rlxc.errors import ArtifactError

PARAMETERS: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "page": 64,
    "cache_dtype": "float16",
    "scale": 0.25,
    "window": None,
    "out_stride": 128,
    "positions": 200,
}


# One, as the first bytes of an element.
ONES = {"float32": np.float32(1), "float16": np.float16(1), "bfloat16": np.uint16(0x3F80), "int8": np.int8(1)}


@pytest.mark.parametrize("dtype", ONES)
@pytest.mark.parametrize(("window", "tokens"), [(None, 1), (100, 8)])
def test_measured_attention_reads_every_page_where_it_lies(
    dtype: str, window: int | None, tokens: int
) -> None:
    """Where all keys are alike, attention is the mean of the values seen: here each is a sign of its page."""
    target = native_target()
    parameters = {**PARAMETERS, "cache_dtype": dtype, "window": window}
    problem = attention(target, **parameters, tokens=tokens)
    kernel = problem.make(problem.space[0])
    names = ["numbers", *(param.name for param in kernel.params if isinstance(param, Pointer))]
    arrays = {}
    for name, tensor in zip(names, call_data(problem)):
        arrays[name] = np.full(tensor.elements, 0 if tensor.values is None else tensor.values, tensor.dtype)
    pages = arrays["values"].view(ONES[dtype].dtype).reshape(len(arrays["table"]), -1)
    pages[1:] = ONES[dtype]
    if dtype == "int8":
        arrays["value_scales"][:] = 1
    run = compile_module(measured_module(problem, problem.space[0]), target)["main"]
    tensors = {name: tvm.runtime.tensor(array) for name, array in arrays.items()}
    run(*tensors.values())
    past = (window or PARAMETERS["positions"]) - tokens
    shares = [max(0, past + token + 1 - 64) / (past + token + 1) for token in range(tokens)]
    expected = np.repeat(shares, PARAMETERS["out_stride"])
    np.testing.assert_allclose(tensors["out"].numpy(), expected, rtol=1e-5)  # sums of 200 numbers in f32


def test_problem_is_named_by_what_its_time_depends_on() -> None:
    target = find_target("x86-64-v3")
    name = attention(target, **PARAMETERS, tokens=1).name
    assert name == "attention 4x32 over 2, float16 pages of 64, window None, 200 positions, 1 token"
    for key, value in {"scale": 0.5, "out_stride": 160, "weight": 7}.items():
        assert attention(target, **{**PARAMETERS, key: value}, tokens=1).name == name
    for key, value in {
        "page": 128,
        "cache_dtype": "int8",
        "window": 100,
        "positions": 300,
        "kv_heads": 1,
        "soft_cap": 50.0,
        "sinks": True,
    }.items():
        assert attention(target, **{**PARAMETERS, key: value}, tokens=1).name != name


EXPERTS: dict[str, Any] = {
    "experts": 5,
    "rows": 40,
    "columns": 64,
    "used": 2,
    "stride": 48,
    "bias": True,
}


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("shared", [True, False], ids=["rows of tokens", "rows of slots"])
@pytest.mark.parametrize("family", [expert_matmul, expert_matmul_exact])
def test_measured_experts_multiply_every_slot_once(family: Any, shared: bool, tokens: int) -> None:
    """All weights are zero and all biases one: so is what is written, and nothing else is."""
    target, more = native_target(), {"x_stride": 64} if family is expert_matmul_exact else {}
    problem = family(target, dtype="q8_0", shared=shared, tokens=tokens, **EXPERTS, **more)
    kernel = problem.make(problem.space[0])
    names = ["numbers", *(param.name for param in kernel.params if isinstance(param, Pointer))]
    arrays = {}
    for name, tensor in zip(names, call_data(problem)):
        fill = float(name in ("bias", "out")) * (7 if name == "out" else 1)
        values = fill if tensor.values is None else tensor.values
        arrays[name] = np.full(tensor.elements, values, tensor.dtype)
    run = compile_module(measured_module(problem, problem.space[0]), target)["main"]
    tensors = {name: tvm.runtime.tensor(array) for name, array in arrays.items()}
    run(*tensors.values())
    out = tensors["out"].numpy().reshape(2 * tokens, 48)
    assert (out[:, :40] == 1).all() and (out[:, 40:] == 7).all()
    slots = 2 * tokens
    assert problem.operations == 2 * 40 * 64 * slots
    assert problem.bytes_moved * 5 == len(arrays["weight"]) * arrays["weight"].itemsize * min(5, slots)


def test_default_knobs_fit_small_pages() -> None:
    """A block never has more keys than a page."""
    for page in (16, 32, 64, 256):
        space = attention(find_target("x86-64-v4"), **{**PARAMETERS, "page": page}, tokens=1).space
        assert {knobs["keys"] for knobs in space} <= {count for count in (16, 32, 64, 128) if count <= page}
        assert space[0]["keys"] == min(64, page)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_workspace_is_enough_for_all_knobs(target: CpuTarget) -> None:
    shape = CacheShape(2, 32, 64, "float16")
    problem = attention(target, **PARAMETERS, tokens=1)
    needed = [workspace_floats(AttentionKnobs(k["rows"], k["keys"], 32), 32) for k in problem.space]
    assert max(needed) <= attention_workspace(target, shape)


def test_entries_of_an_artifact_come_back_as_problems() -> None:
    target = find_target("x86-64-v3")
    entry = Entry("attention", {**PARAMETERS, "tokens": 1})
    (problem,) = read_problems(write_entries([entry.times(3)]), target, "here")
    assert (problem.name, problem.weight) == (entry.problem(target).name, 3)


def test_entries_of_another_version_are_refused() -> None:
    old = {**PARAMETERS, "capacity": 128, "ring": False, "tokens": 1}
    with pytest.raises(ArtifactError, match="here: its kernels are not those of this rlxc"):
        read_problems(write_entries([Entry("attention", old)]), find_target("x86-64-v3"), "here")
