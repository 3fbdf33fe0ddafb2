"""What CUDA graphs tend to break, and eager does not: aliases, liveness, gradients, random numbers, resets, threads."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import re
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cudagraph_backend as sg
from tests.support.regions import compiled

SIZES = (5, 11, 3, 5, 17, 2)
MOVES = hasattr(torch.UntypedStorage, "_swap_data_ptr_")  # torch 2.11 keeps live outputs where they are


def mlp(device, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)


def inputs(n, device, width=8):
    """Drawn on the CPU: while one thread begins a capture, no other may draw from the GPU's generator."""
    return torch.randn(n, width).to(device)


def assert_same_gradients(ours, eager, tolerance=1e-4):
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def right_or_refused(words):
    """The block may compute what is right, or end in a RuntimeError that says ``words``."""
    try:
        yield
    except RuntimeError as error:
        if words not in str(error):
            raise


# ---- aliases


def test_outputs_that_alias_each_other_stay_together(device):
    """Also when both are moved out: a change through one is seen through the other."""

    def function(x):
        y = x * 2
        return y, y[1:], y.view(-1), y

    f = compiled(function)
    with torch.no_grad():
        for n in SIZES:
            x = inputs(n, device)
            whole, rest, flat, again = f(x)
            assert again is whole
            whole += 1
            f(-x)
            f(-x)
            rest *= 3
            expected = x * 2 + 1
            expected[1:] *= 3
            torch.testing.assert_close(whole, expected)
            torch.testing.assert_close(flat, expected.view(-1))
            assert flat.data_ptr() == whole.data_ptr()


def test_an_output_that_is_a_view_of_an_argument(device):
    f = compiled(lambda x: (x[1:], x.t(), x * 2))
    with torch.no_grad():
        for n in SIZES:
            x = inputs(n, device)
            rest, transposed, doubled = f(x)
            before = x.clone()
            x += 1
            torch.testing.assert_close(rest, before[1:] + 1)
            torch.testing.assert_close(transposed, before.t() + 1)
            torch.testing.assert_close(doubled, before * 2)
            rest.zero_()
            assert not x[1:].any()


def test_an_output_that_is_a_view_of_a_parameter(device):
    linear = nn.Linear(8, 8, device=device)

    def function(x):
        return linear(x), linear.weight[1:], linear.bias

    f = compiled(function)
    with torch.no_grad():
        for n in SIZES:
            _, rest, bias = f(inputs(n, device))
            assert bias is linear.bias
            rest += 1
            assert rest.data_ptr() == linear.weight[1:].data_ptr()
            torch.testing.assert_close(rest, linear.weight[1:])


@pytest.mark.slow
def test_views_across_graph_breaks(device):
    """What one region makes and another one views is one memory, as in eager."""

    def function(x):
        y = x * 2
        torch._dynamo.graph_break()
        rest = y[1:]
        torch._dynamo.graph_break()
        rest.add_(1)
        return y, rest, rest + y[:-1]

    f = compiled(function)
    with torch.no_grad():
        for n in SIZES * 2:
            x = inputs(n, device)
            for ours, expected in zip(f(x), function(x), strict=True):
                torch.testing.assert_close(ours, expected)
            whole, rest, _ = f(x)
            whole.zero_()
            assert not rest.any()


def test_outputs_without_entries_constants_and_numbers(device):
    def function(x):
        return (
            x[:0] * 2,
            torch.ones(3, device=device),
            torch.arange(x.shape[0], device=device),
            x.shape[0] * 2,
            None,
            x.sum(),
            x > 0,
            x.to(torch.float16),
            {"nested": (x + 1, [x + 2])},
        )

    f = compiled(function)
    with torch.no_grad():
        for n in SIZES:
            x = inputs(n, device)
            torch.testing.assert_close(f(x)[:3], function(x)[:3])
            assert f(x)[3:5] == (2 * n, None)
            torch.testing.assert_close(f(x)[5:8], function(x)[5:8], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(f(x)[8], function(x)[8])


def test_a_constant_output_that_the_user_changes(device):
    """The next call gets the constant again."""
    f = compiled(lambda x: (torch.zeros(4, device=device), x + 1))
    with torch.no_grad():
        for n in SIZES:
            zeros, _ = f(inputs(n, device))
            assert zeros.tolist() == [0] * 4
            zeros += 1
            f(inputs(n, device))
            assert zeros.tolist() == [1] * 4


def test_complex_outputs(device):
    f = compiled(lambda x: torch.complex(x, x * 2) * 1j)
    with torch.no_grad():
        for n in SIZES:
            x = inputs(n, device)
            torch.testing.assert_close(f(x), torch.complex(x, x * 2) * 1j)


# ---- liveness


@pytest.mark.slow
def test_an_output_that_is_dropped_is_gone(device):
    f = compiled(lambda x: x * 2)
    model = compiled(mlp(device))
    for n in SIZES:
        for function in (f, model):
            out = function(inputs(n, device))
            view = out[1:]
            gone, storage = weakref.ref(out), weakref.ref(view)
            del out, view
            assert gone() is None
            assert storage() is None


@pytest.mark.slow
def test_outputs_dropped_between_graph_breaks(device):
    """An intermediate value that dies within the function, and one that lives on, may share no memory."""

    def function(x, kept):
        a = x * 2
        torch._dynamo.graph_break()
        b = a + 1
        kept.append(b)
        del a
        torch._dynamo.graph_break()
        c = b * 3
        torch._dynamo.graph_break()
        d = c - 1
        kept.append(d)
        del c
        torch._dynamo.graph_break()
        return d + b

    f = compiled(function)
    with torch.no_grad():
        for n in SIZES * 2:
            x, ours, expected = inputs(n, device), [], []
            torch.testing.assert_close(f(x, ours), function(x, expected))
            torch.testing.assert_close(ours, expected)


def test_views_detached_and_exported_outputs_stay(device):
    """Whatever refers to an output's memory keeps its values, even if the output itself is gone."""
    f = compiled(lambda x: x * 2)
    holders = {
        "view": lambda out: out[1:],
        "detached": lambda out: out.detach()[1:],
        "transposed": lambda out: out.t()[:, 1:].t(),
        "parameter": lambda out: nn.Parameter(out)[1:].detach(),
        "set": lambda out: torch.empty(0, device=device).set_(out)[1:],
        "in a list of views": lambda out: out.split(1)[1:],
    }
    with torch.no_grad():
        for n in SIZES:
            held = {}
            for name, hold in holders.items():
                x = inputs(n, device)
                held[name] = hold(f(x)), x[1:] * 2
            for got, expected in held.values():
                got = torch.cat(got) if isinstance(got, tuple) else got
                torch.testing.assert_close(got, expected)


def test_exports_are_not_overwritten_in_the_same_step(device):
    """What DLPack and NumPy got is memory, and does not move: it must stay as long as the step does."""
    f = compiled(lambda x: x * 2)
    with torch.no_grad():
        for n in SIZES:
            torch.compiler.cudagraph_mark_step_begin()
            x = inputs(n, device)
            out = f(x)
            exported = torch.from_dlpack(out)
            assert exported.data_ptr() == out.data_ptr()
            del out
            f(-x)
            f(-x)
            torch.testing.assert_close(exported, x * 2)
            if device.type == "cpu":
                array = f(x).numpy()
                f(-x)
                torch.testing.assert_close(torch.from_numpy(array), x * 2)


def test_saving_several_outputs_saves_what_they_hold(device):
    f = compiled(lambda x: (x * 2, x + 1))
    with torch.no_grad():
        f(inputs(64, device))
        x = inputs(5, device)
        outputs = f(x)
    file = io.BytesIO()
    torch.save({"outputs": outputs, "view": outputs[0][1:]}, file)
    assert file.tell() < 5000
    file.seek(0)
    loaded = torch.load(file)
    torch.testing.assert_close(loaded["outputs"], (x * 2, x + 1))
    torch.testing.assert_close(loaded["view"], x[1:] * 2)
    loaded["outputs"][0].zero_()
    assert not loaded["view"].any()


def test_a_copy_of_an_output_is_one(device):
    f = compiled(lambda x: x * 2)
    with torch.no_grad():
        x = inputs(5, device)
        copies = [copy.deepcopy(f(x)), f(x).clone(), copy.deepcopy([f(x)])[0]]
        f(-x)
        for copied in copies:
            torch.testing.assert_close(copied, x * 2)
            assert sg.alias_info(copied) is None


# ---- gradients


@torch._functorch.config.patch(donated_buffer=False)  # else Inductor refuses
def test_backward_twice_with_retain_graph(device):
    model = mlp(device)
    f = compiled(model)
    for n in SIZES:
        x = inputs(n, device)
        loss = f(x).square().sum()
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        f(-x).sum().backward()  # runs the same regions in between
        second = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


def test_forwards_whose_outputs_are_kept_without_backward(device):
    ours = mlp(device)
    eager = copy.deepcopy(ours)
    f = compiled(ours)
    kept = []
    for n in SIZES * 2:
        x = inputs(n, device)
        kept.append((f(x), eager(x).detach()))
        f(x).sum().backward()
        eager(x).sum().backward()
        for got, expected in kept:
            torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(ours, eager)
    for got, _ in kept:  # late, and in the order of the forwards
        got.sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_late_backwards_have_their_own_saved_values(device):
    model = mlp(device)
    f = compiled(model)
    pending = []
    for n in SIZES * 2:
        x = inputs(n, device).requires_grad_()
        pending.append((x, f(x)))
    for x, out in reversed(pending):
        (got,) = torch.autograd.grad(out.square().sum(), [x])
        (expected,) = torch.autograd.grad(model(x).square().sum(), [x])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_evaluation_between_training_steps(device):
    ours = mlp(device)
    eager = copy.deepcopy(ours)
    f = compiled(ours)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, foreach=True) for m in (ours, eager)]
    for n in SIZES:
        x, other = inputs(n, device), inputs(n + 1, device)
        for model, optimizer in zip((f, eager), optimizers, strict=True):
            loss = model(x).square().mean()
            with torch.no_grad():  # between forward and backward
                model(other)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(f(other), eager(other), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_across_graph_breaks(device):
    """The backwards of several regions run in reverse order, each with what its forward saved."""
    first, second = mlp(device, 0), nn.Linear(4, 8, device=device)

    def function(x):
        y = first(x)
        torch._dynamo.graph_break()
        z = second(y).tanh()
        torch._dynamo.graph_break()
        return first(z) * y

    f = compiled(function)
    parameters = [*first.parameters(), *second.parameters()]
    for n in SIZES:
        x = inputs(n, device).requires_grad_()
        got = torch.autograd.grad(f(x).square().sum(), [x, *parameters])
        expected = torch.autograd.grad(function(x).square().sum(), [x, *parameters])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_model_feeds_another_in_training(device):
    """The tangent of the first one is an output of the second one's backward."""
    first, second = mlp(device, 0), nn.Sequential(nn.Linear(4, 8), nn.Tanh()).to(device)
    f, g = compiled(first), compiled(second)
    parameters = [*first.parameters(), *second.parameters()]
    for n in SIZES:
        x = inputs(n, device)
        got = torch.autograd.grad(f(g(f(x))).square().sum(), parameters)
        expected = torch.autograd.grad(first(second(first(x))).square().sum(), parameters)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_that_are_kept(device):
    """A gradient is an output too: it outlives the next backward, as a whole and as ``.grad``."""
    model = mlp(device)
    f = compiled(model)
    kept = []
    for n in SIZES:
        x = inputs(n, device)
        model.zero_grad(set_to_none=True)
        f(x).square().sum().backward()
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        kept += zip([p.grad for p in model.parameters()], expected, strict=True)
        for got, right in kept:
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_gradients_accumulate_in_place_over_many_backwards(device):
    ours = mlp(device)
    eager = copy.deepcopy(ours)
    f = compiled(ours)
    addresses = set()
    for n in SIZES * 2:
        x = inputs(n, device)
        f(x).square().mean().backward()
        eager(x).square().mean().backward()
        addresses.add(ours[0].weight.grad.detach().sum().item())
        assert_same_gradients(ours, eager)
    assert len(addresses) == len(SIZES) * 2  # the gradient grew every time


def test_a_hook_that_changes_the_gradient(device):
    model = mlp(device)
    f = compiled(model)
    for n in SIZES:
        x = inputs(n, device)
        grads = []
        for function in (f, model):
            out = function(x)
            out.register_hook(lambda g: g * 2)
            grads.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_double_backward_is_right_or_refused(device):
    f = compiled(lambda x: x.sin().square())
    for n in SIZES:
        x = inputs(n, device).requires_grad_()
        (grad,) = torch.autograd.grad(f(x).sum(), [x], create_graph=True)
        torch.testing.assert_close(grad, (2 * x).sin())
        with right_or_refused("double backward"):
            (second,) = torch.autograd.grad(grad.sum(), [x])
            torch.testing.assert_close(second, 2 * (2 * x).cos())


def test_an_output_changed_in_place_before_backward(device):
    """Where eager allows it (nothing saved is changed), the gradient is eager's."""
    model = nn.Linear(8, 4, device=device)
    f = compiled(model)
    for n in SIZES:
        x = inputs(n, device)
        grads = []
        for function in (f, model):
            out = function(x)
            out.mul_(3)
            grads.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_checkpointed_modules(device):
    model = mlp(device)

    def function(x):
        return checkpoint(model, x, use_reentrant=False).square() + checkpoint(model, -x, use_reentrant=False)

    f = compiled(function)
    for n in SIZES:
        x = inputs(n, device).requires_grad_()
        got = torch.autograd.grad(f(x).sum(), [x, *model.parameters()])
        expected = torch.autograd.grad(function(x).sum(), [x, *model.parameters()])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_module_within_an_eager_checkpoint(device):
    """The compiled forward runs again during backward."""
    model = mlp(device)
    f = compiled(model)
    for n in SIZES:
        x = inputs(n, device).requires_grad_()
        got = torch.autograd.grad(checkpoint(f, x, use_reentrant=False).square().sum(), [x, *model.parameters()])
        expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- modes


def test_autocast_around_the_call_comes_and_goes(device):
    model = mlp(device)
    f = compiled(model)
    with torch.no_grad():
        for n in SIZES * 2:
            x = inputs(n, device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                half = f(x)
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), model(x), rtol=5e-2, atol=5e-2)
            torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)


def test_inference_tensors_go_in_and_out(device):
    """Outputs of inference mode are inference tensors; they may be fed back, in that mode and out of it."""
    f = compiled(lambda x: x * 2)
    for n in SIZES:
        x = inputs(n, device)
        with torch.inference_mode():
            y = f(x)
            assert y.is_inference()
            z = f(y)
        with torch.no_grad():
            torch.testing.assert_close(f(z), x * 8)
            ordinary = f(x)
        assert not ordinary.is_inference()
        ordinary.requires_grad_().sum().backward()
        torch.testing.assert_close(y, x * 2)
        torch.testing.assert_close(z, x * 4)


@pytest.mark.slow
def test_outputs_without_gradients_need_none(device):
    model = mlp(device)
    f = compiled(model)
    for n in SIZES:
        x = inputs(n, device)
        with torch.no_grad():
            assert not f(x).requires_grad
        assert f(x).requires_grad
        model.requires_grad_(False)
        out = f(x)
        assert not out.requires_grad
        model.requires_grad_(True)
        torch.testing.assert_close(out, model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_train_and_eval_alternate(device):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).to(device)
    eager = copy.deepcopy(ours)
    f = compiled(ours)
    for n in SIZES:
        x = inputs(n, device)
        for training in (True, False):
            ours.train(training)
            eager.train(training)
            torch.testing.assert_close(f(x), eager(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[1].running_var, eager[1].running_var, rtol=1e-4, atol=1e-4)
        assert ours[1].num_batches_tracked == eager[1].num_batches_tracked


# ---- parameters


def test_parameters_replaced_by_new_ones(device):
    model = mlp(device)
    f = compiled(model)
    with torch.no_grad():
        for n in SIZES:
            x = inputs(n, device)
            model[0].weight = nn.Parameter(torch.randn(16, 8, device=device))
            torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
            torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)
            model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
            torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_model_that_changes_its_dtype(device):
    model = mlp(device)
    f = compiled(model)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            model.to(dtype)
            for n in (5, 11, 3):
                x = inputs(n, device).to(dtype)
                out = f(x)
                assert out.dtype == dtype
                torch.testing.assert_close(out, model(x), rtol=5e-2, atol=5e-2)


def test_tied_parameters(device):
    """One parameter under two names: one gradient, the sum of both uses."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(8, 4, bias=False)
            self.head = nn.Linear(4, 8, bias=False)
            self.head.weight = nn.Parameter(self.embed.weight.detach().t().contiguous())
            self.again = self.embed

        def forward(self, x):
            return self.again(self.head(self.embed(x)))

    ours = Tied().to(device)
    eager = copy.deepcopy(ours)
    f = compiled(ours)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (ours, eager)]
    for n in SIZES:
        x = inputs(n, device)
        for model, optimizer in zip((f, eager), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert ours.again.weight is ours.embed.weight
        assert_same_gradients(ours, eager)
        torch.testing.assert_close(ours.embed.weight, eager.embed.weight, rtol=1e-4, atol=1e-4)


def test_a_parameter_that_is_an_output_of_a_compiled_function(device):
    """A weight made by a compiled function lies in the pool; it must not be taken for memory that never changes."""
    make, linear = compiled(lambda x: x * 2), nn.Linear(8, 8, bias=False, device=device)
    f = compiled(linear)
    with torch.no_grad():
        for n in SIZES:
            weight = inputs(8, device)
            linear.weight = nn.Parameter(make(weight))
            make(-weight)  # wants the weight's range
            x = inputs(n, device)
            for _ in range(2):
                torch.testing.assert_close(f(x), x @ (weight * 2).t(), rtol=1e-4, atol=1e-4)
                make(-weight)


# ---- random numbers


def test_draws_repeat_from_the_same_seed_and_not_otherwise(device):
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)).to(device)
    f = compiled(model)
    for n in SIZES:  # everything is captured by then
        f(torch.ones(n, 8, device=device))
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append([f(torch.ones(n, 8, device=device)) == 0 for n in (5, 5, 11, 3, 5)])
    first, second = results
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[4])


def test_backward_uses_the_mask_of_its_forward(device):
    dropout = compiled(lambda x: nn.functional.dropout(x, 0.5))
    pending = []
    for n in SIZES * 2:
        x = torch.ones(n, 16, device=device, requires_grad=True)
        pending.append((x, dropout(x)))
    for x, out in reversed(pending):
        out.sum().backward()
        torch.testing.assert_close(x.grad, out.detach())


# ---- exceptions


class Broken(Exception):
    pass


@torch.library.custom_op("sharedgraph_semantics::fails_on_demand", mutates_args=())
def fails_on_demand(x: torch.Tensor) -> torch.Tensor:
    if fail:
        raise Broken("on demand")
    return x * 2


@fails_on_demand.register_fake
def _(x):
    return torch.empty_like(x)


fail = False


@pytest.mark.host_only("Python code of an operator runs when a graph is captured, not when it is replayed")
def test_an_operator_that_raises_in_some_calls(device, monkeypatch):
    """In the first call of a size as in a later one, in the first region or in another, outputs being held."""

    def function(x):
        y = x + 1
        torch._dynamo.graph_break()
        z = fails_on_demand(y) - 1
        torch._dynamo.graph_break()
        return y, z * 2

    f = compiled(function)
    kept = []
    with torch.no_grad():
        for n in SIZES * 2:
            for failing in (False, True, True, False):
                monkeypatch.setitem(globals(), "fail", failing)
                x = inputs(n, device)
                if failing:
                    with pytest.raises(Broken, match="on demand"):
                        f(x)
                    continue
                kept.append((f(x), (x + 1, (2 * x + 1) * 2)))
                for got, expected in kept[-3:]:
                    torch.testing.assert_close(got, expected)


def test_an_exception_between_regions_with_outputs_alive(device):
    kept = []

    def function(x, broken):
        y = x * 2
        kept.append(y)
        torch._dynamo.graph_break()
        if broken:
            raise Broken
        return y + 1

    f = compiled(function)
    right = []
    with torch.no_grad():
        for n in SIZES:
            for broken in (False, True, False):
                x = inputs(n, device)
                right.append(x * 2)
                if broken:
                    with pytest.raises(Broken):
                        f(x, broken)
                else:
                    torch.testing.assert_close(f(x, broken), x * 2 + 1)
        torch.testing.assert_close(kept, right)


def test_an_exception_in_backward(device):
    model = mlp(device)
    f = compiled(model)

    def fail(_):
        raise Broken

    for n in SIZES:
        x = inputs(n, device)
        out = f(x)
        out.register_hook(fail)
        with pytest.raises(Broken):
            out.sum().backward()
        got = torch.autograd.grad(f(x).square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- on_overwrite="error"


def error_compiled(function):
    return compiled(function, on_overwrite="error")


def overwritten(f, device, n=5):
    """An output whose memory later steps have used, in the way of a caller that drops theirs."""
    out = f(inputs(n, device))
    for _ in range(3):
        f(inputs(n, device))
    return out


def test_error_names_source_line_and_cures(device):
    def function(x):
        shifted = x + 1
        return shifted * 2

    line = inspect.getsourcelines(function)[1] + 2
    with torch.no_grad():
        out = overwritten(error_compiled(function), device)
        with pytest.raises(RuntimeError) as raised:
            out.tolist()
    message = str(raised.value)
    assert re.search(rf"test_eager_semantics\.py\W+(line )?{line}\b", message)
    assert "return shifted * 2" in message
    assert ".clone()" in message
    assert re.search(r"on_overwrite\W+preserve", message)


ACCESSES = {
    "operator": lambda out: out + 1,
    "number": lambda out: out.sum().item(),
    "clone": lambda out: out.clone(),
    "in place": lambda out: out.add_(1),
    "view": lambda out: out[1:] * 2,
    "repr": lambda out: repr(out),
}


@pytest.mark.parametrize("kind", ACCESSES)
def test_error_at_every_kind_of_access(kind, device):
    with torch.no_grad():
        out = overwritten(error_compiled(lambda x: x * 2), device)
        with pytest.raises(RuntimeError, match="clone"):
            ACCESSES[kind](out)


def test_error_through_a_view_and_as_an_argument(device):
    f = error_compiled(lambda x: x * 2)
    with torch.no_grad():
        out = f(inputs(5, device))
        view = out[1:]
        for _ in range(3):
            f(inputs(5, device))
        with pytest.raises(RuntimeError, match="clone"):
            view.tolist()
        with pytest.raises(RuntimeError, match="clone"):
            f(out)
        x = inputs(5, device)
        torch.testing.assert_close(f(x), x * 2)  # and all goes on


def test_error_spares_clones_and_dropped_outputs(device):
    f = error_compiled(lambda x: x * 2)
    with torch.no_grad():
        kept = []
        for n in SIZES * 2:
            x = inputs(n, device)
            kept.append((f(x).clone(), x * 2))
            out = f(x)
            torch.testing.assert_close(out, x * 2)
            del out
        for got, expected in kept:
            torch.testing.assert_close(got, expected)
    assert sg.stats().outputs_copied_out == 0


def test_error_spares_outputs_of_the_step(device):
    f, g = error_compiled(lambda x: x * 2), error_compiled(lambda x: (x + 1, x - 1))
    with torch.no_grad():
        for n in SIZES * 2:
            torch.compiler.cudagraph_mark_step_begin()
            x = inputs(n, device)
            kept, expected = [], []
            for i in range(3):
                kept += [f(x + i), *g(x + i)]
                expected += [(x + i) * 2, x + i + 1, x + i - 1]
            torch.testing.assert_close(kept, expected)
            del kept


def test_error_spares_outputs_across_graph_breaks(device):
    def function(x):
        a = x * 2
        torch._dynamo.graph_break()
        b = a + 1
        torch._dynamo.graph_break()
        return a, b, a * b

    f = error_compiled(function)
    with torch.no_grad():
        for n in SIZES * 2:
            x = inputs(n, device)
            got = f(x)
            torch.testing.assert_close(got, function(x))
            del got


def test_error_allows_feedback(device):
    f = error_compiled(lambda x: x.roll(1, 1) + 1)
    with torch.no_grad():
        for n in SIZES:
            x = expected = inputs(n, device)
            for _ in range(10):
                x, expected = f(x), expected.roll(1, 1) + 1
            torch.testing.assert_close(x, expected)


def test_error_in_training_spares_what_a_pending_backward_needs_or_says_so(device):
    """A pending backward whose saved values were needed elsewhere must not use other values silently."""
    model = mlp(device)
    f = error_compiled(model)
    for n in SIZES:
        x = inputs(n, device)
        got = torch.autograd.grad(f(x).square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        del got
        pending = f(x).square().sum()
        torch.autograd.grad(f(-x).sum(), list(model.parameters()))
        with right_or_refused("clone"):
            got = torch.autograd.grad(pending, list(model.parameters()))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            del got


# ---- many of everything


@pytest.mark.slow
def test_several_models_interleaved(device):
    """Each keeps an output, and feeds another one from time to time."""
    models = [mlp(device, seed) for seed in range(3)]
    functions = [compiled(m) for m in models]
    last = [None] * 3
    for n in SIZES * 2:
        x = inputs(n, device)
        for i, (f, model) in enumerate(zip(functions, models, strict=True)):
            with torch.no_grad():
                kept = f(x), model(x)
            f(x).sum().backward()
            if last[i] is not None:
                torch.testing.assert_close(*last[i], rtol=1e-4, atol=1e-4)
            last[i] = kept
        wide = torch.cat([last[0][0], last[1][0]], 1)
        torch.testing.assert_close(functions[2](wide), models[2](wide), rtol=1e-4, atol=1e-4)


def run_threads(work, count, timeout=120):
    """Run ``work(0..count-1)`` in as many threads at once; what went wrong in any of them, and who never came back."""
    errors = []
    barrier = threading.Barrier(count)

    def target(i):
        try:
            barrier.wait(timeout)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=target, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_four_threads_with_a_model_each(device):
    models = [mlp(device, seed) for seed in range(4)]
    functions = [compiled(m) for m in models]

    def work(i):
        kept = []
        for n in SIZES * 4:
            x = inputs(n, device)
            with torch.no_grad():
                kept.append((functions[i](x), models[i](x)))
            for got, expected in kept[-3:]:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    for i in range(4):
        work(i)  # compiled
    run_threads(work, 4)


def test_four_threads_that_share_a_model_and_keep_outputs(device):
    model = mlp(device)
    f = compiled(model)

    def work(i):
        kept = []
        for n in SIZES * 4:
            x = inputs(n + i, device)
            with torch.no_grad():
                kept.append((f(x), model(x)))
                for got, expected in kept[-3:]:
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    work(0)
    run_threads(work, 4)


@pytest.mark.slow
def test_four_threads_that_train(device):
    models = [mlp(device, seed) for seed in range(4)]
    functions = [compiled(m) for m in models]

    def work(i):
        for n in SIZES * 2:
            x = inputs(n, device)
            got = torch.autograd.grad(functions[i](x).square().sum(), list(models[i].parameters()))
            expected = torch.autograd.grad(models[i](x).square().sum(), list(models[i].parameters()))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    for i in range(4):
        work(i)
    run_threads(work, 4)


def test_threads_that_feed_back_through_graph_breaks(device):
    """Steps of one thread are not those of another: nobody's live values are anybody else's memory."""

    def function(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y, (y * 3).remainder(1009)

    f = compiled(function)

    def work(i):
        with torch.no_grad():
            x = expected = torch.full((5 + i, 8), float(i), device=device)
            for _ in range(30):
                (y, x), (ey, expected) = f(x), function(expected)
                assert torch.equal(y, ey)
                assert torch.equal(x, expected)

    for i in range(4):
        work(i)
    run_threads(work, 4)


# ---- endings


def two_functions():
    """Two compiled functions, and the means to have Dynamo let go of one: it would keep its code for ever."""

    def first(x):
        return x * 2 + 1

    def second(x):
        return x * 3 + 1

    def drop(function):
        torch._dynamo.eval_frame.reset_code(function.__code__)
        gc.collect()

    functions = [torch.compile(f, backend="sharedgraph", dynamic=True) for f in (first, second)]
    return functions, [lambda: drop(first), lambda: drop(second)]


def test_compiled_code_that_is_dropped_frees_its_graphs_and_memory(device):
    (first, second), (drop_first, drop_second) = two_functions()
    with torch.no_grad():
        for n in SIZES:
            x = inputs(n, device)
            torch.testing.assert_close(first(x), x * 2 + 1)
            torch.testing.assert_close(second(x), x * 3 + 1)
        before = sg.stats()
        drop_first()
        between = sg.stats()
        assert (between.regions, between.graphs) == (before.regions // 2, before.graphs // 2)
        torch.testing.assert_close(second(x), x * 3 + 1)
        drop_second()
    after = sg.stats()
    assert (after.regions, after.graphs, after.staging_bytes) == (0, 0, 0)
    assert after.output_pool_bytes == 0


@pytest.mark.slow
def test_dropped_code_leaves_its_outputs_and_those_made_from_them(device):
    (first, second), (drop_first, drop_second) = two_functions()
    with torch.no_grad():
        for n in SIZES:
            x = inputs(n, device)
            y = first(x)
            z = second(y)
            drop_first()
            torch.testing.assert_close(second(y), (x * 2 + 1) * 3 + 1)
            torch.testing.assert_close(y, x * 2 + 1)
            torch.testing.assert_close(first(-x), 1 - x * 2)  # compiled again
            drop_second()
            torch.testing.assert_close(z, (x * 2 + 1) * 3 + 1)
            torch.testing.assert_close(y, x * 2 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("reset", [sg.reset, torch._dynamo.reset])
def test_a_reset_in_the_middle(reset, device):
    """Outputs that are held, feed back, or await their backward survive it; so do later calls."""
    model = mlp(device)
    f, g = compiled(model), compiled(lambda x: x * 2 + 1)
    for n in SIZES:
        x = inputs(n, device)
        with torch.no_grad():
            held = g(x)
            view = held[1:]
        pending = f(x).square().sum()
        reset()
        with torch.no_grad():
            torch.testing.assert_close(g(held), (x * 2 + 1) * 2 + 1)
            torch.testing.assert_close(g(view), (x[1:] * 2 + 1) * 2 + 1)
        got = torch.autograd.grad(pending, list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        held += 1
        torch.testing.assert_close(view, x[1:] * 2 + 2)


def test_a_reset_between_two_regions_of_one_call(device):
    def function(x, reset):
        y = x * 2
        torch._dynamo.graph_break()
        if reset:
            sg.reset()
        torch._dynamo.graph_break()
        return y, y + 1

    f = compiled(function)
    with torch.no_grad():
        for n in SIZES:
            for reset in (False, True, False):
                x = inputs(n, device)
                torch.testing.assert_close(f(x, reset), (x * 2, x * 2 + 1))


def test_compiled_again_after_a_reset_of_dynamo(device):
    model = mlp(device)
    captures = []
    for _ in range(3):
        f = compiled(model)
        with torch.no_grad():
            for n in SIZES:
                x = inputs(n, device)
                torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)
        captures.append(sg.stats().captures)
        torch._dynamo.reset()
        gc.collect()
        assert sg.stats().graphs == 0
    assert captures[1:] == captures[:-1]


def test_memory_is_gone_after_a_reset_when_the_outputs_are(device):
    f = compiled(lambda x: x * 2)
    with torch.no_grad():
        kept = [f(inputs(n, device)) for n in SIZES]
        sg.reset()
        assert (sg.stats().output_pool_bytes, sg.stats().staging_bytes) == (0, 0)
        gone = [weakref.ref(out) for out in kept]
        del kept
        gc.collect()
        assert all(ref() is None for ref in gone)
