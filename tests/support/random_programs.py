"""Random programs of few steps over tensors with rows, and whether what the backend says of them is true when run.

``python -m tests.support.random_programs 1000`` tries so many, and lists what it finds.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule, Node
from torch.fx.traceback import annotate, preserve_node_meta

from cudagraph_backend.compile.analysis import analyse
from cudagraph_backend.options import Options
from cudagraph_backend.padding.prove import Verdict
from cudagraph_backend.region import DynamicDim
from tests.support.oracle import Region, dynamic, refutation, refute, traced
from tests.support.random_steps import JUMPS, STEPS, Given, Step, Value

#: A step's name, which earlier values it takes, a dim and a number.
Chosen: TypeAlias = "tuple[str, int, int, int, int]"

#: Shapes of what programs begin with, which of their dims change, and whether the number of edges changes.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "matrix": ((5, 4), (0,), False),
    "rows outside": ((5, 3, 4), (0,), False),
    "rows inside": ((3, 5, 4), (1,), False),
    "rows and edges": ((5, 4), (0,), True),
    "two dims": ((5, 7, 4), (0, 1), False),
}
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Program:
    """What is chosen at random.

    Attributes:
        gradient: of what of the last value the gradients are returned, too, with respect to all that is given.
    """

    steps: tuple[Chosen, ...]
    shape: str
    fill: Literal["replica", "zero"] = "replica"
    dtype: torch.dtype = torch.float64
    gradient: Literal["sum", "mean", "squares"] | None = None

    def __call__(self, x: Value, y: Value, *given: Value) -> list[Value]:
        """Run the steps that fit the shapes they meet; each takes two earlier values, mostly the latest."""
        with torch.set_grad_enabled(self.gradient is not None), preserve_node_meta():
            leaves = [self._leaf(tensor) for tensor in (x, y, *given)]
            result = self._result(leaves)
            return [result * 1, *self._gradients(result, leaves)]

    def _leaf(self, tensor: Value) -> Value:
        is_leaf = self.gradient is not None and tensor.is_floating_point()
        return tensor.detach().requires_grad_() if is_leaf else tensor

    def _result(self, leaves: list[Value]) -> Value:
        values = [leaves[1], leaves[0]]
        inputs = Given(*leaves[2:])
        for name, first, second, dim, number in self.steps:
            if self.dtype != torch.float64 and name in JUMPS:
                continue
            a, b = values[-1 - first // 4 % len(values)], values[-1 - second % len(values)]
            step = Step(inputs, leaves[0].shape, dim % max(a.ndim, 1), number)
            try:
                with annotate({"step": name}):
                    values.append(self._exactly(STEPS[name](a, b, step)))
            except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError, AssertionError):
                continue  # does not fit
        return values[-1]

    def _exactly(self, x: Value) -> Value:
        """Numbers made of integers are of torch's default dtype."""
        return x.to(self.dtype) if x.is_floating_point() else x

    def _gradients(self, result: Value, leaves: list[Value]) -> Iterator[Value]:
        if self.gradient is None or not result.requires_grad:
            return
        total = {"sum": result.sum, "mean": result.mean, "squares": result.square().sum}[self.gradient]()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        yield from (grad for grad in torch.autograd.grad(total, wanted, allow_unused=True) if grad is not None)


steps = st.tuples(st.sampled_from(sorted(STEPS)), *[st.integers(0, 7)] * 2, st.integers(0, 3), st.integers(0, 2))
programs = st.builds(
    Program,
    st.lists(steps, min_size=2, max_size=10).map(tuple),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(["replica", "zero"]),
    st.sampled_from([torch.float64] * 6 + [torch.float32, torch.bfloat16]),
    st.sampled_from([None, None, None, "sum", "mean", "squares"]),
)


UNHURRIED = settings(deadline=None, database=None, suppress_health_check=[*HealthCheck])


def trace(program: Program) -> Region:
    """The region of a program, with the arguments that it reads."""
    arguments = made(program, 5)
    return _read_only(traced(dispatch_functionalize(program), *arguments))


def made(program: Program, rows: int) -> list[Value]:
    """Arguments of so many rows; seven are as many as there may be of anything else."""
    torch.manual_seed(0)
    shape, changing, edges_change = SHAPES[program.shape]
    x, y = torch.randn(2, *[rows if size == 5 else size for size in shape], dtype=torch.float64).to(program.dtype)
    edges = torch.tensor([0, 3, 4, 1, 4, 2, 0])
    given = Given(
        indices=dynamic(torch.randint(0, 3, (rows,))),
        mask=dynamic(torch.rand(rows, 7) > 0.4, 0, 1) if len(changing) > 1 else dynamic(torch.rand(rows) > 0.4),
        counts=dynamic(torch.tensor([1, 2, 0, 3, 1, 0, 0][:rows])),
        offsets=dynamic(torch.tensor([0, 2, 2, 3, 5, 5, 6][:rows])),
        edges=dynamic(edges) if edges_change else edges,
        begins=torch.tensor([0, 1, 3]),
        **{
            name: torch.randn(*size, dtype=torch.float64).to(program.dtype)
            for name, size in {"table": (3, 4), "large": (70, 70), "weight": (4, 4)}.items()
        },
    )
    return [dynamic(x, *changing), dynamic(y, *changing), *(getattr(given, field.name) for field in fields(given))]


def _with_equal_sizes(region: Region, program: Program) -> Region:
    """The region with arguments of as many rows as anything else: only such calls pad linked dims."""
    placeholders = [str(node.target) for node in region.module.graph.find_nodes(op="placeholder")]
    numbers = [int(name.removeprefix("arg").removesuffix("_1")) for name in placeholders]
    arguments = made(program, 7)
    return replace(region, args=tuple(arguments[number] for number in numbers))


def _read_only(region: Region) -> Region:
    """The region without arguments that it does not read."""
    placeholders = region.module.graph.find_nodes(op="placeholder")
    args = [arg for node, arg in zip(placeholders, region.args, strict=True) if node.users]
    for node in placeholders:
        if not node.users:
            region.module.graph.erase_node(node)
    region.module.recompile()
    return replace(region, args=tuple(args))


@dataclass(frozen=True)
class Outcome:
    """What became of a program: what the backend says of its dims, and what is not true of that."""

    region: Region | None
    dims: tuple[DynamicDim, ...] = ()
    problem: str | None = None

    @property
    def kind(self) -> str:
        """In a word."""
        if not self.dims:
            return "unfit"
        if self.problem is not None:
            return "refuted"
        padded = [dim for dim in self.dims if dim.refusal is None]
        if not padded:
            return "refused"
        edited = "edited" if any(dim.masks or dim.forms for dim in padded) else "safe"
        return edited if len(padded) == len(self.dims) else f"{edited} in part"

    @property
    def text(self) -> str:
        """What is wrong, and where."""
        graph = "" if self.region is None else self.region.module.print_readable(print_output=False)
        return f"{self.problem}\n{graph}"

    @property
    def steps(self) -> set[str]:
        """Those that the result depends on."""
        customs = [node.meta.get("custom") or {} for node in self._nodes]
        return {custom["step"] for custom in customs if "step" in custom}

    @property
    def operators(self) -> set[str]:
        """Those in the graph."""
        return {str(node.target) for node in self._nodes if node.op == "call_function"}

    @property
    def _nodes(self) -> Iterable[Node]:
        return () if self.region is None else self.region.module.graph.nodes


def judge(program: Program) -> Outcome:
    """Analyse a program as the backend does, and run it with each dim padded that may be, alone and with all others."""
    try:
        region = trace(program)
    except (RuntimeError, IndexError, AssertionError):
        return Outcome(None)  # shapes are not checked everywhere, and gradients get what does not fit
    if not region.symbols() or not region.runs():  # a step fixed the size; shapes are not checked everywhere
        return Outcome(region)
    edited = GraphModule(region.module, copy.deepcopy(region.module.graph))
    metas = [node.meta["val"] for node in edited.graph.find_nodes(op="placeholder")]
    found = analyse(edited, metas, "inference", (), Options(fill=program.fill), 0)
    safe = [dim for dim in found.dims if dim.refusal is None]
    if any(len(dim.symbols) > 1 for dim in safe):
        region = _with_equal_sizes(region, program)
        if not region.admits(region.sizes()) or not region.runs():
            return Outcome(region)
    counts = tuple(count.symbol for count in found.counts)
    verdicts = [Verdict(dim.symbols, None, dim.needs_fill, edited=edited, counts=counts) for dim in safe]
    if not all(region.buckets(*dim.symbols) for dim in safe):
        return Outcome(region)
    return Outcome(region, found.dims, _problem(region, verdicts, program))


def _problem(region: Region, verdicts: list[Verdict], program: Program) -> str | None:
    tolerance = TOLERANCES[program.dtype]
    try:
        found = [refute(region, verdict, program.fill, tolerance=tolerance) for verdict in verdicts]
        if len(verdicts) > 1:
            found.append(_refuted_together(region, verdicts, program.fill, tolerance))
    except (RuntimeError, IndexError) as error:
        return f"raises {error}"
    return next(filter(None, found), None)


def _refuted_together(region: Region, verdicts: list[Verdict], fill: Any, tolerance: float) -> str | None:
    sizes = {symbol: bucket for one, bucket in zip(verdicts, (20, 13), strict=True) for symbol in one.symbols}
    if not region.admits(region.sizes() | sizes):
        return None
    return refutation(region, verdicts[0], sizes, fill, tolerance)


def smallest(program: Program, fails: Callable[[Program], object]) -> Program:
    """The program with as few steps as still fail."""
    for left_out in range(len(program.steps)):
        fewer = replace(program, steps=program.steps[:left_out] + program.steps[left_out + 1 :])
        if fails(fewer):
            return smallest(fewer, fails)
    return program


def is_wrong(program: Program) -> str | None:
    """What is wrong with the verdict on a program, a crash of the analysis, too; None if all is well."""
    try:
        return judge(program).problem
    except Exception as error:
        return f"crashes: {type(error).__name__}: {error}"


def main(count: int) -> None:
    """Try ``count`` programs, print the smallest forms of those that fail, and at last what was met."""
    kinds: Counter[str] = Counter()
    padded: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    @settings(UNHURRIED, max_examples=count, phases=[Phase.generate])
    @given(programs)
    def each(program: Program) -> None:
        try:
            outcome = judge(program)
        except Exception as error:
            kinds["crashed"] += 1
            print(f"CRASH {type(error).__name__}: {error!s:.200}\n  {smallest(program, is_wrong)}", flush=True)
            return
        kinds[outcome.kind] += 1
        if outcome.kind == "refuted":
            print(f"REFUTED {outcome.problem!s:.400}\n  {smallest(program, is_wrong)}", flush=True)
        met = padded if outcome.kind in ("safe", "edited") else refused
        met.update(outcome.steps | outcome.operators)
        if sum(kinds.values()) % 250 == 0:
            print(sum(kinds.values()), dict(kinds), flush=True)

    torch.set_num_threads(1)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it tells what does not fit
    each()
    print(dict(kinds))
    print("steps never padded:", sorted(STEPS.keys() - padded.keys()))
    print("operators padded:", sorted(name for name in padded if name not in STEPS))
    print("operators never padded:", sorted(name for name in refused.keys() - padded.keys() if name not in STEPS))


if __name__ == "__main__":
    main(int(sys.argv[1]))
