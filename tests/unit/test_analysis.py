"""Analysis: what a region's graph says of inputs, symbols and outputs, and which ops can't be captured."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch._library import opaque_object
from torch._library.fake_class_registry import FakeScriptObject
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cudagraph_backend.compile.analysis import analyse, complete
from cudagraph_backend.compile.capturable import op_refusal
from cudagraph_backend.compile.outputs import with_strides
from cudagraph_backend.graph.source import source_line
from cudagraph_backend.options import Options
from cudagraph_backend.region import ArgumentOutput, Region, TensorInput, TensorOutput
from tests.support.graphs import captured

N, M = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))


def region_of(model: Callable[..., Any], *args: Any, static: Sequence[int] = (), **options: Any) -> Region:
    gm, example_inputs = captured(model, *args)
    return analyse(gm, example_inputs, "inference", static, Options(**options), 0)


def compiled(
    mutated: Sequence[int] = (), strides: Sequence[tuple[str, ...] | None] | None = None, reason: str | None = None
) -> SimpleNamespace:
    """What Inductor states of a region that it compiled, under Inductor's names."""
    return SimpleNamespace(mutated_input_idxs=mutated, output_strides=strides, disabled_cudagraphs_reason=reason)


def by_size(region: Region, *size: Any) -> TensorInput:
    """The input with this size, where a string stands for a symbol."""
    (found,) = (i for i in region.inputs if len(i.size) == len(size) and _matches(i.size, size))
    return found


def _matches(size: Sequence[sympy.Expr], pattern: Sequence[Any]) -> bool:
    return all(bool(e.free_symbols) if p == "n" else e == p for e, p in zip(size, pattern, strict=True))


# ------------------------------------------------------------------------------------------------ inputs and sizes


def test_inputs_are_staged_unless_their_address_is_fixed():
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    gm, example_inputs = captured(model, torch.randn(6, 4), torch.randn(4, 3), dynamic=False)
    region = analyse(gm, example_inputs, "inference", [1], Options(), 7)
    assert [(i.index, i.role, i.dtype, i.size, i.stride) for i in region.inputs] == [
        (0, "staged", torch.float32, (6, 4), (4, 1)),
        (1, "static", torch.float32, (4, 3), (3, 1)),
    ]
    assert region.name == "region 7 (inference)"
    assert region.sizes == region.dims == ()
    assert region.refusal is None


def test_a_static_input_with_a_dynamic_dim_is_staged():
    region = region_of(lambda x: x + 1, torch.randn(6, 4), static=range(3))
    assert [i.role for i in region.inputs] == ["staged"]


def test_sizes_are_read_from_int_arguments_and_inputs_state_them():
    region = region_of(lambda x: x.flatten() * 2, torch.randn(6, 4))
    (tensor,) = region.inputs
    assert [s.dim for s in region.sizes] == [None, None]
    assert [s.size for s in region.sizes] == list(tensor.size)
    assert [s.read([6, 4, None]) for s in region.sizes] == [6, 4]
    (output,) = region.outputs
    assert isinstance(output, TensorOutput)
    assert output.size == (tensor.size[0] * tensor.size[1],)


def test_a_symbol_that_no_int_argument_gives_is_read_from_a_dim():
    gm, example_inputs = captured(lambda x: x * 2, torch.randn(6, 4))
    for node in list(gm.graph.find_nodes(op="placeholder"))[:2]:
        gm.graph.erase_node(node)
    region = analyse(gm, example_inputs[2:], "backward", (), Options(), 0)
    assert [(s.index, s.dim) for s in region.sizes] == [(0, 0), (0, 1)]
    assert [s.read([torch.randn(9, 5)]) for s in region.sizes] == [9, 5]
    assert region.values([9, 5]) == dict(zip(region.inputs[0].size, (9, 5), strict=True))


def test_a_symbol_that_no_argument_gives_alone_is_found_or_refused():
    """Only ``2*s`` is an argument's size: every call must know ``s``, or the region isn't captured."""
    gm, _ = captured(lambda x: torch.cat([x, x]), torch.randn(6, 4))
    (cat,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    alone = Graph()
    doubled = alone.placeholder("tangents_1")
    doubled.meta["val"] = cat.meta["val"]
    result = alone.call_function(torch.ops.aten.neg.default, (doubled,))
    result.meta["val"] = cat.meta["val"]
    alone.output((result,))
    region = analyse(GraphModule({}, alone), [cat.meta["val"]], "backward", (), Options(), 0)
    known = set(region.values([s.read([torch.randn(12, 4)]) for s in region.sizes]))
    assert region.refusal is not None or region.inputs[0].symbols <= known


def test_mutated_inputs_are_those_that_inductor_reports():
    region = region_of(lambda x, y: x.add_(y), torch.randn(6, 4), torch.randn(6, 4))
    assert [i.mutated for i in region.inputs] == [False, False]
    assert not region.has_effects
    first = region.inputs[0].index
    done = complete(region, compiled(mutated=[first]))
    assert [i.mutated for i in done.inputs] == [True, False]
    assert done.has_effects
    assert done.refusal is None


@pytest.mark.parametrize("model", [torch.rand_like, lambda x: torch.nn.functional.dropout(x, 0.5), torch.bernoulli])
def test_drawing_random_numbers_is_an_effect(model: Callable[..., Any]):
    assert region_of(model, torch.rand(6, 4)).has_effects


def test_writing_to_an_expanded_input_is_refused():
    """Other inputs whose entries share an address are refused when they come: see ``test_region``."""
    gm, example_inputs = captured(lambda x: x + 1, torch.randn(1, 4).expand(6, 4), dynamic=False)
    region = analyse(gm, example_inputs, "inference", (), Options(), 0)
    assert complete(region, compiled()).refusal is None
    refusal = complete(region, compiled(mutated=[0])).refusal
    assert refusal is not None
    assert "written in place and several of its entries share an address" in refusal.reason


def test_source_lines_name_the_users_function():
    def model(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y.sin()

    first = model.__code__.co_firstlineno
    region = region_of(model, torch.randn(6, 4))
    (line,) = region.source_lines
    assert line.endswith(f"test_analysis.py:{first + 1}-{first + 2} in model")
    assert isinstance(region.outputs[0], TensorOutput)
    assert str(region.outputs[0].source).endswith(f"test_analysis.py:{first + 2} in model: return y.sin()")


def test_a_node_without_a_stack_has_no_source_line():
    assert source_line(Graph().placeholder("x")) is None


def test_frames_of_torch_are_no_users_frames():
    node = Graph().placeholder("x")
    inside = Path(torch.__file__).parent / "_dynamo" / "polyfills" / "__init__.py"
    frames = [("/home/user/model.py", "y = all(z)"), (str(inside), "return elem")]
    node.meta["stack_trace"] = "".join(f'  File "{file}", line 3, in f\n    {code}\n' for file, code in frames)
    assert source_line(node) == "/home/user/model.py:3 in f: y = all(z)"


def test_layers_without_a_users_frame_are_named_by_their_path():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)))
    region = region_of(model, torch.randn(6, 4))
    (refusal,) = (dim.refusal for dim in region.dims)
    assert refusal.source == "module 1.1 (BatchNorm1d)"
    assert region.source_lines == ("module Sequential",)


def test_a_layer_compiled_by_itself_is_named_by_its_class():
    (refusal,) = (dim.refusal for dim in region_of(nn.BatchNorm1d(4), torch.randn(6, 4)).dims if dim.refusal)
    assert refusal.source == "module BatchNorm1d"


def test_a_refused_input_is_named_by_the_line_that_reads_it():
    def model(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2

    region = region_of(model, torch.randn(1, 4).expand(6, 4), fill="zero")
    (refusal,) = (dim.refusal for dim in region.dims if dim.refusal)
    assert "is expanded along the dynamic dim" in refusal.reason
    assert str(refusal.source).endswith("in model: return x.sin() * 2")


def test_a_layer_called_by_a_user_is_named_by_the_users_line():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    refusals = [dim.refusal for dim in region_of(Model(), torch.randn(6, 4)).dims if dim.refusal]
    assert [r.source.split(" in ")[1] for r in refusals] == ["forward: return self.layers(x)"]


# ------------------------------------------------------------------------------------------------ dims


def verdicts(region: Region) -> dict[int, str | None]:
    """Per place of a symbol among the region's sizes, why it is not padded."""
    return {
        position: dim.refusal.reason if dim.refusal else None
        for position, size in enumerate(region.sizes)
        for dim in region.dims
        if size.size in dim.symbols
    }


def test_a_dim_has_the_bounds_that_the_user_gave():
    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    gm, example_inputs = captured(lambda x: x * 2, x, dynamic=None)
    region = analyse(gm, example_inputs, "inference", (), Options(), 0)
    assert [(d.upper, d.refusal) for d in region.dims] == [(64, None)]


def test_padding_off_refuses_every_dim():
    region = region_of(lambda x: x * 2, torch.randn(6, 4), pad="off")
    assert set(verdicts(region).values()) == {"padding is off (option pad='off')"}


def test_padding_assumed_takes_what_the_proof_refuses():
    assert verdicts(region_of(lambda x: x.median(0).values, torch.randn(6, 4), pad="assume"))[0] is None
    assert verdicts(region_of(lambda x: x.median(0).values, torch.randn(6, 4)))[0] is not None


def unproven(region: Region) -> list[str | None]:
    """Per dim that is left to the probe, the operator that has no proof; or why it isn't left to it."""
    return [d.to_probe.op if d.to_probe else d.refusal and d.refusal.reason for d in region.dims]


def test_what_the_proof_refuses_is_left_to_the_probe():
    x = torch.randn(6, 4)
    assert unproven(region_of(lambda x: x.median(0).values, x, pad="probe")) == ["aten.median.dim", None]
    assert unproven(region_of(lambda x: x.median(0).values, x)) == ["reduces or sorts over the padded rows", None]


def test_the_probe_does_not_change_a_refusal_of_the_layout():
    x = torch.randn(1, 4).expand(6, 4)
    (reason,) = unproven(region_of(lambda x: x.median(0).values, x, pad="probe", fill="zero"))[:1]
    assert "is expanded along the dynamic dim" in reason


def test_no_probe_of_random_numbers():
    region = region_of(lambda x: x.median(0).values + torch.rand(4), torch.randn(6, 4), pad="probe")
    assert "reduces or sorts over the padded rows; no probe: the region draws random numbers" in unproven(region)[0]


@pytest.mark.parametrize(
    ("function", "takes_extremes"),
    [
        (lambda x: x.long(), False),
        (lambda x: x.double().to(torch.int8), False),
        (lambda x: x.view(torch.int32), False),
        (lambda x: torch.bucketize(x, torch.arange(3.0)), False),
        (lambda x: (x > 0).long(), True),
        (lambda x: x.argmax(1), True),
        (lambda x: x.sort(1).indices + 1, True),
        (lambda x: x > 0, True),
        (lambda x: x.bfloat16(), True),
    ],
)
def test_extremes_that_may_become_integers(function, takes_extremes):
    region = region_of(lambda x: (function(x), x.median(0).values), torch.randn(6, 4), pad="probe")
    assert region.takes_extremes is takes_extremes
    (dim, *_) = region.dims
    assert (dim.refusal is None) is takes_extremes


@pytest.mark.parametrize(
    ("dtype", "inner", "precision"),
    [
        (torch.float32, torch.float32, 2**-23),
        (torch.float32, torch.bfloat16, 2**-7),
        (torch.float64, torch.float64, 2**-52),
        (torch.float64, torch.float32, 2**-23),
        (torch.int64, torch.int64, 0),
    ],
)
def test_the_precision_is_that_of_the_coarsest_value(dtype, inner, precision):
    region = region_of(lambda x: (x.to(inner) * 2).to(dtype) + 1, torch.ones(6, 4, dtype=dtype))
    assert region.precision == precision


@pytest.mark.parametrize(
    ("function", "is_refused"),
    [
        (lambda x: nn.functional.pad(x, (0, 0, 0, 1)), False),
        (lambda x: x[:-1] * 2, False),
        (lambda x: x[:-2] * 2, True),
    ],
)
def test_a_size_with_a_few_more_or_less_entries_than_rows(function, is_refused):
    """Padded rows come behind them; but a size that may be none has no last row to repeat."""
    gm, example_inputs = captured(function, torch.randn(6, 4))
    longer = gm.graph.output_node().args[0][0].meta["val"]
    graph = Graph()
    inputs = [example_inputs[0], example_inputs[-1], longer]
    names = [graph.placeholder(name) for name in ("s", "x", "longer")]
    for node, value in zip(names, inputs, strict=True):
        node.meta["val"] = value
    graph.output((names[1],))
    region = analyse(GraphModule({}, graph), inputs, "inference", (), Options(pad="assume"), 0)
    assert ("not so many entries per row" in str(verdicts(region)[0])) is is_refused


def test_a_size_that_is_a_product_of_two_dims_is_not_padded_along_both():
    """Real rows of ``s0*s1`` entries are no prefix of the bucket's."""
    gm, example_inputs = captured(lambda x: x.flatten() * 2, torch.randn(6, 4))
    flat = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor).meta["val"]
    graph = Graph()
    names = [graph.placeholder(name) for name in ("s", "k", "flat")]
    for node, value in zip(names, (*example_inputs[:2], flat), strict=True):
        node.meta["val"] = value
    graph.output(())
    region = analyse(GraphModule({}, graph), [*example_inputs[:2], flat], "backward", (), Options(pad="assume"), 0)
    assert len(verdicts(region)) == 2
    assert any(verdicts(region).values())


def test_a_dynamic_stride_is_that_of_the_bucket():
    region = region_of(lambda x: x * 2, torch.randn(6, 5)[:, 0])
    assert [*verdicts(region).values()] == [None, None]


def test_rows_may_be_the_stride_of_another_input():
    region = region_of(lambda x, y: (x * 2, y * 2), torch.randn(6, 4), torch.randn(5, 6)[:, 0])
    assert verdicts(region)[0] is None


def test_an_int_argument_is_padded_with_the_dim_that_it_counts():
    """As after a graph break: the size comes as an int, the tensor that it was read from does not come along."""

    def model(mask: torch.Tensor, n: int) -> torch.Tensor:
        return mask[torch.arange(n)[:, None], torch.arange(4)]

    region = region_of(model, torch.randn(7, 4), 6)
    (linked,) = (dim for dim in region.dims if len(dim.symbols) > 1)
    counted = {size.size for size in region.sizes} - {size for tensor in region.inputs for size in tensor.size}
    assert linked.refusal is None
    assert len(counted & linked.symbols) == 1


def test_an_int_argument_that_is_a_size_is_padded():
    region = region_of(lambda x, n: x[:, None].expand(-1, n) * 2, torch.randn(6), 9)
    assert [dim.refusal for dim in region.dims] == [None, None]


def test_an_int_argument_that_is_a_value_has_no_rows():
    region = region_of(lambda x, n: x[:, None] * n, torch.randn(6), 9)
    (refusal,) = (dim.refusal for dim in region.dims if dim.refusal)
    assert refusal.reason == "the padded size reaches values through argument 'other'"
    assert str(refusal.source).endswith("x[:, None] * n, torch.randn(6), 9)")


def test_expanded_rows_can_not_be_filled_with_zeros():
    x = torch.randn(1, 4).expand(6, 4)
    assert "expanded along the dynamic dim" in str(verdicts(region_of(lambda x: x * 2, x, fill="zero"))[0])
    assert verdicts(region_of(lambda x: x * 2, x))[0] is None


@pytest.mark.parametrize(
    ("size", "stride", "padded"),
    [
        ((N, 4), (4, 1), True),
        ((N, 4), (6, 1), True),
        ((3, N), (1, 3), True),
        ((N, 4), (0, 1), True),
        ((N, 4), (2, 1), False),  # windows
        ((N, 4), (1, 10), False),  # rows cut from columns
        ((3, 2 * N, 4), (80, 4, 1), False),
        ((N, N), (7, 1), False),
        ((N, M), (M, 1), True),  # judged call by call
        ((9, 4), (2, 1), True),  # windows, and no dynamic dim among them
    ],
)
def test_a_dim_whose_rows_would_overlap_when_padded_is_not(size: Any, stride: Any, padded: bool):
    region = region_of(lambda x: x.sum(1), torch.randn(6, 4), pad="assume")
    (rows,) = region.inputs
    symbols = dict(zip((N, M), rows.size, strict=True))
    size, stride = (tuple(sympy.sympify(e).xreplace(symbols) for e in part) for part in (size, stride))
    done = complete(replace(region, inputs=(replace(rows, size=size, stride=stride),), outputs=()), compiled())
    assert verdicts(done)[0] == (None if padded else f"input {rows.name} would overlap itself in memory")


# ------------------------------------------------------------------------------------------------ outputs


def test_strides_are_those_that_inductor_states():
    region = region_of(lambda x: (x.shape[0], x * 2, None), torch.randn(6, 4))
    rows, width = region.inputs[0].size
    tensors = [o for o in region.outputs if isinstance(o, TensorOutput)]
    assert [o.stride for o in tensors] == [None]
    strides = [(f"2*{width}", "1") if isinstance(o, TensorOutput) else None for o in region.outputs]
    stated = with_strides(region.outputs, strides, region.shapes)
    assert [o.stride for o in stated if isinstance(o, TensorOutput)] == [(2 * width, 1)]
    assert complete(region, compiled(strides=strides)).outputs == stated
    assert with_strides(region.outputs, None, region.shapes) == region.outputs
    assert rows in region.outputs


# ------------------------------------------------------------------------------------------------ refusals


def refusal_of(model: Callable[..., Any], *args: Any) -> tuple[str, str, str]:
    refusal = region_of(model, *args).refusal
    assert refusal is not None
    return refusal.reason, str(refusal.op), str(refusal.source)


@torch.library.custom_op("sharedgraph_tests::unsafe", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def unsafe(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("sharedgraph_tests::safe", mutates_args=())
def safe(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@unsafe.register_fake
@safe.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def calls_unsafe(x: torch.Tensor) -> torch.Tensor:
    return unsafe(x) + 1


def branches(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def selects(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0] * 2


def finds(x: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(x)


def reads(x: torch.Tensor) -> torch.Tensor:
    return x * x.argmax().item()


@pytest.mark.parametrize(
    ("model", "reason", "op", "line"),
    [
        (calls_unsafe, "tagged unsafe for CUDA graphs", "sharedgraph_tests.unsafe", "return unsafe(x) + 1"),
        (branches, "a higher-order operator may branch on data", "cond", "torch.cond("),
        (selects, "a size or value depends on data", "aten.", "x[x > 0]"),
        (finds, "a size or value depends on data", "aten.nonzero", "torch.nonzero(x)"),
        (reads, "a size or value depends on data", "aten._local_scalar_dense", "x.argmax().item()"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_an_op_that_can_not_be_captured_is_named_with_its_line(model: Any, reason: str, op: str, line: str):
    got = refusal_of(model, torch.randn(6, 4))
    assert reason in got[0]
    assert op in got[1]
    assert f" in {model.__name__}: " in got[2]
    assert line in got[2]


@pytest.mark.parametrize(
    "model",
    [safe, lambda x: x[torch.arange(2)], lambda x: torch.where(x > 0, x, 0), lambda x: x.topk(2).values],
    ids=["custom op", "index", "where", "topk"],
)
def test_what_can_be_captured_is_not_refused(model: Callable[..., Any]):
    assert region_of(model, torch.randn(6, 4)).refusal is None


@pytest.mark.parametrize("is_ours", [False, True])
def test_a_wait_is_for_one_of_several_collectives_that_began_in_the_graph(is_ours: bool):
    graph, collectives = Graph(), torch.ops._c10d_functional
    x = graph.placeholder("x")
    begin = collectives.all_reduce_coalesced.default
    begun = graph.call_function(begin, ([x, x], "sum", "0")) if is_ours else graph.placeholder("begun")
    second = graph.call_function(operator.getitem, (begun, 1))
    wait = graph.call_function(collectives.wait_tensor.default, (second,))
    for node in (x, second, wait):
        node.meta["val"] = torch.empty(3)
    begun.meta["val"] = [torch.empty(3), torch.empty(3)]
    refusal = op_refusal(wait, torch.device("cpu"))
    if is_ours:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.reason == "it waits for a collective that is not in the graph"


def test_a_float_of_a_size_is_no_data():
    """``x * n**-0.5`` can be captured, and padded, as it is computed from the number of real rows."""
    region = region_of(lambda x: x * x.shape[0] ** -0.5, torch.randn(6, 4))
    assert region.refusal is None
    assert verdicts(region)[0] is None


def test_a_refused_region_has_no_dims():
    assert region_of(calls_unsafe, torch.randn(6, 4)).dims == ()


def hand_made(*values: Any) -> Graph:
    """A graph that returns its arguments, with ``values`` as what they are."""
    graph = Graph()
    nodes = [graph.placeholder(f"arg{i}_1") for i in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    graph.output(tuple(nodes))
    return graph


def refusal_for(*values: Any) -> str:
    region = analyse(GraphModule({}, hand_made(*values)), values, "inference", (), Options(), 0)
    assert region.refusal is not None
    return str(region.refusal)


def reading(*values: Any) -> Region:
    """A region with an operator that reads all arguments, on the user's line 12."""
    graph = hand_made(*values)
    output = graph.output_node()
    with graph.inserting_before(output):
        node = graph.call_function(torch.ops.aten.sin.default, tuple(graph.find_nodes(op="placeholder")))
    node.meta["val"] = torch.ones(2)
    node.meta["stack_trace"] = 'File "/home/user/model.py", line 12, in forward\n    y = f(x)'
    output.args = ((node,),)
    return analyse(GraphModule({}, graph), values, "inference", (), Options(), 0)


def test_mixed_devices_are_refused_with_both_names_and_the_cpus_line():
    with FakeTensorMode():
        values = torch.empty(2, device="cuda:0"), torch.empty(2)
    graph = hand_made(*values)
    frame = 'File "/home/user/model.py", line 12, in forward\n    y = x + self.table'
    list(graph.nodes)[1].meta["stack_trace"] = frame
    refusal = analyse(GraphModule({}, graph), values, "inference", (), Options(), 0).refusal
    assert refusal is not None
    assert refusal.reason == "the region mixes devices: cpu and cuda:0"
    assert refusal.op == "arg1_1"
    assert refusal.source == "/home/user/model.py:12 in forward: y = x + self.table"


def test_a_device_without_driver_is_refused():
    with FakeTensorMode():
        assert "no graph driver for device xpu" in refusal_for(torch.empty(2, device="xpu"))


def test_a_region_on_meta_is_refused_and_a_tensor_there_is_no_mix_of_devices():
    assert "no tensor that has memory" in refusal_for(torch.empty(2, device="meta"))
    region = reading(torch.empty(2, device="meta"), torch.ones(2))
    assert (region.refusal, region.device) == (None, torch.device("cpu"))


def test_a_region_without_tensors_is_refused():
    assert "holds no tensor" in refusal_for(3)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(3).to_sparse(), "input arg0_1 has layout torch.sparse_coo"),
        (torch.randn(3, dtype=torch.complex64).conj(), "input arg0_1 is a lazy conjugate or negative view"),
        (torch.randn(3, dtype=torch.complex64).conj().imag, "input arg0_1 is a lazy conjugate or negative view"),
    ],
    ids=["sparse", "conjugate", "negative"],
)
def test_inputs_that_are_not_plain_memory_are_refused(value: torch.Tensor, reason: str):
    refusal = reading(value, torch.ones(1)).refusal
    assert refusal is not None
    assert reason in refusal.reason
    assert refusal.source == "/home/user/model.py:12 in forward: y = f(x)"
    assert analyse(GraphModule({}, hand_made(value)), (value,), "inference", (), Options(), 0).refusal is None


@pytest.mark.parametrize("value", [True, 2.5, None, "text", [1]])
def test_inputs_that_are_neither_tensor_nor_size_are_refused_where_they_are_read(value: Any):
    refusal = reading(value, torch.ones(1)).refusal
    assert refusal is not None
    assert refusal.reason == f"input arg0_1 is a {type(value).__name__}, neither a tensor nor a size"
    region = analyse(
        GraphModule({}, hand_made(value, torch.ones(1))), (value, torch.ones(1)), "inference", (), Options(), 0
    )
    assert region.refusal is None
    assert region.outputs[0] == ArgumentOutput(0)


class Constant:
    """Equal ones are one, so that Dynamo may take it for part of the code."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant)

    def __hash__(self) -> int:
        return 1

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        return "Constant()", {"Constant": Constant}


class Counter(OpaqueBase):
    """What it holds may be another number at every call."""


def test_objects_that_never_change_are_read_as_they_are_and_others_are_refused(monkeypatch):
    monkeypatch.setattr(opaque_object, "_OPAQUE_TYPES", opaque_object._OPAQUE_TYPES.copy())
    register_opaque_type(Constant, typ="value")
    register_opaque_type(Counter, typ="reference")
    group = torch.distributed.ProcessGroup(0, 1)
    for value in (torch.Generator(), group, FakeScriptObject(group, "ProcessGroup", group), Constant()):
        region = reading(torch.ones(2), value)
        assert (region.refusal, region.objects) == (None, (1,))
        unread = analyse(
            GraphModule({}, hand_made(torch.ones(2), value)), (torch.ones(2), value), "inference", (), Options(), 0
        )
        assert unread.objects == ()
        assert unread.outputs[1] == ArgumentOutput(1)
    counter = Counter()
    for value in (counter, FakeScriptObject(counter, "Counter", counter)):
        refusal = reading(torch.ones(2), value).refusal
        assert refusal is not None
        assert refusal.reason == "input arg1_1 is a Counter, neither a tensor nor a size"


def test_a_region_that_reads_a_generator_draws_random_numbers():
    assert reading(torch.ones(2), torch.Generator()).has_effects
    assert not reading(torch.ones(2)).has_effects


def test_the_lengths_of_a_jagged_dim_are_no_size():
    lengths = FakeTensorMode(shape_env=ShapeEnv()).create_symbolic_nested_int(nt_tensor_id=1)
    graph = hand_made(lengths, torch.ones(2))
    region = analyse(GraphModule({}, graph), (lengths, torch.ones(2)), "forward", (), Options(), 0)
    assert (region.refusal, region.sizes, region.objects) == (None, (), ())
    assert region.outputs[0] == ArgumentOutput(0)
    refusal = reading(lengths, torch.ones(2)).refusal
    assert refusal is not None
    assert refusal.reason == "input arg0_1 stands for the lengths of a jagged dim"


def test_dims_of_tensors_on_meta_are_not_padded():
    region = region_of(lambda t, y: (t * 2, y * 2), torch.empty(6, 4, device="meta"), torch.randn(5, 3))
    refusals = {dim.refusal.reason if dim.refusal else None for dim in region.dims}
    (meta,) = [tensor for tensor in region.inputs if tensor.role == "static"]
    assert refusals == {None, f"input {meta.name} is on the device meta, and has no rows to add to"}


def test_inductors_own_reason_counts_on_cuda_only():
    region = region_of(lambda x: x * 2, torch.randn(6, 4))
    assert complete(region, compiled(reason="cpu device")).refusal is None
    on_cuda = replace(region, device=torch.device("cuda:0"))
    assert complete(on_cuda, compiled()).refusal is None
    assert str(complete(on_cuda, compiled(reason="cpu device")).refusal) == "Inductor: cpu device"
