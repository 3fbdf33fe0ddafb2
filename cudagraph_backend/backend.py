"""The ``torch.compile`` entry: composes the compile path, and owns the process's devices and regions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cudagraph_backend import torch_internals
from cudagraph_backend.compiling import RegionCompile
from cudagraph_backend.devices import Device, Devices
from cudagraph_backend.errors import OptionError
from cudagraph_backend.fill import InputName
from cudagraph_backend.options import Options, parse_options
from cudagraph_backend.region import Kind, Region
from cudagraph_backend.replay import CutOut, Replayer
from cudagraph_backend.torch_internals import Compiled


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

    def __call__(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one Dynamo graph.

        Raises:
            OptionError: a bad option, or a ``mode`` (Inductor's settings go into ``options={"inductor": {...}}``).
            RefusalError: with ``strict``, if a region can't be captured or one of its dims can't be padded.
        """
        if mode is not None:
            raise OptionError(f"mode: got {mode!r}; accepted is none: use options={{'inductor': {{...}}}} instead")
        names = tuple(InputName.of(source) for source in torch_internals.input_sources(gm))
        frame = _FrameCompile(self, parse_options(options), names)
        return torch_internals.compile_regions(gm, example_inputs, frame.compile_region, dict(frame.options.inductor))

    def regions(self) -> list[Replayer]:
        """The regions that were compiled or called since the last reset, in the order of compilation."""
        return sorted(self._replayers, key=lambda replayer: (replayer.region.number, replayer.region.part or ()))

    def register(self, replayer: Replayer) -> None:
        self._replayers.add(replayer)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[list[Replayer]]:
        """What is called meanwhile is compiled, and runs, but captures and counts nothing; gives the regions called."""
        called: list[Replayer] = []
        Replayer.rehearsed = called
        try:
            yield called
        finally:
            Replayer.rehearsed = None

    def next_number(self) -> int:
        return next(self._numbers)

    def devices(self) -> dict[torch.device, Device]:
        return self._devices.alive()

    def device(self, device: torch.device) -> Device:
        """The device's driver and pool, made at the first use."""
        return self._devices.at(device)

    def reset(self) -> None:
        """Free all graphs, buffers and pools. Outputs stay valid; compiled functions capture anew when called."""
        self._devices.clear()  # first: devices go with the last region that uses them
        for replayer in self.regions():
            replayer.reset()
        self._replayers.clear()


@dataclasses.dataclass(slots=True)
class _FrameCompile:
    """The compilation of one Dynamo graph: its forward (or inference) region, and later its backward region."""

    backend: Backend
    options: Options
    names: tuple[InputName, ...]
    _static_names: frozenset[str] = frozenset()

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
            inductor=kwargs,
            replayer=self._replayer,
        ).compile(gm, example_inputs)

    def _replayer(self, region: Region, compiled: Compiled, cut_out: CutOut | None = None) -> Replayer:
        return Replayer(region, compiled, self.options, self.backend.register, self.backend.device, cut_out)

    def _static_inputs(self, graph: torch.fx.Graph, kind: Kind, indices: Sequence[int]) -> frozenset[int]:
        """Indices of the inputs whose address never changes.

        For a backward, AOTAutograd reports everything saved by the forward; only the forward's own static inputs
        among it (known by name) are certain to stay where they are.
        """
        names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
        if kind != "backward":
            self._static_names = frozenset(names[i] for i in indices)
            return frozenset(indices)
        return frozenset(i for i, name in enumerate(names) if name in self._static_names)


sharedgraph = Backend()
