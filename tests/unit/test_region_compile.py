"""The compilation of one region: scalars that move to a GPU, errors on the way to parts, operators that are cut out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from cudagraph_backend import torch_internals
from cudagraph_backend.compile import region_compile
from cudagraph_backend.compile.region_compile import RegionCompile
from cudagraph_backend.debug import Debug
from cudagraph_backend.errors import OptionError
from cudagraph_backend.options import Options
from cudagraph_backend.region import CutOut, Region

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


class Compiled:
    """Stands for Inductor's code, which would need the GPU; keeps what it was called with."""

    _boxed_call = True

    def __init__(self) -> None:
        self.called: list[list[Any]] = []

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        self.called.append(list(args))
        return ()


class Regions:
    """What the compilation of a region hands on: to Inductor, and to what makes its call."""

    def __init__(self) -> None:
        self.made: list[tuple[Region, CutOut | None]] = []
        self.inductor: list[dict[str, Any]] = []
        self.examples: list[Sequence[Any]] = []
        self.compiled = Compiled()

    def compile(self, gm: GraphModule, examples: Sequence[Any], static: Sequence[int] = (), **options: Any) -> Any:
        return RegionCompile(
            number=0,
            kind="inference",
            static=static,
            names=(),
            options=Options(**options),
            debug=Debug(),
            inductor={"static_input_idxs": list(static)},
            replayer=self._replayer,
            composition=lambda wiring, calls: self.compiled,
            bounds={},
        ).compile(gm, examples)

    def _replayer(self, region: Region, compiled: Any, cut_out: CutOut | None) -> Any:
        self.made.append((region, cut_out))
        return compiled


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> Regions:
    made = Regions()

    def compile_region(gm: GraphModule, examples: Sequence[Any], **inductor: Any) -> Any:
        made.examples.append(examples)
        made.inductor.append(inductor)
        return made.compiled

    monkeypatch.setattr(torch_internals, "compile_region", compile_region)
    monkeypatch.setattr(torch_internals, "is_compiled_graph", lambda compiled: True)
    monkeypatch.setattr(torch_internals, "mutated_inputs", lambda compiled: frozenset())
    monkeypatch.setattr(torch_internals, "output_strides", lambda compiled: [("1",)])
    monkeypatch.setattr(torch_internals, "uncapturable_reason", lambda compiled: None)
    monkeypatch.setattr(region_compile, "driver_refusal", lambda name, device: None)
    return made


Add = Callable[..., torch.fx.Node]


def graph_of(values: dict[str, Any], build: Callable[..., Sequence[torch.fx.Node]]) -> tuple[GraphModule, list[Any]]:
    """A graph on fake values: sizes with their devices."""
    graph, mode = Graph(), FakeTensorMode()
    inputs = []
    for name, (size, device) in values.items():
        inputs.append(graph.placeholder(name))
        with mode:
            inputs[-1].meta["val"] = torch.empty(size, device=device)

    def add(target: Any, *args: Any) -> torch.fx.Node:
        node = graph.call_function(target, args)
        with mode:
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda read: read.meta["val"]))
        return node

    graph.output(tuple(build(add, *inputs)))
    return GraphModule({}, graph), [node.meta["val"] for node in inputs]


class Scalar:
    """Keeps where it was moved to; there is no GPU to move a tensor to."""

    def is_pinned(self) -> bool:
        return False

    def to(self, device: torch.device, non_blocking: bool) -> tuple[str, torch.device, bool]:
        return "moved", device, non_blocking


def test_scalars_that_a_region_on_a_gpu_reads_are_moved_at_every_call(regions: Regions):
    values = {"x": (3, CUDA), "scale": ((), "cpu"), "w": (3, CUDA)}
    gm, examples = graph_of(values, lambda add, x, scale, w: [add(aten.mul.Tensor, add(aten.mul.Tensor, x, scale), w)])
    call = regions.compile(gm, examples, static=(1, 2))
    ((region, _),) = regions.made
    assert region.refusal is None
    assert region.device == CUDA
    roles = {tensor.name: tensor.role for tensor in region.inputs}
    assert roles == {"x": "staged", "scale": "staged", "w": "static"}  # it is another tensor at every call
    assert regions.inductor == [{"static_input_idxs": [2]}]
    assert [example.device for example in regions.examples[0]] == [CUDA] * 3
    scale = Scalar()
    call(["x", scale, "w"])
    assert regions.compiled.called == [["x", ("moved", CUDA, True), "w"]]


def chain(add: Add, x: torch.fx.Node) -> Sequence[torch.fx.Node]:
    """Six operators, the fourth of which reads what no graph may."""
    for target in (aten.sin, aten.cos, aten.tan, aten.sqrt, aten.relu, aten.tanh):
        x = add(target.default, x)
    return [x]


def test_a_wrong_option_that_a_part_shows_is_told(regions: Regions, monkeypatch: pytest.MonkeyPatch):
    """A part on a device of its own has inputs that the region as a whole does not stage."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OptionError("option 'fill': got 0.5")

    monkeypatch.setattr(region_compile, "split", fail)
    gm, examples = graph_of({"x": (3, "cpu")}, chain)
    with pytest.raises(OptionError, match=r"option 'fill': got 0\.5"):
        regions.compile(gm, examples, uncapturable_ops=("aten::sqrt",))
    assert regions.made == []


def test_an_operator_is_cut_out_once(regions: Regions, monkeypatch: pytest.MonkeyPatch):
    """Two parts may run it, and fail."""
    splits, split = [], region_compile.split

    def counted(*args: Any) -> Any:
        splits.append(args[-1])
        return split(*args)

    monkeypatch.setattr(region_compile, "split", counted)
    gm, examples = graph_of({"x": (3, "cpu")}, chain)
    regions.compile(gm, examples)
    ((_, cut_out),) = regions.made
    assert cut_out is not None
    for _ in range(2):
        cut_out("aten.sqrt.default", "it waits")
    assert splits == [{"aten.sqrt.default": "it waits"}]
    parts = [(region.part, region.refusal and region.refusal.reason) for region, _ in regions.made[1:]]
    assert parts == [((1, 3), None), ((2, 3), "its capture failed: it waits"), ((3, 3), None)]
