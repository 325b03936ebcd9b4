"""A program as one object file: a function that calls the kernels one after the other.

There is no virtual machine: every address is the start of the weights, of the workspace or of a page plus a constant,
so a call costs as much as a call in C. The object file is loaded as it is; nothing is linked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Call as TvmCall
from tvm.ir import GlobalVar, IRModule, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc, address_of, call_llvm_intrin, compilation_pipeline
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Expr, bind, when
from rlxc.backends.tvm.program import (
    Argument,
    Call,
    InPage,
    InTable,
    InUnit,
    InWeights,
    InWorkspace,
    Program,
    Times,
    Workspace,
)
from rlxc.backends.tvm.targets import CpuTarget

STEP = "rlxc_step"
"""The exported function. Its parameters, all flat tensors and then numbers:

weights int8 (the data of the weights file); workspace int8; anchor int8 (one byte that addresses count from);
lora_starts int32 ``[sequences + 1]`` (sequence s has the units from number ``lora_starts[s]`` up to
``lora_starts[s + 1]``); lora_units int64 ``[units]`` (each one's distance from the anchor in bytes); lora_scales f32
``[units]``; tables int64 ``[sequences]`` (the distance of each one's block tables from the anchor, in bytes; they are
int64 ``[tables, entries]``, and entry i is the distance of the page of positions ``page_size * i`` and following,
likewise; only entries of positions that a token sees, or takes, are read); past int32 ``[sequences]``; ids int64
``[sequences * step]``; logit_rows int64 ``[rows]``; logits f32 ``[sequences * rows * vocab]``; maxima and sums f32
``[sequences * rows * blocks]`` (of every 64 logits); ticks int64 ``[calls + 1]`` (when each call began, and the last
one ended, in ticks of the CPU's clock); sequences; step; rows. Tensors of f32 begin at multiples of 64 bytes.
"""

_TENSORS = {
    "weights": "int8",
    "workspace": "int8",
    "anchor": "int8",
    "lora_starts": "int32",
    "lora_units": "int64",
    "lora_scales": "float32",
    "tables": "int64",
    "past": "int32",
    "ids": "int64",
    "logit_rows": "int64",
    "logits": "float32",
    "maxima": "float32",
    "sums": "float32",
    "ticks": "int64",
}

# x86's time stamp counter, and ARM's generic timer: what user programs may read.
_CLOCKS = {"x86_64": "llvm.readcyclecounter", "aarch64": "llvm.readsteadycounter"}


def build_module(program: Program, workspace: Workspace, target: CpuTarget) -> IRModule:
    """All kernels of a program, and the function that calls them."""
    functions = {kernel.name: kernel.function(private=True) for kernel in program.kernels}
    names = {name: GlobalVar(name) for name in functions}
    main = _main(program, workspace, names, _CLOCKS[target.machine])
    return IRModule({**{names[n]: f for n, f in functions.items()}, GlobalVar(STEP): main})


def compile_module(module: IRModule, target: CpuTarget) -> Any:
    """A module's machine code, as TVM's runtime module."""
    return tvm.tirx.build(module, target=target.llvm, pipeline=PIPELINE)


def _lowering() -> tuple[Any, Any, Any]:
    """What kernels need of TVM's lowering. LLVM simplifies better, and kernels leave nothing to vectorise."""
    passes = tvm.transform.Sequential(
        [
            tirx.transform.LowerTIRx(),
            tirx.transform.LowerTIRxOpaque(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.StmtSimplify(),  # an index must be a plain ramp to become one load
            tirx.transform.BF16ComputeLegalize(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
            tirx.transform.BF16StorageLegalize(),
        ]
    )
    return passes, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


PIPELINE = "rlxc"
"""The name of our lowering among TVM's."""

compilation_pipeline.register_tir_pipeline(PIPELINE, _lowering)


def build_object(module: IRModule, target: CpuTarget) -> bytes:
    """The machine code of a module, as an object file."""
    library = compile_module(module, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.o"
        library.write_to_file(str(path), "o")
        return path.read_bytes()


def _main(program: Program, workspace: Workspace, names: dict[str, GlobalVar], clock: str) -> PrimFunc:
    with IRBuilder() as builder, T.prim_func():
        T.func_name(STEP)
        T.func_attr({"global_symbol": STEP})
        handles = {name: T.arg(name, T.handle()) for name in _TENSORS}
        numbers = {name: T.arg(name, T.int32()) for name in ("sequences", "step", "rows")}
        tensors = {
            name: T.match_buffer(handle, (T.int64(),), _TENSORS[name]) for name, handle in handles.items()
        }
        counters = {
            "sequences": numbers["sequences"],
            "step": numbers["step"],
            "rows_per_sequence": numbers["rows"],
            "tokens": bind(numbers["sequences"] * numbers["step"]),
            "rows": bind(numbers["sequences"] * numbers["rows"]),
        }

        def value(argument: Argument) -> Expr:
            match argument:
                case InWeights(offset):
                    return address_of(tensors["weights"][offset])
                case InWorkspace(buffer, offset):
                    return address_of(tensors["workspace"][workspace.offsets[buffer] + offset])
                case InTable(offset) | InPage(offset) | InUnit(offset):
                    return address_of(tensors["anchor"][offset])
                case Times(counter, factor):
                    return counters[counter] * factor
                case str() if argument in counters:
                    return counters[argument]
                case _:
                    return tensors[argument].data

        _calls(program, names, value, tensors["ticks"], clock)
    return builder.get()


def _calls(
    program: Program,
    names: dict[str, GlobalVar],
    value: Callable[[Argument], Expr],
    ticks: Buffer,
    clock: str,
) -> None:
    for index, call in enumerate(program.calls):
        T.buffer_store(ticks, _now(clock), [index])
        if call.amount == "rows":
            with when(value("rows") > 0):
                _call(call, names, value)
        else:
            _call(call, names, value)
    T.buffer_store(ticks, _now(clock), [len(program.calls)])


def _call(call: Call, names: dict[str, GlobalVar], value: Callable[[Argument], Expr]) -> None:
    arguments = [value(argument) for argument in call.arguments]
    T.evaluate(TvmCall(names[call.kernel.name], arguments, ret_ty=PrimType("int32")))


def _now(clock: str) -> Any:
    return call_llvm_intrin("int64", clock)
