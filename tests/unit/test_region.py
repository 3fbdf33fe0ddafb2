"""A region's record, and calls of whole regions whose compiled code is the graph itself (no Inductor)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from torch._subclasses import FakeTensorMode

import cudagraph_backend
from cudagraph_backend import torch_internals
from cudagraph_backend.backend import _FrameCompile
from cudagraph_backend.debug import Debug
from cudagraph_backend.drivers.host import HostDriver
from cudagraph_backend.errors import Refusal
from cudagraph_backend.options import Options
from cudagraph_backend.region import DynamicDim, Region, SizeInput, TensorInput, evaluate, evaluate_all
from cudagraph_backend.torch_internals import Shapes
from tests.support.ungenerated import Compile

N, M = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))

# ------------------------------------------------------------------------------------------------ the record


@pytest.mark.parametrize(
    ("expression", "value"),
    [(sympy.Integer(7), 7), (N, 5), (2 * N + 1, 11), (N * M, 15), (sympy.floor(N / 2), 2), (N - M, 2)],
)
def test_an_expression_has_the_value_of_the_calls_sizes(expression: sympy.Expr, value: int):
    result = evaluate(expression, {N: 5, M: 3})
    assert result == value
    assert type(result) is int


def test_expressions_are_evaluated_in_order():
    assert evaluate_all((N, sympy.Integer(4), N + M), {N: 5, M: 3}) == (5, 4, 8)
    assert evaluate_all((), {}) == ()


def test_a_size_that_is_not_known_is_an_error():
    with pytest.raises(TypeError):
        evaluate(N * M, {N: 5})


def test_symbols_of_an_input_are_those_of_sizes_and_strides():
    tensor = TensorInput(0, "x", "staged", False, torch.float32, (N, sympy.Integer(4)), (M, sympy.Integer(1)))
    assert tensor.symbols == {N, M}
    assert TensorInput(0, "x", "static", False, torch.float32, (), ()).symbols == frozenset()


def test_a_size_is_read_from_an_int_or_a_dim():
    args = [9, torch.randn(4, 6)]
    assert SizeInput(0, None, N).read(args) == 9
    assert SizeInput(1, 0, N).read(args) == 4
    assert SizeInput(1, 1, M).read(args) == 6


def test_values_are_those_of_symbols_and_in_the_order_of_sizes():
    sizes = (SizeInput(0, None, N), SizeInput(1, None, 2 * N), SizeInput(2, None, sympy.Integer(3)), SizeInput(3, 0, M))
    region = Region(4, "forward", torch.device("cpu"), (), sizes, (), (), (), Shapes([]), None, False, ())
    assert region.values([5, 10, 3, 7]) == {N: 5, M: 7}
    assert region.name == "region 4 (forward)"
    with pytest.raises(ValueError, match="zip"):
        region.values([5])


def test_a_dim_is_named_by_its_symbols():
    assert DynamicDim(frozenset([N]), None, None, False).name == "s0"
    assert DynamicDim(frozenset([M, N]), None, Refusal("no"), False).name == "s0=s1"


# ------------------------------------------------------------------------------------------------ calls


def assert_replayed(calls: int) -> None:
    """Whether graphs answered that many calls, and nothing else did: values alone would be right without graphs too."""
    stats = cudagraph_backend.stats()
    assert (stats.replays, stats.fallbacks) == (calls, {})


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, check_stride=True)


def test_sizes_share_a_bucket_and_get_their_own_rows(compiles: Compile):
    def model(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).relu()

    compiled = compiles(model)
    for rows in (9, 16, 11, 7, 8):
        x = torch.randn(rows, 4)
        assert_equal(compiled(x), model(x))
    stats = cudagraph_backend.stats()
    assert (stats.graphs, stats.captures, stats.replays) == (2, 2, 5)
    assert (stats.rows_real, stats.rows_padded) == (51 + 5 * 4, 13)  # the columns are a dim, too
    assert stats.fallbacks == {}


def test_outputs_that_are_dropped_are_not_copied(compiles: Compile):
    compiled = compiles(lambda x: x * 2)
    addresses = set()
    for _ in range(5):
        result = compiled(torch.randn(6, 4))
        addresses.add(result.data_ptr())
        del result
    assert len(addresses) == 1
    assert cudagraph_backend.stats().outputs_copied_out == 0
    assert_replayed(5)


def test_outputs_that_are_kept_keep_their_values(compiles: Compile):
    compiled, kept = compiles(lambda x: x * 2), []
    for value in range(6):
        x = torch.full((6, 4), float(value))
        kept.append((compiled(x), x * 2))
    for got, expected in kept:
        assert_equal(got, expected)
    assert_replayed(6)
    assert cudagraph_backend.stats().outputs_copied_out == 4


def test_an_output_fed_back_is_read_before_it_is_overwritten(compiles: Compile):
    compiled = compiles(lambda x: x + 1)
    x = torch.zeros(6, 4)
    for _ in range(5):
        x = compiled(x)
    assert_equal(x, torch.full((6, 4), 5.0))
    assert_replayed(5)


def test_an_argument_is_changed_in_place_exactly_once_and_its_real_rows_only(compiles: Compile):
    compiled = compiles(lambda x: x.add_(1))
    base = torch.zeros(16, 4)
    for rows in (9, 9, 12):
        compiled(base[:rows])
    assert base[:, 0].tolist() == [3.0] * 9 + [1.0] * 3 + [0.0] * 4
    assert_replayed(3)


def test_windows_that_are_written_in_place_run_uncaptured_and_are_written_once(compiles: Compile):
    """Expanded inputs are refused for good; windows by their sizes, when they come, and other sizes are captured."""
    compiled, base = compiles(lambda x: x.add_(1)), torch.zeros(64)
    for rows in (6, 6, 7):
        compiled(base.as_strided((rows, 4), (2, 1)))
    assert base.tolist() == [3.0] * 14 + [1.0] * 2 + [0.0] * 48
    stats = cudagraph_backend.stats()
    assert stats.fallbacks == {"an input that is written in place overlaps itself in memory": 3}
    assert (stats.replays, stats.graphs) == (0, 0)
    apart = torch.zeros(6, 4)
    compiled(apart)
    assert_equal(apart, torch.ones(6, 4))
    assert cudagraph_backend.stats().replays == 1


def test_a_graph_without_operators_is_returned_as_inductor_left_it(compiles: Compile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_internals, "is_compiled_graph", lambda compiled: False)
    compiled, x = compiles(lambda x: x * 2), torch.randn(6, 4)
    assert_equal(compiled(x), x * 2)
    stats = cudagraph_backend.stats()
    assert (stats.regions, stats.replays, stats.fallbacks) == (0, 0, {})


def test_regions_of_one_place_may_return_different_numbers_of_tensors(compiles: Compile):
    def model(x: torch.Tensor, both: bool) -> tuple[torch.Tensor, ...]:
        return (x + 1, x * 2) if both else (x + 3,)

    compiled = compiles(model)
    for rows, both in ((5, False), (5, True), (6, False), (6, True), (5, False)):
        x = torch.randn(rows, 4)
        for got, expected in zip(compiled(x, both), model(x, both), strict=True):
            assert_equal(got, expected)
    assert_replayed(5)


def test_rows_of_a_table_of_positions(compiles: Compile):
    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(64, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.table[: x.shape[0]], x + 1

    model = Positions()
    compiled = compiles(model)
    with torch.no_grad():
        for rows in (5, 6, 9):
            x = torch.randn(rows, 4)
            rows_of_table, result = compiled(x)
            assert_equal(rows_of_table, model.table[:rows])
            assert_equal(result, x + 1)
            assert rows_of_table.data_ptr() == model.table.data_ptr()
            del rows_of_table, result  # kept, it would have the next call capture anew where outputs can't move
    assert_replayed(3)
    assert cudagraph_backend.stats().captures == 2


@pytest.mark.parametrize(("width", "rows"), [(10, 9), (12, 11), (4000, 3999)])
def test_rows_cut_from_columns_do_not_overlap_when_padded(compiles: Compile, width: int, rows: int):
    """Real rows end before the next column begins; those of the bucket may not."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).sum(1)

    x = torch.randn(4, width).t()[:rows]
    assert_equal(compiles(model)(x), model(x))
    assert_replayed(1)


def test_windows_of_a_dynamic_step_are_filled_or_not_padded(compiles: Compile):
    def model(x: torch.Tensor) -> torch.Tensor:
        return (x - x.amax(0)).sum(1)

    compiled = compiles(model)
    for step, rows in ((300, 9), (310, 7), (600, 9)):
        x = (torch.randn(20000) - 5).as_strided((rows, 500), (step, 1))
        torch.testing.assert_close(compiled(x), model(x))
    assert_replayed(3)


def test_windows_are_captured_at_their_own_size_whatever_the_users_sizes_are(compiles: Compile):
    def model(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).sum(1)

    compiled, memory = compiles(model, capture_sizes=[16, 64]), torch.randn(400)
    for rows in (9, 11, 9):
        x = memory.as_strided((rows, 4), (2, 1))
        torch.testing.assert_close(compiled(x), model(x))
    assert_replayed(3)
    stats = cudagraph_backend.stats()
    assert (stats.graphs, stats.rows_padded) == (2, 0)


def test_an_expanded_argument_without_rows(compiles: Compile):
    compiled = compiles(lambda x: x * 2, dynamic=False)
    x = torch.randn(1, 4).expand(0, 4)
    assert compiled(x).shape == (0, 4)
    assert_replayed(1)


def test_training_gives_eagers_gradients(compiles: Compile):
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight).tanh()

    compiled = compiles(model)
    weight = torch.randn(4, 3, requires_grad=True)
    for rows in (5, 6, 9):
        x, tangent = torch.randn(rows, 4), torch.randn(rows, 3)
        gradients = [torch.autograd.grad(f(x, weight), weight, tangent)[0] for f in (compiled, model)]
        torch.testing.assert_close(*gradients)
    assert_replayed(6)


# ------------------------------------------------------------------------------------------------ generators


def noisy_region() -> tuple[torch.fx.GraphModule, list[Any]]:
    """``x`` and random numbers of an argument. No program for the CPU has such a region: checkpoints on a GPU do."""
    graph, mode, generator = torch.fx.Graph(), FakeTensorMode(), torch.Generator()
    x, drawn_from = graph.placeholder("x"), graph.placeholder("fwd_rng_state_0")
    noise = graph.call_function(torch.ops.aten.rand.generator, ([3],), {"generator": drawn_from})
    result = graph.call_function(torch.ops.aten.add.Tensor, (x, noise))
    with mode:
        x.meta["val"], noise.meta["val"], result.meta["val"] = torch.empty(3), torch.empty(3), torch.empty(3)
    drawn_from.meta["val"] = generator
    graph.output((result, drawn_from))
    return torch.fx.GraphModule({}, graph), [x.meta["val"], generator]


def test_a_generator_is_drawn_from_at_every_call_and_has_graphs_of_its_own(
    compiles: Compile, monkeypatch: pytest.MonkeyPatch
):
    registered: list[Sequence[torch.Generator]] = []
    capture = HostDriver.capture

    def keep(self: HostDriver, run: Any, *, draws: bool, stages: bool, generators: Sequence[Any] = ()) -> Any:
        assert draws
        registered.append(generators)
        return capture(self, run, draws=draws, stages=stages, generators=generators)

    monkeypatch.setattr(HostDriver, "capture", keep)
    frame = _FrameCompile(cudagraph_backend.sharedgraph, Options(), Debug(), (), frozenset())
    call = frame.compile_region(*noisy_region(), is_inference=True, static_input_idxs=[])
    ours, eagers = ([torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(2))
    x = torch.randn(3)
    for number in (0, 0, 1, 0, 1, 1):
        result, generator = call([x, ours[number]])
        assert generator is ours[number]
        assert_equal(result, x + torch.rand(3, generator=eagers[number]))
        del result  # a kept one would ask for another place
    assert_replayed(6)
    assert registered == [[ours[0]], [ours[1]]]
    torch._dynamo.reset()
