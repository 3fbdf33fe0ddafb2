"""Everything private of torch that this package touches, in one place.

Read from, and tested with, torch 2.11, 2.12 and 2.13. No other module imports a private torch name, so a new torch
release is a review of this file. (Elsewhere only ``torch._foreach_copy_`` and ``UntypedStorage._cdata`` are used; the
padding rules name ATen and prims operators.)
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import linecache
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard
from weakref import finalize

import sympy
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._C._dynamo.eval_frame import _reset_precompile_entries
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.mutation_guard import GenerationTracker
from torch._dynamo.package import DynamoCache
from torch._dynamo.utils import get_static_address_type
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._guards import CompileContext, TracingContext, compile_context, detect_fake_mode, tracing
from torch._inductor.compile_fx import compile_fx, compile_fx_inner, fake_tensor_prop
from torch._inductor.cudagraph_trees import MarkStepBox, get_manager
from torch._inductor.output_code import CompiledFxGraph
from torch._library.fake_class_registry import FakeScriptObject
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef  # expired() tells whether it is dead
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.numbers import int_oo

# Registered objects came with torch 2.11.
_is_constant_type = getattr(getattr(torch._library, "opaque_object", None), "is_opaque_value_type", None)

Compiled = Callable[[list[Any]], Sequence[Any]]
InnerCompile = Callable[..., Callable[..., Any]]

# ------------------------------------------------------------------------------------------------ compile path


def compile_regions(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], inner: InnerCompile, patches: dict[str, Any]
) -> Any:
    """Run stock Inductor's whole pipeline on a Dynamo graph, calling ``inner`` once per AOT region.

    A warm AOTAutogradCache would return stock-compiled code without ever calling ``inner``; it is switched off. The
    FX graph cache below it, which holds the expensive part, still works. Stock's own CUDA graphs are switched off.
    """
    patches = {**patches, "triton.cudagraphs": False}
    with functorch_config.patch(enable_autograd_cache=False, bundled_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)  # type: ignore[arg-type]


def compile_region(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Compile one AOT region with Inductor. ``kwargs`` are what ``compile_fx`` passed; they differ by release."""
    return compile_fx_inner(gm, example_inputs, **kwargs)


def without_graph_cache() -> contextlib.AbstractContextManager[None]:
    """Compile in here what the FX graph cache can't tell apart.

    Inductor's code checks sizes that depend on data as the whole frame says. The cache's key is the graph, and that of
    a part need not hold the operators which say so.
    """
    return inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)


class Compilation:
    """What the compilation that is under way knows, to compile more of it later."""

    def __init__(self, patches: Mapping[str, Any]):
        self._patches = {**patches, "triton.cudagraphs": False}
        self._tracing, self._compile = TracingContext.try_get(), CompileContext.try_get()

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        with (
            tracing(self._tracing),
            compile_context(self._compile),
            inductor_config.patch(self._patches),
            outside_inference_mode(),
            compile_lock,
        ):
            yield


_CALLED = re.compile(r"\btorch\.ops\.(\w+\.\w+\.\w+)\(")


def failed_operator(error: BaseException) -> str | None:
    """The operator that a region's code was calling when an error was raised: ``namespace.name.overload``.

    Generated code calls what it does not generate by name, each on a line of its own.
    """
    lines = (linecache.getline(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__))
    return next((called[1] for line in lines if (called := _CALLED.search(line))), None)


def is_compiled_graph(compiled: Any) -> TypeGuard[CompiledFxGraph]:
    """False for a graph without operators, which Inductor leaves as it is."""
    return isinstance(compiled, CompiledFxGraph)


def boxed(call: Compiled) -> Compiled:
    """``call`` as a function that AOTAutograd knows to take one list of arguments and to empty it."""

    def boxed_call(args: list[Any]) -> Sequence[Any]:
        return call(args)

    boxed_call._boxed_call = True  # type: ignore[attr-defined]
    return boxed_call


def output_strides(compiled: CompiledFxGraph) -> Sequence[tuple[str, ...] | None] | None:
    """Per output, its strides as expressions in text (``None`` for what is not a tensor), as Inductor laid them out."""
    return compiled.output_strides


def mutated_inputs(compiled: CompiledFxGraph) -> frozenset[int]:
    """Indices of the inputs that the compiled region writes to."""
    return frozenset(compiled.mutated_input_idxs)


def uncapturable_reason(compiled: CompiledFxGraph) -> str | None:
    """Inductor's own reason against capturing a region in a CUDA graph, found while lowering it."""
    return compiled.disabled_cudagraphs_reason


def checked_inductor_options(options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's own check of its settings' names and types (as for ``torch.compile(options=…)``).

    Raises:
        RuntimeError: an unknown name or a value of the wrong type.
    """
    return dict(torch._TorchCompileInductorWrapper(None, options, None).config)


def mode_settings(mode: str) -> dict[str, Any]:
    """Inductor's settings that a ``mode`` of ``torch.compile`` stands for."""
    return dict(torch._inductor.list_mode_options(mode))


def inductor_option_names() -> list[str]:
    return sorted(inductor_config.get_config_copy())


def ops_to_partition() -> tuple[str, ...]:
    """Inductor's own list of operators that must run outside of CUDA graphs, as it is set now."""
    return tuple(getattr(inductor_config, "custom_should_partition_ops", ()))


def is_registered_operator(name: str) -> bool:
    """Whether there is an operator of that name, given with or without its overload."""
    packet, _, overload = name.partition(".")
    namespace, _, short = packet.partition("::")
    if namespace == "higher_order":
        return hasattr(torch.ops.higher_order, short)
    schemas = torch._C._jit_get_schemas_for_operator(packet)
    return any(overload in ("", schema.overload_name or "default") for schema in schemas)


def input_sources(gm: torch.fx.GraphModule) -> list[str]:
    """Per input of a Dynamo graph, where the user's frame holds it, e.g. ``L['batch']['labels']``.

    Without Dynamo's record of that, the input's name in the graph.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    return [getattr(getattr(node, "_dynamo_source", None), "name", str(node.target)) for node in nodes]


def take_graph_override(gm: torch.fx.GraphModule) -> tuple[bool | None, bool | None]:
    """What ``torch._dynamo.override_cudagraphs`` (since torch 2.13) says of a Dynamo graph's forward and backward.

    It is taken off the graph: where it asks for graphs, Inductor would make stock's.
    """
    said = gm.meta.pop("cudagraph_annotation", None)
    return getattr(said, "fwd", None), getattr(said, "bwd", None)


def keep_precompiled_code_apart(backend: Any) -> None:
    """Let functions that ``backend`` compiles neither get nor leave anything in torch's precompile cache.

    With ``torch._dynamo.config.caching_precompile`` the cache is asked when a function is handed to ``torch.compile``,
    before any backend is called, and knows it by name and line alone: it would answer with what another backend left,
    plain Inductor's code. Of ours it could keep no more than an entry without code, in place of that of the other.
    """
    load, record = DynamoCache.load, DynamoCache.record_package
    ours: set[int] = set()  # by identity: equal code may stand in another file

    def load_unless_ours(function: Callable[..., Any]) -> Any:
        context = sys._getframe(1).f_locals.get("self")  # the cache is not told for which backend it is asked
        code = innermost_fn(function).__code__
        if backend in _backends_of(context):
            if id(code) not in ours:
                ours.add(id(code))
                finalize(code, ours.discard, id(code))
            _reset_precompile_entries(code)  # those that another backend has loaded
        return None if id(code) in ours else load(function)

    def record_unless_ours(package: Any) -> None:
        if id(package._innermost_fn.__code__) not in ours:
            record(package)

    DynamoCache.load = load_unless_ours  # type: ignore[method-assign, assignment]
    DynamoCache.record_package = record_unless_ours  # type: ignore[method-assign]


def _backends_of(context: Any) -> tuple[Any, ...]:
    """What a context of Dynamo compiles with: the backend, and where ``torch.compile`` wraps that, what it wraps."""
    found: Any = getattr(context, "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found, getattr(found, "compiler_fn", None)


def call_input(node: torch.fx.Node) -> int | None:
    """Which input of the Dynamo graph a region's input is, unchanged; ``None`` for all that AOTAutograd adds.

    Holds for backward regions too: what the forward hands on to them as it got it.
    """
    described = node.meta.get("desc")
    return described.idx if isinstance(described, PlainAOTInput) else None


def unbound_sizes(compiled: Any) -> list[str]:
    """The names of sizes that generated code reads and nothing in it defines.

    Inductor counts on sizes of the frame that the graph was cut from (seen with torch 2.11, in the checks of sizes
    that depend on data).
    """
    call: Any = getattr(getattr(compiled, "compiled_fn_runner", None), "call", None)
    if not isinstance(call, types.MethodType):
        return []
    code, known = call.__func__.__code__, call.__func__.__globals__
    return [name for name in code.co_names if re.fullmatch(r"[su]\d+", name) and name not in known]


def with_allocator(compiled: Any, device_type: str, allocate: Callable[..., torch.Tensor]) -> Compiled | None:
    """The region's generated code bound to private globals, with ``allocate(size, stride, dtype)`` for its buffers.

    The generated module may be shared by equal regions, so its globals are copied, never changed. Returns ``None`` if
    the compiled region is not generated Python code.
    """
    call: Any = getattr(getattr(compiled, "compiled_fn_runner", None), "call", None)
    name = f"empty_strided_{device_type}"
    function = getattr(call, "__func__", None)
    if not isinstance(function, types.FunctionType) or name not in function.__globals__:
        return None
    return types.MethodType(_rebound(function, {name: allocate}), call.__self__)


def _rebound(function: types.FunctionType, changed: Mapping[str, Any]) -> types.FunctionType:
    """A function of generated code with globals of its own, and with it all that it calls there (graphs inside it).

    Globals that held the function itself would be freed by the garbage collector only, and the device's memory with
    them. Generated functions do not call themselves, and call graphs from their own bodies only.
    """
    shared = function.__globals__
    called = {key: shared[key] for key in function.__code__.co_names if _is_of(shared.get(key), shared)}
    own = {**shared, **changed, **{key: _rebound(value, changed) for key, value in called.items()}}
    return types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)


def _is_of(value: Any, module: Mapping[str, Any]) -> bool:
    return isinstance(value, types.FunctionType) and value.__globals__ is module


# ------------------------------------------------------------------------------------------------ parts of a region


@contextlib.contextmanager
def compiling_a_part() -> Iterator[list[Any]]:
    """While a part of a region is compiled: yields the list to which Inductor appends its outputs' strides.

    AOTAutograd reads one such list per region. It also tells Inductor which inputs of a backward region may be
    overwritten: not here, as they are numbered in the region, and another part may read them.
    """
    context = TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    donated = getattr(metadata, "bw_donated_idxs", None)
    if donated is not None:
        metadata.bw_donated_idxs = []  # type: ignore[union-attr]
    try:
        with TracingContext.report_output_strides() as strides:
            yield [] if strides is None else strides
    finally:
        if donated is not None:
            metadata.bw_donated_idxs = donated  # type: ignore[union-attr]


def retrace_strides(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Let the values of a graph have the strides that follow from those of its inputs.

    What a forward region saves may have other strides than those that its backward was traced with.
    """
    inputs = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    pairs = [(v, e) for v, e in zip(inputs, example_inputs, strict=True) if isinstance(v, torch.Tensor)]
    if any([*map(expr, v.stride())] != [*map(expr, e.stride())] for v, e in pairs):
        with torch.no_grad():
            fake_tensor_prop(gm, example_inputs)


def report_output_strides(strides: Sequence[Any]) -> None:
    """Tell AOTAutograd the strides of a region's outputs, as Inductor does of what it compiles; ``None``: as traced."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.extend(strides)


def forget_output_strides() -> None:
    """Before a region is compiled again: what was reported of its outputs' strides."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.clear()


def visible_outputs(graph: torch.fx.Graph) -> Sequence[int]:
    """Indices of the outputs whose strides Inductor must keep."""
    return graph.output_node().meta.get("user_visible_output_idxs", ())


def mark_visible(graph: torch.fx.Graph, indices: list[int]) -> None:
    graph.output_node().meta["user_visible_output_idxs"] = indices


def module_of(graph: torch.fx.Graph, whole: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A module of a part of the graph of ``whole``, with the constants and the sizes' environment of that.

    The graphs inside are copied: Inductor changes what it compiles, and may be given several parts that hold them.
    """
    module = torch.fx.GraphModule(whole, graph)
    module.meta.update(whole.meta)
    inside = {str(n.target): submodule_of(n) for n in graph.find_nodes(op="get_attr")}
    for path, submodule in inside.items():
        if submodule is not None:
            module.set_submodule(path, _copied(submodule))
    if getattr(whole, "shape_env", None) is not None:
        module.shape_env = whole.shape_env  # type: ignore[assignment]
    return module


def _copied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.output_node().meta = dict(module.graph.output_node().meta)
    return module_of(graph, module)


# ------------------------------------------------------------------------------------------------ symbolic sizes


class Shapes:
    """What torch's ``ShapeEnv`` knows of one region's symbols; a thin, read-only face of it."""

    def __init__(self, symints: Sequence[torch.SymInt]):
        self._env = symints[0].node.shape_env if symints else None
        self._symints = list(symints)
        self._symbols = _by_name(symints)  # what Inductor compiles may replace one by another
        self._guards: str | None = None
        self._asserts: list[Any] = []

    def freeze_guards(self) -> bool:
        """Take the guards as they stand; call it after Inductor compiled the region, which adds some.

        Returns false if they can't be told: they name a size of the frame that this region does not receive.
        """
        if self._env is None:
            return True
        asserts = [each.expr for some in self._env.deferred_runtime_asserts.values() for each in some]
        own = frozenset().union(*(expr(size).free_symbols for size in self._symints))
        self._asserts = [each for each in asserts if each.free_symbols & own]
        try:
            self._guards = self._env.produce_guards_expression(placeholders=self._symints)
        except (
            AssertionError,
            IndexError,
        ):  # "sources must not be empty for symbol", or torch 2.11 reads the first one
            return False
        return True

    def upper_bound(self, symbol: sympy.Symbol) -> int | None:
        """Largest size of ``symbol``; ``None`` if it has no bound.

        The lengths of a jagged dim are one symbol, which stands for no number and has no range.
        """
        known = self._env.var_to_range.get(symbol)  # type: ignore[union-attr]
        upper = None if known is None else known.upper
        return int(upper) if isinstance(upper, sympy.Integer) and int(upper) < 2**31 else None

    def admits(self, sizes: Sequence[int]) -> bool:
        """Whether the compiled region is valid for these values of its SymInt inputs, in their order.

        What the code checks while running, of sizes that depend on data, must hold for them, too.
        """
        values = {expr(s): sympy.Integer(n) for s, n in zip(self._symints, sizes, strict=True)}
        return all(each.xreplace(values) == sympy.true for each in self._asserts) and self.are_guarded(sizes)

    def are_guarded(self, sizes: Sequence[int]) -> bool:
        """Whether these values pass the guards that compiling the region took for granted."""
        if self._guards is None:
            return True
        return bool(self._env.evaluate_guards_expression(self._guards, list(sizes)))  # type: ignore[union-attr]

    def parse(self, expression: str) -> sympy.Expr:
        """The expression behind Inductor's text form of it, e.g. ``"8*s77"``."""
        # Not the environment's own deserialize_symexpr, which can't tell the number of a jagged dim's lengths.
        return expr(eval(expression, SYMPY_INTERP, self._symbols | _by_name(self._symints)))


def has_lost_guards(graph: torch.fx.Graph) -> bool:
    """Whether something compiled after Dynamo had made its guards holds for certain sizes only, which nothing checks.

    A guard is lost once: what is compiled later may rely on it, and loses none. Of backwards, which are always compiled
    after Dynamo's guards, PyTorch takes the risk.
    """
    shape_env = getattr(fake_mode_of(graph), "shape_env", None)
    return shape_env is not None and shape_env.counter["ignored_backward_guard"] > 0


def _by_name(symints: Sequence[torch.SymInt]) -> dict[str, torch.SymInt]:
    return {str(expr(symint)): symint for symint in symints}


def fake_mode_of(graph: torch.fx.Graph) -> Any:
    """The mode that the values of a graph were traced in; new values must be made in the same one."""
    return detect_fake_mode(
        [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    )


def is_jagged_size(value: Any) -> bool:
    """Whether an int argument stands for the lengths of a jagged dim: it names them, and is no number."""
    # What it was made for is a number where it is one, and another such name where it is not.
    return isinstance(value, torch.SymInt) and isinstance(value.node.hint, torch.SymInt)


def is_generator(value: Any) -> bool:
    """Whether an argument is a ``torch.Generator``, or stands for one while a region is compiled."""
    return isinstance(_real_object(value), torch.Generator)


def never_changes(value: Any) -> bool:
    """Whether an argument is an object whose state stays as it is: a process group or mesh, or a registered constant.

    What other registered objects hold may be another thing at every call.
    """
    real = _real_object(value)
    kinds = [getattr(torch.distributed, name, None) for name in ("ProcessGroup", "DeviceMesh")]
    if any(isinstance(kind, type) and isinstance(real, kind) for kind in kinds):
        return True
    return _is_constant_type is not None and _is_constant_type(type(real))


def kind_of(value: Any) -> str:
    """The name of an argument's class."""
    return type(_real_object(value)).__name__


def _real_object(value: Any) -> Any:
    return value.real_obj if isinstance(value, FakeScriptObject) else value


def trace_missing_values(graph: torch.fx.Graph) -> None:
    """Give operators that have no traced value one: Inductor's passes put some in without (for tensors on ``meta``)."""
    mode = fake_mode_of(graph)
    for node in graph.nodes:
        if is_operator(node.target) and "val" not in node.meta and mode is not None:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def expr(value: Any) -> Any:
    """A size, or a number computed from sizes, as a sympy expression over the region's symbols."""
    return value.node.expr if isinstance(value, SYMBOLIC) else sympy.sympify(value)


def is_operator(target: Any) -> TypeGuard[torch._ops.OpOverload]:
    """Whether an FX node's target is an overload of an operator (ATen, prims or custom)."""
    return isinstance(target, torch._ops.OpOverload)


def is_higher_order(target: Any) -> bool:
    """Whether an FX node's target takes graphs as arguments (``torch.cond``, ``scan``, …)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def flat_arguments(node: torch.fx.Node) -> list[Any]:
    """What a node is called with, without the lists, tuples and dicts around it."""
    return tree_leaves([node.args, node.kwargs])


def bound_arguments(node: torch.fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a higher-order operator by the names that its call gives them."""
    bound = inspect.signature(type(node.target).__call__).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def written_arguments(node: torch.fx.Node, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What the operator behind ``auto_functionalized_v2`` is called with, by name, taken from the wrapper's ``kwargs``.

    ``None`` for another wrapper, and where what is changed is not, in this order, one whole argument each: a view, two
    views of one tensor, a list, or an argument that is left out.
    """
    if node.target is not torch.ops.higher_order.auto_functionalized_v2 or not is_operator(node.args[0]):
        return None
    arguments: dict[str, Any] = {}
    bases = list(kwargs["_all_bases"])
    for argument in operator_schema(node.args[0]).arguments:
        name = argument.name
        if argument.alias_info is None or not argument.alias_info.is_write:
            arguments[name] = kwargs.get(name, argument.default_value)
            continue
        said = {key: value for key, value in kwargs.items() if key.startswith(f"_{name}_") and value is not None}
        said.pop(f"_{name}_alias", None)
        index = sum(1 for other in operator_schema(node.args[0]).arguments[: len(arguments)] if _is_written(other))
        if said != {f"_{name}_base_index": index} or index >= len(bases):
            return None
        arguments[name] = bases[index]
    return arguments if sum(map(_is_written, operator_schema(node.args[0]).arguments)) == len(bases) else None


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def subgraphs_of(node: torch.fx.Node) -> list[torch.fx.GraphModule]:
    """The graphs that a higher-order operator is given, each once."""
    found = [submodule_of(read) for read in node.all_input_nodes if read.op == "get_attr"]
    return [module for module in found if module is not None]


def submodule_of(node: torch.fx.Node) -> torch.fx.GraphModule | None:
    """The graph that a node gives to a higher-order operator; ``None`` if it gives anything else."""
    found = attribute_of(node)
    return found if isinstance(found, torch.fx.GraphModule) else None


def attribute_of(node: torch.fx.Node) -> Any:
    """What a ``get_attr`` node reads; ``None`` if its graph has no module, or that not this attribute."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def number_of(node: torch.fx.Node) -> Any:
    """The number in a tensor without dims that a ``get_attr`` node reads; ``None`` if it isn't known."""
    found = attribute_of(node)
    if not isinstance(found, torch.Tensor) or isinstance(found, FakeTensor):
        return None
    with unset_fake_temporarily():
        return found.item()


def calls_its_graph(target: torch._ops.HigherOrderOperator) -> bool:
    """Whether a higher-order operator is of those that do no more than call the graph they are given."""
    return any(base.__name__ == "BaseHOP" for base in type(target).__mro__)


def operator_name(target: torch._ops.OpOverload) -> str:
    """With namespace and overload: ``aten::sum.dim_IntList``."""
    return target.name()


def operator_schema(target: torch._ops.OpOverload) -> torch.FunctionSchema:
    return target._schema


def returns_view(target: torch._ops.OpOverload) -> bool:
    """Whether an operator returns views of an argument, and writes to none."""
    returns = target._schema.returns
    return not target._schema.is_mutable and any(r.alias_info is not None for r in returns)


def symbols_of(value: Any) -> frozenset[sympy.Symbol]:
    """The symbols in a number, or in the layout of a tensor."""
    numbers: list[Any] = [value] if isinstance(value, SYMBOLIC) else []
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        numbers = [*value.shape, *value.stride(), value.storage_offset()]
    return frozenset().union(*(expr(n).free_symbols for n in numbers))


def is_backed(expression: sympy.Expr) -> bool:
    """Whether every symbol is an input's size; others (``u0``) depend on data and are known only while running."""
    from torch.fx.experimental.symbolic_shapes import symbol_is_type
    from torch.utils._sympy.symbol import SymT

    return not any(symbol_is_type(s, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)) for s in expression.free_symbols)


# ------------------------------------------------------------------------------------------------ dynamic dims

Bounds = tuple[int | None, int | None]
"""The least and the largest size of a dim, as far as they are given."""


def marked_dims(tensor: torch.Tensor) -> dict[int, Bounds]:
    """The dims that ``torch._dynamo.mark_dynamic`` has marked, ascending, with the bounds given there."""
    bounds = {mark.dim: (mark.min, mark.max) for mark in getattr(tensor, "_dynamo_dynamic_range", ())}
    return {dim: bounds.get(dim, (None, None)) for dim in sorted(getattr(tensor, "_dynamo_dynamic_indices", ()))}


def mark_dim(tensor: torch.Tensor, dim: int, bounds: Bounds) -> None:
    """As ``mark_dynamic``, which takes two bounds or none; here one will do."""
    lower, upper = bounds
    if (lower is None) != (upper is None):
        lower, upper = 2 if lower is None else lower, int_oo if upper is None else upper
    torch._dynamo.mark_dynamic(tensor, dim, min=lower, max=upper)


def has_static_address(tensor: torch.Tensor) -> bool:
    """Whether Dynamo takes the address of an argument as fixed: of a parameter, or after ``mark_static_address``."""
    return isinstance(tensor, torch.nn.Parameter) or get_static_address_type(tensor) is not None


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested containers (those that pytree knows), in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """New containers like ``tree``, with ``function`` of each tensor."""
    return tree_map_only(torch.Tensor, function, tree)


# ------------------------------------------------------------------------------------------------ call path


def current_step() -> tuple[int, int]:
    """The step as PyTorch's own trees count it.

    Every outermost compiled call is a step; from the first ``torch.compiler.cudagraph_mark_step_begin()`` on, these
    calls say where steps begin (the second number, which falls). Read from ``cudagraph_trees.get_curr_generation``.
    """
    marked = MarkStepBox.mark_step_counter
    return (0, marked) if marked else (GenerationTracker.generation, 0)


def forget_marked_steps() -> None:
    """Until the next ``torch.compiler.cudagraph_mark_step_begin()`` every outermost compiled call is a step again.

    As a reset of stock's trees does. The count is the process's: of all threads, and of stock's trees, too.
    """
    MarkStepBox.mark_step_counter = 0


def storage_users(cdata: int) -> int:
    """How many references hold the storage at address ``cdata`` (``UntypedStorage._cdata``)."""
    return torch._C._storage_Use_Count(cdata)


same_storage: Callable[[torch.Tensor, Sequence[int], Sequence[int], int], torch.Tensor] = (
    torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
)
"""A new tensor of the same dtype on a tensor's storage, no view of it: size, stride, offset in elements.

What Inductor's code makes its views with; it does not go through the dispatcher.
"""

_ADDRESSES_EQUAL = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)  # CUDA builds only


def addresses_equal(tensors: list[Any], addresses: list[int | None], indices: list[int]) -> bool:
    """Whether the tensors at ``indices`` are at their ``addresses`` (a list as long as ``tensors``)."""
    if _ADDRESSES_EQUAL is not None:
        return _ADDRESSES_EQUAL(tensors, addresses, indices)
    return all(tensors[i].data_ptr() == addresses[i] for i in indices)


def borrowed_memory(address: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """A storage over memory that somebody else owns, and that must be there whenever it is read or written."""
    return torch._C._construct_storage_from_data_pointer(address, device, nbytes)  # type: ignore[return-value]


_FORBID_ACCESS = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)  # CUDA builds only
CAN_FORBID_ACCESS = _FORBID_ACCESS is not None


def forbid_access(storage: torch.UntypedStorage, message: str) -> None:
    """From now on an access to the storage's memory raises ``RuntimeError(message)``; it is no longer held.

    CPU builds of torch can't do that: there, every tensor on it that Python knows becomes of a class that raises.
    """
    if _FORBID_ACCESS is not None:
        _FORBID_ACCESS(storage._cdata, message)
        return
    forbidden = _forbidden(message)
    for tensor in [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # not every tensor has a storage
            if tensor.untyped_storage()._cdata == storage._cdata:
                tensor.__class__ = forbidden


def _forbidden(message: str) -> type[torch.Tensor]:
    def raises(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(message)

    return type("Overwritten", (torch.Tensor,), {"__torch_function__": classmethod(raises)})


def current_stream(device: torch.device) -> tuple[int, int, int]:
    """The id of the device's current stream, its device index and its device type."""
    return torch._C._cuda_getCurrentStream(device.index)


@contextlib.contextmanager
def generator_state_apart(device: torch.device) -> Iterator[None]:
    """Begin a capture in here that draws no random numbers.

    A capture takes the device's default generator, from which no thread can draw until it ends. One that begins here
    takes a copy of the generator's state; the generator itself goes on with its own.
    """
    generator = torch.cuda.default_generators[device.index]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


def register_generator(graph: torch.cuda.CUDAGraph, generator: torch.Generator) -> None:
    """Let a graph that will be captured draw from a generator, other numbers at every replay.

    A torch that lacks this finds the generators of a capture by itself.
    """
    if hasattr(graph, "register_generator_state"):
        graph.register_generator_state(generator)


def raw_stream(device_index: int) -> int:
    """The device's current stream as the driver's handle."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def current_device_index() -> int:
    """Of the current CUDA device, without ``torch.cuda``'s look whether CUDA is initialised."""
    return torch._C._cuda_getDevice()


def is_current_stream_capturing() -> bool:
    """As ``torch.cuda``'s, without its look whether CUDA is initialised."""
    return torch._C._cuda_isCurrentStreamCapturing()


def clear_cublas_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()


def end_failed_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Stop routing allocations to a pool, which ``CUDAGraph.capture_end`` does not do when it fails."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Buffers made here are ordinary tensors, usable from inference mode and from outside of it alike."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def stock_graph_count(device: torch.device) -> int:
    """The graphs that PyTorch's own cudagraph trees hold; they keep no counter, so the tree is walked."""
    manager = get_manager(device.index or 0, create_if_none_exists=False)
    waiting = [node for nodes in manager.roots.values() for node in nodes] if manager else []
    count = 0
    while waiting:
        node = waiting.pop()
        count += 1
        waiting.extend(child for children in node.children.values() for child in children)
    return count
