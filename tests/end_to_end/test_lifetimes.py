"""Outputs behave as eager's do, however long they are kept, and are marked as aliases of the output pool."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from torch import nn

import cudagraph_backend as sg

SIZES = (5, 11, 3, 64, 5, 17, 11, 2, 40)


def test_kept_outputs_keep_their_values(device):
    compiled = torch.compile(lambda x: (x * 2, x.sum(1)), backend="sharedgraph")
    kept = []
    with torch.no_grad():
        for n in SIZES * 3:
            x = torch.randn(n, 4, device=device)
            doubled, summed = compiled(x)
            kept.append((doubled[1:], x[1:] * 2))  # a view outlives its tensor
            kept.append((summed, x.sum(1)))
            for got, expected in kept:
                torch.testing.assert_close(got, expected)


def test_a_storage_held_alone_keeps_its_bytes(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    x = torch.randn(5, 4, device=device)
    storage = compiled(x).untyped_storage()
    compiled(-x)
    kept = torch.empty(0, device=device).set_(storage, 0, (5, 4), (4, 1))
    torch.testing.assert_close(kept, x * 2)


def test_dead_outputs_are_not_moved(device):
    """Nothing is copied out, and no second range taken, for outputs that nobody holds any more."""
    compiled = torch.compile(lambda x: (x * 2, x.sum(1)), backend="sharedgraph")
    addresses = set()
    with torch.no_grad():
        for n in (64, 5, 9, 64, 5, 9, 64):
            addresses.add(compiled(torch.randn(n, 4, device=device))[0].data_ptr())
    assert sg.stats().outputs_copied_out == 0
    assert len(addresses) <= 2  # the first, static region came before the size was known


def test_feedback(device):
    compiled = torch.compile(lambda x: x * 1.01 + 1, backend="sharedgraph")
    with torch.no_grad():
        for n in (5, 9, 64):
            x = y = torch.randn(n, 4, device=device)
            for _ in range(30):
                x, y = compiled(x), y * 1.01 + 1
                torch.testing.assert_close(x, y)


def test_outputs_changed_in_place_by_the_user(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4, device=device)
            out = compiled(x)
            out.add_(1)
            again = compiled(x)
            torch.testing.assert_close(out, x * 2 + 1)
            torch.testing.assert_close(again, x * 2)


def test_one_model_feeds_another(device):
    first = torch.compile(lambda x: x * 2, backend="sharedgraph")
    second = torch.compile(lambda x: x + 1, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4, device=device)
            middle = first(x)
            torch.testing.assert_close(second(middle), x * 2 + 1)
            torch.testing.assert_close(second(middle[1:]), x[1:] * 2 + 1)
            torch.testing.assert_close(middle, x * 2)


def test_graph_breaks(device):
    def function(x):
        x = x * 2
        torch._dynamo.graph_break()
        y = x.relu()
        torch._dynamo.graph_break()
        return x + y

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4, device=device)
            torch.testing.assert_close(compiled(x), x * 2 + (x * 2).relu())


def test_alias_info(device):
    def function(x):
        return x * 2, x.sum(1)

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in (5, 9, 12):
            doubled, summed = compiled(torch.randn(n, 4, device=device))
    pool = sg.output_pool(device)
    assert pool.tensor.dtype == torch.uint8
    assert pool.nbytes == pool.tensor.nbytes == sg.stats().output_pool_bytes
    for output, tensor in enumerate((doubled, summed)):
        info = sg.alias_info(tensor)
        assert info.output == output
        assert info.region in sg.explain()
        assert info.end - info.start == tensor.nbytes
        same = pool.tensor[info.start : info.end].view(torch.float32).view(tensor.shape)
        assert torch.equal(same, tensor)
        assert same.data_ptr() == tensor.data_ptr()
    view = sg.alias_info(doubled[2:])
    assert (view.start, view.output) == (sg.alias_info(doubled).start + 2 * 16, 0)
    assert sg.alias_info(doubled.clone()) is None
    assert sg.alias_info(torch.randn(3, device=device)) is None
    assert sg.alias_info(doubled[12:]) is None, "it has no bytes"
    assert sg.alias_info(torch.eye(3, device=device).to_sparse()) is None
    with pytest.raises(TypeError, match="alias_info: got a int"):
        sg.alias_info(3)


def test_a_copied_output_is_no_alias(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    x = torch.randn(5, 4, device=device)
    kept = [compiled(x) for _ in range(4)]
    infos = [sg.alias_info(out) for out in kept]
    assert infos[1].step > infos[0].step
    assert infos[2:] == [None, None]
    for out in kept:
        torch.testing.assert_close(out, x * 2)


def test_all_buckets_share_one_range(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    addresses = set()
    with torch.no_grad():
        for n in (3, 64, 5, 33, 17, 48, 64, 1):
            x = torch.randn(n, 4, device=device)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            if n > 1:
                torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            out = compiled(x)
            if n > 1:
                addresses.add(out.data_ptr())
            del out
    assert len(addresses) == 1
    largest = 2 * 64 * 4 * 4  # one input and one output
    assert sg.stats().sum_of_buckets_bytes == (64 + 4 + 8 + 40 + 24 + 48 + 1) * 4 * 4
    granularity = 1 if device.type == "cpu" else 2 << 20
    assert sg.stats().output_pool_bytes == max(largest, granularity)


def test_saving_an_output_saves_it_alone(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    with torch.no_grad():
        compiled(torch.randn(64, 4, device=device))
        out = compiled(torch.randn(5, 4, device=device))
    file = io.BytesIO()
    torch.save(out, file)
    assert out.untyped_storage().nbytes() == out.nbytes
    assert file.tell() < 3000
    file.seek(0)
    torch.testing.assert_close(torch.load(file), out)


def test_outputs_outlive_reset_and_model(device):
    linear = nn.Linear(4, 4, device=device)
    compiled = torch.compile(linear, backend="sharedgraph")
    x = torch.randn(5, 4, device=device)
    with torch.no_grad():
        expected = linear(x)
        out = compiled(x)
        sg.reset()
        assert sg.stats().graphs == sg.stats().output_pool_bytes == 0
        torch.testing.assert_close(out, expected)
        again = compiled(x)
        torch._dynamo.reset()
        del compiled, linear
        gc.collect()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(again, expected)


def test_inference_mode_and_no_grad_mix(device):
    compiled = torch.compile(lambda x: x * 2, backend="sharedgraph")
    for n in (5, 9, 12, 9):
        x = torch.randn(n, 4, device=device)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), x * 2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), x * 2)
        torch.testing.assert_close(compiled(x), x * 2)


def test_outputs_that_are_arguments_parameters_or_views(device):
    weight = nn.Parameter(torch.randn(4, 4, device=device))

    def function(x):
        return x, weight, weight.t(), x * 2, None, x.shape[0], (x * 2)[1:], x[:, 1]

    compiled = torch.compile(function, backend="sharedgraph")
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 4, device=device)
            got, expected = compiled(x), function(x)
            assert got[0] is x
            assert got[1] is weight
            assert got[2].data_ptr() == weight.data_ptr()
            assert got[4:6] == (None, n)
            for a, b in zip(got, expected, strict=True):
                if isinstance(b, torch.Tensor):
                    torch.testing.assert_close(a, b)
                    assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset())


@pytest.mark.parametrize("reset", [torch._dynamo.reset, sg.reset])
def test_marks_of_steps_end_with_a_reset(reset, device):
    """Every call is a step again, as in a new process: an output is overwritten by the second call from it."""

    def overwrites():
        compiled = torch.compile(lambda x: x * x * x, backend="sharedgraph", options={"on_overwrite": "error"})
        with torch.no_grad():
            x = torch.rand(4, device=device)
            first, second = compiled(x), compiled(x)
            torch.testing.assert_close(second, x * x * x)
            try:
                torch.testing.assert_close(first + 0, x * x * x)
            except RuntimeError as error:
                return "is used after a later step has overwritten it" in str(error)
        return False

    assert overwrites()
    torch.compiler.cudagraph_mark_step_begin()
    assert not overwrites()  # no step has begun since
    reset()
    assert overwrites()
    torch.compiler.cudagraph_mark_step_begin()
    assert not overwrites()
