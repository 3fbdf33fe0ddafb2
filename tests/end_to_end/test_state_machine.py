"""Random programs: whatever is called, kept, changed, fed back or dropped, every value that is held equals eager's.

All numbers are whole and small enough for float32 to hold them exactly, so values are compared bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import cudagraph_backend as sg

WIDTH = 4
LARGEST = 24
HELD = 10  # values held at a time, at most
PRIME = 1009


# ---- what is compiled: each function takes and returns whole numbers below the prime


def stir(x):
    return torch.remainder(x.flip(1) * 3 + 1, PRIME)


def running_sum(x):
    return torch.remainder(x.cumsum(0), PRIME)


def centred(x):
    return torch.remainder(x * 2 + x.sum(0), PRIME)


def peaked(x):
    """The largest of each column: right in padded rows too only if these are filled."""
    return torch.remainder(x * 2 + x.amax(0), PRIME)


def several(x):
    """An aliasing pair, another output, the argument itself."""
    y = torch.remainder(x + 5, PRIME)
    return y, y[:, 1:], torch.remainder(x.sum(1), PRIME), x


def change(x):
    x.add_(1).remainder_(PRIME)
    return torch.remainder(x * 2, PRIME)


def combine(x, y):
    return torch.remainder(x * 2 + y.flip(1), PRIME)


def broken(x):
    if x.shape[1] != WIDTH:
        raise ValueError
    a = stir(x)
    torch._dynamo.graph_break()
    b = running_sum(a)
    torch._dynamo.graph_break()
    return a, torch.remainder(a + b + x, PRIME)


class Product(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(float(WIDTH * WIDTH)).view(WIDTH, WIDTH) % 5)

    def forward(self, x):
        return torch.remainder(torch.remainder(x, 11) @ self.weight, PRIME)


class Trained(torch.nn.Module):
    """Its backward needs the argument, and a product that is made on the way. Gradients are whole numbers too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(float(WIDTH)) % 3)

    def forward(self, x):
        y = x * self.weight
        return y * y


UNARY = {f.__name__: f for f in (stir, running_sum, centred, peaked, several, broken)}


class Functions:
    """The functions and their compiled twins, made once for all programs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.captures = self.rows_padded = 0  # before resets
        self.eager: dict[str, Any] = {**UNARY, "change": change, "combine": combine}
        self.eager["product"] = Product().to(device)
        self.eager["trained"] = Trained().to(device)
        self.compiled = {
            name: torch.compile(f, backend="sharedgraph", dynamic=True if name == "broken" else None)
            for name, f in self.eager.items()
        }

    def __call__(self, name: str, *arguments: torch.Tensor):
        for argument in arguments:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
        return self.compiled[name](*arguments)

    def reset(self) -> None:
        stats = sg.stats()
        self.captures += stats.captures
        self.rows_padded += stats.rows_padded
        assert stats.fallbacks == {}
        sg.reset()


@dataclass
class Value:
    """What the program holds, and its twin in eager. Views of one tensor are views of one twin."""

    ours: torch.Tensor
    eager: torch.Tensor
    address: int = 0

    def __post_init__(self) -> None:
        self.address = self.ours.data_ptr()

    def storage(self) -> int:
        return self.eager.untyped_storage().data_ptr()


@dataclass
class Pending:
    """A forward whose backward may come."""

    argument: Value
    ours: torch.Tensor
    eager: torch.Tensor


INDICES = st.integers(0, HELD - 1)


def machine(functions: Functions) -> type[RuleBasedStateMachine]:
    class Program(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.random = torch.Generator().manual_seed(0)
            self.values: list[Value] = []
            self.pending: list[Pending] = []

        @initialize(rows=st.integers(2, LARGEST))
        def start(self, rows):
            functions.reset()  # a failing program fails again when it is run alone
            self.user_tensor(rows)

        def hold(self, ours, eager) -> None:
            self.values.append(Value(ours, eager))
            del self.values[:-HELD]

        def matrix(self, index) -> Value:
            """One of the values that have the shape which functions take."""
            fitting = [v for v in self.values if v.eager.ndim == 2 and v.eager.shape[1] == WIDTH and len(v.eager)]
            if not fitting:
                self.user_tensor(index + 1)
                return self.values[-1]
            return fitting[index % len(fitting)]

        def is_saved(self, value) -> bool:
            """Saved for a backward that may come, so it must not be changed."""
            return any(value.storage() == p.argument.storage() for p in self.pending)

        # ---- what a program may do

        @rule(rows=st.integers(1, LARGEST))
        def user_tensor(self, rows):
            made = torch.randint(0, PRIME, (rows, WIDTH), generator=self.random).float().to(functions.device)
            self.hold(made.clone(), made)

        @rule(name=st.sampled_from([*UNARY, "product"]), index=INDICES)
        def call(self, name, index):
            x = self.matrix(index)
            with torch.no_grad():
                ours, eager = functions(name, x.ours), functions.eager[name](x.eager)
            if isinstance(eager, torch.Tensor):
                ours, eager = [ours], [eager]
            for got, expected in zip(ours, eager, strict=True):
                self.hold(got, expected)

        @rule(
            name=st.sampled_from(["stir", "running_sum", "peaked", "product"]), index=INDICES, times=st.integers(2, 5)
        )
        def feed_back(self, name, index, times):
            x = self.matrix(index)
            ours, eager = x.ours, x.eager
            with torch.no_grad():
                for _ in range(times):
                    ours, eager = functions(name, ours), functions.eager[name](eager)
            self.hold(ours, eager)

        @rule(first=INDICES, second=INDICES, skip=st.integers(0, 3))
        def call_with_two(self, first, second, skip):
            """Pieces of two values, or of one, that have equally many rows."""
            x, y = self.matrix(first), self.matrix(second)
            rows = max(min(len(x.eager), len(y.eager)) - skip, 1)
            with torch.no_grad():
                ours = functions("combine", x.ours[:rows], y.ours[-rows:])
                self.hold(ours, functions.eager["combine"](x.eager[:rows], y.eager[-rows:]))

        @rule(index=INDICES)
        def call_that_changes_its_argument(self, index):
            x = self.matrix(index)
            if not self.is_saved(x):
                with torch.no_grad():
                    self.hold(functions("change", x.ours), change(x.eager))

        @rule(index=INDICES, start=st.integers(0, 5), stop=st.integers(1, LARGEST))
        def view(self, index, start, stop):
            x = self.values[index % len(self.values)]
            self.hold(x.ours[start:stop], x.eager[start:stop])

        @rule(index=INDICES, amount=st.integers(1, 9))
        def change_in_place(self, index, amount):
            x = self.values[index % len(self.values)]
            if not self.is_saved(x):
                with torch.no_grad():
                    x.ours.add_(amount).remainder_(PRIME)
                    x.eager.add_(amount).remainder_(PRIME)

        @rule(index=INDICES)
        def export(self, index):
            """Hold the memory through another library's tensor, and no more by ours."""
            x = self.values[index % len(self.values)]
            exported = torch.from_dlpack(x.ours.detach())
            if exported.stride() == x.eager.stride():  # a dim of one entry may get another stride
                self.values[index % len(self.values)] = Value(exported, x.eager)

        @precondition(lambda self: len(self.values) > 1)
        @rule(index=INDICES)
        def drop(self, index):
            del self.values[index % len(self.values)]

        @rule()
        def drop_all_but_the_last(self):
            del self.values[:-1]

        @rule()
        def step(self):
            torch.compiler.cudagraph_mark_step_begin()

        @rule(index=INDICES)
        def forward(self, index):
            x = self.matrix(index)
            with torch.no_grad():
                if x.eager.max() > 101:  # gradients would not be exact
                    x = Value(functions("stir", x.ours), stir(x.eager))
                    x.ours.remainder_(101)
                    x.eager.remainder_(101)
            argument = Value(x.ours.detach().requires_grad_(), x.eager.detach().requires_grad_())
            ours, eager = functions("trained", argument.ours), functions.eager["trained"](argument.eager)
            self.pending.append(Pending(argument, ours, eager))
            del self.pending[:-3]

        @precondition(lambda self: self.pending)
        @rule(index=INDICES)
        def backward(self, index):
            pending = self.pending.pop(index % len(self.pending))
            weight = functions.eager["trained"].weight
            ours = torch.autograd.grad(pending.ours.sum(), [pending.argument.ours, weight])
            eager = torch.autograd.grad(pending.eager.sum(), [pending.argument.eager, weight])
            for got, expected in zip(ours, eager, strict=True):
                self.hold(got, expected)

        @precondition(lambda self: self.pending)
        @rule(index=INDICES)
        def no_backward(self, index):
            del self.pending[index % len(self.pending)]

        @rule(chance=st.integers(0, 4))
        def reset(self, chance):
            if chance == 0:
                functions.reset()

        # ---- what must hold

        @invariant()
        def every_value_is_eagers(self):
            for value in self.values:
                assert torch.equal(value.ours, value.eager)
                assert value.ours.stride() == value.eager.stride()
                assert value.ours.data_ptr() == value.address
            for pending in self.pending:
                assert torch.equal(pending.ours, pending.eager)
                assert torch.equal(pending.argument.ours, pending.argument.eager)

        def teardown(self):
            self.values.clear()
            self.pending.clear()

    return Program


@pytest.mark.slow
def test_random_programs(device):
    functions = Functions(device)
    run_state_machine_as_test(
        machine(functions),
        settings=settings(
            max_examples=40,
            stateful_step_count=100,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # with Phase.shrink too, a failing program gets short, in many minutes
        ),
    )
    functions.reset()
    assert functions.captures > 0
    assert functions.rows_padded > 0
