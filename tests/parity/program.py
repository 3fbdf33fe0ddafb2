"""The record of a small program, and how its calls become values to compare.

A program is a function of a device that gives a *flow*: a generator of everything that must equal eager's, made from
calls of what it compiles. The flow compiles through the function that it is given, so one flow serves eager, stock and
sharedgraph alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Flow = Callable[[Compile], Iterator[Any]]

SIZES = (4, 7)
#: Stock warms a size up at its first call, records at the second and replays from the third on.
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Program:
    """A behaviour of CUDA graph trees, as a program of a few lines.

    Attributes:
        name: of the function that makes it, in words.
        kind: the heading in the table.
        what: the behaviour, in one line.
        make: gives the flow, for a device; random numbers were seeded before.
        leaves: of each reason for which a part of it has to run uncaptured, or of the operator, a piece. Everything
            else is to be captured.
        captures: false for a program of which nothing can be captured.
        needs_cuda: why it says nothing on a CPU; empty if it runs there too.
        draws: whether random numbers are part of the values: then the backends draw as eager does.
        inductor, dynamo: settings; those that a release of torch does not have are left out.
        tolerance: of the values, relative and absolute.
        around: what is there while it runs, in every way, until all graphs are gone.
    """

    name: str
    kind: str
    what: str
    make: Callable[[torch.device], Flow]
    leaves: tuple[str, ...] = ()
    captures: bool = True
    needs_cuda: str = ""
    draws: bool = False
    inductor: dict[str, Any] = field(default_factory=dict)
    dynamo: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4
    around: Callable[[torch.device], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def expected(self) -> str:
        """How much of it is to be captured."""
        return verdict(self.captures, bool(self.leaves))


def verdict(any_graph: bool, any_uncaptured: bool) -> str:
    if not any_graph:
        return "no"
    return "partly" if any_uncaptured else "captured"


class Section:
    """Programs under one heading, in the order in which they are written."""

    def __init__(self, kind: str):
        self.kind = kind
        self.programs: list[Program] = []

    def program(self, **settings: Any) -> Callable[[Callable[[torch.device], Flow]], Callable[[torch.device], Flow]]:
        """Takes the decorated function as a program; its name and docstring are the program's."""

        def take(make: Callable[[torch.device], Flow]) -> Callable[[torch.device], Flow]:
            name, what = make.__name__.replace("_", " ").strip(), (make.__doc__ or "").rstrip(".")
            self.programs.append(Program(name, self.kind, what, make, **settings))
            return make

        return take


def calls(
    function: Callable[..., Any],
    arguments: Callable[[int], Sequence[Any]],
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
    training: bool = False,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Flow:
    """Calls a function with fresh arguments of each size, several times.

    Compared are the results, in training the gradients of arguments and parameters, and what the call made of the
    arguments and of a module's state.
    """

    def flow(compile: Compile) -> Iterator[Any]:
        compiled = compile(function)
        for seed, size in enumerate(size for size in sizes for _ in range(repeats)):
            torch.manual_seed(seed)
            given = arguments(size)
            with torch.set_grad_enabled(training), context():
                results = compiled(*given)
            yield copied(results)
            if training:
                yield from gradients(results, [*tensors(given), *parameters(function)])
            yield copied(given)
            del given, results  # an output that is alive costs a copy or a second graph
        yield copied(function.state_dict()) if isinstance(function, nn.Module) else None

    return flow


def gradients(results: Any, leaves: Sequence[torch.Tensor]) -> Iterator[Any]:
    """The gradients of ``leaves`` after the backward of a sum over all results, weighted; they are taken away."""
    differentiable = [out for out in tensors(results) if out.requires_grad]
    total = sum(_weighted(out) for out in differentiable)
    assert isinstance(total, torch.Tensor), "nothing to differentiate"
    total.backward()
    yield [copied(leaf.grad) for leaf in leaves if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None


def _weighted(out: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return (out.float() * weights).sum()


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def parameters(function: Callable[..., Any]) -> list[torch.Tensor]:
    return list(function.parameters()) if isinstance(function, nn.Module) else []


def copied(tree: Any) -> Any:
    """Values as they are now: the next call may write to the memory that they are in."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), tree)


def randn(*shape: int, device: torch.device, grad: bool = False) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(shape).to(device).requires_grad_(grad)


def fixed(*shape: int, device: torch.device) -> torch.Tensor:
    """As ``randn``, for what does not change from call to call: the same numbers always."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(7)) / 2).to(device)


def linear(device: torch.device, inputs: int = 8, outputs: int = 8) -> nn.Linear:
    return nn.Linear(inputs, outputs).to(device)  # made on the CPU: the same weights on every device
