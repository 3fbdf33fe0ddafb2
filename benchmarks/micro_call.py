"""Where the host's microseconds of a call go, from Dynamo's guards to the views that the caller gets.

    python -m benchmarks.micro_call --device cuda --json micro_call.json

A module of ten matrix products is called with inputs that are copied and padded. Measured apart, all in one run:

- the *layers* that every backend pays: Dynamo alone (guards, the generated function), with AOTAutograd's wrapper, each
  around a region that does nothing;
- whole calls: sharedgraph, stock (``reduce-overhead``), Inductor, and the replay of a graph and nothing else;
- the *steps* of sharedgraph's own call path, each in a loop of its own, with the cost of an empty call taken off.

Host time: calls without waiting for the GPU in between. On a CPU the graph is a plain run of the region (host driver),
whose bytes are poisoned before each call, so that only layers and steps before the launch say anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import cudagraph_backend as sg
from benchmarks import rows
from benchmarks.runners import marked
from benchmarks.timing import Call, enqueue_seconds, interleaved, spread
from cudagraph_backend.runtime.replayer import Replayer

CALLS = 20  # per sample: few, so that the driver's queue does not fill up
ROWS, LARGEST, WIDTH, KERNELS = 7, 8, 64, 10


class Chain(nn.Module):
    """Matrix products of the sum of all inputs: nothing fuses, so each is a kernel."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)) for _ in range(parameters))

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        for other in inputs[1:]:
            x = x + other
        for index in range(KERNELS):
            x = x @ self.weights[index % len(self.weights)]
        return x


class Once:
    """A region's code that computes at its first call, and from then on returns that result."""

    def __init__(self, run: Callable[..., Sequence[Any]]):
        self._run = run
        self._results: Sequence[Any] | None = None

    def __call__(self, *args: Any) -> Sequence[Any]:
        if self._results is None:
            self._results = [result.detach() for result in self._run(*args)]
        return self._results


def dynamo_alone(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    return Once(gm)


def with_aot(gm: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = aot_autograd(fw_compiler=lambda graph, _: Once(graph))(gm, examples)
    return compiled


def whole_calls(module: nn.Module, batch: Sequence[Tensor]) -> dict[str, Call]:
    # An option of its own, so that Dynamo compiles for each and does not answer from what another one has compiled.
    ways: dict[str, Any] = {
        "layer: Dynamo": {"backend": dynamo_alone},
        "layer: Dynamo and AOTAutograd": {"backend": with_aot},
        "inductor": {"options": {"triton.cudagraphs": False}},
        "sharedgraph": {"backend": "sharedgraph", "options": {"capture": "always"}},
    }
    if batch[0].is_cuda:
        ways["reduce-overhead"] = {"mode": "reduce-overhead"}
    served = {name: torch.compile(module, **way) for name, way in ways.items()}
    return {name: lambda call=call: call(*batch) for name, call in served.items()}  # type: ignore[misc]


def caught_call(call: Call) -> tuple[Replayer, list[Any]]:
    """The replayer that answers a call, and the arguments that it gets."""
    caught: list[tuple[Replayer, list[Any]]] = []
    original = Replayer.__call__

    def catching(self: Replayer, args: list[Any]) -> Sequence[Any]:
        caught.append((self, list(args)))
        return original(self, args)

    with mock.patch.object(Replayer, "__call__", catching):
        call()
    (found,) = caught
    return found


def steps(replayer: Replayer, args: list[Any]) -> dict[str, Call]:
    """The steps of ``Replayer.__call__`` with these arguments, in their order."""
    state = replayer.state
    assert state is not None
    device, planner, places, sizes = state.device, state.planner, state.places, replayer.region.sizes
    plan = planner.plan(tuple([size.read(args) for size in sizes]))
    assert not isinstance(plan, sg.Refusal)
    route = places.route(plan, args)
    assert not isinstance(route, sg.Refusal)
    graph = route.graph
    assert graph is not None

    def lock() -> None:
        with device:
            pass

    return {
        "is a capture under way": device.driver.is_capturing,
        "lock": lock,
        "streams": device.driver.join,
        "sizes, plan": lambda: planner.plan(tuple([size.read(args) for size in sizes])),
        "route: where arguments are, liveness": lambda: places.route(plan, args),
        "staging apart": lambda: route.stage(args),
        "staging, graph launch": lambda: graph.replay(route.stage, args),
        "outputs": lambda: state.views(plan, route, args, {}),
        "counters": lambda: replayer.counters.count(plan, route, 0),
        "all of them: Replayer.__call__": lambda: replayer(list(args)),
    }


def measured(calls: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Host time in µs, without what an empty call takes."""
    for call in calls.values():
        for _ in range(5):
            call()
    measures = {name: lambda call=call: enqueue_seconds(call, CALLS, device) for name, call in calls.items()}
    empty = spread(interleaved({"": lambda: enqueue_seconds(lambda: None, CALLS, device)}, rounds)[""], 1e6).median
    found = {name: spread(samples, 1e6) for name, samples in interleaved(measures, rounds).items()}
    return {name: {"median": s.median - empty, "p20": s.p20 - empty, "p80": s.p80 - empty} for name, s in found.items()}


def measure(inputs: int, parameters: int, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    module = Chain(parameters).to(device).eval()
    batch = marked(tuple(torch.randn(ROWS, WIDTH, device=device) for _ in range(inputs)), LARGEST)
    expected = module(*batch)
    calls = whole_calls(module, batch)
    for name, call in calls.items():
        for _ in range(4):
            torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-3, msg=f"{name}: {{}}".format)
    replayer, args = caught_call(calls["sharedgraph"])
    return measured({**calls, **steps(replayer, args)}, rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, default=Path("micro_call.json"))
    parser.add_argument("--commit", help="where the history of the repository is not there to ask")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--parameters", type=int, nargs="+", default=[1, 30])
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    environment = dataclasses.asdict(rows.environment(options.device, options.commit))
    result: dict[str, Any] = {"environment": environment, "kernels": KERNELS, "host µs": {}}
    with torch.inference_mode():
        for inputs in options.inputs:
            for parameters in options.parameters:
                torch._dynamo.reset()
                sg.reset()
                case = f"{inputs} inputs, {parameters} parameters"
                result["host µs"][case] = measure(inputs, parameters, options.rounds, device)
    options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for case, table in result["host µs"].items():
        print(f"\n{case:34}{'median':>8}{'p20':>8}{'p80':>8}")
        for name, row in table.items():
            print(f"  {name:32}{row['median']:8.2f}{row['p20']:8.2f}{row['p80']:8.2f}")


if __name__ == "__main__":
    main()
