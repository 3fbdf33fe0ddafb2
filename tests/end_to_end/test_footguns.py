"""Every known hazard of CUDA graphs and of padding, with the cure that this backend has for it, one test each.

Where other systems leave it to the user not to do these things, here they must just work (or say clearly that they
don't).
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import cudagraph_backend as sg
from tests.support.regions import compiled

pytestmark = pytest.mark.usefixtures("no_grad")


def test_keeping_an_output_while_calling_again(device):
    """Elsewhere: "accessing tensor output of CUDAGraphs that has been overwritten". Here: moved out first."""
    f = compiled(lambda x: x * 2)
    first = f(torch.ones(4, device=device))
    f(torch.zeros(4, device=device))
    assert first.tolist() == [2, 2, 2, 2]


def test_composing_a_compiled_function_with_itself(device):
    """g(f(x)) with f and g the same graph reads its input while it writes its output."""
    f = compiled(lambda x: x.flip(1) + 1)
    x = torch.arange(8.0, device=device).view(2, 4)
    assert f(f(x)).tolist() == (x + 2).tolist()


def test_a_batch_mean_must_not_see_padded_rows(device):
    f = compiled(lambda x: x.mean(0))
    for n in (3, 5, 6):
        x = torch.full((n, 2), 7.0, device=device)
        assert f(x).tolist() == [7, 7]


def test_the_batch_size_as_a_value(device):
    f = compiled(lambda x: x * x.shape[0])
    for n in (3, 5, 6):
        assert f(torch.ones(n, device=device)).tolist() == [n] * n


def test_counting_calls_in_a_buffer(device):
    """Warm-up and capture must not count."""
    calls = torch.zeros(1, device=device)

    def function(x):
        calls.add_(1)
        return x + calls

    f = compiled(function)
    for n in (3, 5, 6, 3, 5):
        f(torch.ones(n, device=device))
    assert calls.item() == 5


def test_padded_rows_must_not_write_to_a_cache(device):
    """Rows padded with slot 0 or with garbage would overwrite somebody's slot."""
    cache = torch.zeros(10, device=device)

    def function(slots, values):
        cache[slots] = values
        return values * 2

    f = compiled(function)
    for slots in ([1, 2, 3], [4, 5, 6, 7, 9], [3, 1]):
        f(torch.tensor(slots, device=device), torch.tensor([float(s) for s in slots], device=device))
    assert cache.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9]


def test_a_python_branch_on_the_size(device):
    """A graph recorded for odd sizes must not serve even ones, nor buckets that its guards exclude."""
    f = compiled(lambda x: x + 1 if x.shape[0] % 2 else x - 1)
    for n in (3, 5, 4, 7, 6, 8):
        assert f(torch.zeros(n, device=device)).tolist() == [1 if n % 2 else -1] * n


def test_a_size_above_the_last_bucket_is_not_silent(device):
    f = compiled(lambda x: x * 2, capture_sizes=[2, 4])
    for n in (3, 4, 9):
        assert f(torch.ones(n, device=device)).tolist() == [2.0] * n
    (reason,) = sg.stats().fallbacks
    assert "larger than the largest of capture_sizes" in reason


def test_replacing_the_weights(device):
    """A graph holds the addresses of the weights it was captured with."""
    linear = nn.Linear(2, 2, bias=False, device=device)
    f = compiled(linear)
    for scale in (1.0, 2.0, 3.0):
        linear.weight.data = torch.eye(2, device=device) * scale
        for n in (3, 5, 3):
            assert f(torch.ones(n, 2, device=device)).tolist() == [[scale, scale]] * n


def test_weights_changed_in_place_are_seen(device):
    linear = nn.Linear(2, 2, bias=False, device=device)
    f = compiled(linear)
    for scale in (1.0, 2.0):
        linear.weight.copy_(torch.eye(2, device=device) * scale)
        assert f(torch.ones(3, 2, device=device)).tolist() == [[scale, scale]] * 3


def test_writing_into_an_output_does_not_reach_the_next_call(device):
    f = compiled(lambda x: (x * 0, x * 0))
    for n in (3, 5, 3):
        first, second = f(torch.ones(n, device=device))
        first += 1
        assert second.tolist() == [0] * n


def test_the_same_input_object_with_new_contents(device):
    f = compiled(lambda x: x * 2)
    x = torch.ones(3, device=device)
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        assert f(x).tolist() == [2 * value] * 3


def test_an_input_is_not_written_by_staging_or_padding(device):
    f = compiled(lambda x: x * 2)
    base = torch.ones(10, device=device)
    for n in (3, 5, 3):
        f(base[:n])
    assert base.tolist() == [1.0] * 10


def test_nan_in_one_row_stays_there(device):
    f = compiled(lambda x: torch.softmax(x, 1))
    for n in (3, 5):
        x = torch.zeros(n, 2, device=device)
        x[-1] = float("nan")  # the row that padding repeats
        out = f(x)
        assert out[:-1].tolist() == [[0.5, 0.5]] * (n - 1)
        assert out[-1].isnan().all()


def test_infinities_times_zero_fill(device):
    """Zeros are no neutral padding where they meet an infinity."""
    f = compiled(lambda x, y: (x * y).sum(0), fill="zero")
    for n in (3, 5):
        x, y = torch.ones(n, device=device), torch.full((n,), float("inf"), device=device)
        assert f(x, y).item() == float("inf")


def test_an_exception_in_the_middle_leaves_everything_usable(device):
    def function(x):
        y = x * 2
        torch._dynamo.graph_break()
        if y.shape[0] == 5:
            raise ValueError("user error")
        return y + 1

    f = compiled(function)
    for n in (3, 4):
        assert f(torch.ones(n, device=device)).tolist() == [3.0] * n
        with pytest.raises(ValueError, match="user error"):
            f(torch.ones(5, device=device))
    assert f(torch.ones(4, device=device)).tolist() == [3.0] * 4


def test_threads(device):
    """Two threads on one compiled function: each gets its own values, and nobody waits for ever."""
    f = compiled(lambda x: x * 2)
    f(torch.ones(3, device=device))
    f(torch.ones(4, device=device))
    wrong = []

    def work(value):
        with torch.no_grad():
            for n in (3, 4, 7) * 20:
                out = f(torch.full((n,), value, device=device))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if out.tolist() != [2 * value] * n:
                    wrong.append((value, n, out.tolist()))

    threads = [threading.Thread(target=work, args=(float(v),)) for v in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_a_numpy_view_of_a_live_output():
    """As long as the output is not called over, its NumPy view is its memory; a copy is needed beyond that."""
    f = compiled(lambda x: x * 2)
    out = f(torch.ones(3))
    array = out.numpy()
    np.testing.assert_array_equal(array, [2, 2, 2])
    out += 1
    np.testing.assert_array_equal(array, [3, 3, 3])


def test_autocast_inside(device):
    linear = nn.Linear(4, 4, device=device)

    def function(x):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return linear(x)

    f = compiled(function)
    for n in (3, 5, 6):
        x = torch.randn(n, 4, device=device)
        out = f(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), linear(x), rtol=3e-2, atol=3e-2)
