"""The compilation of one region: analysis, Inductor and the call path, for the region as a whole or for its parts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from cudagraph_backend import torch_internals
from cudagraph_backend.compile.analysis import analyse, complete, shapes_of, unknown_region, unsafe_ops
from cudagraph_backend.compile.capturable import main_device
from cudagraph_backend.compile.cut import Part, Split, split
from cudagraph_backend.compile.graph_log import log_split, logged_change
from cudagraph_backend.compile.inputs import size_inputs
from cudagraph_backend.compile.joined import take_apart
from cudagraph_backend.compile.levels import CannotSplit
from cudagraph_backend.compile.scalars import move_scalars, moving
from cudagraph_backend.debug import Debug
from cudagraph_backend.drivers.platforms import driver_refusal
from cudagraph_backend.errors import OptionError, Refusal, RefusalError, SharedGraphError
from cudagraph_backend.fill import InputName
from cudagraph_backend.options import Options
from cudagraph_backend.region import CutOut, Kind, Region, SizeInput, Wiring
from cudagraph_backend.torch_internals import Compiled, Shapes

log = logging.getLogger("cudagraph_backend")

UNEXPECTED = "an unexpected error, please report it"
_SIZES_REMEMBERED = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class RegionCompile:
    """Compiles one region.

    Attributes:
        number: the region's.
        static: the indices of inputs whose address never changes.
        names: what the user's call names the inputs of the Dynamo graph, in their order.
        debug: whether what passes change in the graph is logged.
        inductor: the keyword arguments of Inductor's compile function.
        replayer: makes the call of a region, from what is known of it and Inductor's code.
        composition: makes the call of a region that runs in parts, from how values go between them and their calls.
        bounds: the largest size by symbol, as far as known, of all that the regions of this frame have seen.
        refusal: why it must not be captured, neither as a whole nor in parts, where the user says so.
        marked: the sizes that the user has marked dynamic.
    """

    number: int
    kind: Kind
    static: Collection[int]
    names: Sequence[InputName]
    options: Options
    debug: Debug
    inductor: Mapping[str, Any]
    replayer: Callable[[Region, Compiled, CutOut | None], Compiled]
    composition: Callable[[Wiring, Sequence[Compiled]], Compiled]
    bounds: dict[Any, int | None]
    refusal: Refusal | None = None
    marked: frozenset[sympy.Symbol] = frozenset()

    def compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Return the call of the region, in place of what Inductor's compile function returns.

        Whatever goes wrong, other than an error raised on purpose, the region is compiled as Inductor alone does.
        """
        graph = copy.deepcopy(gm.graph)  # all that follows changes it
        try:
            return self._compile_to_capture(gm, example_inputs)
        except SharedGraphError:
            raise
        except Exception as error:
            return self._compile_alone(torch_internals.module_of(graph, gm), example_inputs, error)

    def _compile_alone(self, gm: GraphModule, example_inputs: Sequence[Any], error: Exception) -> Any:
        refusal = Refusal(f"{UNEXPECTED}: {type(error).__name__}: {error}")
        region = unknown_region(gm, example_inputs, self.number, self.kind, refusal)
        torch_internals.forget_output_strides()
        compiled = torch_internals.compile_region(gm, example_inputs, **self.inductor)  # an error here is none of ours
        if not torch_internals.is_compiled_graph(compiled):
            return compiled
        if self.options.strict:
            raise RefusalError(f"{region.name} can't be captured: {region.refusal}") from error
        log.debug("%s: %s", region.name, region.refusal, exc_info=error)
        return torch_internals.boxed(self.replayer(region, compiled, None))

    def _compile_to_capture(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        torch_internals.trace_missing_values(gm.graph)
        device = main_device(gm.graph)
        if self._refused_device(device) is not None:
            return self._compile(gm, example_inputs)
        with self._logged("moving scalars", gm):
            moved = move_scalars(gm.graph, device)
        with self._logged("taking joined dims apart", gm):
            joined = take_apart(gm, example_inputs) if self.options.pad != "off" else None
        if not moved and not joined:
            return self._compile(gm, example_inputs)
        changed = moved | (joined.arguments.keys() if joined else frozenset())
        inputs = gm.graph.find_nodes(op="placeholder")
        examples = [inputs[i].meta["val"] if i in changed else example for i, example in enumerate(example_inputs)]
        static = frozenset(self.static) - moved
        indices = [i for i in self.inductor.get("static_input_idxs") or () if i not in moved]
        inductor = {**self.inductor, "static_input_idxs": indices}
        call = dataclasses.replace(self, static=static, inductor=inductor)._compile(gm, examples)
        if moved:
            call = moving(call, moved, device)
        if joined:
            torch_internals.report_as_traced(joined.results)
            call = joined.around(call)
        return torch_internals.boxed(call)

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        cuts = _Cuts(self, gm, example_inputs)
        region = self._analyse(gm, example_inputs, self.static)
        region = cuts.keep_bounds(region)
        if region.refusal is not None and not self.options.strict:
            composition = self._in_parts(gm, example_inputs, region, cuts)
            if composition is not None:
                return cuts.entry(composition)
        compiled = _inductor(gm, example_inputs, region, self.inductor)
        if not torch_internals.is_compiled_graph(compiled):
            return compiled  # nothing is computed: it only hands arguments back
        region = complete(region, compiled)
        if self.options.strict:
            _raise_refusals(region)
        cuts.strides = torch_internals.output_strides(compiled) or ()
        return cuts.entry(self.replayer(region, compiled, cuts.cut_out))

    def _refused_device(self, device: torch.device) -> Refusal | None:
        return self.refusal or driver_refusal(self.options.driver, device)

    def _analyse(
        self, gm: GraphModule, example_inputs: Sequence[Any], static: Collection[int], refusal: Refusal | None = None
    ) -> Region:
        driver = functools.partial(driver_refusal, self.options.driver)
        args = (self.kind, static, self.options, self.number, self.names, driver, self.refusal or refusal, self.marked)
        with self._logged("padding masks", gm):
            return analyse(gm, example_inputs, *args)

    def _logged(self, what: str, gm: GraphModule) -> contextlib.AbstractContextManager[None]:
        """Log what is changed in the graph meanwhile, if that is wanted."""
        return logged_change(f"{what}, {self._name}", gm) if self.debug.graphs else contextlib.nullcontext()

    @property
    def _name(self) -> str:
        return f"region {self.number} ({self.kind})"

    # ---- parts

    def split(self, gm: GraphModule, example_inputs: Sequence[Any], failed: Mapping[str, str]) -> Split | None:
        """Split a region around what can't be captured, or has ``failed`` to be."""
        cut = split(gm, example_inputs, main_device(gm.graph), unsafe_ops(self.options), failed)
        if cut is not None and self.debug.graphs:
            titles = [f"part {number}: {part.refusal or 'captured'}" for number, part in enumerate(cut.parts, start=1)]
            parts = [(title, part.module) for title, part in zip(titles, cut.parts, strict=True)]
            log_split(f"splitting, {self._name}", gm, parts)
        return cut

    def _in_parts(self, gm: GraphModule, example_inputs: Sequence[Any], region: Region, cuts: _Cuts) -> Compiled | None:
        """Compile in parts a region that can't be captured as a whole; return its call, ``None`` if that fails."""
        if self._refused_device(main_device(gm.graph)):
            return None
        try:
            torch_internals.retrace_strides(gm, example_inputs)
            cut = self.split(gm, example_inputs, {})
            return None if cut is None else self.compile_parts(cut, cuts)
        except OptionError:
            raise
        except CannotSplit as error:
            log.info("%s is not captured in parts: %s", region.name, error)
        except Exception as error:  # whatever it is, the region as a whole is still there
            log.warning("%s is not captured in parts: %s: %s", region.name, UNEXPECTED, error)
            log.debug("where that was found", exc_info=True)
        return None

    def compile_parts(self, cut: Split, cuts: _Cuts) -> Compiled:
        # All are analysed before any is compiled: Inductor bounds sizes, which is no promise of the user's.
        regions = [cuts.keep_bounds(self._analyse_part(part)) for part in cut.parts]
        strides: dict[int, Any] = {}
        stated: dict[int, Any] = {}
        done: list[tuple[Region, Compiled]] = []
        for number, (part, region) in enumerate(zip(cut.parts, regions, strict=True), start=1):
            region = dataclasses.replace(region, part=(number, len(cut.parts)))
            done.append((region, self._compile_part(part, region, cut, strides, stated)))
        cuts.keep_strides([stated.get(slot) for slot in cut.wiring.results])
        completed = [(complete(region, compiled), compiled) for region, compiled in done]
        calls = [self.replayer(region, compiled, cuts.cut_out) for region, compiled in completed]
        # Last, as up to here the way back is open.
        torch_internals.report_output_strides([strides.get(slot) for slot in cut.wiring.results])
        return self.composition(cut.wiring, calls)

    def _analyse_part(self, part: Part) -> Region:
        static = frozenset(i for i, slot in enumerate(part.reads) if slot in self.static)
        return self._analyse(part.module, part.examples, static, part.refusal)

    def _compile_part(
        self, part: Part, region: Region, cut: Split, strides: dict[int, Any], stated: dict[int, Any]
    ) -> Compiled:
        """Compile a part with Inductor; ``strides`` get those of its results, for AOTAutograd, ``stated`` as text."""
        static = self.inductor.get("static_input_idxs") or ()
        indices = [i for i, slot in enumerate(part.reads) if slot in static]
        outputs = part.module.graph.output_node().args[0]
        traced = [node.meta["val"] for node in outputs]
        with torch_internals.compiling_a_part() as reported:
            compiled = _inductor(part.module, part.examples, region, {**self.inductor, "static_input_idxs": indices})
        if not torch_internals.is_compiled_graph(compiled):
            raise CannotSplit("a part computes nothing")
        if unbound := torch_internals.unbound_sizes(compiled):
            raise CannotSplit(f"Inductor reads the size {unbound[0]}, which the part does not get")
        texts = torch_internals.output_strides(compiled) or [None] * len(traced)
        for slot, value, stride in zip(part.makes, traced, texts, strict=True):
            if cut.is_read(slot) and not _has_strides(value, stride, region):
                raise CannotSplit(f"Inductor lays out what a part reads with strides {stride}")
        strides.update(zip(part.makes, reported, strict=False))
        stated.update(zip(part.makes, texts, strict=True))
        return compiled


class _Cuts:
    """What it takes to compile a region again, in parts, when the capture of one of its operators has failed.

    Held until something of the region is captured.
    """

    def __init__(self, compile_: RegionCompile, gm: GraphModule, example_inputs: Sequence[Any]):
        self._compile = compile_
        self._module = torch_internals.module_of(copy.deepcopy(gm.graph), gm)  # compiling uses up the other one
        self._examples = example_inputs
        self._compilation = torch_internals.Compilation(compile_.options.inductor)
        self._failed: dict[str, str] = {}
        self._entry: _Entry | None = None
        self.strides: Sequence[Any] | None = None

    def entry(self, call: Compiled) -> _Entry:
        """Return the region's call, which may be exchanged."""
        self._entry = _Entry(call)
        return self._entry

    def keep_bounds(self, region: Region) -> Region:
        """Return the region with the bounds that its sizes had when first seen, as what is compiled adds others."""
        for dim in region.dims:
            for symbol in dim.symbols:
                self._compile.bounds.setdefault(symbol, dim.upper)
        known = [[self._compile.bounds[symbol] for symbol in dim.symbols] for dim in region.dims]
        upper = [min((bound for bound in bounds if bound is not None), default=None) for bounds in known]
        dims = (dataclasses.replace(dim, upper=bound) for dim, bound in zip(region.dims, upper, strict=True))
        return dataclasses.replace(region, dims=tuple(dims))

    def keep_strides(self, strides: Sequence[Any]) -> None:
        """Note the strides of results. Raises ``CannotSplit`` if they changed: what reads them relies on the old."""
        before, self.strides = self.strides, strides
        for old, new in zip(before or (), strides, strict=False):
            if old is not None and new is not None and [*old] != [*new]:
                raise CannotSplit(f"in parts, a result would have strides {new}, not {old}")

    def cut_out(self, name: str, reason: str) -> None:
        """Run the region in parts from the next call on, those around the operator captured, if that can be had."""
        if self._entry is None or name in self._failed:
            return
        self._failed[name] = reason
        try:
            with self._compilation.resumed():
                call = self._compiled_around()
        except Exception as error:  # the region as it is compiled is still there
            # Without references to the call's frames, which hold its arguments.
            log.info("region %d is not captured around %s: %s", self._compile.number, name, repr(error))
            return
        if call is not None:
            self._entry.call = call

    def _compiled_around(self) -> Compiled | None:
        """Compile the region in parts, around all operators that have failed."""
        assert self._entry is not None
        before = self._entry.call
        sizes = size_inputs(self._examples)
        shapes = shapes_of(sizes, self._examples)  # first, as a guard may replace one size by another
        torch_internals.retrace_strides(self._module, self._examples)
        cut = self._compile.split(self._module, self._examples, self._failed)
        if cut is None:
            return None
        call = self._compile.compile_parts(cut, self)
        if not torch_internals.has_lost_guards(self._module.graph):
            return call
        if not shapes.freeze_guards():
            raise CannotSplit("in parts, it would hold for certain sizes only")
        return _where_valid(call, before, sizes, shapes)


def _where_valid(call: Compiled, before: Compiled, sizes: Sequence[SizeInput], shapes: Shapes) -> Compiled:
    """Make a call that is ``call`` for the sizes that it was compiled for, and ``before`` for others.

    Dynamo, whose guards are made by then, lets these through.
    """
    is_valid = functools.lru_cache(_SIZES_REMEMBERED)(shapes.are_guarded)

    def call_where_valid(args: list[Any]) -> Sequence[Any]:
        return (call if is_valid(tuple([size.read(args) for size in sizes])) else before)(args)

    return call_where_valid


class _Entry:
    """The call of a region."""

    def __init__(self, call: Compiled):
        self.call = call
        self._boxed_call = True  # AOTAutograd's mark of what takes one list of arguments, and empties it

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        return self.call(args)


def _has_strides(value: Any, stated: Sequence[str] | None, region: Region) -> bool:
    """Return whether Inductor lays out ``value`` as it was traced, which is what the parts that read it count on.

    It states no strides that depend on data; there its own code, too, counts on those that were traced.
    """
    if not isinstance(value, torch.Tensor):
        return True
    if stated is None:
        return not all(torch_internals.is_backed(torch_internals.expr(step)) for step in value.stride())
    return [*map(region.shapes.parse, stated)] == [*map(torch_internals.expr, value.stride())]


def _inductor(gm: GraphModule, example_inputs: Sequence[Any], region: Region, kwargs: Mapping[str, Any]) -> Any:
    """Compile a region with Inductor; the analysis may have given its graph more inputs than ``example_inputs`` has."""
    inputs = gm.graph.find_nodes(op="placeholder")
    counts = [inputs[count.index].meta["val"] for count in region.counts]
    with torch_internals.without_graph_cache() if region.sizes_from_data else contextlib.nullcontext():
        return torch_internals.compile_region(gm, [*example_inputs, *counts], **kwargs)


def _raise_refusals(region: Region) -> None:
    if region.refusal is not None:
        raise RefusalError(f"{region.name} can't be captured: {region.refusal}")
    for dim in region.dims:
        if dim.refusal is not None:
            raise RefusalError(f"{region.name}: dim {dim.name} can't be padded: {dim.refusal}")
