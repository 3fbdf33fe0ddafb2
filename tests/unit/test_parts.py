"""Parts: where a graph is cut, what goes from part to part, how long it lives, and scalars that move to a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import ConstantSource
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cudagraph_backend.compile.analysis import analyse
from cudagraph_backend.compile.capturable import devices_of
from cudagraph_backend.compile.cut import Part, Split, split
from cudagraph_backend.compile.levels import CannotSplit, Flow, parts_of
from cudagraph_backend.compile.scalars import move_scalars, moving
from cudagraph_backend.errors import Refusal
from cudagraph_backend.options import Options
from cudagraph_backend.region import Wiring
from cudagraph_backend.runtime.composition import Composition

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@torch.library.custom_op("parts_unit::wave", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def wave(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


wave.register_fake(torch.empty_like)


def two(x: Any) -> Any:
    """Two operators: a part of one is not worth a graph."""
    return x * 2 + 1


def parts(model: Callable[..., Any], *args: Any, dynamic: bool = True) -> list[Part]:
    """The parts of the region that AOTAutograd hands over for a call; running them in turn gives the model's result."""
    return list(cut(model, *args, dynamic=dynamic)[0].parts)


def cut(model: Callable[..., Any], *args: Any, dynamic: bool = True) -> tuple[Split, GraphModule]:
    seen: list[tuple[Split | None, GraphModule]] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        code = gm.code
        seen.append((split(gm, example_inputs, CPU), gm))
        assert gm.code == code, "the region's own graph has changed"
        made = seen[-1][0]
        if made is None:
            return gm.forward
        composition = Composition(made.wiring, [lambda args, part=part: part.module(*args) for part in made.parts])
        return lambda *args: composition(list(args))

    torch._dynamo.reset()
    decompositions = select_decomp_table()
    backend = aot_autograd(fw_compiler=keep, decompositions=decompositions, keep_inference_input_mutations=True)
    expected = model(*(a.clone() for a in args))
    with torch.no_grad():
        result = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    torch.testing.assert_close(result, expected)
    assert seen[0][0] is not None
    return seen[0]


def operators(part: Part) -> list[str]:
    called = [n.target for n in part.module.graph.nodes if n.op == "call_function"]
    return [str(target).split(".")[-2] for target in called if isinstance(target, torch._ops.OpOverload)]


def inputs(part: Part) -> list[str]:
    return [str(n.target) for n in part.module.graph.find_nodes(op="placeholder")]


def test_operators_go_as_far_forward_as_what_they_read_allows():
    def model(x):
        y = x + 1
        return wave(y) * 2 + y.relu()

    first, unsafe, second = parts(model, torch.randn(6, 4))
    assert operators(first) == ["add", "relu"]
    assert operators(unsafe) == ["wave"]
    assert operators(second) == ["mul", "add"]
    assert [part.refusal is None for part in (first, unsafe, second)] == [True, False, True]


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda x: two(wave(wave(x))), 2),
        (lambda x: wave(two(x)), 2),
        (lambda x: two(wave(x)) + wave(two(x)), 3),
        (lambda x: two(wave(two(wave(two(x))))), 5),
        (lambda x: (two(x), wave(x)), 2),
        (lambda x: two(wave(x.t()[:2])[1:].t() + x.shape[0]), 2),  # views and sizes are no part
        (lambda x: two(wave(wave(two(x)) + 1)), 3),  # nor is one operator
    ],
)
def test_there_are_as_few_parts_as_possible(model: Callable[..., Any], count: int):
    assert len(parts(model, torch.randn(6, 4))) == count


def test_a_graph_of_one_kind_is_not_cut():
    for model in (lambda x: x + 1, wave):
        with pytest.raises(AssertionError):
            cut(model, torch.randn(6, 4))


def test_views_and_constants_are_computed_by_every_part_that_reads_them():
    def model(x):
        y = x @ x
        return wave(two(y).t()) * y.t() * torch.full((), 3.0) + torch.arange(5)

    first, unsafe, second = parts(model, torch.randn(5, 5), dynamic=False)
    assert [[n.name for n in p.module.graph.output_node().args[0]] for p in (first, unsafe)] == [
        ["mm", "add"],
        ["wave"],
    ]
    assert operators(unsafe).count("permute") == operators(second).count("permute") == 1
    assert inputs(second) == ["mm", "wave"]
    assert "iota" in operators(second)


def test_what_reads_arguments_alone_is_computed_where_it_is_read():
    """Autocast casts all weights first; they would all be handed from part to part."""
    first, _, second = parts(lambda x, w: wave(two(x)) @ w.float(), torch.randn(6, 4), torch.randn(4, 4).double())
    assert operators(first) == ["mul", "add"]
    assert "mm" in operators(second)
    assert len(operators(second)) > 1


def test_parts_are_given_the_sizes_in_their_graphs():
    split_, gm = cut(lambda x: two(wave(two(x)).reshape(-1)), torch.randn(6, 4))
    symbols = [n.name for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], torch.SymInt)]
    for part in split_.parts:
        assert set(inputs(part)[: len(symbols)]) == set(symbols)


def test_a_size_that_no_number_gives_is_read_from_an_argument():
    split_, gm = cut(lambda x: two(wave(two(x))), torch.randn(6, 4))
    tensor = gm.graph.find_nodes(op="placeholder")[-1]
    assert split_.wiring.sizes == ()
    for number in gm.graph.find_nodes(op="placeholder")[:-1]:
        number.replace_all_uses_with(tensor, propagate_meta=False)
        gm.graph.erase_node(number)
    made = split(gm, [tensor.meta["val"]], CPU)
    assert made is not None
    assert [(s.index, s.dim) for s in made.wiring.sizes] == [(0, 0), (0, 1)]
    composition = Composition(made.wiring, [lambda args, part=part: part.module(*args) for part in made.parts])
    x = torch.randn(9, 3)
    torch.testing.assert_close(composition([x]), [two(two(x).sin())])


def test_a_write_is_made_with_its_value_after_all_reads():
    def model(x, y):
        result = two(wave(two(wave(y) + x)) * x)
        x.copy_(y * 2)
        return result

    made = parts(model, torch.randn(6, 2), torch.randn(6, 2))
    writing = [i for i, part in enumerate(made) if "copy_" in operators(part)]
    assert writing == [len(made) - 1]  # it reads `x`, too
    made = parts(lambda x, y: (two(wave(two(wave(two(x + y))))), x.add_(1))[0], torch.randn(6, 2), torch.randn(6, 2))
    assert ["copy_" in operators(part) for part in made] == [True, False, False, False, False]


def graph_of(*targets: Any) -> tuple[Graph, list[Node]]:
    """A chain of operators on one input."""
    graph, nodes = Graph(), []
    value = graph.placeholder("x")
    value.meta["val"] = torch.empty(3)
    for target in targets:
        value = graph.call_function(target, (value, *([2] if target is aten.add.Tensor else [])))
        value.meta["val"] = torch.empty(3)
        nodes.append(value)
    graph.output((value,))
    return graph, nodes


def test_a_write_in_the_middle_is_not_cut():
    graph, nodes = graph_of(aten.relu_.default, aten.sin.default)
    with pytest.raises(CannotSplit, match="before the graph's end"):
        parts_of(Flow(graph), {nodes[1]: Refusal("unsafe")})


def test_random_numbers_keep_their_order():
    graph, drawn = Graph(), []
    for _ in range(6):
        drawn.append(graph.call_function(aten.rand.default, ([3],)))
        drawn[-1].meta["val"] = torch.empty(3)
    graph.output(tuple(drawn))
    part_of = parts_of(Flow(graph), {node: Refusal("unsafe") for node in drawn[2:4]})
    assert [part_of[node] for node in drawn] == [0, 0, 1, 1, 2, 2]


# ------------------------------------------------------------------------------------------------ calls


class Value:
    """What a weak reference may refer to."""


def part(reads: Sequence[int], makes: Sequence[int]) -> Part:
    return Part(GraphModule({}, Graph()), (), tuple(reads), tuple(makes), None)


def test_values_live_until_their_last_reader_is_called():
    alive: list[list[int]] = []
    refs: dict[int, weakref.ref[Value]] = {}

    def call(*makes: int) -> Callable[[list[Any]], list[Any]]:
        def run(args: list[Any]) -> list[Any]:
            args.clear()  # as compiled code does once it has read them
            alive.append([slot for slot, ref in refs.items() if ref() is not None])
            made = [Value() for _ in makes]
            refs.update(zip(makes, map(weakref.ref, made), strict=True))
            return made

        return run

    # Arguments 0 to 3, of which nobody reads 3; 4 is a constant.
    steps = [part([0, 1], [5, 6]), part([5, 0], [7]), part([7, 2], [8])]
    reads, makes = tuple(p.reads for p in steps), tuple(p.makes for p in steps)
    composition = Composition(Wiring((), (None,), reads, makes, (8, 6, 1, 4, 8)), [call(*p.makes) for p in steps])
    args = [Value() for _ in range(4)]
    refs.update(enumerate(map(weakref.ref, args)))
    results = composition(args)
    assert args == []
    assert alive == [[0, 1, 2], [1, 2, 6], [1, 6]]
    assert [r is None for r in results] == [False, False, False, True, False]
    assert results[0] is results[4]


# ------------------------------------------------------------------------------------------------ devices


def mixed(build: Callable[[Graph, Callable[..., Node], dict[str, Node]], Any]) -> GraphModule:
    """A graph on ``x`` on a GPU, and on the CPU the scalars ``a`` and ``b`` and some ``rows``."""
    graph, mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())
    given: dict[str, Node] = {}
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    rows = mode.from_tensor(torch.empty(4, 3), symbolic_context=context, source=ConstantSource("rows"))
    with mode:
        values = torch.empty(3, device=CUDA), torch.empty(()), torch.empty(()), rows
    for name, value in zip(("x", "a", "b", "rows"), values, strict=True):
        given[name] = graph.placeholder(name)
        given[name].meta["val"] = value

    def add(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, args, kwargs)
        with mode:
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node

    graph.output(tuple(build(graph, add, given)))
    return GraphModule({}, graph)


def test_a_tensor_on_the_cpu_of_which_only_the_size_is_read_does_not_keep_from_capture():
    """So are the lengths of jagged tensors, which are on the CPU and hold nothing."""

    def build(graph, add, given):
        rows = given["rows"].meta["val"]
        on_gpu = graph.placeholder("on_gpu")
        on_gpu.meta["val"] = rows.new_empty(rows.shape, device=CUDA)
        size = add(aten.sym_size.int, given["rows"], 0)
        return add(aten.mul.Tensor, given["x"], size), add(aten.mul.Tensor, on_gpu, 2)

    module = mixed(build)
    examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    assert split(module, examples, CUDA) is None
    region = analyse(module, examples, "inference", (), Options(), 0)
    assert region.refusal is None
    assert [tensor.name for tensor in region.inputs] == ["x", "on_gpu"]
    (dim,) = region.dims
    assert dim.refusal is not None
    assert "the padded size reaches values" in dim.refusal.reason
    (assumed,) = analyse(module, examples, "inference", (), Options(pad="assume"), 0).dims
    assert assumed.refusal is not None
    assert "argument rows has the same size" in assumed.refusal.reason


def test_a_constant_on_the_cpu_is_returned_from_a_part_of_its_own():
    def build(graph, add, given):
        size = add(aten.sym_size.int, given["rows"], 0)
        constants = (add(aten.full.default, [size, 0], 0.0, device=d) for d in (CPU, CUDA))
        return add(aten.sin.default, given["x"]), *constants

    parts = split_of(mixed(build))
    assert [operators(p) for p in parts] == [["sym_size", "sin", "full"], ["sym_size", "full"]]
    assert [p.refusal is None for p in parts] == [True, False]


def test_scalars_that_only_the_gpu_reads_are_moved():
    def build(graph, add, given):
        scaled = add(aten.mul.Tensor, given["x"], add(aten.sqrt.default, given["a"]))
        zero = add(aten.full.default, [], 0.0, dtype=torch.float32, device=CPU)
        return add(aten.where.self, add(aten.gt.Scalar, scaled, 0), scaled, zero), add(aten.add.Tensor, given["b"], 1)

    module = mixed(build)
    assert move_scalars(module.graph, CUDA) == {1}
    on_cpu = [n.target for n in module.graph.nodes if n.op != "output" and n.meta["val"].device == CPU]
    assert on_cpu == ["b", "rows", aten.add.Tensor]
    assert [p.refusal is None for p in split_of(module)] == [True, False]


@pytest.mark.parametrize("reader", ["output", "cpu", "number", "write"])
def test_a_scalar_that_something_else_reads_stays_and_is_copied_for_the_gpu(reader: str):
    def build(graph, add, given):
        more = {
            "output": lambda a: a,
            "cpu": lambda a: add(aten.view.default, a, [1]),
            "number": lambda a: add(aten.sym_size.int, add(aten.view.default, a, [1]), 0),
            "write": lambda a: add(aten.copy_.default, a, add(aten.add.Tensor, a, 1)),
        }
        scaled = add(aten.mul.Tensor, given["x"], given["a"])
        return add(aten.add.Tensor, scaled, given["a"]), more[reader](given["a"])

    module = mixed(build)
    assert move_scalars(module.graph, CUDA) == frozenset()
    parts = split_of(module)
    assert [operators(p) for p in parts if p.refusal is None] == [["mul", "add"]]
    (copied,) = [p for p in parts if "device_put" in operators(p)]  # once, for both readers
    assert operators(copied).count("device_put") == 1
    assert [p.refusal is None for p in parts] == [False, True]
    order = operators(copied)
    assert reader != "write" or order.index("device_put") < order.index("copy_")


def test_a_constant_on_the_cpu_that_the_cpu_reads_too_is_made_once_more():
    def build(graph, add, given):
        half = add(aten.full.default, [], 0.5, dtype=torch.float32, device=CPU)
        return add(aten.sin.default, add(aten.mul.Tensor, given["x"], half)), add(aten.add.Tensor, given["a"], half)

    module = mixed(build)
    move_scalars(module.graph, CUDA)
    assert [(operators(p), p.refusal is None) for p in split_of(module)] == [
        (["full", "mul", "sin"], True),
        (["full", "add"], False),
    ]


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_pinned_scalar_is_copied_before_the_caller_can_change_it(is_pinned: bool):
    class Scalar:
        def is_pinned(self) -> bool:
            return is_pinned

        def to(self, device: torch.device, non_blocking: bool) -> tuple[torch.device, bool]:
            return device, non_blocking

    assert moving(lambda args: args, frozenset([1]), CUDA)(["x", Scalar()]) == ["x", (CUDA, not is_pinned)]


def test_a_number_in_a_tensor_of_the_graphs_own_is_made_on_the_gpu():
    """``x * torch.tensor(0.5)``; what Dynamo keeps of the user's tensor and nobody reads is on no device."""
    graph, mode = Graph(), FakeTensorMode()
    x, half, unread = graph.placeholder("x"), graph.get_attr("number"), graph.get_attr("other")
    scaled = graph.call_function(aten.mul.Tensor, (x, half))
    with mode:
        x.meta["val"] = scaled.meta["val"] = torch.empty(3, device=CUDA)
        half.meta["val"] = unread.meta["val"] = torch.empty(())
    graph.output((scaled,))
    root = torch.nn.Module()
    root.register_buffer("number", torch.tensor(0.5))
    root.register_buffer("other", torch.tensor(2.0))
    module = GraphModule(root, graph)
    assert devices_of(module.graph) == {CPU, CUDA}
    assert move_scalars(module.graph, CUDA) == frozenset()
    assert devices_of(module.graph) == {CUDA}
    (made,) = (node for node in module.graph.nodes if node.target is aten.full.default)
    assert (made.args, made.kwargs["dtype"], made.kwargs["device"]) == (((), 0.5), torch.float32, CUDA)


def test_a_tensor_of_the_graphs_own_that_is_no_number_stays_where_it_is():
    graph, mode = Graph(), FakeTensorMode()
    x, table = graph.placeholder("x"), graph.get_attr("table")
    scaled = graph.call_function(aten.mul.Tensor, (x, table))
    with mode:
        x.meta["val"] = scaled.meta["val"] = table.meta["val"] = torch.empty(3, device=CUDA)
    graph.output((scaled,))
    root = torch.nn.Module()
    root.register_buffer("table", torch.randn(3))
    module = GraphModule(root, graph)
    assert move_scalars(module.graph, CUDA) == frozenset()
    assert [node.op for node in module.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]


def test_a_result_on_the_cpu_that_the_gpu_reads_is_copied():
    def build(graph, add, given):
        on_cpu = add(aten.add.Tensor, given["a"], given["b"])
        scaled = add(aten.sin.default, add(aten.mul.Tensor, given["x"], on_cpu))
        return scaled, on_cpu

    module = mixed(build)
    assert move_scalars(module.graph, CUDA) == frozenset()
    assert [(operators(p), p.refusal is None) for p in split_of(module)] == [
        (["add", "device_put"], False),
        (["mul", "sin"], True),
    ]


PATTERNS = {
    "two scalars": (lambda add, x, a, b, rows: [add(aten.add.Tensor, x, a), add(aten.mul.Tensor, x, b)], "c"),
    "one read by both": (lambda add, x, a, b, rows: [add(aten.add.Tensor, x, a), add(aten.add.Tensor, a, b)], ".c"),
    "a device each": (lambda add, x, a, b, rows: [add(aten.add.Tensor, x, 1), add(aten.add.Tensor, rows, 2)], "c."),
    "moved there and back": (
        lambda add, x, a, b, rows: [add(aten._to_copy.default, add(aten._to_copy.default, a, device=CUDA), device=CPU)],
        "c.",
    ),
    "a view goes to the cpu": (
        lambda add, x, a, b, rows: [
            add(aten._to_copy.default, add(aten.view.dtype, add(aten.add.Tensor, x, 1), torch.int32), device=CPU)
        ],
        "c.",
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_on_the_gpu_is_captured_though_it_is_one_operator(name: str):
    """As long as nothing else in the region is."""
    build, kinds = PATTERNS[name]
    module = mixed(lambda graph, add, given: build(add, *given.values()))
    moved = move_scalars(module.graph, CUDA)
    examples = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    made = split(module, examples, CUDA)
    refusals = [None] if made is None else [part.refusal for part in made.parts]
    assert "".join("c" if refusal is None else "." for refusal in refusals) == kinds
    if name == "two scalars":
        assert moved == {1, 2}
    if name == "a device each":
        assert made is not None
        captured, on_cpu = made.parts
        assert inputs(captured) == ["x"]
        assert inputs(on_cpu)[1:] == ["rows"]


def test_operators_on_another_device_are_cut_out():
    def build(graph, add, given):
        y = add(aten.cos.default, add(aten.sin.default, given["x"]))
        cpu = add(aten.cos.default, add(aten._to_copy.default, y, device=CPU))
        return (add(aten.relu.default, add(aten.mul.Tensor, add(aten._to_copy.default, cpu, device=CUDA), y)),)

    first, on_cpu, second = split_of(mixed(build))
    assert operators(first) == ["sin", "cos"]
    assert operators(on_cpu) == ["_to_copy", "cos", "_to_copy"]
    assert operators(second) == ["mul", "relu"]
    assert on_cpu.refusal is not None
    assert on_cpu.refusal.reason == "the region mixes devices: cpu and cuda:0"


def split_of(module: GraphModule) -> Sequence[Part]:
    made = split(module, [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")], CUDA)
    assert made is not None
    return made.parts


def with_object(value: Any, unused: Any = None) -> tuple[GraphModule, list[Any]]:
    """A graph of ten operators, the sixth of which reads an object."""
    graph, values = Graph(), [torch.empty(3), value, unused]
    inputs = [graph.placeholder(name) for name in ("x", "group", "unused")]
    for node, given in zip(inputs, values, strict=True):
        node.meta["val"] = given
    node = inputs[0]
    for number in range(10):
        node = graph.call_function(aten.sin.default, (node, *([inputs[1]] if number == 5 else [])))
        node.meta["val"] = torch.empty(3)
    graph.output((node, inputs[1], inputs[2]))
    return GraphModule({}, graph), values


def test_an_object_that_no_graph_can_read_is_read_in_a_part_of_its_own():
    module, values = with_object("text", 2.5)
    made = split(module, values, CPU)
    assert made is not None
    first, reads_it, second = made.parts
    assert [len(operators(p)) for p in (first, reads_it, second)] == [5, 1, 4]
    assert reads_it.refusal is not None
    assert reads_it.refusal.reason == "input group is a str, neither a tensor nor a size"
    assert (inputs(first), inputs(reads_it)) == (["x"], ["group", "sin_default_4"])
    assert reads_it.examples[0] == "text"
    assert made.wiring.results[1:] == (1, 2)


def test_an_operator_cut_out_gets_the_objects_that_it_reads():
    """Process groups and generators can be read by a captured part and by another one."""
    module, values = with_object(torch.distributed.ProcessGroup(0, 1))
    assert split(module, values, CPU) is None
    seventh = [node for node in module.graph.nodes if node.op == "call_function"][6]
    seventh.target = torch.ops.parts_unit.wave.default
    made = split(module, values, CPU)
    assert made is not None
    first, _, _ = made.parts
    assert first.refusal is None
    assert inputs(first) == ["x", "group"]
    assert first.examples[1] is values[1]


def test_a_view_of_what_no_graph_can_read_is_read_where_that_is():
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(3, dtype=torch.complex64).conj()
    view = graph.call_function(aten.view.default, (x, [3, 1]))
    view.meta["val"] = x.meta["val"].view(3, 1)
    sin = graph.call_function(aten.abs.default, (view,))
    sin.meta["val"] = torch.empty(3, 1)
    node = sin
    for _ in range(2):
        node = graph.call_function(aten.sin.default, (node,))
        node.meta["val"] = torch.empty(3, 1)
    graph.output((node,))
    made = split(GraphModule({}, graph), [x.meta["val"]], CPU)
    assert made is not None
    assert [operators(p) for p in made.parts] == [["view", "abs"], ["sin", "sin"]]
    assert [p.refusal is None for p in made.parts] == [False, True]


def test_moving_moves_arguments_of_a_call():
    call = moving(lambda args: [a.device.type for a in args], frozenset([1]), torch.device("meta"))
    assert call([torch.ones(2), torch.ones(()), torch.ones(())]) == ["cpu", "meta", "cpu"]


def test_source_of_a_refusal_is_the_line_that_calls_the_operator():
    (_, unsafe) = parts(lambda x: wave(two(x)), torch.randn(6, 4))
    assert unsafe.refusal is not None
    assert unsafe.refusal.source is not None
    assert Path(__file__).name in unsafe.refusal.source
