"""A kernel: its name, its parameters and what it does, turned into a TVM PrimFunc.

Kernels take pointers and 32-bit numbers, return 0, and are specialised by Python values: every shape and stride that
is known at compile time is a constant in their code. ``function(private=True)`` gives what the model's own code calls
directly, without checks; ``function(private=False)`` gives the same body with tensors for parameters, for tuning and
tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.ir import PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc, Ramp, address_of, call_llvm_intrin, const
from tvm.tirx.script.builder import ir as T

_MANY_ROWS = 8

# For reading, to stay in every cache, data.
_PREFETCH = (const(0, "int32"), const(3, "int32"), const(1, "int32"))

Expr = Any
"""An expression of TVM's."""

Buffer = Any
"""A flat buffer of TVM's."""

Knobs = Mapping[str, int]
"""A setting of what may be tuned in a kernel: it changes speed, and rounding at most."""


@dataclass(frozen=True)
class Pointer:
    """A parameter: the first of many elements of a type, ``float32`` for one."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Number:
    """A parameter: an int32."""

    name: str


@dataclass(frozen=True)
class Kernel:
    """A function of the compiled library.

    Attributes:
        name: unique among kernels that do different things; equal kernels have equal names.
        params: what it takes.
        body: emits its code, given a flat :data:`Buffer` for every pointer and an expression for every number.
    """

    name: str
    params: tuple[Pointer | Number, ...]
    body: Callable[..., None]

    def function(self, *, private: bool) -> PrimFunc:
        """The kernel as a PrimFunc."""
        with IRBuilder() as builder, T.prim_func(is_private=private):
            T.func_name(self.name)
            T.func_attr({"tirx.noalias": True})
            if private:
                T.func_ret(PrimType("int32"))
            given = [_parameter(param, private) for param in self.params]
            arguments = [_buffer(param, value, private) for param, value in zip(self.params, given)]
            with _on_cpu():
                self.body(*arguments)
            if private:
                T.Return(const(0, "int32"))
        return builder.get()


def _parameter(param: Pointer | Number, private: bool) -> Expr:
    if isinstance(param, Number):
        return T.arg(param.name, T.int32())
    return T.arg(param.name, T.handle(param.dtype) if private else T.handle())


def _buffer(param: Pointer | Number, value: Expr, private: bool) -> Buffer | Expr:
    if isinstance(param, Number):
        return value
    if private:
        return T.decl_buffer((1 << 40,), param.dtype, data=value)
    return T.match_buffer(value, (T.int64(),), param.dtype)


@contextmanager
def _on_cpu() -> Iterator[None]:
    """What TVM wants to know about local buffers; larger ones than a stack should hold are not for kernels."""
    with ExitStack() as stack:
        stack.enter_context(T.attr("default", "device_id", 0))
        stack.enter_context(T.attr("default", "device_type", 1))
        yield


def serial(extent: Expr, start: Expr = 0) -> Any:
    """A loop, as a context manager that gives its variable."""
    return T.serial(start, extent)


def parallel(extent: Expr) -> Any:
    """A loop whose iterations the thread pool shares, as a context manager that gives its variable."""
    return T.parallel(0, extent)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Code that runs if the condition holds."""
    with T.If(condition), T.Then():
        yield


def local(size: int, dtype: str) -> Buffer:
    """A buffer of this call's own; vectors at constant places in a small one stay in registers."""
    return T.alloc_buffer((size,), dtype, align=64, annotations={"disable_lower_builtin": True})


def bind(value: Expr) -> Expr:
    """The value, computed here and once."""
    return T.Bind(value)


def view(buffer: Buffer, dtype: str) -> Buffer:
    """The same memory as elements of another type."""
    return T.decl_buffer((1 << 40,), dtype, data=buffer.data)


def size_of(dtype: str) -> int:
    """Bytes of an element."""
    return {"int8": 1, "float16": 2, "float32": 4}[dtype]


def prefetch(buffer: Buffer, at: Expr) -> None:
    """Ask for the cache line of an element that will be read."""
    T.evaluate(call_llvm_intrin("void", "llvm.prefetch.p0", address_of(buffer[at]), *_PREFETCH))


class Register:
    """A vector that changes as the kernel runs, and stays in a register."""

    def __init__(self, lanes: int, value: Expr, dtype: str = "float32") -> None:
        """Starts with this value."""
        self._buffer, self._place = local(lanes, dtype), [Ramp(0, 1, lanes)]
        self.set(value)

    def get(self) -> Expr:
        """What it holds now."""
        return self._buffer[self._place[0]]

    def lane(self, index: int) -> Expr:
        """One of its numbers."""
        return self._buffer[index]

    def set(self, value: Expr) -> None:
        """Hold another value from now on."""
        T.buffer_store(self._buffer, value, self._place)


def for_tokens(count: Expr, sizes: Sequence[int], emit: Callable[[int, Expr], None]) -> None:
    """Cover ``count`` tokens with pieces of these sizes, as many of each as fit, the largest first and 1 last.

    ``emit(size, start)`` writes the code for ``size`` tokens from ``start`` on.
    """
    start, rest = const(0, "int32"), count
    for size in sizes:
        pieces = bind(rest // size)
        with serial(pieces) as piece:
            emit(size, start + piece * size)
        start, rest = bind(start + pieces * size), bind(rest - pieces * size)


def pieces_of(most: int) -> tuple[int, ...]:
    """Sizes for :func:`for_tokens` that are mostly ``most``; few sizes, because each is code."""
    return (most, *(size for size in (4, 1) if size < most))


TASKS = 16
"""Into how many tasks rows are divided, if they are many."""


def for_rows(count: Expr, emit: Callable[[Expr, Expr], None]) -> None:
    """Run ``emit(token, task)`` for each of ``count`` tokens, one after the other in each of at most 16 tasks.

    Few tokens are one task, number 0: a parallel region costs about 1 µs.
    """
    with T.If(count >= _MANY_ROWS):
        with T.Then(), parallel(TASKS) as task:
            first = bind(count * task >> 4)
            with serial((count * (task + 1) >> 4) - first) as index:
                emit(bind(first + index), task)
        with T.Else(), serial(count) as token:
            emit(token, const(0, "int32"))
