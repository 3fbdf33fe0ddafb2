"""What was handed out never changes and never moves: kept outputs, exports of them, and readers in other threads."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import cudagraph_backend as sg


class Interface:
    """Memory in the form of ``__cuda_array_interface__``, as CuPy and Numba take it: it holds the tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.owner = tensor
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


EXPORTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a tensor": lambda out: out,
    "a view": lambda out: out[1:],
    "a detached tensor": lambda out: out.detach(),
    "its storage": lambda out: out.untyped_storage(),
    "DLPack": lambda out: torch.utils.dlpack.from_dlpack(out),
    "a DLPack capsule": lambda out: torch.utils.dlpack.to_dlpack(out),
}
ON_THE_CPU: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy()": lambda out: out.numpy(),
    "np.asarray": np.asarray,
    "np.from_dlpack": np.from_dlpack,
    "memoryview": lambda out: memoryview(out.numpy()),
}
ON_A_GPU: dict[str, Callable[[torch.Tensor], Any]] = {
    "__cuda_array_interface__": Interface,
}


def read(export: Any, device: torch.device) -> torch.Tensor:
    """The values of an export now, as flat floats on the CPU."""
    if isinstance(export, torch.UntypedStorage):
        export = torch.empty(0, device=device).set_(export)
    elif type(export).__name__ == "PyCapsule":
        export = torch.utils.dlpack.from_dlpack(export)
    elif isinstance(export, Interface):
        export = torch.as_tensor(export, device=device)
    return torch.as_tensor(np.asarray(export) if not isinstance(export, torch.Tensor) else export).flatten().cpu()


@pytest.mark.parametrize("keeps_tensor", [True, False])
def test_exports_of_kept_outputs_keep_their_values(device, keeps_tensor):
    f = torch.compile(lambda x: x * 2 + 1, backend="sharedgraph", dynamic=True)
    exports = {**EXPORTS, **(ON_THE_CPU if device.type == "cpu" else ON_A_GPU)}
    for name, export in exports.items():
        kept = []
        with torch.no_grad():
            for i, n in enumerate([5, 7, 5, 3, 7, 8, 5] * 2):
                out = f(torch.full((n, 4), float(i), device=device))
                kept.append((export(out), out if keeps_tensor else None, out.data_ptr(), 2.0 * i + 1))
                del out
        for exported, tensor, address, expected in kept:
            assert tensor is None or tensor.data_ptr() == address
            assert (read(exported, device) == expected).all(), name
        assert sg.stats().fallbacks == {}
        assert sg.stats().outputs_copied_out > 0
        del exported, tensor, kept
        sg.reset()


def test_results_of_a_compiled_numpy_function_are_kept():
    @torch.compile(backend="sharedgraph", dynamic=True)
    def f(x):
        return np.tanh(x) * 2 + np.arange(x.shape[1])

    kept = []
    for n in (5, 7, 5, 3, 7, 8, 5):
        x = np.random.default_rng(n).standard_normal((n, 4))
        kept.append((f(x), np.tanh(x) * 2 + np.arange(4)))
    for got, expected in kept:
        np.testing.assert_allclose(got, expected)


def test_readers_in_other_threads_see_whole_results(device):
    """One thread calls and queues what it gets; others read it, later, as a server's threads do."""
    f = torch.compile(lambda x: x * 2 + 1, backend="sharedgraph", dynamic=True)
    results: queue.Queue = queue.Queue(maxsize=8)
    wrong: list[float] = []

    def reader():
        while (item := results.get()) is not None:
            out, expected = item
            wrong.extend(out[out != expected].flatten()[:1].tolist())

    readers = [threading.Thread(target=reader) for _ in range(3)]
    for thread in readers:
        thread.start()
    with torch.no_grad():
        for i in range(300):
            x = torch.full((60 + i % 5, 1 << 13), float(i), device=device)
            results.put((f(x), 2.0 * i + 1))
    for _ in readers:
        results.put(None)
    for thread in readers:
        thread.join()
    assert wrong == []


def test_outputs_that_share_memory_share_their_copy(device):
    def function(x):
        y = x + 1
        return y, y[1:], y.t()

    f = torch.compile(function, backend="sharedgraph", dynamic=True)
    kept = []
    with torch.no_grad():
        for n in (5, 6, 5, 6, 5):
            x = torch.randn(n, 4, device=device)
            got = f(x)
            got[1][0, 0] = 50.0
            expected = function(x)
            expected[1][0, 0] = 50.0
            kept.append((got, expected))
    for got, expected in kept:
        for ours, right in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, right)
            assert ours.stride() == right.stride()
            assert ours.untyped_storage().data_ptr() == got[0].untyped_storage().data_ptr()
    assert sg.alias_info(kept[-1][0][0]) is None


def test_only_the_outputs_that_are_kept_are_copied(device):
    """A loss that is logged must not cost a copy of all hidden states."""
    f = torch.compile(lambda x: (x.sum(), x * 2), backend="sharedgraph", dynamic=True)
    losses = []
    with torch.no_grad():
        for i in range(12):
            loss, hidden = f(torch.full((6, 4), float(i), device=device))
            losses.append(loss)
            assert (hidden == 2 * i).all()
    assert [float(loss) for loss in losses] == [24.0 * i for i in range(12)]
    assert sg.alias_info(losses[-1]) is None
    assert sg.alias_info(hidden) is not None
    assert sg.stats().outputs_copied_out == 10  # the losses after the first two


def test_a_training_loop_that_logs_its_loss_keeps_activations_in_the_pool(device):
    torch.manual_seed(0)
    ours, eager = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in "ab")
    eager.load_state_dict(ours.state_dict())
    ours, eager = ours.to(device), eager.to(device)
    f = torch.compile(lambda x: ours(x).square().mean(), backend="sharedgraph", dynamic=True)
    losses, expected = [], []
    for _ in range(12):
        x = torch.randn(6, 8, device=device)
        for model, kept, loss in ((ours, losses, f(x)), (eager, expected, eager(x).square().mean())):
            loss.backward()
            kept.append(loss.detach())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    stats = sg.stats()
    assert stats.fallbacks == {}
    assert stats.outputs_copied_out <= 12  # the losses, not what is saved for backward
    assert stats.captures <= 6


def test_without_memory_for_copies_outputs_are_lent(device, monkeypatch):
    """The call has changed its argument by then, and must not lose that."""

    def change(x, c):
        c.add_(1)
        return x * 2

    f = torch.compile(change, backend="sharedgraph", dynamic=True)
    kept = []
    with torch.no_grad():
        for i in range(8):
            if i == 5:
                monkeypatch.setattr(sys.modules["cudagraph_backend.runtime.region_state"], "own_memory", no_memory)
            n = 12 if i == 6 else 5  # the first call of a bucket, too
            x, c = torch.full((n, 4), float(i), device=device), torch.zeros(n, device=device)
            kept.append((f(x, c), 2.0 * i))
            assert (c == 1).all()
    for out, expected in kept:
        assert (out == expected).all()
    assert sg.stats().fallbacks == {}


def no_memory(*args):
    raise torch.OutOfMemoryError("none")


def test_kept_outputs_outlive_a_reset_where_they_are(device):
    f = torch.compile(lambda x: x * 2, backend="sharedgraph")
    with torch.no_grad():
        x = torch.randn(5, 4, device=device)
        out = f(x)
        address = out.data_ptr()
        sg.reset()
        assert sg.stats().output_pool_bytes == 0
        later = [f(x + i) for i in range(4)]
    assert out.data_ptr() == address
    torch.testing.assert_close(out, x * 2)
    for i, got in enumerate(later):
        torch.testing.assert_close(got, (x + i) * 2)
