"""What Inductor makes of a region: its code, and what it tells of that."""

from __future__ import annotations

import linecache
import re
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch._inductor.output_code import CompiledFxGraph

Compiled = Callable[[list[Any]], Sequence[Any]]

_CALLED = re.compile(r"\btorch\.ops\.(\w+\.\w+\.\w+)\(")


def failed_operator(error: BaseException) -> str | None:
    """Return the operator that a region's code was calling when an error was raised: ``namespace.name.overload``.

    Generated code calls what it does not generate by name, each on a line of its own.
    """
    lines = (linecache.getline(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__))
    return next((called[1] for line in lines if (called := _CALLED.search(line))), None)


def is_compiled_graph(compiled: Any) -> TypeGuard[CompiledFxGraph]:
    """Return whether Inductor compiled a graph; one without operators it leaves as it is."""
    return isinstance(compiled, CompiledFxGraph)


def boxed(call: Compiled) -> Compiled:
    """Wrap ``call`` as a function that AOTAutograd knows to take one list of arguments and to empty it."""

    def boxed_call(args: list[Any]) -> Sequence[Any]:
        return call(args)

    boxed_call._boxed_call = True  # type: ignore[attr-defined]
    return boxed_call


def output_strides(compiled: CompiledFxGraph) -> Sequence[tuple[str, ...] | None] | None:
    """Return each output's strides, as Inductor laid it out: expressions in text, ``None`` for what is no tensor."""
    return compiled.output_strides


def mutated_inputs(compiled: CompiledFxGraph) -> frozenset[int]:
    """Return the indices of the inputs that the compiled region writes to."""
    return frozenset(compiled.mutated_input_idxs)


def uncapturable_reason(compiled: CompiledFxGraph) -> str | None:
    """Return Inductor's own reason against capturing a region in a CUDA graph, found while lowering it."""
    return compiled.disabled_cudagraphs_reason


def unbound_sizes(compiled: Any) -> list[str]:
    """Return the names of sizes that generated code reads and nothing in it defines.

    Inductor counts on sizes of the frame that the graph was cut from (seen with torch 2.11, in the checks of sizes
    that depend on data).
    """
    call: Any = getattr(getattr(compiled, "compiled_fn_runner", None), "call", None)
    if not isinstance(call, types.MethodType):
        return []
    code, known = call.__func__.__code__, call.__func__.__globals__
    return [name for name in code.co_names if re.fullmatch(r"[su]\d+", name) and name not in known]


def with_allocator(compiled: Any, device_type: str, allocate: Callable[..., torch.Tensor]) -> Compiled | None:
    """Bind the region's generated code to private globals, with ``allocate(size, stride, dtype)`` for its buffers.

    The generated module may be shared by equal regions, so its globals are copied, never changed. Returns ``None`` if
    the compiled region is not generated Python code.
    """
    call: Any = getattr(getattr(compiled, "compiled_fn_runner", None), "call", None)
    name = f"empty_strided_{device_type}"
    function = getattr(call, "__func__", None)
    if not isinstance(function, types.FunctionType) or name not in function.__globals__:
        return None
    return types.MethodType(_rebound(function, {name: allocate}), call.__self__)


def _rebound(function: types.FunctionType, changed: Mapping[str, Any]) -> types.FunctionType:
    """Copy a function of generated code, with all that it calls there (graphs inside it), to globals of its own.

    Globals that held the function itself would be freed by the garbage collector only, and the device's memory with
    them. Generated functions do not call themselves, and call graphs from their own bodies only.
    """
    shared = function.__globals__
    called = {key: shared[key] for key in function.__code__.co_names if _is_of(shared.get(key), shared)}
    own = {**shared, **changed, **{key: _rebound(value, changed) for key, value in called.items()}}
    return types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)


def _is_of(value: Any, module: Mapping[str, Any]) -> bool:
    return isinstance(value, types.FunctionType) and value.__globals__ is module
