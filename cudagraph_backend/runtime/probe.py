"""The probe: test runs, before a plan first answers a call, that show whether padded rows reach real ones.

The region runs on the call's own arguments, once at their exact sizes and twice in the plan's bucket, with padded rows
that hold NaN in the first run and large random numbers in the second (booleans: true and false; integers, which may be
indices: the option's ``fill``, then other real rows). What must not depend on padding are the real rows of outputs and
of inputs that are written in place. They must be equal *bit for bit* in both runs in the bucket, which differ in padded
rows only, and *close* to the run at the exact sizes, which computes in other tiles.

Where a proof relies on what padded rows hold, or where a number made of floats may become an index, padded rows hold
what the option ``fill`` says, and only closeness is left to see.

Nothing else is touched: the region runs on copies of what it may write to, random number generators are put back, and
results are dropped. What a custom operator does besides computing its results can't be undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cudagraph_backend.drivers.platforms import generators_of
from cudagraph_backend.errors import Refusal, is_out_of_memory
from cudagraph_backend.memory.copies import stage
from cudagraph_backend.memory.strides import extent, reaching_once
from cudagraph_backend.region import DynamicDim, Region, TensorOutput, evaluate_all
from cudagraph_backend.runtime.bucket_run import new_buffer, with_static
from cudagraph_backend.runtime.comparison import is_close, is_equal
from cudagraph_backend.runtime.layout import detached
from cudagraph_backend.runtime.plan import Plan
from cudagraph_backend.runtime.readings import shape_at
from cudagraph_backend.runtime.region_state import RegionState
from cudagraph_backend.runtime.route import bucket_inputs

Fill = Callable[[torch.Tensor, torch.Tensor, int, int], None]
"""Overwrites padded rows. Given are they, the real rows, the axis of both, and the entries along it that make a row."""

log = logging.getLogger("cudagraph_backend")

_SEED = 1799


@dataclass(frozen=True, slots=True)
class Postponed:
    """The probe can't tell by this call, for want of memory or of other valid integers; it may by another one."""

    reason: str


class _NotTelling(Exception):
    """No other valid integers are known to fill padded rows with."""


def probed(state: RegionState, plan: Plan, args: list[Any], refuse: Callable[[Refusal], None]) -> Plan | Refusal:
    """Return the plan that answers the call: without those dims whose padded rows the probe sees in real ones.

    With ``strict`` such a dim ends the captures of the region, which ``refuse`` is told.
    """
    answer: Plan | Refusal = plan
    while isinstance(answer, Plan) and answer.to_probe:
        found = probe(state, answer, args)
        if found is None:
            state.planner.pass_probe(answer)
        elif isinstance(found, Postponed):
            answer = state.planner.postpone_probe(answer, found.reason)
        else:
            _refuse_dims(state, _blamed(state, answer, args), found)
            if state.options.strict:
                refuse(found)
                return found
            answer = state.planner.plan(answer.sizes)
    return answer


def _blamed(state: RegionState, plan: Plan, args: Sequence[Any]) -> Sequence[DynamicDim]:
    """Return, of several dims that failed the probe together, those that fail it alone; all of them if none does."""
    dims = suspects(plan)
    if len(dims) == 1:
        return dims
    alone = [state.planner.plan_without([other for other in dims if other is not dim], plan.sizes) for dim in dims]
    tested = zip(dims, alone, strict=True)
    failed = [d for d, p in tested if isinstance(p, Plan) and isinstance(probe(state, p, args), Refusal)]
    return failed or dims


def _refuse_dims(state: RegionState, dims: Sequence[DynamicDim], refusal: Refusal) -> None:
    names = ", ".join(dim.name for dim in dims)
    if state.options.pad != "assume" and all(dim.to_probe is None for dim in dims):
        text = "%s: dim %s was proven to be safe to pad and is not; please report this: %s"
        log.error(text, state.region.name, names, refusal)
    else:
        log.warning("%s: dim %s is not padded: %s", state.region.name, names, refusal)
    state.planner.refuse_dims(dims, refusal)
    state.places.clear()


def probe(state: RegionState, plan: Plan, args: Sequence[Any]) -> Refusal | Postponed | None:
    """Return how the plan's padded rows reach real ones; ``None`` if test runs see nothing of it.

    Raises what the region raises for the arguments at their exact sizes.
    """
    try:
        with torch.no_grad():
            return _verdict(state, plan, args)
    except _NotTelling as error:
        return Postponed(str(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Postponed("no memory for the probe")


def suspects(plan: Plan) -> tuple[DynamicDim, ...]:
    """Return the dims that a failure tells against: those without a proof, if there are any."""
    return tuple(dim for dim in plan.to_probe if dim.to_probe is not None) or plan.to_probe


def _verdict(state: RegionState, plan: Plan, args: Sequence[Any]) -> Refusal | None:
    exact = _run(state, plan, _with_copies(state.region, args, args))
    fills = _fills(state, plan)
    try:
        runs = [_run_padded(state, plan, args, fill) for fill in fills]
        changed = _first_apart(is_equal, runs[0], runs[-1])
        if changed is not None and all(dim.to_probe is None for dim in plan.to_probe):
            # A proof is not refuted by a region that never gives the same bits twice.
            repeated = _run_padded(state, plan, args, fills[0])
            changed = changed if _first_apart(is_equal, runs[0], repeated) is None else None
    except Exception as error:
        if isinstance(error, _NotTelling) or is_out_of_memory(error):
            raise
        return _refusal(state.region, plan, None, f"{type(error).__name__}: {error}".partition("\n")[0])
    if changed is not None:
        return _refusal(state.region, plan, changed, "changes with what padded rows hold")
    for run in runs:
        apart = _first_apart(partial(is_close, precision=state.region.precision), run, exact)
        if apart is not None:
            return _refusal(state.region, plan, apart, "is not that of the exact size")
    return None


def _first_apart(compare: Callable[[Any, Any], bool], found: Sequence[Any], expected: Sequence[Any]) -> int | None:
    return next((i for i, pair in enumerate(zip(found, expected, strict=True)) if not compare(*pair)), None)


def _refusal(region: Region, plan: Plan, index: int | None, reason: str) -> Refusal:
    """Refuse what failed the probe; ``index`` is that of the value among those that ``_run`` gives."""
    real, padded = region.values(plan.sizes), region.values(plan.bucket.sizes)
    symbols = [next(iter(dim.symbols)) for dim in plan.to_probe]
    sizes = " × ".join(f"{real[s]} of {padded[s]}" for s in symbols)
    source = next((dim.to_probe.source for dim in plan.to_probe if dim.to_probe is not None), None)
    if index is None:
        return Refusal(f"probe with {sizes} rows: the padded region fails with {reason}", source=source)
    if index < len(region.outputs):
        name, known = f"output {index}", region.outputs[index]
        source = known.source if isinstance(known, TensorOutput) and known.source else source
    else:
        name = f"input {[i.name for i in region.inputs if i.mutated][index - len(region.outputs)]}, written in place,"
    return Refusal(f"probe with {sizes} rows: {name} {reason}", source=source)


# ---- runs


def _run_padded(state: RegionState, plan: Plan, args: Sequence[Any], fill: Fill) -> list[Any]:
    """Run once in the plan's bucket; ``fill`` overwrites the padded rows of dims that are to be probed."""
    buffers = {reading.index: new_buffer(reading, state.region.device) for reading in plan.readings}
    stage([reading.copy_to(buffers[reading.index]) for reading in plan.readings], (), args)
    _overwrite(state, plan, buffers, fill)
    inputs = with_static(bucket_inputs(state.region, plan.bucket.sizes, buffers), args)
    return _run(state, plan, _with_copies(state.region, inputs, args))


def _with_copies(region: Region, inputs: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Return ``inputs`` with copies of those that the region may write to though they are the caller's (``args``).

    These are the ones it writes in place, and all that are staged: a backward uses their memory for its results.
    """
    copied = list(inputs)
    for tensor in region.inputs:
        if (tensor.mutated or tensor.role == "staged") and inputs[tensor.index] is args[tensor.index]:
            copied[tensor.index] = _own_copy(args[tensor.index])
    return copied


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor with its strides, and with what is between its entries."""
    shape = tuple(tensor.shape), tensor.stride()
    return tensor.as_strided((extent(*shape),), (1,)).clone().as_strided(*shape)


def _run(state: RegionState, plan: Plan, inputs: Sequence[Any]) -> list[Any]:
    """Run, and return what must not depend on padding: the real rows of outputs and written inputs, as copies."""
    region, values = state.region, state.region.values(plan.sizes)
    with torch.random.fork_rng(generators_of(region.device)):
        results = state.run(list(inputs))
    observed: list[Any] = []
    for result, known in zip(results, region.outputs, strict=True):
        if isinstance(result, torch.Tensor):
            size = evaluate_all(known.size, values) if isinstance(known, TensorOutput) else result.shape
            observed.append(detached(result, size))
        else:
            observed.append(result if known is None else None)  # a size is computed from those of the call
    written = [tensor for tensor in region.inputs if tensor.mutated]
    return observed + [detached(inputs[t.index], shape_at(t, values)[0]) for t in written]


# ---- fills


def _fills(state: RegionState, plan: Plan) -> list[Fill]:
    """Return one per run in the bucket."""
    if not state.region.takes_extremes or all(dim.needs_fill for dim in plan.to_probe):
        return [_leave]
    return [_fill_nan, partial(_fill_extremes, torch.Generator(state.region.device).manual_seed(_SEED))]


def _overwrite(state: RegionState, plan: Plan, buffers: Mapping[int, torch.Tensor], fill: Fill) -> None:
    values = state.region.values(plan.sizes)
    symbols = {s for dim in plan.to_probe if not dim.needs_fill for s in dim.symbols}
    for tensor in state.region.staged:
        if not tensor.symbols & symbols:
            continue
        buffer, (size, _) = buffers[tensor.index], shape_at(tensor, values)
        once = buffer.as_strided(*reaching_once(buffer.shape, buffer.stride()))  # expanded dims repeat by themselves
        for axis, expression in enumerate(tensor.size):
            symbol = next(iter(expression.free_symbols & symbols), None)
            if symbol is not None and once.size(axis) > size[axis]:
                padded = once.narrow(axis, size[axis], once.size(axis) - size[axis])
                fill(padded, once.narrow(axis, 0, size[axis]), axis, size[axis] // values[symbol])


def _leave(padded: torch.Tensor, real: torch.Tensor, axis: int, entries: int) -> None:
    """Leave padded rows as staged: they hold the option's fill."""


def _fill_nan(padded: torch.Tensor, real: torch.Tensor, axis: int, entries: int) -> None:
    if padded.is_floating_point() or padded.is_complex():
        padded.copy_(torch.full((), float("nan"), device=padded.device))
    elif padded.dtype == torch.bool:
        padded.fill_(True)


def _fill_extremes(
    generator: torch.Generator, padded: torch.Tensor, real: torch.Tensor, axis: int, entries: int
) -> None:
    if padded.is_complex():
        padded.copy_(torch.complex(*(_extremes(padded, generator) for _ in range(2))))
    elif padded.is_floating_point():
        padded.copy_(_extremes(padded, generator))
    elif padded.dtype == torch.bool:
        padded.fill_(False)
    else:
        _fill_other_integers(padded, real, axis, entries, generator)


def _extremes(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw numbers of either sign, and of any magnitude between 1 and that whose square is still finite."""
    exponents = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    signs = torch.randint(0, 2, like.shape, generator=generator, device=like.device) * 2 - 1
    return signs * torch.finfo(like.dtype).max ** (exponents / 2)


def _fill_other_integers(
    padded: torch.Tensor, real: torch.Tensor, axis: int, entries: int, generator: torch.Generator
) -> None:
    """Fill padded rows with random real rows that differ from what is staged; with zeros, if none does.

    Any other number may be invalid.
    """
    rows, staged = real.unflatten(axis, (-1, entries)), padded.narrow(axis, 0, entries)
    others = (rows != staged.unsqueeze(axis)).movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
    if others.numel():
        count = padded.size(axis) // entries
        chosen = torch.randint(0, others.numel(), (count,), generator=generator, device=padded.device)
        padded.copy_(rows.index_select(axis, others[chosen]).flatten(axis, axis + 1))
    elif bool(staged.any()):
        padded.zero_()
    else:
        raise _NotTelling("all rows of an integer input are zero")
