"""Warm-up: all buckets of a compiled function are captured before it serves, the largest first."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudagraph_backend import torch_internals
from cudagraph_backend.backend import sharedgraph
from cudagraph_backend.drivers.platforms import current_devices, generators_of, synchronize
from cudagraph_backend.errors import WarmupError
from cudagraph_backend.example import Axis, ExampleCall, Size
from cudagraph_backend.report import stats_of
from cudagraph_backend.runtime import buckets
from cudagraph_backend.runtime.replayer import Replayer

log = logging.getLogger("cudagraph_backend")


@dataclass(frozen=True, slots=True)
class WarmedSize:
    """What warming up one size took, and what is held after it.

    Attributes:
        size: the rows of the call; a tuple where several dims change, in the order of ``sizes``.
        seconds: from the call until the device has finished; the first also compiles, unless that was done before.
        captures: graphs captured (one per region, or none where the bucket was there already).
        output_pool_bytes, memory_pool_bytes, executable_bytes: held by now in all, as in ``stats()``.
    """

    size: int | tuple[int, ...]
    seconds: float
    captures: int
    output_pool_bytes: int
    memory_pool_bytes: int
    executable_bytes: int

    @property
    def nbytes(self) -> int:
        return self.output_pool_bytes + self.memory_pool_bytes + self.executable_bytes


def warmup(
    fn: Callable[..., Any],
    inputs: Sequence[Any] | Mapping[str, Any],
    sizes: Collection[int] | Collection[tuple[int, ...]] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    backward: bool = False,
) -> tuple[WarmedSize, ...]:
    """Call a compiled function once per size, the largest first, so that later calls need not capture.

    Smaller captures reuse the scratch of larger ones. Calls are made in the caller's grad and autocast modes. With
    tqdm installed a bar shows sizes, seconds and MiB on a terminal; the logger ``cudagraph_backend`` has them at INFO.

    Which dims change: those marked with ``torch._dynamo.mark_dynamic``. If none is, dim 0 of every tensor whose dim 0
    is as long as that of the first tensor. Marked dims that are equally long in ``inputs`` change together, so dims
    that change on their own must differ in length there.

    Every call gets copies of the tensors, with the rows given repeated or cut to the size, the same order of dims in
    memory, and the same marks; so ``fn`` may write to its arguments. Parameters and ``mark_static_address`` tensors are
    passed as they are, since graphs depend on their addresses, and so is what is in objects that pytree does not know.
    The states of PyTorch's default generators and of Python's ``random`` are put back. Not undone is what else ``fn``
    changes: buffers, caches, tensors it reaches by itself, files; reset these afterwards.

    A dim of size 1 is called unmarked, as Dynamo compiles size 1 apart from all others; ``min=2`` leaves it out of the
    default sizes. Captured is what these calls do: values that steer ``fn`` elsewhere, or arguments that are outputs
    of compiled functions, may need graphs of their own later. No other thread should call compiled functions meanwhile.

    Args:
        fn: what ``torch.compile(..., backend="sharedgraph")`` returned, or a function that calls it.
        inputs: the arguments of one call, with at least one row: positional ones as a tuple, or keyword ones as a dict.
        sizes: the rows to call with, ints. Where several dims change, one tuple per combination, ordered as these dims
            are first met in the arguments. Default: all sizes of the option ``capture_sizes`` up to the marks' bound
            (all combinations, for several dims); to learn that option ``fn`` is called once more before, without
            capturing anything. With ``"auto"`` a bound is needed.
        kwargs: keyword arguments besides positional ``inputs``.
        backward: run the backward of the summed outputs, too, to capture training steps; no ``.grad`` is changed.

    Returns:
        A record per size, in the order of the calls.

    Raises:
        WarmupError: what changes, or up to what size, can't be told; a size that the marks don't allow; ``fn`` calls
            nothing that this backend compiled; ``backward`` without outputs that need gradients.
    """
    call = ExampleCall.of(fn, inputs, kwargs, backward)
    given = None if sizes is None else _checked(sizes, call.axes)
    with _random_states_kept(call):
        chosen = _default_sizes(call) if given is None else given
        return tuple(_warm_up(call, sorted(chosen, key=lambda size: (math.prod(size), size), reverse=True)))


def _warm_up(call: ExampleCall, sizes: Sequence[Size]) -> Iterator[WarmedSize]:
    with _progress_bar(len(sizes)) as progress:
        for size in sizes:
            before, began = stats_of(sharedgraph), time.perf_counter()
            call.run(size)
            _wait_for_devices()
            seconds, after = time.perf_counter() - began, stats_of(sharedgraph)
            if (after.replays, after.fallbacks) == (before.replays, before.fallbacks):
                raise _not_ours(call.fn)
            warmed = WarmedSize(
                size if len(size) > 1 else size[0],
                seconds,
                after.captures - before.captures,
                after.output_pool_bytes,
                after.memory_pool_bytes,
                after.executable_bytes,
            )
            progress(warmed)
            yield warmed


# ---- sizes


def _checked(sizes: Any, axes: Sequence[Axis]) -> set[Size]:
    accepted = "a non-empty list of ints" if len(axes) == 1 else f"a non-empty list of tuples of {len(axes)} ints"
    accepted += " (the sizes of " + ", ".join(map(str, axes)) + ")"
    if isinstance(sizes, (str, Mapping)) or not isinstance(sizes, Collection) or not sizes:
        raise WarmupError(f"warmup: sizes: got {sizes!r}; accepted is {accepted}")
    checked = set()
    for given in sizes:
        size = (given,) if len(axes) == 1 and not isinstance(given, (tuple, list)) else given
        if not isinstance(size, (tuple, list)) or len(size) != len(axes) or any(type(n) is not int for n in size):
            raise WarmupError(f"warmup: sizes: got {given!r} among them; accepted is {accepted}")
        for axis, n in zip(axes, size, strict=True):
            # 1 is compiled apart, unmarked, so marks say nothing of it.
            lower, upper = axis.lower or 1, axis.upper or math.inf
            if n != 1 and not max(lower, 1) <= n <= upper:
                raise WarmupError(
                    f"warmup: sizes: got {n} for {axis}; accepted is 1, or {lower} to {axis.upper or 'any'} as marked; "
                    "leave it out, or mark the inputs with other bounds"
                )
        checked.add(tuple(size))
    return checked


def _default_sizes(call: ExampleCall) -> set[Size]:
    """Return all buckets of the regions that ``call`` calls; compiles them, and captures nothing yet."""
    with sharedgraph.rehearsal() as regions:
        call.run(tuple(axis.example for axis in call.axes))
    if not regions:
        raise _not_ours(call.fn)
    options = {region.options.capture_sizes for region in regions}
    if len(options) > 1:
        raise WarmupError(
            "warmup: sizes: got none, and the compiled functions that are called have different capture_sizes; "
            "accepted is one for all: give sizes"
        )
    found = options.pop()
    sizes = set(itertools.product(*(_axis_sizes(axis, found) for axis in call.axes)))
    _check_count(len(sizes), regions)
    return sizes


def _axis_sizes(axis: Axis, capture_sizes: buckets.CaptureSizes) -> tuple[int, ...]:
    if capture_sizes == "auto" and axis.upper is None:
        raise WarmupError(
            f"warmup: sizes: got none, and {axis} has no bound; accepted is a list of sizes here, the option "
            "capture_sizes, or a bound: torch._dynamo.mark_dynamic(tensor, dim, min=2, max=…)"
        )
    sizes = buckets.all_sizes(capture_sizes, axis.lower or 1, axis.upper)
    if not sizes:
        raise WarmupError(
            f"warmup: sizes: got none, and of capture_sizes {list(capture_sizes)} none is within the marked bounds of "
            f"{axis}, {axis.lower} to {axis.upper}; accepted are capture_sizes from {axis.lower} on"
        )
    return sizes


def _check_count(count: int, regions: Sequence[Replayer]) -> None:
    most = min(region.options.max_graphs for region in regions)
    if count > most:
        raise WarmupError(
            f"warmup: sizes: got none, and there are {count} combinations; accepted are {most}, as many graphs as a "
            "region may hold: give sizes, fewer capture_sizes, or a larger max_graphs"
        )


def _not_ours(fn: Any) -> WarmupError:
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return WarmupError(
        f"warmup: got the function {name}, whose call runs nothing that this backend has compiled; accepted is what "
        "torch.compile(…, backend='sharedgraph') returns, or a function that calls it"
    )


# ---- running


def _wait_for_devices() -> None:
    for device in sharedgraph.devices():
        synchronize(device)


@contextlib.contextmanager
def _random_states_kept(call: ExampleCall) -> Iterator[None]:
    tensors = torch_internals.tensors_in((call.args, call.kwargs))
    devices = {tensor.device for tensor in tensors} | current_devices()
    generators = {index for device in devices for index in generators_of(device)}
    state = random.getstate()
    with torch.random.fork_rng(sorted(generators)):
        try:
            yield
        finally:
            random.setstate(state)


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[WarmedSize], None]]:
    """Yield what takes each record to a bar on standard error (where there is a terminal and tqdm) and to the log."""
    try:
        from tqdm import tqdm
    except ImportError:
        bar = None
    else:
        bar = tqdm(total=total, desc="warmup", unit="size", disable=None)  # None: off where there is no terminal

    def advance(warmed: WarmedSize) -> None:
        told = f"size {warmed.size}: {warmed.seconds:.2f} s, {warmed.nbytes / 2**20:.1f} MiB held"
        log.info("warmup: %s, %d captures", told, warmed.captures)
        if bar is not None:
            bar.set_postfix_str(told, refresh=False)
            bar.update()

    with contextlib.nullcontext() if bar is None else bar:
        yield advance
