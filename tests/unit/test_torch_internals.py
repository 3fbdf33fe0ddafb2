"""The private names of torch that this package relies on: each does what we take it to do, in every torch we allow."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._sympy.functions import (
    FloatTrueDiv,
    FloorDiv,
    IntTrueDiv,
    Max,
    Min,
    Mod,
    OpaqueUnaryFn_sqrt,
    PythonMod,
    ToFloat,
)

from cudagraph_backend import torch_internals
from cudagraph_backend.region import evaluate
from cudagraph_backend.torch_internals import (
    Shapes,
    StorageWeakRef,
    addresses_equal,
    borrowed_memory,
    current_step,
    dynamo,
    expr,
    forbid_access,
    forget_marked_steps,
    outside_inference_mode,
    same_storage,
    stock_graph_count,
    stock_trees,
    storage_users,
    storages,
    take_graph_override,
    with_allocator,
)
from tests.support.graphs import captured

# ------------------------------------------------------------------------------------------------ addresses


@pytest.fixture(params=["Python", "C++"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of comparing addresses that this build of torch has."""
    if request.param == "Python":
        monkeypatch.setattr(storages, "_ADDRESSES_EQUAL", None)
    elif storages._ADDRESSES_EQUAL is None:
        pytest.skip("this build of torch has no _tensors_data_ptrs_at_indices_equal")


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [1, 3], [3], []])
def test_addresses_are_equal_while_no_tensor_moves(indices: list[int]):
    tensors = [torch.zeros(4) for _ in range(4)]
    assert addresses_equal(tensors, [t.data_ptr() for t in tensors], indices)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("moved", [1, 3])
def test_addresses_differ_if_one_of_the_tensors_moves(moved: int):
    tensors: list[Any] = [5, torch.zeros(4), 7, torch.zeros(4)]
    addresses = [None, tensors[1].data_ptr(), None, tensors[3].data_ptr()]
    assert addresses_equal(tensors, addresses, [1, 3])
    before, tensors[moved] = tensors[moved], torch.zeros(4)
    assert not addresses_equal(tensors, addresses, [1, 3])
    tensors[moved] = before
    assert addresses_equal(tensors, addresses, [1, 3])


@pytest.mark.usefixtures("variant")
def test_only_the_tensors_asked_for_are_compared():
    tensors: list[Any] = [torch.zeros(4), 7, torch.zeros(4)]
    addresses = [tensors[0].data_ptr(), None, tensors[2].data_ptr()]
    before, tensors[0] = tensors[0], torch.zeros(4)
    assert addresses_equal(tensors, addresses, [2])
    assert before.data_ptr() != tensors[0].data_ptr()


# ------------------------------------------------------------------------------------------------ storages


def test_every_tensor_on_a_storage_is_one_more_user():
    tensor = torch.zeros(8)
    cdata = tensor.untyped_storage()._cdata
    alone = storage_users(cdata)
    view, alias = tensor[2:], tensor.detach()
    assert storage_users(cdata) == alone + 2
    del view
    assert storage_users(cdata) == alone + 1
    del alias
    assert storage_users(cdata) == alone


def test_a_tensor_on_the_same_storage_is_no_view_of_the_other():
    tensor = torch.arange(8.0)
    other = same_storage(tensor, (2, 2), (2, 1), 3)
    assert other.tolist() == [[3, 4], [5, 6]]
    assert other.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    assert other._base is None
    assert StorageWeakRef(other.untyped_storage()) == StorageWeakRef(tensor.untyped_storage())


def test_borrowed_memory_is_read_and_written_where_it_is():
    owner = torch.arange(4.0)
    storage = borrowed_memory(owner.data_ptr(), owner.untyped_storage().nbytes(), owner.device)
    tensor = torch.empty(0).set_(storage, 0, (4,), (1,))
    assert torch.equal(tensor, owner)
    tensor[0] = 7
    assert owner[0] == 7
    del tensor, storage
    assert owner[0] == 7


def test_forbidden_memory_raises_with_the_message():
    tensor, other = torch.zeros(4), torch.zeros(4)
    forbid_access(tensor.untyped_storage(), "it was overwritten")
    with pytest.raises(RuntimeError, match="it was overwritten"):
        tensor + 1
    assert torch.equal(other + 1, torch.ones(4))


def test_where_torch_can_forbid_all_accesses_it_is_left_to_do_so(monkeypatch: pytest.MonkeyPatch):
    forbidden: list[Any] = []
    monkeypatch.setattr(storages, "_FORBID_ACCESS", lambda *given: forbidden.append(given))
    tensor = torch.zeros(4)
    forbid_access(tensor.untyped_storage(), "it was overwritten")
    assert forbidden == [(tensor.untyped_storage()._cdata, "it was overwritten")]
    assert torch.equal(tensor + 1, torch.ones(4)), "no other class is needed"


def test_tensors_made_outside_of_inference_mode_can_be_saved_for_backward():
    with torch.inference_mode():
        with outside_inference_mode():
            inner = torch.zeros(2)
            assert not torch.is_grad_enabled()
        assert torch.zeros(2).is_inference()
    assert not inner.is_inference()
    (torch.ones(2, requires_grad=True) * inner).sum().backward()


# ------------------------------------------------------------------------------------------------ steps


def test_a_marked_step_is_a_new_step():
    before = current_step()
    assert current_step() == before
    torch.compiler.cudagraph_mark_step_begin()
    after = current_step()
    assert after != before
    torch.compiler.cudagraph_mark_step_begin()
    assert current_step() not in (before, after)


def test_stock_has_no_graphs_without_a_gpu():
    assert stock_graph_count(torch.device("cpu")) == 0


def test_stocks_graphs_are_those_of_its_whole_tree(monkeypatch: pytest.MonkeyPatch):
    def node(*children: Any) -> Any:
        return SimpleNamespace(children={number: [child] for number, child in enumerate(children)})

    manager = SimpleNamespace(roots={0: [node(node(), node(node())), node()], 1: []})
    monkeypatch.setattr(stock_trees, "get_manager", lambda index, create_if_none_exists: manager)
    assert stock_graph_count(torch.device("cuda", 0)) == 5


# ------------------------------------------------------------------------------------------------ precompiled code


def test_functions_of_ours_neither_get_nor_leave_precompiled_code(monkeypatch: pytest.MonkeyPatch):
    loaded: list[Any] = []
    recorded: list[Any] = []
    monkeypatch.setattr(dynamo.DynamoCache, "load", loaded.append)
    monkeypatch.setattr(dynamo.DynamoCache, "record_package", recorded.append)
    backend = object()
    dynamo.keep_precompiled_code_apart(backend)

    def ours() -> None: ...

    def theirs() -> None: ...

    def load(self: Any, function: Callable[..., Any]) -> None:
        dynamo.DynamoCache.load(function)

    for _ in range(2):
        load(SimpleNamespace(callback=backend), ours)
        load(SimpleNamespace(callback=object()), theirs)
    load(SimpleNamespace(callback=object()), ours)
    packages = [SimpleNamespace(_innermost_fn=function) for function in (ours, theirs)]
    for package in packages:
        dynamo.DynamoCache.record_package(package)
    assert loaded == [theirs, theirs]
    assert recorded == packages[1:]


# ------------------------------------------------------------------------------------------------ generated code

GENERATED = """
class Runner:
    def call(self, args):
        (x,) = args
        args.clear()
        buffer = empty_strided_cpu((2, 3), (3, 1), float32)
        buffer.copy_(x)
        buffers.append(buffer)
        return (buffer,)
"""


@pytest.fixture
def generated() -> types.ModuleType:
    """A module as Inductor generates it."""
    module = types.ModuleType("generated_by_inductor")
    module.__dict__.update(empty_strided_cpu=forbidden, float32=torch.float32, buffers=[])
    exec(GENERATED, module.__dict__)
    return module


def forbidden(*args: Any) -> Any:
    raise AssertionError("the module's own allocator was called")


def compiled_by(module: types.ModuleType) -> SimpleNamespace:
    return SimpleNamespace(compiled_fn_runner=module.Runner())


def test_an_allocator_serves_one_region_and_leaves_the_shared_module_alone(generated: types.ModuleType):
    asked, before = [], dict(generated.__dict__)

    def allocate(*layout: Any) -> torch.Tensor:
        asked.append(layout)
        return torch.empty_strided(layout[0], layout[1], dtype=layout[2])

    compiled = compiled_by(generated)
    call = with_allocator(compiled, "cpu", allocate)
    assert call is not None
    x = torch.randn(2, 3)
    (result,) = call([x])
    assert torch.equal(result, x)
    assert asked == [((2, 3), (3, 1), torch.float32)]
    assert result is generated.buffers[0]  # other globals are still the module's
    assert generated.__dict__ == before
    with pytest.raises(AssertionError, match="own allocator"):
        compiled.compiled_fn_runner.call([x])


def test_graphs_inside_a_region_have_its_allocator_and_die_with_it(generated: types.ModuleType):
    """A cycle would keep the allocator, and with it a driver and its memory, until the garbage collector runs."""
    source = GENERATED.replace("def call(self, args):", "def call(self, args):\n        return inside(args)") + (
        "def inside(args):\n    args.clear()\n    return [empty_strided_cpu((2,), (1,), float32)]\n"
        "def unrelated():\n    return unrelated\n"
    )
    exec(source, generated.__dict__)

    class Allocator:
        def __call__(self, *layout: Any) -> torch.Tensor:
            return torch.ones(layout[0])

    allocator = Allocator()
    call = with_allocator(compiled_by(generated), "cpu", allocator)
    assert call is not None
    assert torch.equal(call([torch.zeros(())])[0], torch.ones(2))
    ref = weakref.ref(allocator)
    gc.disable()
    try:
        del call, allocator
        assert ref() is None
    finally:
        gc.enable()


def test_two_regions_on_one_module_have_allocators_of_their_own(generated: types.ModuleType):
    def allocator(value: float) -> Callable[..., torch.Tensor]:
        return lambda size, stride, dtype: torch.full(size, value, dtype=dtype)

    generated.__dict__["buffers"] = seen = []
    first, second = (with_allocator(compiled_by(generated), "cpu", allocator(v)) for v in (1.0, 2.0))
    assert first is not None
    assert second is not None
    results = [call([torch.zeros(())])[0].untyped_storage()._cdata for call in (first, second, first)]
    assert len(set(results)) == len(seen) == 3


@pytest.mark.parametrize(
    "compiled",
    [None, lambda args: args, SimpleNamespace(compiled_fn_runner=None), SimpleNamespace(compiled_fn_runner=sys)],
)
def test_code_that_is_not_generated_python_takes_no_allocator(compiled: Any):
    assert with_allocator(compiled, "cpu", torch.empty_strided) is None


@pytest.mark.parametrize("compiled", [SimpleNamespace(), SimpleNamespace(compiled_fn_runner=SimpleNamespace(call=len))])
def test_code_that_is_not_generated_python_reads_no_size_that_it_lacks(compiled: Any):
    assert torch_internals.unbound_sizes(compiled) == []


def test_another_devices_code_takes_no_allocator(generated: types.ModuleType):
    assert with_allocator(compiled_by(generated), "cuda", torch.empty_strided) is None


# ------------------------------------------------------------------------------------------------ symbolic sizes


def shapes_of(model: Callable[..., Any], rows: int, **bounds: int) -> tuple[Shapes, sympy.Symbol]:
    """What torch knows of the first dim of a region's only argument, guards included."""
    x = torch.randn(rows, 4)
    torch._dynamo.mark_dynamic(x, 0, **bounds)
    _, example_inputs = captured(model, x, dynamic=None)
    symints = [i for i in example_inputs if isinstance(i, torch.SymInt)]
    shapes = Shapes(symints)
    shapes.freeze_guards()
    return shapes, expr(symints[0])


def admitted(shapes: Shapes, sizes: range) -> list[int]:
    return [n for n in sizes if shapes.admits([n])]


def test_a_graph_without_branches_admits_all_sizes():
    shapes, symbol = shapes_of(lambda x: x * 2, 6)
    assert admitted(shapes, range(2, 70)) == list(range(2, 70))
    assert shapes.upper_bound(symbol) is None


@pytest.mark.parametrize("rows", [16, 10])
def test_a_graph_traced_under_divisibility_admits_sizes_that_share_it(rows: int):
    shapes, _ = shapes_of(lambda x: x * 2 if x.shape[0] % 8 == 0 else x * 3, rows)
    assert admitted(shapes, range(2, 34)) == [n for n in range(2, 34) if (n % 8 == 0) == (rows == 16)]


@pytest.mark.parametrize("rows", [10, 30])
def test_a_graph_traced_on_one_side_of_a_limit_stays_there(rows: int):
    shapes, symbol = shapes_of(lambda x: x * 2 if x.shape[0] <= 20 else x * 3, rows)
    upper = shapes.upper_bound(symbol) or 64
    allowed = [n for n in admitted(shapes, range(rows, 64)) if n <= upper]  # buckets are never smaller than the size
    assert allowed == [n for n in range(rows, 64) if (n <= 20) == (rows == 10)]


def test_bounds_are_those_that_the_user_gave():
    shapes, symbol = shapes_of(lambda x: x * 2, 6, min=3, max=40)
    assert shapes.upper_bound(symbol) == 40


@pytest.mark.parametrize(("bounds", "upper"), [((3, None), None), ((None, 40), 40)])
def test_one_bound_leaves_the_other_open(bounds: tuple[int | None, int | None], upper: int | None):
    x = torch.randn(10, 4)
    torch_internals.mark_dim(x, 0, bounds)
    _, example_inputs = captured(lambda x: x * 2, x, dynamic=None)
    symint = next(i for i in example_inputs if isinstance(i, torch.SymInt))
    assert Shapes([symint]).upper_bound(expr(symint)) == upper


def test_guards_are_those_at_the_time_of_freezing():
    x = torch.randn(10, 4)
    torch._dynamo.mark_dynamic(x, 0)
    _, example_inputs = captured(lambda x: x * 2, x, dynamic=None)
    symint = next(i for i in example_inputs if isinstance(i, torch.SymInt))
    shapes = Shapes([symint])
    assert shapes.admits([7])
    assert symint.node.shape_env.evaluate_expr(sympy.Eq(expr(symint) % 2, 0))  # as Inductor may, while it compiles
    shapes.freeze_guards()
    assert admitted(shapes, range(2, 12)) == [2, 4, 6, 8, 10]


def test_a_guard_on_two_sizes_is_checked_together():
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum() + y.sum() if x.shape[0] < y.shape[0] else x.sum() - y.sum()

    x, y = torch.randn(6), torch.randn(9)
    _, example_inputs = captured(model, x, y)
    shapes = Shapes([i for i in example_inputs if isinstance(i, torch.SymInt)])
    shapes.freeze_guards()
    assert shapes.admits([6, 9])
    assert shapes.admits([8, 16])
    assert not shapes.admits([16, 9])


@pytest.mark.parametrize("dynamic", [None, True])
def test_marked_sizes_are_those_that_no_earlier_call_decides(dynamic: bool | None):
    found: list[tuple[sympy.Expr, ...]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        marked = torch_internals.marked_sizes(gm)
        values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        found.append(tuple(expr(size) in marked for tensor in tensors for size in tensor.shape))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: (x + 1, y + 1), backend=backend, dynamic=dynamic)
    for n in (5, 7):  # the second call shows that the other sizes change, too
        x, y = torch.randn(n, n + 1), torch.randn(n)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x, y)
    assert set(found) == {(True, False, False)}
    assert len(found) == (1 if dynamic else 2)


def test_a_region_without_symbols_admits_its_only_sizes():
    shapes = Shapes([])
    shapes.freeze_guards()
    assert shapes.admits([])
    assert shapes.parse("12") == 12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8*{s}", 72),
        ("{s}", 9),
        ("4", 4),
        ("2*{s} + 1", 19),
        ("4*({s}//2)", 16),
        ("{s}**2", 81),
        ("Max(2, {s} - 4, 1)", 5),
        ("Min({s}, FloorDiv({s}, 2))", 4),
    ],
)
def test_expressions_in_text_are_read_back(text: str, value: int):
    shapes, symbol = shapes_of(lambda x: x * 2, 6)
    assert evaluate(shapes.parse(text.format(s=symbol)), {symbol: 9}) == value


def test_an_int_is_an_expression():
    assert expr(5) == sympy.Integer(5)
    assert expr(5).free_symbols == frozenset()


# ------------------------------------------------------------------------------------------------ options


def test_inductors_settings_are_checked_by_inductor():
    assert torch_internals.checked_inductor_options({"max-autotune": True}) == {"max_autotune": True}
    assert "max_autotune" in torch_internals.inductor_option_names()
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        torch_internals.checked_inductor_options({"no_such_setting": 1})


# ------------------------------------------------------------------------------------------------ names of inputs


def test_inputs_of_a_dynamo_graph_know_where_the_frame_holds_them():
    found: list[list[str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(torch_internals.input_sources(gm))
        return gm.forward

    torch._dynamo.reset()
    x, y = torch.randn(3), torch.randn(3)
    torch.compile(lambda batch, **kwargs: batch["x"] + kwargs["y"], backend=backend)({"x": x}, y=y)
    assert found == [["L['batch']['x']", "L['kwargs']['y']"]]


def test_inputs_of_any_other_graph_have_its_names():
    gm = torch.fx.symbolic_trace(lambda x, y: x + y)
    assert torch_internals.input_sources(gm) == ["x", "y"]


def test_regions_know_which_inputs_are_those_of_the_call():
    seen: dict[str, list[int | None]] = {}

    def keep(kind: str) -> Callable[..., Any]:
        def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            seen[kind] = [torch_internals.call_input(node) for node in gm.graph.find_nodes(op="placeholder")]
            return gm.forward

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    torch.compile(lambda x, y: (x * y).sin(), backend=backend)(x, y).sum().backward()
    assert seen["forward"] == [0, 1]
    assert seen["backward"][-1] is None  # the tangent
    assert set(seen["backward"]) <= {0, 1, None}
    assert 1 in seen["backward"]


def test_the_base_of_views_is_no_input_of_the_call():
    seen: list[int | None] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.extend(torch_internals.call_input(node) for node in gm.graph.find_nodes(op="placeholder"))
        return gm.forward

    torch._dynamo.reset()
    base = torch.zeros(4)
    with torch.no_grad():
        torch.compile(lambda x, y: (x.add_(1), y * 2), backend=aot_autograd(fw_compiler=compiler))(base[:3], base[1:])
    assert seen == [None]


def test_forgotten_marks_count_no_more():
    before = current_step()
    torch.compiler.cudagraph_mark_step_begin()
    assert current_step() != before
    forget_marked_steps()
    assert current_step() == before
    torch.compiler.cudagraph_mark_step_begin()
    assert current_step() != before


def test_an_override_is_taken_off_the_graph():
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    assert take_graph_override(gm) == (None, None)
    gm.meta["cudagraph_annotation"] = SimpleNamespace(fwd=False, bwd=True)
    assert take_graph_override(gm) == (False, True)
    assert take_graph_override(gm) == (None, None)


# ------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("name", ["aten::mm", "aten::mm.default", "aten::sum.dim_IntList", "higher_order::cond"])
def test_operators_are_known_by_name_with_or_without_their_overload(name: str):
    assert torch_internals.is_registered_operator(name)


@pytest.mark.parametrize("name", ["aten::nothing", "aten::mm.other", "nobody::mm", "higher_order::nothing"])
def test_other_names_are_no_operators(name: str):
    assert not torch_internals.is_registered_operator(name)


def test_static_addresses_are_those_that_dynamo_was_told_of():
    tensor = torch.zeros(2)
    assert not torch_internals.has_static_address(tensor)
    torch._dynamo.mark_static_address(tensor)
    assert torch_internals.has_static_address(tensor)
    assert torch_internals.has_static_address(torch.nn.Parameter(torch.zeros(2)))


# ------------------------------------------------------------------------------------------------ parts of a region


def test_values_are_traced_again_with_the_strides_of_the_inputs():
    gm, (given,) = captured(lambda x: x.sin() + 1, torch.randn(4, 6), dynamic=False)
    values = [node for node in gm.graph.nodes if node.op == "call_function"]
    before = [node.meta["val"] for node in values]
    torch_internals.retrace_strides(gm, [given])
    assert all(node.meta["val"] is value for node, value in zip(values, before, strict=True))
    with torch_internals.fake_mode_of(gm.graph):
        transposed = torch.empty_strided((4, 6), (1, 4))
    torch_internals.retrace_strides(gm, [transposed])
    assert [node.meta["val"].stride() for node in values] == [(1, 4), (1, 4)]


def test_a_module_of_a_part_has_the_sizes_environment_of_the_whole():
    whole = torch.fx.symbolic_trace(lambda x: x + 1)
    assert getattr(torch_internals.module_of(whole.graph, whole), "shape_env", None) is None
    whole.shape_env = environment = object()  # type: ignore[assignment]
    assert torch_internals.module_of(whole.graph, whole).shape_env is environment


def test_a_number_is_known_only_where_a_tensor_holds_it():
    graph = torch.fx.Graph()
    number, lacking = graph.get_attr("number"), graph.get_attr("lacking")
    graph.output((number, lacking))
    assert torch_internals.number_of(number) is None, "no module is there yet"
    root = torch.nn.Module()
    root.register_buffer("number", torch.tensor(0.5))
    root.register_buffer("lacking", None)
    read = [node for node in torch.fx.GraphModule(root, graph).graph.nodes if node.op == "get_attr"]
    assert [torch_internals.number_of(node) for node in read] == [0.5, None]


KINDS = {int: torch.int64, float: torch.float64}


def test_sizes_are_computed_on_tensors():
    s, t = sympy.symbols("s t", integer=True, positive=True)
    cases = {
        2 * s * t + 3: 73,
        s**2 - t: 18,
        FloorDiv(s, 2): 2,
        Mod(s, 3): 2,
        PythonMod(t, 4): 3,
        Max(s, t): 7,
        Min(s, t, 6): 5,
        IntTrueDiv(s, t): 5 / 7,
        FloatTrueDiv(1.0, ToFloat(s)): 1 / 5,
        OpaqueUnaryFn_sqrt(ToFloat(s)): 5**0.5,
    }
    for expression, expected in cases.items():
        sizes = {s: torch.tensor(5), t: torch.tensor(7)}
        found = torch_internals.tensor_of_sizes(
            expression, sizes, lambda number: torch.tensor(number, dtype=KINDS[type(number)])
        )
        assert found.dtype == KINDS[type(expected)], expression
        torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-15, atol=0)
