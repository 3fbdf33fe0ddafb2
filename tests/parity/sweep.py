"""Judges many programs, each in a process of its own: one that crashes or hangs costs its own row only."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tests.parity.judge import Outcome, Side, judge, prepare
from tests.parity.program import Program

SECONDS = 150.0  # for one program; most take ten, half of it to start on a GPU


@dataclass(frozen=True, slots=True)
class _Worker:
    program: Program
    process: Any
    pipe: Connection
    started: float
    lost: str = ""
    """What became of a first process, in which stock ran too; empty in that one."""


def sweep(programs: Sequence[Program], device: torch.device, jobs: int, seconds: float = SECONDS) -> Iterator[Outcome]:
    """The outcomes, as they come.

    The processes come from a fork server, which has imported torch and never touched the GPU: a fork of a process that
    has can't use it.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else an import may start CUDA in the server
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else an import starts threads there
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parity.catalogue", "tests.parity.judge"])
    waiting = list(programs)  # taken from the end, where those are that compile for longest
    working: dict[Connection, _Worker] = {}
    ended: list[Any] = []
    while waiting or working:
        while waiting and len(working) < jobs:
            worker = _start(context, waiting.pop(), device)
            working[worker.pipe] = worker
        done = {pipe for pipe in wait(list(working), timeout=1.0) if isinstance(pipe, Connection)}
        done |= {pipe for pipe, worker in working.items() if time.monotonic() - worker.started > seconds}
        for pipe in done:
            worker = working.pop(pipe)
            ended.append(worker.process)
            outcome, lost = _heard(worker, seconds)
            if lost and device.type == "cuda" and not worker.lost:  # by whom? Ours is tried alone
                again = _start(context, worker.program, device, lost)
                working[again.pipe] = again
            else:
                yield outcome
    for process in ended:
        process.join(timeout=10)  # an end takes a while on a GPU, so nothing waited for it before
        process.kill()


def _start(context: Any, program: Program, device: torch.device, lost: str = "") -> _Worker:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(program, device, theirs, lost), daemon=True)
    process.start()
    theirs.close()
    return _Worker(program, process, ours, time.monotonic(), lost)


def _work(program: Program, device: torch.device, pipe: Connection, lost: str) -> None:
    """What makes a program is a function of a module, and is sent by its name."""
    prepare()
    pipe.send(judge(program, device, lost))


def _heard(worker: _Worker, seconds: float) -> tuple[Outcome, str]:
    """What a worker said, or that it said nothing, and what became of it then."""
    program, problem = worker.program, f"no answer within {seconds:.0f} s"
    try:
        if worker.pipe.poll():
            return worker.pipe.recv(), ""
    except EOFError:
        worker.process.join()
        problem = f"the process ended: {worker.process.exitcode}"
    finally:
        worker.pipe.close()
    worker.process.kill()
    return Outcome(program.name, program.kind, program.what, program.expected, ours=Side(problem=problem)), problem
