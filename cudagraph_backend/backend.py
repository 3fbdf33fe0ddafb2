"""The ``torch.compile`` entry: composes the compile path, and owns the process's devices and regions."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cudagraph_backend import torch_internals
from cudagraph_backend.compile.joined import save_apart
from cudagraph_backend.compile.outputs import mark_saved
from cudagraph_backend.compile.region_compile import RegionCompile
from cudagraph_backend.debug import ENVIRONMENT as DEBUG_ENVIRONMENT
from cudagraph_backend.debug import Debug, debug_of
from cudagraph_backend.drivers.platforms import forks
from cudagraph_backend.errors import Refusal
from cudagraph_backend.fill import InputName
from cudagraph_backend.options import ENVIRONMENT, Options, checked_options, merged_options, options_of
from cudagraph_backend.region import CutOut, Kind, Region
from cudagraph_backend.runtime.composition import Composition
from cudagraph_backend.runtime.devices import Device, Devices
from cudagraph_backend.runtime.planner import ChosenSizes
from cudagraph_backend.runtime.replayer import Rehearsal, Replayer
from cudagraph_backend.torch_internals import Compiled

_GRAPHS_OFF = Refusal("CUDA graphs are off for this function (override_cudagraphs)")


class Backend:
    """``torch.compile(model, backend="sharedgraph", options={...})``; see ``Options``.

    One instance serves the process. Nothing is created on a device before a region runs there.
    """

    __name__ = "sharedgraph"
    compiler_name = "sharedgraph"

    def __init__(self) -> None:
        self._devices = Devices()
        self._replayers: weakref.WeakSet[Replayer] = weakref.WeakSet()
        self._numbers = itertools.count()  # never starts anew: a region's name stays its own
        self._configured: dict[str, Any] = {}
        self._watches_forks = False
        self._inherited: list[Any] = []
        self.rehearsing = Rehearsal()

    def __call__(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one Dynamo graph.

        The environment variables ``SHAREDGRAPH_OPTIONS`` and ``SHAREDGRAPH_DEBUG`` are read here, at each compilation.

        Raises:
            OptionError: a bad option or ``mode``.
            RefusalError: with ``strict``, if a region can't be captured or one of its dims can't be padded.
        """
        parsed = options_of(options, mode, self._configured, os.environ.get(ENVIRONMENT))
        debug = debug_of(os.environ.get(DEBUG_ENVIRONMENT))
        names = tuple(InputName.of(source) for source in torch_internals.input_sources(gm))
        without_graphs = _kinds_without_graphs(*torch_internals.take_graph_override(gm))
        if parsed.pad != "off":
            torch_internals.unify_factors(gm)
        frame = _FrameCompile(self, parsed, debug, names, without_graphs, torch_internals.marked_sizes(gm))
        return torch_internals.compile_regions(
            gm, example_inputs, frame.compile_region, frame.save, dict(parsed.inductor)
        )

    def configure(self, **options: Any) -> dict[str, Any]:
        """Set options that hold where a compilation does not give them; returns all that are set so."""
        self._configured = merged_options((self._configured, checked_options(options)))
        return copy.deepcopy(self._configured)

    def unconfigure(self) -> None:
        """Forget all that ``configure`` has set."""
        self._configured = {}

    def regions(self) -> list[Replayer]:
        """Return the regions that were compiled or called since the last reset, in the order of compilation."""
        return sorted(self._replayers, key=lambda replayer: (replayer.region.number, replayer.region.part or ()))

    def register(self, replayer: Replayer) -> None:
        self._watch_forks()
        self._replayers.add(replayer)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[list[Replayer]]:
        """Let what is called meanwhile compile and run, but capture and count nothing; yields the regions called."""
        called: list[Replayer] = []
        self.rehearsing.called = called
        try:
            yield called
        finally:
            self.rehearsing.called = None

    def next_number(self) -> int:
        return next(self._numbers)

    def devices(self) -> dict[torch.device, Device]:
        return self._devices.alive()

    def device(self, device: torch.device) -> Device:
        """Return the device's driver and pool, made at the first use."""
        self._watch_forks()
        return self._devices.at(device)

    def reset(self) -> None:
        """Free all graphs, buffers and pools. Outputs stay valid; compiled functions capture anew when called.

        Steps are counted as in a new process, too: marks that were made before don't count. What ``configure`` has set
        stays.
        """
        self._devices.clear()  # first: devices go with the last region that uses them
        for replayer in self.regions():
            replayer.reset()
        self._replayers.clear()
        torch_internals.forget_marked_steps()

    # ---- copies, and forks

    def __reduce__(self) -> str:
        """Return the name by which the backend is copied and pickled, as the one that serves the process."""
        return "sharedgraph"

    def _watch_forks(self) -> None:
        if not self._watches_forks:
            self._watches_forks = True
            os.register_at_fork(after_in_child=functools.partial(_begin_in_child, weakref.ref(self)))

    def begin_in_child(self) -> None:
        """Let a forked child start anew, with locks, pools and graphs of its own.

        A thread that the child does not have may have been in a call: it holds the lock for ever, and has left pool and
        tree as they were at that moment. Nothing of these is changed or awaited here: this thread may have forked
        within a call, and finishes it on what it has. Outputs keep their memory, of which the child has a private copy.
        """
        replayers, self._replayers = list(self._replayers), weakref.WeakSet()
        # What the child must not free.
        self._inherited += [r.state for r in replayers if r.state is not None and not forks(r.region.device)]
        self._devices = Devices()
        self.rehearsing.called = None
        for replayer in replayers:
            replayer.reset()


@dataclasses.dataclass(slots=True)
class _FrameCompile:
    """The compilation of one Dynamo graph: its forward (or inference) region, and later its backward region."""

    backend: Backend
    options: Options
    debug: Debug
    names: tuple[InputName, ...]
    without_graphs: frozenset[Kind]
    marked: frozenset[Any] = frozenset()
    _static_names: frozenset[str] = frozenset()
    _bounds: dict[Any, int | None] = dataclasses.field(default_factory=dict)
    _chosen: ChosenSizes = dataclasses.field(default_factory=ChosenSizes)

    def save(self, forward: torch.fx.GraphModule, backward: torch.fx.GraphModule, returned: int) -> None:
        """Let a forward save, behind what is ``returned``, what its backward can read where it lies."""
        save_apart(forward, backward, returned)
        mark_saved(forward.graph, returned)

    def compile_region(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        """Analyse a region, let Inductor compile it, and wrap the result. Passed to ``compile_fx`` as inner compile."""
        kind: Kind = "inference" if kwargs.get("is_inference") else "forward"
        if kwargs.get("is_backward"):
            kind = "backward"
        return RegionCompile(
            number=self.backend.next_number(),
            kind=kind,
            static=self._static_inputs(gm.graph, kind, kwargs.get("static_input_idxs") or ()),
            names=self.names,
            options=self.options,
            debug=self.debug,
            inductor=kwargs,
            replayer=self._replayer,
            composition=Composition,
            bounds=self._bounds,
            refusal=_GRAPHS_OFF if kind in self.without_graphs else None,
            marked=self.marked,
        ).compile(gm, example_inputs)

    def _replayer(self, region: Region, compiled: Compiled, cut_out: CutOut | None = None) -> Replayer:
        backend = self.backend
        return Replayer(
            region,
            compiled,
            self.options,
            self.debug,
            backend.register,
            backend.device,
            backend.rehearsing,
            self._chosen,
            cut_out,
        )

    def _static_inputs(self, graph: torch.fx.Graph, kind: Kind, indices: Sequence[int]) -> frozenset[int]:
        """Return the indices of the inputs whose address never changes.

        For a backward, AOTAutograd reports everything saved by the forward; only the forward's own static inputs
        among it (known by name) are certain to stay where they are.
        """
        names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
        if kind != "backward":
            self._static_names = frozenset(names[i] for i in indices)
            return frozenset(indices)
        return frozenset(i for i, name in enumerate(names) if name in self._static_names)


def _begin_in_child(backend: weakref.ref[Backend]) -> None:
    """Let the backend start anew in a forked child, if it is alive; being registered for that does not keep it so."""
    alive = backend()
    if alive is not None:
        alive.begin_in_child()


def _kinds_without_graphs(fwd: bool | None, bwd: bool | None) -> frozenset[Kind]:
    """Return the kinds of regions that the user's ``override_cudagraphs`` turns graphs off for.

    As stock does, a backward follows its forward where nothing is said of it.
    """
    off: set[Kind] = {"inference", "forward"} if fwd is False else set()
    if bwd is False or (bwd is None and fwd is False):
        off.add("backward")
    return frozenset(off)


sharedgraph = Backend()
# Not later: a function's precompiled code is looked up before any of it comes here.
torch_internals.keep_precompiled_code_apart(sharedgraph)
