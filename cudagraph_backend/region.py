"""What is known of one region at compile time: frozen records, made by ``compile/``, read by ``runtime/``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import sympy
import torch

from cudagraph_backend.errors import Refusal
from cudagraph_backend.fill import Fill, InputName
from cudagraph_backend.torch_internals import Shapes, is_backed

Kind = Literal["inference", "forward", "backward"]
Role = Literal["static", "staged"]
Values = Mapping[sympy.Symbol, int]
CutOut: TypeAlias = "Callable[[str, str], None]"
"""Told the name of an operator whose capture failed, and why, lets later calls be captured around it."""


def evaluate(expression: sympy.Expr, values: Values) -> int:
    """Return a size for given values of the region's symbols."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    return int(expression.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()}))


def evaluate_all(expressions: Sequence[sympy.Expr], values: Values) -> tuple[int, ...]:
    return tuple(evaluate(e, values) for e in expressions)


@dataclass(frozen=True, slots=True)
class TensorInput:
    """A tensor argument of the region.

    A *static* input keeps its address (parameter, buffer, ``mark_static_address``); any other one is *staged*: copied
    into a buffer of ours before replay. Sizes and strides are in elements, over the region's symbols. ``name`` is the
    graph's; ``given`` is the name that the user's call has for it, if it is a tensor of that call. ``fill`` is what its
    padded rows hold.
    """

    index: int
    name: str
    role: Role
    mutated: bool
    dtype: torch.dtype
    size: tuple[sympy.Expr, ...]
    stride: tuple[sympy.Expr, ...]
    given: InputName | None = None
    fill: Fill = "replica"

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        return frozenset().union(*(e.free_symbols for e in (*self.size, *self.stride)))


@dataclass(frozen=True, slots=True)
class SizeInput:
    """Where a call's value of a size is found: an int argument, or (``dim``) a dim of a tensor argument."""

    index: int
    dim: int | None
    size: sympy.Expr

    def read(self, args: Sequence[Any]) -> int:
        value = args[self.index]
        return value if self.dim is None else value.size(self.dim)


@dataclass(frozen=True, slots=True)
class CountInput:
    """An argument that the analysis added: the number of real rows of a dim, which the graph computes with.

    ``index`` is its place, behind the arguments that the region is called with.
    """

    index: int
    name: str
    symbol: sympy.Symbol

    def make(self, values: Values, device: torch.device) -> torch.Tensor:
        """Return the argument for a call, an int64 tensor without dims."""
        return torch.full((), values[self.symbol], dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True)
class DynamicDim:
    """One dynamic dim of a region: symbols that are padded together, and what was decided about padding them.

    ``refusal`` is why the dim isn't padded (each of its sizes gets a graph of its own then). ``needs_fill`` says
    whether the proof relies on what padded rows hold, ``masks`` how many were put into the graph for it, and ``forms``
    which operators were written in another form there. ``to_probe``
    is why there is no proof, for a dim that is padded where the probe sees nothing against it (``pad="probe"``).
    """

    symbols: frozenset[sympy.Symbol]
    upper: int | None
    refusal: Refusal | None
    needs_fill: bool
    masks: int = 0
    forms: tuple[str, ...] = ()
    to_probe: Refusal | None = None

    @property
    def name(self) -> str:
        return "=".join(sorted(map(str, self.symbols)))


@dataclass(frozen=True, slots=True)
class TensorOutput:
    """A tensor that the region returns.

    ``stride`` is ``None`` where Inductor does not state it beforehand. ``argument`` is the index of an argument that is
    handed back. What is not ``visible`` is saved for the backward, out of the caller's reach: its rows may have the
    strides of a bucket.
    """

    dtype: torch.dtype
    size: tuple[sympy.Expr, ...]
    stride: tuple[sympy.Expr, ...] | None
    source: str | None
    argument: int | None = None
    visible: bool = True


@dataclass(frozen=True, slots=True)
class ArgumentOutput:
    """An argument that is neither a tensor nor a number (a process group, the lengths of a jagged dim), handed back."""

    argument: int


Output: TypeAlias = "TensorOutput | ArgumentOutput | sympy.Expr | None"
"""What a region returns: a tensor, an argument, a size, or ``None``."""


@dataclass(frozen=True, slots=True)
class Region:
    """One graph handed over by AOTAutograd and compiled by Inductor.

    ``objects`` are the indices of arguments that are neither tensors nor sizes and that operators read (generators of
    random numbers, process groups): a graph is good for the objects that it was captured with. ``refusal`` is why
    the region can't be captured at all. ``has_effects``: running it twice is not the same as running it once.
    ``effect``: one that can't be put back, as communication with other processes, so that no trial run is made.
    ``may_draw``: it draws random numbers, or has operators of which that is not known. ``takes_extremes``: NaN and
    large floats can't become an index. ``precision``: the largest machine epsilon among its values. ``part``: which
    part of what AOTAutograd handed over it is, and of how many, if it is not all of it.
    """

    number: int
    kind: Kind
    device: torch.device
    inputs: tuple[TensorInput, ...]
    sizes: tuple[SizeInput, ...]
    dims: tuple[DynamicDim, ...]
    counts: tuple[CountInput, ...]
    outputs: tuple[Output, ...]
    shapes: Shapes
    refusal: Refusal | None
    has_effects: bool
    source_lines: tuple[str, ...]
    effect: Refusal | None = None
    may_draw: bool = True
    takes_extremes: bool = True
    precision: float = torch.finfo(torch.float32).eps
    part: tuple[int, int] | None = None
    objects: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        whole = f"region {self.number} ({self.kind})"
        return whole if self.part is None else "{}, part {} of {}".format(whole, *self.part)

    @property
    def static(self) -> list[int]:
        """Indices of the static inputs."""
        return [i.index for i in self.inputs if i.role == "static"]

    @property
    def staged(self) -> list[TensorInput]:
        return [i for i in self.inputs if i.role == "staged"]

    @property
    def sizes_from_data(self) -> bool:
        """Whether some of the sizes are known only at a call (``u0``): results of other parts have them."""
        return any(not is_backed(s.size) for s in self.sizes)

    def values(self, sizes: Sequence[int]) -> dict[sympy.Symbol, int]:
        """Return the symbols' values for the sizes of a call (in the order of ``self.sizes``)."""
        return {s.size: n for s, n in zip(self.sizes, sizes, strict=True) if isinstance(s.size, sympy.Symbol)}


@dataclass(frozen=True, slots=True)
class Wiring:
    """How the values of a region go between its parts, in the order in which these run.

    Values are numbered: the region's arguments, then ``sizes``, which are read from them, then ``constants`` (numbers
    and ``None`` among the outputs), then what the parts make. ``reads`` and ``makes`` have, per part, the numbers of
    what it takes and returns; ``results`` are those of the region's outputs.
    """

    sizes: tuple[SizeInput, ...]
    constants: tuple[Any, ...]
    reads: tuple[tuple[int, ...], ...]
    makes: tuple[tuple[int, ...], ...]
    results: tuple[int, ...]
