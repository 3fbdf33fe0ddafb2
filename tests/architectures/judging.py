"""Runs a program as the backend would, with changing sizes, and says what was padded, and whether values are eager's.

All but Inductor's code is the backend's own: graphs that are interpreted stand in for that, so that a program takes
seconds. The host driver overwrites with NaN what must not be read.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import sympy
import torch
from torch import nn
from torch._guards import CompileContext
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import cudagraph_backend as sg
from cudagraph_backend import backend, sharedgraph, torch_internals
from cudagraph_backend.compile.region_compile import RegionCompile
from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.errors import Refusal
from cudagraph_backend.memory.strides import same_places
from tests.architectures.program import BETWEEN, CALL_COUNT, CALLS, CAPTURE_SIZES, Batch, Mode, Program
from tests.architectures.verdicts import as_compiled
from tests.support.oracle import Region as OracleRegion
from tests.support.oracle import _Repeatable as Repeatable
from tests.support.oracle import outputs_of

Values = list[torch.Tensor]


@dataclass(slots=True)
class Outcome:
    """What was found of a program in one mode.

    Attributes:
        refusals: of each dim that changes, why it is not padded; empty if it is, in every region.
        uncaptured: why regions, or calls of them, ran uncaptured.
        masked: whether a graph was changed for the proof.
        padded_rows: how many rows of padding all calls had.
        regions: how many were found.
        problem: the first value that is not as it should be, or the exception; None if all is well.
    """

    refusals: dict[str, list[Refusal]] = field(default_factory=dict)
    uncaptured: list[str] = field(default_factory=list)
    masked: bool = False
    padded_rows: int = 0
    regions: int = 0
    problem: str | None = None


def judge(program: Program, mode: Mode, interpreted: bool = True) -> Outcome:
    """Run a program a few times; without ``interpreted`` Inductor compiles it, which takes longer."""
    outcome, seen = Outcome(), _Seen()
    torch._dynamo.reset()
    try:
        with _as_served(seen, interpreted):
            expected = _expected(program, mode)
            outcome.problem = _compared(program, mode, expected)
            _note(outcome, program, seen)
    finally:
        torch._dynamo.reset()
    return outcome


def surprise(program: Program, mode: Mode, outcome: Outcome) -> str | None:
    """What is not as the program says, or not true when run; None if all is well."""
    if outcome.problem is not None:
        return outcome.problem
    found = {name: [str(refusal) for refusal in refusals] for name, refusals in outcome.refusals.items()}
    expected = program.expected(mode)
    if found.keys() != expected.keys():
        return f"dims are {sorted(found)}, not {sorted(expected)}: {found}"
    for name, reason in expected.items():
        if reason is None and found[name]:
            return f"{name} is not padded: {'; '.join(found[name])}"
        if reason is not None and not any(reason in one for one in found[name]):
            return f"{name} is not to be padded for {reason!r}, but got {found[name]}"
    unforeseen = [why for why in outcome.uncaptured if not any(piece in why for piece in program.leaves)]
    if unforeseen:
        return f"ran uncaptured: {'; '.join(unforeseen)}"
    if None in expected.values() and outcome.padded_rows == 0:
        return "no call was padded"
    return None


# ---- running


def _expected(program: Program, mode: Mode) -> list[Values]:
    """The values of each call in eager; of one that draws, those of its regions at their exact sizes."""
    if not program.draws:
        return _values(program, mode, lambda function: function)
    torch._dynamo.reset()
    values = _values(program, mode, lambda function: _compile(function, driver="off"))
    torch._dynamo.reset()
    return values


def _compared(program: Program, mode: Mode, expected: list[Values]) -> str | None:
    try:
        found = _values(program, mode, lambda function: _compile(function, driver="host"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for call, (ours, right) in enumerate(zip(found, expected, strict=True)):
        for number, (one, other) in enumerate(zip(ours, right, strict=True)):
            try:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
            except AssertionError as error:
                return f"value {number} of call {call} is not eager's: {error}"
    return None


def _compile(function: Callable[..., Any], driver: str) -> Callable[..., Any]:
    options: Any = {"driver": driver, "capture_sizes": CAPTURE_SIZES}
    return torch.compile(function, backend="sharedgraph", options=options)


def _values(program: Program, mode: Mode, wrap: Callable[..., Any]) -> list[Values]:
    """What each call returns, and in training what it leaves in gradients and buffers."""
    torch.manual_seed(0)
    model = program.build().train(mode == "training")
    function = program.answer if mode == "inference" else program.loss
    assert function is not None
    call = wrap(lambda batch: function(model, **batch))
    values = []
    for number in range(CALL_COUNT):
        torch.manual_seed(number)
        batch = _marked(program, program.batch(program.sizes(number)))
        with torch.set_grad_enabled(mode == "training"):
            result = call(batch)
        if mode == "training":
            result.backward()
        values.append(_tensors(result) + (_left(model) if mode == "training" else []))
    return values


def _marked(program: Program, batch: Batch) -> Batch:
    for name, shape in program.shapes.items():
        for dim, changing in enumerate(shape):
            if changing is not None:
                torch._dynamo.mark_dynamic(batch[name], dim)
    return batch


def _tensors(result: Any) -> Values:
    result = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [leaf.detach().clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _left(model: nn.Module) -> Values:
    """Gradients, which are then forgotten, and buffers."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return [grad.clone() for grad in grads] + [buffer.clone() for buffer in model.buffers()]


# ---- what is seen of it


@dataclass(slots=True)
class _Seen:
    """Of each region, by its number: Dynamo's number for the frame, its kind, and what sizes it was compiled at."""

    frames: dict[int, tuple[Any, str]] = field(default_factory=dict)
    sizes: dict[int, dict[sympy.Symbol, int]] = field(default_factory=dict)

    def add(self, compilation: RegionCompile, example_inputs: Sequence[Any]) -> None:
        compile_id = CompileContext.current_compile_id()
        frame = None if compile_id is None else compile_id.frame_id
        self.frames[compilation.number] = frame, "backward" if compilation.kind == "backward" else "forward"
        self.sizes[compilation.number] = dict(_hints(example_inputs))

    def last(self) -> set[int]:
        """Dynamo takes a size as fixed until a second call shows that it changes: of one frame the last counts."""
        return set({frame: number for number, frame in sorted(self.frames.items())}.values())


def _hints(example_inputs: Sequence[Any]) -> Iterator[tuple[sympy.Symbol, int]]:
    for value in example_inputs:
        for size in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.has_hint():
                yield size.node.expr, int(size.node.hint)


def _note(outcome: Outcome, program: Program, seen: _Seen) -> None:
    last = seen.last()
    refusals: defaultdict[str, list[Refusal]] = defaultdict(list)
    outcome.uncaptured += map(str, sg.stats().fallbacks)
    outcome.padded_rows = sg.stats().rows_padded
    for region in (replayer.region for replayer in sharedgraph.regions()):
        if region.number not in last:
            continue
        outcome.regions += 1
        if region.refusal is not None:
            outcome.uncaptured.append(str(region.refusal))
        outcome.masked |= any(dim.masks or dim.forms for dim in region.dims)
        for dim in region.dims:
            for symbol in dim.symbols:
                refusals[_name(program, seen.sizes[region.number].get(symbol))] += [dim.refusal] if dim.refusal else []
    outcome.refusals = dict(refusals)


def _name(program: Program, size: int | None) -> str:
    """The name of the dim that is as long as a symbol was."""
    return next((name for name in program.dims if size in CALLS[name]), BETWEEN)


@contextlib.contextmanager
def _as_served(seen: _Seen, interpreted: bool) -> Iterator[None]:
    class Noted(RegionCompile):
        __slots__ = ()

        def compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
            seen.add(self, example_inputs)
            return RegionCompile.compile(self, gm, example_inputs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(HostDriver, "poison", True))
        stack.enter_context(mock.patch.object(backend, "RegionCompile", Noted))
        if interpreted:
            stack.enter_context(mock.patch.object(torch_internals, "compile_region", _Interpreted))
            stack.enter_context(mock.patch.object(torch_internals, "is_compiled_graph", _is_interpreted))
        yield


class _Interpreted:
    """Stands in for what Inductor compiles: calls the graph as it is, and lays results out as they were traced."""

    def __init__(self, module: GraphModule, example_inputs: Sequence[Any], **kwargs: Any):
        stated = as_compiled(module)
        self.output_strides = stated.output_strides
        self.mutated_input_idxs = stated.mutated_input_idxs
        self.disabled_cudagraphs_reason = None
        self._region = OracleRegion(GraphModule(module, copy.deepcopy(module.graph)), ())
        self._outputs = list(outputs_of(self._region.module))

    def __call__(self, args: list[Any]) -> list[Any]:
        given = tuple(args)
        args.clear()
        with torch.no_grad():
            results = Repeatable(self._region.module).run(*given)
        sizes = replace(self._region, args=given).sizes()
        return [_laid_out(meta, result, sizes) for meta, result in zip(self._outputs, results, strict=True)]


def _laid_out(meta: Any, result: Any, sizes: dict[sympy.Symbol, int]) -> Any:
    """The result with the strides of ``meta``; AOTAutograd and the backend count on what was stated of them."""
    if not isinstance(result, torch.Tensor):
        return result
    strides = [torch_internals.expr(stride).subs(sizes) for stride in meta.stride()]
    if any(stride.free_symbols for stride in strides) or same_places(result.shape, strides, result.stride()):
        return result
    return torch.empty_strided(result.shape, [int(s) for s in strides], dtype=result.dtype).copy_(result)


def _is_interpreted(compiled: Any) -> bool:
    return isinstance(compiled, _Interpreted)
