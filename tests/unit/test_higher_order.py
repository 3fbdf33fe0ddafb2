"""What higher-order operators run decides what they are: capturable, random, with effects, or writing in place."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from cudagraph_backend.compile import probing
from cudagraph_backend.compile.capturable import capture_refusal, devices_of, op_refusal
from cudagraph_backend.compile.cut import split
from cudagraph_backend.compile.levels import CannotSplit, Flow, parts_of
from cudagraph_backend.graph import operators
from cudagraph_backend.torch_internals import subgraphs_of

aten, prims, hops = torch.ops.aten, torch.ops.prims, torch.ops.higher_order
collectives = torch.ops._c10d_functional
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@torch.library.custom_op("higher_order_unit::fill", mutates_args=("x",))
def fill(x: torch.Tensor) -> None:
    x.fill_(1)


@torch.library.custom_op("higher_order_unit::fill_unsafe", mutates_args=("x",), tags=(torch.Tag.cudagraph_unsafe,))
def fill_unsafe(x: torch.Tensor) -> None:
    x.fill_(1)


@torch.library.custom_op("higher_order_unit::wave", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def wave(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@torch.library.custom_op("higher_order_unit::reduce", mutates_args=())
def reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return x.clone()


OPS = torch.ops.higher_order_unit


class Building:
    """A graph made by hand, of values of one size on one device."""

    def __init__(self, device: torch.device = CPU):
        self.graph = Graph()
        self.root = torch.nn.Module()
        self._mode = FakeTensorMode()
        self._device = device
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = self.tensor()

    def tensor(
        self, dtype: torch.dtype = torch.float32, device: torch.device | None = None, shape: Any = (4, 4)
    ) -> Any:
        with self._mode:
            return torch.empty(shape, dtype=dtype, device=device or self._device)

    def call(self, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.tensor() if val is None else val
        return node

    def subgraph(self, *targets: Any, **kwargs: Any) -> Node:
        """A graph that applies ``targets`` to its argument in turn, as it is given to a higher-order operator."""
        inner = Building(kwargs.get("device", self._device))
        value = inner.x
        for target in targets:
            value = inner.call(target, value)
        self.root.inside = inner.done(value)
        node = self.graph.get_attr("inside")
        node.meta["val"] = None
        return node

    def item(self, node: Node, index: Any) -> Node:
        return self.call(operator.getitem, node, index, val=node.meta["val"][index])

    def done(self, *results: Node) -> GraphModule:
        self.graph.output(results)
        return GraphModule(self.root, self.graph)


def nested(*targets: Any, **kwargs: Any) -> GraphModule:
    made = Building()
    called = made.call(hops.invoke_subgraph, made.subgraph(*targets, **kwargs), "0", made.x, val=(made.tensor(),))
    return made.done(made.item(called, 0))


def wrapping(op: Any) -> GraphModule:
    made = Building()
    called = made.call(hops.auto_functionalized_v2, op, _x_base_index=0, _all_bases=[made.x], val=(None, made.tensor()))
    return made.done(made.item(called, 1))


def triton_kernel(dtype: torch.dtype = torch.float32, mutation: bool = False) -> GraphModule:
    """As AOTAutograd traces a call of a user's Triton kernel, which can't run here."""
    made = Building(CUDA)
    out = made.call(aten.empty.memory_format, [4, 4], device=CUDA, val=made.tensor(dtype))
    launch = {"kernel_idx": 0, "constant_args_idx": 0, "grid": [(1, 1, 1)], "tma_descriptor_metadata": {}}
    launch["kwargs"] = {"x_ptr": made.x, "out_ptr": out}
    if mutation:
        made.graph.call_function(hops.triton_kernel_wrapper_mutation, (), launch).meta["val"] = None
        return made.done(made.call(aten.relu.default, out))
    target, cloned = hops.triton_kernel_wrapper_functional, {"out_ptr": made.tensor(dtype)}
    called = made.call(target, **launch, tensors_to_clone=["out_ptr"], val=cloned)
    return made.done(made.call(aten.relu.default, made.item(called, "out_ptr")))


def refusal_of(module: GraphModule, unsafe: Any = ()) -> Any:
    examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    return capture_refusal(module.graph, examples, devices_of(module.graph), unsafe)


# ------------------------------------------------------------------------------------------------ captured or not

BRANCH_OR_LOOP = ["cond", "map_impl", "scan", "while_loop"]
CALL_PYTHON = ["call_torchbind", "flat_apply", "invoke_leaf_function", "print", "inductor_compiled_code"]


@pytest.mark.parametrize("name", [n for n in BRANCH_OR_LOOP + CALL_PYTHON if hasattr(hops, n)])
def test_what_chooses_by_data_or_calls_python_is_not_captured(name):
    made = Building()
    refusal = refusal_of(made.done(made.call(getattr(hops, name), made.x)))
    assert refusal.reason == "a higher-order operator may branch on data"
    assert refusal.op == name


def test_one_that_torch_does_not_know_is_not_captured():
    class Unknown(torch._ops.HigherOrderOperator):
        def __init__(self) -> None:
            super().__init__("higher_order_unit_unknown")

        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args)

    made = Building()
    try:
        assert refusal_of(made.done(made.call(Unknown(), made.x))) is not None
    finally:
        torch._ops._higher_order_ops.pop("higher_order_unit_unknown", None)


@pytest.mark.parametrize("op", [OPS.fill.default, torch.ops._c10d_functional.all_reduce_.default])
def test_a_functional_wrapper_of_a_capturable_operator_is_captured(op):
    assert refusal_of(wrapping(op)) is None


def test_a_wrapped_operator_decides():
    refusal = refusal_of(wrapping(OPS.fill_unsafe.default))
    assert refusal.reason == "the operator is tagged unsafe for CUDA graphs"
    assert refusal.op == "higher_order_unit.fill_unsafe.default"


def test_a_nested_graph_decides():
    assert refusal_of(nested(aten.relu.default, aten.sin.default)) is None
    refusal = refusal_of(nested(aten.relu.default, OPS.fill_unsafe.default))
    assert refusal.op == "higher_order_unit.fill_unsafe.default"
    refusal = refusal_of(nested(aten.relu.default, aten._local_scalar_dense.default))
    assert refusal.reason == "a size or value depends on data"


def test_devices_inside_are_seen():
    made = Building(CUDA)
    called = made.call(hops.invoke_subgraph, made.subgraph(aten.sin.default, device=CPU), "0", made.x)
    made.done(called)
    refusal = op_refusal(called, CUDA)
    assert refusal is not None
    assert refusal.reason == "the region mixes devices: cpu and cuda:0"
    assert devices_of(made.graph) == {CPU, CUDA}


def test_users_triton_kernels_are_captured():
    assert refusal_of(triton_kernel()) is None


def test_named_operators_are_not_captured_behind_wrappers_either():
    for name in ("higher_order_unit::fill", "higher_order_unit::fill.default"):
        refusal = refusal_of(wrapping(OPS.fill.default), [name])
        assert refusal.reason == "the operator is named as one that must not be captured"
        assert refusal.op == "higher_order_unit.fill.default"
    assert refusal_of(nested(aten.relu.default, aten.sin.default), ["aten::sin"]).op == "aten.sin.default"
    assert refusal_of(triton_kernel(), ["higher_order::triton_kernel_wrapper_functional"]) is not None
    assert refusal_of(wrapping(OPS.fill.default), ["higher_order_unit::fill.other", "unit::fill"]) is None


@pytest.mark.parametrize("name", ["run_and_save_rng_state", "run_with_rng_state"])
def test_generator_states_on_the_host_are_no_part_of_a_cuda_graph(name):
    """Where the numbers are drawn on the CPU, replays of the host driver read and set them anew."""
    for device, is_captured in ((CPU, True), (CUDA, False)):
        made = Building(device)
        state = made.graph.placeholder("state")
        state.meta["val"] = made.tensor(torch.uint8, CPU)
        args = (aten.rand_like.default, made.x)
        called = made.call(getattr(hops, name), *(args if "save" in name else (state, *args)))
        refusal = op_refusal(called, device)
        assert (refusal is None) == is_captured
        if refusal is not None and "save" not in name:
            assert "generator" in refusal.reason


def test_generator_states_that_graphs_know_are_captured():
    made = Building(CUDA)
    called = made.call(hops.graphsafe_run_with_rng_state, aten.rand_like.default, made.x, rng_state=None)
    assert op_refusal(called, CUDA) is None


MASKED = [
    (aten.index_put.default, torch.bool, (4, 4), True),
    (aten.index_put.default, torch.uint8, (3, 4), True),
    (aten.index_put.default, torch.bool, (), False),  # becomes a where
    (aten.index_put.default, torch.int64, (3, 4), False),
    (aten.index.Tensor, torch.uint8, None, True),
    (aten.index.Tensor, torch.int64, None, False),
]


@pytest.mark.parametrize(("op", "dtype", "values", "is_refused"), MASKED)
def test_masks_that_are_counted_are_not_captured(op, dtype, values, is_refused):
    made = Building()
    index, other = (made.graph.placeholder(name) for name in ("index", "values"))
    index.meta["val"] = made.tensor(dtype, shape=(4,))
    other.meta["val"] = made.tensor(shape=values or ())
    refusal = op_refusal(made.call(op, made.x, [index], *([] if values is None else [other])), CPU)
    assert (refusal is not None) == is_refused
    assert refusal is None or refusal.reason == "how many entries a mask has is read back"


def test_a_mask_beside_another_index_is_counted_whatever_is_written():
    made = Building()
    index, value = (made.graph.placeholder(name) for name in ("index", "value"))
    index.meta["val"], value.meta["val"] = made.tensor(torch.bool, shape=(4,)), made.tensor(shape=())
    assert op_refusal(made.call(aten.index_put.default, made.x, [None, index], value), CPU) is not None


# ------------------------------------------------------------------------------------------------ what they do


def test_random_numbers_inside_are_seen():
    drawing = nested(aten.relu.default, aten.rand_like.default).graph
    assert probing.draws_random_numbers(drawing)
    assert not probing.draws_random_numbers(nested(aten.relu.default).graph)
    assert probing.may_draw_random_numbers(wrapping(OPS.fill.default).graph)
    assert not probing.may_draw_random_numbers(nested(aten.relu.default).graph)


def test_precision_inside_counts():
    made = nested(aten.relu.default)
    (inside,) = (m for node in made.graph.nodes for m in subgraphs_of(node))
    inside.graph.find_nodes(op="call_function", target=aten.relu.default)[0].meta["val"] = Building().tensor(
        torch.bfloat16
    )
    assert probing.precision(made.graph) == torch.finfo(torch.bfloat16).eps


def test_integers_that_a_users_kernel_makes_of_floats_may_be_any():
    assert probing.number_from_floats(triton_kernel(torch.int64).graph) is not None
    assert probing.number_from_floats(triton_kernel().graph) is None


def test_communication_is_an_effect_at_every_level():
    reducing = nested(aten.relu.default, collectives.all_reduce.default).graph
    effect = probing.lasting_effect(reducing)
    assert effect is not None
    assert effect.op == "_c10d_functional.all_reduce.default"
    assert probing.lasting_effect(nested(aten.relu.default).graph) is None


COMMUNICATE = [
    collectives.all_gather_into_tensor.default,
    torch.ops._c10d_functional_autograd.all_to_all_single.default,
    torch.ops.symm_mem.one_shot_all_reduce.default,
    torch.ops._dtensor.shard_dim_alltoall.default,
    OPS.reduce.default,  # takes a group
]


@pytest.mark.parametrize("op", COMMUNICATE, ids=str)
def test_operators_that_communicate_are_known(op):
    assert operators.communicates(op)
    assert not operators.communicates(aten.relu.default)
    assert not operators.communicates(OPS.fill.default)


def with_effect() -> GraphModule:
    """As AOTAutograd traces two operators that are registered to have effects, with one to be cut out between."""
    made = Building()
    token = made.call(prims._make_token.default, val=made.tensor(device=CPU, shape=(0,)))
    values = (made.tensor(device=CPU, shape=(0,)), made.tensor())
    first = made.call(hops.with_effects, token, OPS.reduce.default, made.x, "0", val=values)
    between = made.call(OPS.wave.default, made.call(aten.relu.default, made.item(first, 1)))
    second = made.call(hops.with_effects, made.item(first, 0), OPS.reduce.default, between, "0", val=values)
    made.call(prims._sink_tokens.default, [made.item(second, 0)])
    return made.done(made.call(aten.sin.default, made.item(second, 1)))


def test_operators_with_effects_are_captured_and_cannot_be_repeated():
    made = Building(CUDA)
    token = made.call(prims._make_token.default, val=made.tensor(device=CPU, shape=(0,)))
    values = (made.tensor(device=CPU, shape=(0,)), made.tensor())
    called = made.call(hops.with_effects, token, OPS.fill.default, made.x, val=values)
    module = made.done(made.item(called, 1))
    assert devices_of(module.graph) == {CUDA}, "a token is on no device"
    assert refusal_of(module) is None
    effect = probing.lasting_effect(module.graph)
    assert effect is not None
    assert effect.op == "higher_order_unit.fill.default"


def test_what_only_shows_on_the_host_is_not_captured():
    made = Building()
    token = made.call(prims._make_token.default, val=made.tensor(shape=(0,)))
    made.call(hops.with_effects, token, aten._print.default, "text", val=(made.tensor(shape=(0,)), None))
    assert refusal_of(made.done(made.x)).op == "aten._print.default"


def test_writes_are_seen_through_wrappers():
    def writing(module: GraphModule) -> list[bool]:
        return [operators.writes_in_place(n) for n in module.graph.nodes if operators.is_higher_order(n.target)]

    assert writing(triton_kernel(mutation=True)) == [True]
    assert writing(triton_kernel()) == [False]
    assert writing(wrapping(OPS.fill.default)) == [False]
    assert writing(nested(aten.relu_.default)) == [True]
    with pytest.raises(CannotSplit, match="before the graph's end"):
        parts_of(Flow(triton_kernel(mutation=True).graph), {})


# ------------------------------------------------------------------------------------------------ parts


def parts_with(*targets: Any) -> list[GraphModule]:
    made = Building()
    value = made.x
    for target in targets:
        if isinstance(target, tuple):
            inside = made.subgraph(*target)
            value = made.item(made.call(hops.invoke_subgraph, inside, "0", value, val=(made.tensor(),)), 0)
        else:
            value = made.call(target, value)
    found = split(made.done(value), [made.x.meta["val"]], CPU)
    assert found is not None
    return [part.module for part in found.parts]


def test_each_part_has_its_own_copy_of_the_graphs_inside():
    block = (aten.relu.default, aten.sin.default)
    first, _, last = parts_with(aten.cos.default, block, OPS.wave.default, block, aten.cos.default)
    inside = [[m for node in part.graph.nodes for m in subgraphs_of(node)] for part in (first, last)]
    assert [len(modules) for modules in inside] == [1, 1]
    assert inside[0][0] is not inside[1][0]
    for (module,) in inside:
        called = [node for node in module.graph.nodes if node.op == "call_function"]
        assert [str(node.target) for node in called] == ["aten.relu.default", "aten.sin.default"]
        assert all(node.meta["val"].shape == (4, 4) for node in called)


def test_a_nested_graph_that_cannot_be_captured_is_cut_out():
    found = parts_with(aten.cos.default, aten.sin.default, (OPS.wave.default,), aten.cos.default, aten.sin.default)
    assert [any(subgraphs_of(node) for node in part.graph.nodes) for part in found] == [False, True, False]


def test_every_part_has_tokens_of_its_own():
    module = with_effect()
    found = split(module, [module.graph.find_nodes(op="placeholder")[0].meta["val"]], CPU)
    assert found is not None
    assert [part.refusal is None for part in found.parts] == [True, False, True]
    for part in (found.parts[0], found.parts[2]):
        targets = [node.target for node in part.module.graph.nodes if node.op == "call_function"]
        assert targets.count(prims._make_token.default) == targets.count(prims._sink_tokens.default) == 1
    assert all(value.numel() for part in found.parts for value in part.examples), "no token goes from part to part"


def collective() -> tuple[GraphModule, dict[str, Node]]:
    """A collective that is waited for late: after random numbers that a refused operator holds up."""
    made = Building()
    begun = made.call(collectives.all_reduce.default, made.call(aten.sin.default, made.x), "sum", "0")
    noise = made.call(aten.rand_like.default, made.call(OPS.wave.default, made.x))
    waited = made.call(collectives.wait_tensor.default, begun)
    more = made.call(collectives.all_reduce.default, made.call(aten.cos.default, made.x), "sum", "0")
    done = made.call(collectives.wait_tensor.default, more)
    named = {"begun": begun, "waited": waited, "noise": noise, "more": more, "done": done}
    return made.done(made.call(aten.add.Tensor, made.call(aten.add.Tensor, noise, waited), done)), named


def test_a_wait_is_in_the_part_of_its_collective_and_collectives_keep_their_order():
    module, nodes = collective()
    refused = {n: r for n in module.graph.nodes if (r := op_refusal(n, CPU)) is not None}
    assert {str(node.target) for node in refused} == {"higher_order_unit.wave.default"}
    part_of = parts_of(Flow(module.graph), refused)
    assert part_of[nodes["begun"]] == part_of[nodes["waited"]] < part_of[nodes["noise"]]
    assert part_of[nodes["more"]] == part_of[nodes["done"]] >= part_of[nodes["noise"]]


def test_a_graph_that_cannot_be_found_is_not_captured():
    made = Building()
    called = made.call(hops.invoke_subgraph, made.subgraph(aten.sin.default), "0", made.x)
    refusal = op_refusal(called, CPU)  # the graph has no module yet
    assert refusal is not None
    assert refusal.reason == "what it runs can't be found"


def test_a_wait_without_its_collective_is_not_captured():
    made = Building()
    waited = made.call(collectives.wait_tensor.default, made.x)
    refusal = op_refusal(waited, CPU)
    assert refusal is not None
    assert refusal.reason == "it waits for a collective that is not in the graph"


def test_a_wait_for_a_collective_that_is_cut_out_is_cut_out():
    _, nodes = collective()
    unsafe = ["_c10d_functional::all_reduce"]
    assert op_refusal(nodes["waited"], CPU, unsafe) is not None
    assert op_refusal(nodes["waited"], CPU) is None
