"""What is tuned: one kernel at one shape, with every setting of its knobs, and how it is called to be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import IRModule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rlxc.backends.tvm.kernels.kernel import Buffer, Kernel, Knobs, Number, Pointer, bind, view

NAME_ATTRIBUTE = "rlxc_problem"
KNOBS_ATTRIBUTE = "rlxc_knobs"
"""Attributes of the module that stands for a problem in a database: its name, and its knobs' names in order."""

_NUMBERS = Pointer("numbers", "int32")

# Buffers of int8 hold codes, but f16 and f32 scales too. Random bytes would be numbers too small for the CPU to
# multiply at full speed; random f32, seen as bytes, are not. Nor are random f16, seen as the bf16 that u16 stand for.
_STAND_INS = {"int8": ("float32", 4), "uint16": ("float16", 1)}
"""The type that is allocated and filled instead of another, and how many elements of the latter are one of it."""


@dataclass(frozen=True)
class Filled:
    """A buffer whose elements must not be just any numbers, as positions and offsets: theirs, or one value for all."""

    elements: int
    value: int | tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One kernel to tune at one shape.

    Attributes:
        name: unique and readable, such as ``matmul q5_0 4096x640, 256 tokens``; results are found by it.
        space: every setting that is a candidate, all with the same knobs; the first is the default.
        make: the kernel with a setting; its parameters do not depend on the setting.
        arguments: for each parameter of the kernel the elements of a pointer's buffer, or the value of a number.
            Buffers of int32 and int64 hold zeros unless they are :class:`Filled`, others hold random numbers.
        bytes_moved: bytes that a call reads and writes.
        operations: additions and multiplications of a call.
        weight: how often a step of the model calls it.
    """

    name: str
    space: tuple[Knobs, ...]
    make: Callable[[Knobs], Kernel]
    arguments: tuple[int | Filled, ...]
    bytes_moved: int
    operations: int
    weight: int


@dataclass(frozen=True)
class Data:
    """A tensor that a measured kernel is called with.

    Attributes:
        dtype: the type of its elements.
        elements: how many there are.
        values: what they are, or one value for all; None for random numbers.
    """

    dtype: str
    elements: int
    values: tuple[int, ...] | int | None


def measured_module(problem: Problem, knobs: Knobs) -> IRModule:
    """The kernel with these knobs as the function ``main`` of :func:`call_data`'s tensors.

    The kernel's numbers are read from the first tensor: compiled in, LLVM would specialise the code for them, and
    code that no model runs would be measured.
    """
    kernel = problem.make(knobs)
    numbers, pointers = _split(kernel)

    def body(given: Buffer, *buffers: Buffer) -> None:
        values: dict[str, Any] = {number.name: bind(given[i]) for i, number in enumerate(numbers)}
        for pointer, buffer in zip(pointers, buffers):
            values[pointer.name] = view(buffer, pointer.dtype) if pointer.dtype in _STAND_INS else buffer
        kernel.body(*(values[param.name] for param in kernel.params))

    main = Kernel("main", (_NUMBERS, *map(_stand_in, pointers)), body)
    return IRModule({main.name: main.function(private=False)})


def _stand_in(pointer: Pointer) -> Pointer:
    dtype, _ = _STAND_INS.get(pointer.dtype, (pointer.dtype, 1))
    return Pointer(pointer.name, dtype)


def call_data(problem: Problem) -> tuple[Data, ...]:
    """What :func:`measured_module`'s function is called with."""
    params = problem.make(problem.space[0]).params
    if len(params) != len(problem.arguments):
        raise ValueError(f"{problem.name}: {len(params)} parameters, {len(problem.arguments)} arguments")
    numbers: list[int] = []
    tensors = []
    for param, argument in zip(params, problem.arguments):
        if isinstance(argument, Filled):
            assert isinstance(param, Pointer)
            tensors.append(Data(param.dtype, argument.elements, argument.value))
        elif isinstance(param, Number):
            numbers.append(argument)
        else:
            zero = 0 if param.dtype in ("int32", "int64") else None
            _, per_element = _STAND_INS.get(param.dtype, (param.dtype, 1))
            tensors.append(Data(_stand_in(param).dtype, -(-argument // per_element), zero))
    return (Data(_NUMBERS.dtype, max(1, len(numbers)), tuple(numbers) or 0), *tensors)


def workload_module(problem: Problem) -> IRModule:
    """What stands for the problem in TVM's database: its name, its knobs and the function's tensors, but no code.

    The code of a kernel is up to a megabyte of JSON, changes from version to version, and is not what a result is
    found by; without it a problem has the same few kilobytes for as long as it has the same knobs and shapes.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        for i, data in enumerate(call_data(problem)):
            T.match_buffer(T.arg(f"tensor{i}", T.handle()), (data.elements,), data.dtype)
        T.evaluate(0)
    module = IRModule({"main": builder.get()})
    return module.with_attr(NAME_ATTRIBUTE, problem.name).with_attr(KNOBS_ATTRIBUTE, knob_names(problem))


def knob_names(problem: Problem) -> list[str]:
    """The names of the problem's knobs, in the order in which a database has them."""
    return sorted(problem.space[0])


def _split(kernel: Kernel) -> tuple[list[Number], list[Pointer]]:
    numbers = [param for param in kernel.params if isinstance(param, Number)]
    pointers = [param for param in kernel.params if isinstance(param, Pointer)]
    return numbers, pointers
