"""Everything private of torch that this package touches, in one place, by subject.

Read from, and tested with, torch 2.11, 2.12 and 2.13. No other module uses a private name of torch, but for
``torch._foreach_copy_``, the ``_cdata`` of storages, and operators by their names. Others import from this package, not
from its modules; these import each other alone, without circles.

``docs/torch_internals.md`` lists every private name: where it is used, what differs between releases, which test guards
it. ``tests/unit/test_torch_internals_table.py`` compares that list with this code and with the torch that is installed.

For a new release of torch:

1. ``python -m tests.torch_names > old.txt`` with the last release. Install the new one, let ``setup.py`` and the CI
   matrix allow it, and ``python -m tests.torch_names > new.txt``. Each line says the parameters of a name, and a digest
   of its source: where they differ, read what has changed.
2. ``pytest tests/unit/test_torch_internals_table.py tests/unit/test_torch_internals.py``: names that are gone, and what
   each does.
3. Read what has no underscore, and so is not found by its name (the second part of the list): the fields of
   ``CompiledFxGraph`` and the code that Inductor generates, ``ShapeEnv``, ``TracingContext``, the keys of a node's
   ``meta``, the arguments that ``compile_fx`` passes on to ``compile_fx_inner``.
4. Read what decides about CUDA graphs in torch itself, as ours follows it: ``torch/_inductor/cudagraph_trees.py`` (how
   steps are counted), ``torch/_inductor/cudagraph_utils.py`` (what is not captured) and ``torch/cuda/graphs.py``.
5. ``pytest``, and on a GPU ``pytest -m cuda -n 0``; then ``python -m tests.parity`` and ``python -m tests.opinfo``:
   what is captured, and which operators are padded.
6. Write down what differs, and take out what only releases need that are supported no more.
"""

from __future__ import annotations

from cudagraph_backend.torch_internals.captures import (
    clear_cublas_workspaces,
    end_failed_capture,
    generator_state_apart,
    register_generator,
)
from cudagraph_backend.torch_internals.containers import map_tensors, tensors_in
from cudagraph_backend.torch_internals.dynamo import (
    call_input,
    input_sources,
    keep_precompiled_code_apart,
    take_graph_override,
)
from cudagraph_backend.torch_internals.fx import (
    attribute_of,
    dispatch_to_proxies,
    fake_mode_of,
    flat_arguments,
    number_of,
    subgraphs_of,
    submodule_of,
    trace_missing_values,
)
from cudagraph_backend.torch_internals.generated_code import (
    Compiled,
    boxed,
    failed_operator,
    is_compiled_graph,
    mutated_inputs,
    output_strides,
    unbound_sizes,
    uncapturable_reason,
    with_allocator,
)
from cudagraph_backend.torch_internals.inductor import (
    Compilation,
    InnerCompile,
    checked_inductor_options,
    compile_region,
    compile_regions,
    draws_as_eager,
    inductor_option_names,
    mode_settings,
    ops_to_partition,
    without_graph_cache,
)
from cudagraph_backend.torch_internals.marks import Bounds, has_static_address, mark_dim, marked_dims
from cudagraph_backend.torch_internals.objects import is_generator, kind_of, never_changes
from cudagraph_backend.torch_internals.schemas import (
    MAKE_TOKEN,
    SINK_TOKENS,
    bound_arguments,
    calls_its_graph,
    is_higher_order,
    is_operator,
    is_registered_operator,
    operator_name,
    operator_schema,
    returns_view,
    written_arguments,
)
from cudagraph_backend.torch_internals.shapes import (
    SYMBOLIC,
    Shapes,
    expr,
    has_lost_guards,
    is_backed,
    is_jagged_size,
    marked_sizes,
    number_of_sizes,
    symbols_of,
    tensor_of_sizes,
    unify_factors,
)
from cudagraph_backend.torch_internals.stock_trees import current_step, forget_marked_steps, stock_graph_count
from cudagraph_backend.torch_internals.storages import (
    CAN_FORBID_ACCESS,
    StorageWeakRef,
    addresses_equal,
    borrowed_memory,
    forbid_access,
    outside_inference_mode,
    same_storage,
    storage_users,
)
from cudagraph_backend.torch_internals.streams import (
    current_device_index,
    current_stream,
    is_current_stream_capturing,
    raw_stream,
)
from cudagraph_backend.torch_internals.tracing import (
    compiling_a_part,
    forget_output_strides,
    mark_visible,
    module_of,
    report_as_traced,
    report_output_strides,
    retrace_strides,
    visible_outputs,
)

__all__ = [
    "CAN_FORBID_ACCESS",
    "MAKE_TOKEN",
    "SINK_TOKENS",
    "SYMBOLIC",
    "Bounds",
    "Compilation",
    "Compiled",
    "InnerCompile",
    "Shapes",
    "StorageWeakRef",
    "addresses_equal",
    "attribute_of",
    "borrowed_memory",
    "bound_arguments",
    "boxed",
    "call_input",
    "calls_its_graph",
    "checked_inductor_options",
    "clear_cublas_workspaces",
    "compile_region",
    "compile_regions",
    "compiling_a_part",
    "current_device_index",
    "current_step",
    "current_stream",
    "dispatch_to_proxies",
    "draws_as_eager",
    "end_failed_capture",
    "expr",
    "failed_operator",
    "fake_mode_of",
    "flat_arguments",
    "forbid_access",
    "forget_marked_steps",
    "forget_output_strides",
    "generator_state_apart",
    "has_lost_guards",
    "has_static_address",
    "inductor_option_names",
    "input_sources",
    "is_backed",
    "is_compiled_graph",
    "is_current_stream_capturing",
    "is_generator",
    "is_higher_order",
    "is_jagged_size",
    "is_operator",
    "is_registered_operator",
    "keep_precompiled_code_apart",
    "kind_of",
    "map_tensors",
    "mark_dim",
    "mark_visible",
    "marked_dims",
    "marked_sizes",
    "mode_settings",
    "module_of",
    "mutated_inputs",
    "never_changes",
    "number_of",
    "number_of_sizes",
    "operator_name",
    "operator_schema",
    "ops_to_partition",
    "output_strides",
    "outside_inference_mode",
    "raw_stream",
    "register_generator",
    "report_as_traced",
    "report_output_strides",
    "retrace_strides",
    "returns_view",
    "same_storage",
    "stock_graph_count",
    "storage_users",
    "subgraphs_of",
    "submodule_of",
    "symbols_of",
    "take_graph_override",
    "tensor_of_sizes",
    "tensors_in",
    "trace_missing_values",
    "unbound_sizes",
    "uncapturable_reason",
    "unify_factors",
    "visible_outputs",
    "with_allocator",
    "without_graph_cache",
    "written_arguments",
]
