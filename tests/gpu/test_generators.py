"""Random numbers that a backward draws again: their generators are arguments of the regions (checkpointing)."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

import cudagraph_backend as sg
from cudagraph_backend import sharedgraph
from cudagraph_backend.drivers.cuda import CudaDriver

# Without these settings Inductor draws from seeds, which are saved for the backward, or carries states to the host.
INDUCTOR = {"fallback_random": True, "test_configs.graphsafe_rng_func_ignores_fallback_random": True}


def dropped(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x.sin(), 0.5)


def function(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(dropped, x.exp(), use_reentrant=False)


def steps(compiled, x: torch.Tensor) -> list[torch.Tensor]:
    """Results of several calls, one of which is made before the backward of the one before it; gradients fit each."""
    results = []
    for number in range(6):
        pending = [compiled(x) for _ in range(2 if number == 3 else 1)]
        for y in pending:
            (grad,) = torch.autograd.grad(y.sum(), x)
            results.append(y.detach().clone())
            mask = (results[-1] / x.exp().sin()).round()  # 0 or 2
            torch.testing.assert_close(results[-1], mask * x.exp().sin())
            torch.testing.assert_close(grad, mask * x.exp().cos() * x.exp())
    return results


def test_a_backward_draws_the_numbers_of_its_forward(device):
    x = (torch.rand(64, 64, device=device) + 0.1).requires_grad_()
    torch.manual_seed(3)
    expected = steps(torch.compile(function, options=INDUCTOR), x)
    torch._dynamo.reset()
    torch.manual_seed(3)
    ours = steps(torch.compile(function, backend="sharedgraph", options={"inductor": INDUCTOR}), x)
    assert len({result.cpu().numpy().tobytes() for result in ours}) == len(ours)  # new ones at every call
    for result, other in zip(ours, expected, strict=True):
        assert torch.equal(result, other)
    drawing = [replayer for replayer in sharedgraph.regions() if replayer.region.objects]
    assert {replayer.region.kind for replayer in drawing} == {"forward", "backward"}
    assert all(replayer.counters.replays == len(ours) for replayer in drawing)
    assert sg.stats().fallbacks == {}


def test_a_replay_draws_from_a_registered_generator_as_a_run_does(device):
    driver = CudaDriver(device)
    ours, eagers = (torch.Generator(device).manual_seed(5) for _ in range(2))
    out = torch.empty(1000, device=device)
    torch.rand(1000, generator=ours, out=out)
    assert torch.equal(out, torch.rand(1000, generator=eagers, device=device))
    graph = driver.capture(
        lambda: torch.rand(1000, generator=ours, out=out), draws=True, stages=False, generators=[ours]
    )
    for _ in range(3):
        graph.replay(driver.prepare_staging((), ()), ())
        assert torch.equal(out, torch.rand(1000, generator=eagers, device=device))
    ours.manual_seed(7)
    graph.replay(driver.prepare_staging((), ()), ())
    assert torch.equal(out, torch.rand(1000, generator=eagers.manual_seed(7), device=device))
