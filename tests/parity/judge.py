"""Runs a program as eager, stock and sharedgraph, and says what each captured and whether the values are eager's."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_flatten

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph
from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.torch_internals import stock_graph_count
from tests.parity.program import Compile, Program, verdict


@dataclass(frozen=True, slots=True)
class Side:
    """What one of the two did.

    Attributes:
        graphs: that it holds after the last call.
        partitions: into which stock cut its regions; 0 where none was cut.
        skips: stock's own count of what it skipped.
        uncaptured: of ours, what ran uncaptured, and why.
        problem: the first value that is not eager's, or the exception.
    """

    graphs: int = 0
    partitions: int = 0
    skips: int = 0
    uncaptured: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def verdict(self) -> str:
        return verdict(self.graphs > 0, bool(self.uncaptured))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found of a program.

    Attributes:
        unexpected: what ran uncaptured in ours though the program doesn't leave it.
        left_out: why it was not run; empty if it was.
        stock: ``None`` where stock captures nothing: on a CPU.
    """

    name: str
    kind: str
    what: str
    expected: str
    unexpected: tuple[str, ...] = ()
    left_out: str = ""
    stock: Side | None = None
    ours: Side | None = None

    @property
    def wrong(self) -> bool:
        """Whether ours gives another value than eager, or an exception."""
        return self.ours is not None and self.ours.problem is not None

    @property
    def surprise(self) -> bool:
        """Whether ours captures less, or more, than the program says."""
        return self.ours is not None and (self.ours.verdict != self.expected or bool(self.unexpected))

    @property
    def missed(self) -> bool:
        """Whether stock records graphs where ours has none, or leaves something uncaptured that it should not."""
        if self.stock is None or self.ours is None or self.stock.graphs == 0:
            return False
        return self.ours.graphs == 0 or bool(self.unexpected)

    @property
    def failed(self) -> bool:
        """Whether the check fails. On a CPU, where stock is no measure, what the program says is."""
        return self.wrong or self.missed or (self.stock is None and self.surprise)


def prepare() -> None:
    """Makes a process ready to judge: quiet, with one thread, full precision, and poison on a CPU."""
    logging.disable(logging.CRITICAL)  # what is refused is counted, not logged
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    HostDriver.poison = True


def judge(program: Program, device: torch.device, lost: str = "") -> Outcome:
    """Run a program in every way that there is on ``device``; without stock, if that has ``lost`` a process before."""
    outcome: dict[str, Any] = {
        "name": program.name,
        "kind": program.kind,
        "what": program.what,
        "expected": program.expected,
    }
    if device.type != "cuda" and program.needs_cuda:
        return Outcome(**outcome, left_out=f"needs a GPU: {program.needs_cuda}")
    try:
        with _settings(program, device), program.around(device):
            right = [_values(program, device, lambda function: function)]
            if program.draws and device.type == "cuda":
                right.append(_inductors(program, device))
            stock = Side(problem=lost) if lost else None
            if device.type == "cuda" and not lost:
                stock = _stock(program, device, right)
            ours = _ours(program, device, right)
    except Exception as error:
        return Outcome(**outcome, ours=Side(problem=f"in eager: {_text(error)}"))
    unexpected = tuple(what for what in ours.uncaptured if not any(piece in what for piece in program.leaves))
    return Outcome(**outcome, unexpected=unexpected, stock=stock, ours=ours)


def _inductors(program: Program, device: torch.device) -> list[Any]:
    """The values of Inductor alone, which may draw the same random numbers in another order than eager."""
    with _alone():
        return _values(program, device, torch.compile)


def _ours(program: Program, device: torch.device, right: Sequence[list[Any]]) -> Side:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend="sharedgraph", options={"capture": "always"})

    with _alone():
        problem, _kept = _run(program, device, compile, right)
        return Side(graphs=sg.stats().graphs, uncaptured=_uncaptured(), problem=problem)


def _uncaptured() -> tuple[str, ...]:
    """Each reason for which ours ran something uncaptured, with the operator where that is the whole region's."""
    found: dict[str, None] = {}
    for replayer in sharedgraph.regions():
        refusal = replayer.region.refusal
        for reason in replayer.counters.fallbacks:
            operator = f" ({refusal.op})" if refusal is not None and refusal.reason == reason and refusal.op else ""
            found[f"{reason}{operator}"] = None
    return tuple(found)


def _stock(program: Program, device: torch.device, right: Sequence[list[Any]]) -> Side:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, mode="reduce-overhead")

    with _alone():
        problem, _kept = _run(program, device, compile, right)
        counted = counters["inductor"]
        return Side(
            graphs=stock_graph_count(device),
            partitions=counted["cudagraph_partitions"],
            skips=counted["cudagraph_skips"],
            problem=problem,
        )


def _run(
    program: Program, device: torch.device, compile: Compile, right: Sequence[list[Any]]
) -> tuple[str | None, list[Callable[..., Any]]]:
    """The first problem, and what was compiled: graphs are there as long as that is.

    There is none if the values are some of the ``right`` ones; else it is told beside the first of these, eager's.
    """
    kept: list[Callable[..., Any]] = []

    def compile_and_keep(function: Callable[..., Any]) -> Callable[..., Any]:
        kept.append(compile(function))
        return kept[-1]

    try:
        values = _values(program, device, compile_and_keep)
        problems = [difference(values, expected, program.tolerance) for expected in right]
        return None if None in problems else problems[0], kept
    except Exception as error:
        return _text(error), kept


def _values(program: Program, device: torch.device, compile: Compile) -> list[Any]:
    torch.manual_seed(0)
    return list(program.make(device)(compile))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nothing compiled before is there in here, and nothing of it after."""
    torch._dynamo.reset()
    counters.clear()
    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        gc.collect()


@contextlib.contextmanager
def _settings(program: Program, device: torch.device) -> Iterator[None]:
    """What a program wants, and that everything is compiled here and now: stock counts partitions as it compiles.

    On a CPU Inductor calls ATen's kernels where it can, as generated ones take seconds to compile: the graph that is
    analysed and captured is the same.
    """
    inductor = {"fx_graph_cache": False, "compile_threads": 1, "fallback_random": program.draws}
    inductor |= {"fallback_by_default": device.type == "cpu"} | program.inductor
    with (
        warnings.catch_warnings(),
        _patched(torch._inductor.config, inductor),
        _patched(torch._functorch.config, {"enable_autograd_cache": False}),
        _patched(torch._dynamo.config, program.dynamo),
    ):
        warnings.simplefilter("ignore")
        yield


def _patched(config: Any, settings: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    return config.patch({name: value for name, value in settings.items() if hasattr(config, name)})


def difference(got: Any, expected: Any, tolerance: float) -> str | None:
    """Where the first of two trees is not like the second; ``None`` if they are alike."""
    ours, our_spec = tree_flatten(got)
    others, other_spec = tree_flatten(expected)
    if our_spec != other_spec:
        return "results of another structure"
    return next((d for a, b in zip(ours, others, strict=True) if (d := _unlike(a, b, tolerance))), None)


def _unlike(got: Any, expected: Any, tolerance: float) -> str | None:
    if not isinstance(expected, torch.Tensor):
        same = abs(got - expected) <= tolerance if isinstance(expected, float) else got == expected
        return None if same else f"{got!r} instead of {expected!r}"
    if got.device.type == expected.device.type == "meta":
        return None if got.shape == expected.shape else f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    try:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError as error:
        return _text(error)
    return None


def _text(error: BaseException) -> str:
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]
