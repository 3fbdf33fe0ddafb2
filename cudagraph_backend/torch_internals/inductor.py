"""The way into Inductor, and its settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._dynamo.convert_frame import compile_lock
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from cudagraph_backend.torch_internals.storages import outside_inference_mode

InnerCompile = Callable[..., Callable[..., Any]]

#: Changes a forward and its backward, which agree on what is saved: what the forward has behind so many results.
AfterPartition = Callable[[torch.fx.GraphModule, torch.fx.GraphModule, int], None]


def compile_regions(
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    inner: InnerCompile,
    after_partition: AfterPartition,
    patches: dict[str, Any],
) -> Any:
    """Run stock Inductor's whole pipeline on a Dynamo graph, calling ``inner`` once per AOT region.

    In training ``after_partition`` gets the graphs of both regions before either is compiled.

    A warm AOTAutogradCache would return stock-compiled code without ever calling ``inner``; it is switched off. The
    FX graph cache below it, which holds the expensive part, still works. Stock's own CUDA graphs are switched off.
    """
    given = patches.get("custom_partitioner_fn", inductor_config.custom_partitioner_fn)
    partitioner = _Partitioner(given or min_cut_rematerialization_partition, after_partition)
    patches = {**patches, "triton.cudagraphs": False, "custom_partitioner_fn": partitioner}
    with functorch_config.patch(enable_autograd_cache=False, bundled_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)  # type: ignore[arg-type]


class _Partitioner(CustomPartitionerFn):
    """Partitions as ``partition`` does, and lets ``after`` change the two graphs."""

    def __init__(self, partition: Callable[..., Any], after: AfterPartition):
        self._partition, self._after = partition, after

    def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        forward, backward = self._partition(gm, joint_inputs, **kwargs)
        self._after(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward

    def uuid(self) -> Any:
        """Return what tells the cache of compiled graphs partitioners apart: that graph is its key, too."""
        uuid = getattr(self._partition, "uuid", None)
        return "sharedgraph", uuid() if uuid is not None else None


def compile_region(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Compile one AOT region with Inductor. ``kwargs`` are what ``compile_fx`` passed; they differ by release.

    Code may overwrite what a forward has saved, but not if the backward may run again (``retain_graph=True``). The
    key of the FX graph cache tells the two apart by these arguments alone: then a tuple is in place of a list.
    """
    metadata = getattr(TracingContext.try_get(), "fw_metadata", None)
    if not getattr(metadata, "bw_donated_idxs", None):
        kwargs["static_input_idxs"] = tuple(kwargs.get("static_input_idxs") or ())
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


def checked_inductor_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return Inductor's settings after its own check of names and types (as for ``torch.compile(options=…)``).

    Raises:
        RuntimeError: an unknown name or a value of the wrong type.
    """
    return dict(torch._TorchCompileInductorWrapper(None, options, None).config)


def mode_settings(mode: str) -> dict[str, Any]:
    """Return Inductor's settings that a ``mode`` of ``torch.compile`` stands for."""
    return dict(torch._inductor.list_mode_options(mode))


def inductor_option_names() -> list[str]:
    return sorted(inductor_config.get_config_copy())


def draws_as_eager() -> bool:
    """Return whether compiled code must draw the random numbers that eager draws."""
    return bool(inductor_config.fallback_random)


def ops_to_partition() -> tuple[str, ...]:
    """Return Inductor's own list of operators that must run outside of CUDA graphs, as it is set now."""
    return tuple(getattr(inductor_config, "custom_should_partition_ops", ()))
