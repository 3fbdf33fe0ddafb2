"""What the staging kernel has to do, as numbers: jobs, and the table of them that lies on the device.

A bucket's rows are the product of its dims, each of which has a real and a padded part. So they fall into boxes: the
real one, and one per combination of padded parts. Every box is a strided copy from the argument. A replica is one too,
as a dim that repeats has source stride 0; no fill waits for another one, and one launch does them all. Strides are in
bytes, and an entry is one more dim of bytes: which dtype it was does not matter, and whatever lies in sequence moves in
units of up to eight bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch

from cudagraph_backend.memory.copies import StagedCopy

BLOCK = 1024  # units that one program moves at a time
FEW_DIMS = 2  # are enough for rows in sequence and their replicas; the kernel is compiled for these and for MAX_DIMS
MAX_DIMS = 5
MAX_SOURCES = 16
ADDRESS = -1  # in place of a source's number: ``Job.at`` is an address
CONSTANT = -2  # … ``Job.at`` is eight bytes that repeat

Launch: TypeAlias = "Callable[[int, int, int, Sequence[int]], None]"
"""Takes the number of programs, the raw stream (the current one), the table's address and ``MAX_SOURCES`` sources'."""

_WIDEST = 8
_PROGRAMS = 2048  # about as many as a large GPU runs at once; beyond that, each program moves several blocks
_MAX_UNITS = 2**31 - 2**20  # the kernel counts them in 32 bits, and may count to the end of a block


@dataclass(frozen=True, slots=True)
class Dim:
    """``size`` steps, in bytes ``to`` apart where they are written and ``source`` apart where they are read."""

    size: int
    to: int
    source: int


@dataclass(frozen=True, slots=True)
class Job:
    """A strided copy of units of 1, 2, 4 or 8 bytes.

    Attributes:
        to: the address written first.
        source: which of the launch's sources is read, ``ADDRESS`` or ``CONSTANT``.
        at: where in the source reading begins, in bytes.
        dims: innermost first.
    """

    to: int
    source: int
    at: int
    unit: int
    dims: tuple[Dim, ...]

    @property
    def units(self) -> int:
        return math.prod(dim.size for dim in self.dims)


@dataclass(frozen=True, slots=True)
class Table:
    """``words``, int64, are three per program (where its job begins, its first unit, one past its last), then the jobs.

    A job is ``to``, ``source``, ``at``, ``unit``, then ``size``, ``to``, ``source`` of each of ``dims`` dims.
    """

    words: list[int]
    programs: int
    dims: int


def jobs(
    copy: StagedCopy, stride: Sequence[int] | None, source: int = ADDRESS, alignment: int = 16
) -> tuple[Job, ...] | None:
    """Return the jobs of one staged input; ``None`` if the kernel can't do one of them.

    Args:
        stride: of the argument, as ``StagedCopy.argument`` makes it; ``None`` for one that is read in place, whose
            padded rows alone are written.
        source: the argument's number among the launch's sources.
        alignment: of the argument's address, at most 16.
    """
    constant = None if copy.fill == "replica" else _pattern(copy)
    made: list[Job | None] = []
    for is_padded, to, at, dims in _boxes(copy, copy.bucket.stride() if stride is None else stride):
        if not is_padded and stride is None:
            continue
        to += copy.bucket.data_ptr()
        if is_padded and copy.fill != "replica":
            if constant is None:
                return None
            dims = [Dim(dim.size, dim.to, dim.to) for dim in dims]
            made.append(_job(to, CONSTANT, constant, dims, aligned=0))
        elif stride is None:
            at += copy.bucket.data_ptr()
            made.append(_job(to, ADDRESS, at, dims, aligned=at))
        else:
            made.append(_job(to, source, at, dims, aligned=math.gcd(at, alignment)))
    found = tuple(job for job in made if job is not None)
    return found if len(found) == len(made) else None


def _boxes(copy: StagedCopy, stride: Sequence[int]) -> Iterator[tuple[bool, int, int, list[Dim]]]:
    """Yield, per box that is not empty, whether it is padded, where it begins in bucket and argument, and its dims."""
    itemsize, parts = copy.bucket.element_size(), []
    for length, size, to, source, entries in zip(
        copy.real.shape, copy.bucket.shape, copy.bucket.stride(), stride, copy.row_entries, strict=True
    ):
        to, source = to * itemsize, source * itemsize
        parts.append([(False, 0, 0, [Dim(length, to, source)])])
        if size > length and to != 0:  # expanded dims repeat by themselves
            padded = [Dim(size - length, to, to)]
            if copy.fill == "replica":
                padded = [Dim((size - length) // entries, to * entries, 0), Dim(entries, to, source)]
            parts[-1].append((True, length * to, (length - entries) * source, padded))
    for box in product(*parts):
        dims = [dim for _, _, _, part in box for dim in part]
        if all(dim.size for dim in dims):
            is_padded = any(padded for padded, _, _, _ in box)
            yield (
                is_padded,
                sum(to for _, to, _, _ in box),
                sum(at for _, _, at, _ in box),
                [*dims, Dim(itemsize, 1, 1)],
            )


def _job(to: int, source: int, at: int, dims: Sequence[Dim], aligned: int) -> Job | None:
    """Make a job with as few dims, and units as wide, as sizes, strides and addresses allow.

    ``aligned`` is the alignment of the source. Returns ``None`` if there are more dims or units than the kernel takes.
    """
    merged = _merged(dims)
    unit = 1
    if merged and merged[0].to == merged[0].source == 1:
        run, *others = merged
        steps = [step for dim in others for step in (dim.to, dim.source)]
        unit = math.gcd(_WIDEST, run.size, to, aligned, *steps)
        merged = _merged([Dim(run.size // unit, unit, unit), *others])
    job = Job(to, source, at, unit, tuple(merged))
    return job if len(merged) <= MAX_DIMS and job.units < _MAX_UNITS else None


def _merged(dims: Sequence[Dim]) -> list[Dim]:
    """Return the same pairs of places as fewer dims, innermost first: none has one entry, and neighbours are joined."""
    merged: list[Dim] = []
    for dim in sorted((dim for dim in dims if dim.size > 1), key=lambda dim: dim.to):
        last = merged[-1] if merged else None
        if last is not None and (dim.to, dim.source) == (last.to * last.size, last.source * last.size):
            merged[-1] = Dim(last.size * dim.size, last.to, last.source)
        else:
            merged.append(dim)
    return merged


def _pattern(copy: StagedCopy) -> int | None:
    """Return eight bytes, as an int64, that repeat in memory filled with the number; ``None`` for wider entries.

    They are made on the bucket's device, where ``fill_`` would make them.
    """
    if copy.fill == "zero":
        return 0
    itemsize = copy.bucket.element_size()
    if itemsize > _WIDEST:
        return None
    entry = torch.empty(1, dtype=copy.bucket.dtype, device=copy.bucket.device).fill_(copy.fill)  # type: ignore[arg-type]
    return int.from_bytes(bytes(entry.view(torch.uint8).tolist()) * (_WIDEST // itemsize), "little", signed=True)


def table(listed: Sequence[Job]) -> Table:
    """Return the jobs as the kernel reads them, shared out to programs."""
    dims = FEW_DIMS if all(len(job.dims) <= FEW_DIMS for job in listed) else MAX_DIMS
    chunk = BLOCK * max(1, -(-sum(job.units for job in listed) // (BLOCK * _PROGRAMS)))
    shares = [(n, first) for n, job in enumerate(listed) for first in range(0, job.units, chunk)]
    begin, width = 3 * len(shares), 4 + 3 * dims
    words: list[int] = []
    for n, first in shares:
        words += [begin + n * width, first, min(first + chunk, listed[n].units)]
    for job in listed:
        words += [job.to, job.source, job.at, job.unit]
        for dim in (*job.dims, *[Dim(1, 0, 0)] * (dims - len(job.dims))):
            words += [dim.size, dim.to, dim.source]
    return Table(words, len(shares), dims)
