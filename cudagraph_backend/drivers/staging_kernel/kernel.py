"""The staging kernel, one launch of which does all jobs of a table (``jobs.Table``); how to launch it without delay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from cudagraph_backend.drivers.staging_kernel.jobs import BLOCK, MAX_SOURCES, Launch

SOURCES = tuple(f"source{k}" for k in range(MAX_SOURCES))
_WARPS = 4


@triton.jit
def _move(job, source, is_read, first, end, kind: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """Move units ``first`` to ``end`` of a job, of integer type ``kind``; ``source`` is an address or the constant."""
    target = tl.load(job)
    for start in range(first, end, BLOCK):
        rest = start + tl.arange(0, BLOCK)
        is_unit = rest < end
        to = target
        at = source
        for d in tl.static_range(DIMS):
            if d < DIMS - 1:
                size = tl.load(job + 4 + 3 * d).to(tl.int32)
                step = (rest % size).to(tl.int64)
                rest = rest // size
            else:
                step = rest.to(tl.int64)
            to = to + step * tl.load(job + 5 + 3 * d)
            at = at + step * tl.load(job + 6 + 3 * d)
        read = tl.load(at.to(tl.pointer_type(kind)), mask=is_unit & is_read, other=0)
        units = tl.where(is_read, read, source.to(kind))
        tl.store(to.to(tl.pointer_type(kind)), units, mask=is_unit)


# Addresses are plain numbers: the launcher need not look for a tensor's. None is specialized on, or each alignment
# would be a kernel of its own.
@triton.jit(do_not_specialize=["table", *SOURCES])
def stage_kernel(
    table: tl.int64,
    source0: tl.int64,
    source1: tl.int64,
    source2: tl.int64,
    source3: tl.int64,
    source4: tl.int64,
    source5: tl.int64,
    source6: tl.int64,
    source7: tl.int64,
    source8: tl.int64,
    source9: tl.int64,
    source10: tl.int64,
    source11: tl.int64,
    source12: tl.int64,
    source13: tl.int64,
    source14: tl.int64,
    source15: tl.int64,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sources = (
        source0, source1, source2, source3, source4, source5, source6, source7,
        source8, source9, source10, source11, source12, source13, source14, source15,
    )  # fmt: skip
    words = table.to(tl.pointer_type(tl.int64))
    share = words + 3 * tl.program_id(0)
    job = words + tl.load(share)
    first = tl.load(share + 1).to(tl.int32)
    end = tl.load(share + 2).to(tl.int32)
    number = tl.load(job + 1)
    source = tl.load(job + 2)
    unit = tl.load(job + 3)
    for k in tl.static_range(16):
        source += tl.where(number == k, sources[k], 0)
    is_read = number != -2
    if unit == 8:
        _move(job, source, is_read, first, end, tl.int64, DIMS, BLOCK)
    elif unit == 4:
        _move(job, source, is_read, first, end, tl.int32, DIMS, BLOCK)
    elif unit == 2:
        _move(job, source, is_read, first, end, tl.int16, DIMS, BLOCK)
    else:
        _move(job, source, is_read, first, end, tl.int8, DIMS, BLOCK)


def normal_launch(dims: int) -> Launch:
    """Return a launch by Triton's own ``kernel[grid](…)``, which binds and looks up all arguments at every call."""

    def launch(programs: int, stream: int, table: int, sources: Sequence[int]) -> None:
        stage_kernel[(programs,)](table, *sources, DIMS=dims, BLOCK=BLOCK, num_warps=_WARPS)

    return launch


def cached_launch(dims: int) -> Launch:
    """Return a launch that goes straight to the launcher of the compiled kernel, for the current device.

    That is not Triton's public API: read from 3.6 and 3.7. It is tried with no programs, which checks the arguments and
    runs nothing; if that fails, launches are normal ones.
    """
    compiled = stage_kernel.warmup(0, *[0] * MAX_SOURCES, DIMS=dims, BLOCK=BLOCK, num_warps=_WARPS, grid=(1,))
    try:
        run: Callable[..., Any] = compiled.run
        function, metadata = compiled.function, compiled.packed_metadata

        def launch(programs: int, stream: int, table: int, sources: Sequence[int]) -> None:
            run(programs, 1, 1, stream, function, metadata, None, None, None, table, *sources, dims, BLOCK)

        launch(0, 0, 0, [0] * MAX_SOURCES)
    except (AttributeError, TypeError):
        return normal_launch(dims)
    return launch
