"""Judges many operators, each in a process of its own: one that hangs or crashes costs its own case only."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.testing._internal.opinfo.core import OpInfo

from tests.opinfo.cases import cases_of
from tests.opinfo.judge import Outcome, judge


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is done per operator: samples, and seconds for one case."""

    samples: int = 8
    seconds: float = 60.0


@dataclass(slots=True)
class _Worker:
    """A process that judges the cases of one operator, from number ``start`` on.

    Attributes:
        last: the newest word on the case under way, with its number; None between two cases.
        since: when the last word came.
    """

    op: OpInfo
    process: Any
    pipe: Connection
    since: float
    last: tuple[int, Outcome] | None = None


def judge_operator(op: OpInfo, samples: int) -> list[Outcome]:
    """All outcomes of one operator, in this process."""
    return [judge(op.formatted_name, sample, dims) for sample, dims in cases_of(op, samples)]


def sweep(ops: Sequence[OpInfo], limits: Limits, jobs: int, tick: Callable[[], None]) -> Iterator[Outcome]:
    """The outcomes of all ``ops``, as they come; ``tick`` is called after each operator."""
    waiting = [(op, 0) for op in reversed(ops)]
    working: dict[Connection, _Worker] = {}
    while waiting or working:
        while waiting and len(working) < jobs:
            worker = _start(*waiting.pop(), limits)
            working[worker.pipe] = worker
        for pipe in wait(list(working), timeout=1.0):
            yield from _hear(working[pipe])  # type: ignore[index]
        for worker in [worker for worker in working.values() if _is_over(worker, limits)]:
            del working[worker.pipe]
            yield from _hear(worker)
            if worker.last is None and worker.process.exitcode == 0:
                tick()
                continue
            number, outcome = worker.last or (None, Outcome(worker.op.formatted_name, -1, ""))
            outcome.kind, outcome.detail = "crashed", f"the process ended: {worker.process.exitcode}"
            yield outcome
            if number is not None:
                waiting.append((worker.op, number + 1))


def _start(op: OpInfo, start: int, limits: Limits) -> _Worker:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # fork: importing torch's table of operators takes seconds
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(op, start, limits.samples, theirs), daemon=True
    )
    process.start()
    theirs.close()
    return _Worker(op, process, ours, time.monotonic())


def _tell(pipe: Connection, number: int, so_far: Outcome) -> None:
    pipe.send((number, so_far, False))


def _work(op: OpInfo, start: int, samples: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        for number, (sample, dims) in enumerate(cases_of(op, samples)):
            if number >= start:
                outcome = judge(op.formatted_name, sample, dims, partial(_tell, pipe, number))
                pipe.send((number, outcome, True))
    except Exception as error:  # the sweep's own mistake, not the operator's
        pipe.send(RuntimeError(f"{op.formatted_name}: {type(error).__name__}: {error}"))
    pipe.close()


def _hear(worker: _Worker) -> Iterator[Outcome]:
    """The outcomes that are complete among what the worker has said."""
    while not worker.pipe.closed and worker.pipe.poll():
        try:
            word = worker.pipe.recv()
        except EOFError:
            worker.pipe.close()
            return
        if isinstance(word, Exception):
            raise word
        number, outcome, is_complete = word
        worker.since, worker.last = time.monotonic(), None if is_complete else (number, outcome)
        if is_complete:
            yield outcome


def _is_over(worker: _Worker, limits: Limits) -> bool:
    if worker.pipe.closed:
        worker.process.join()
        return True
    if time.monotonic() - worker.since < limits.seconds:
        return False
    worker.process.kill()
    worker.process.join()
    return True
