"""What the backend did: numbers (``stats``), text (``explain``), and which memory a tensor aliases (``alias_info``)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudagraph_backend.backend import Backend
from cudagraph_backend.fill import key_of
from cudagraph_backend.memory.spans import merged
from cudagraph_backend.memory.strides import extent
from cudagraph_backend.region import DynamicDim
from cudagraph_backend.runtime.devices import Device
from cudagraph_backend.runtime.places import Place
from cudagraph_backend.runtime.plan import Bucket, Sizes
from cudagraph_backend.runtime.replayer import Replayer
from cudagraph_backend.runtime.served import Padding, Rows, padding_of
from cudagraph_backend.torch_internals import is_registered_operator


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the last reset, over all regions that are alive; memory in bytes, over all devices.

    Attributes:
        regions: compiled regions; each part of one that is not captured whole counts.
        graphs: captured graphs that are held.
        captures: captures made (more than ``graphs`` where a graph was replaced).
        replays: calls that a graph answered, those that captured it included.
        fallbacks: calls that ran the compiled region, by reason.
        rows_real, rows_padded: rows of padded dims, over all replays.
        padding: the same by region and dim, with shares in percent, and calls that took a bucket which existed; of the
            regions that have padded dims and were called.
        output_pool_bytes: memory that the output pools hold, for outputs and for inputs that are copied to be read.
        sum_of_buckets_bytes: what separate outputs for every captured bucket would hold.
        staging_bytes: the part of the output pools to which inputs are copied; between calls it serves other places.
        memory_pool_bytes: scratch, shared by all captures (CUDA).
        executable_bytes: what the executables of the graphs that are held took when they were made (CUDA). This memory
            is no allocator's: only ``torch.cuda.mem_get_info`` sees it. Measured as the fall of free memory, so an
            estimate where other processes use the device.
        outputs_copied_out: outputs that calls got as copies in memory of their own, because callers keep earlier ones;
            those that share memory count once.
        staged_copies: arguments that were copied to where a graph reads them.
        read_in_place: arguments, outputs of earlier calls, that a graph read where they were.
        output_copies: outputs, over all graphs, that are copied to the pool in the graph and not written there at once.
    """

    regions: int
    graphs: int
    captures: int
    replays: int
    fallbacks: dict[str, int]
    rows_real: int
    rows_padded: int
    padding: list[Padding]
    output_pool_bytes: int
    sum_of_buckets_bytes: int
    staging_bytes: int
    memory_pool_bytes: int
    executable_bytes: int
    outputs_copied_out: int
    staged_copies: int
    read_in_place: int
    output_copies: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stats_of(backend: Backend) -> Stats:
    replayers = backend.regions()
    fallbacks: Counter[str] = Counter()
    for replayer in replayers:
        fallbacks.update(replayer.counters.fallbacks)
    padding = [found for found in map(_padding, replayers) if found is not None]
    rows = [rows for one in padding for rows in one.dims.values()]
    return Stats(
        regions=len(replayers),
        graphs=sum(_graph_count(r) for r in replayers),
        captures=sum(r.counters.captures for r in replayers),
        replays=sum(r.counters.replays for r in replayers),
        fallbacks=dict(fallbacks),
        rows_real=sum(one.real for one in rows),
        rows_padded=sum(one.padded for one in rows),
        padding=padding,
        output_pool_bytes=sum(d.pool.nbytes for d in backend.devices().values()),
        sum_of_buckets_bytes=sum(sum(_output_bytes(r)) for r in replayers),
        staging_bytes=sum(_staging_bytes([r for r in replayers if r.region.device == d]) for d in backend.devices()),
        memory_pool_bytes=sum(d.driver.scratch_nbytes() for d in backend.devices().values()),
        executable_bytes=sum(_executable_bytes(r) for r in replayers),
        outputs_copied_out=sum(r.counters.outputs_copied_out for r in replayers),
        staged_copies=sum(r.counters.staged_copies for r in replayers),
        read_in_place=sum(r.counters.read_in_place for r in replayers),
        output_copies=sum(_output_copies(r) for r in replayers),
    )


def explanation_of(backend: Backend) -> str:
    """Describe each region: source lines, verdict on each dynamic dim, buckets, fallbacks, memory."""
    replayers = backend.regions()
    if not replayers:
        return "sharedgraph: no region is compiled"
    lines = [line for replayer in replayers for line in _explain(replayer)]
    lines += _unmatched_fills(replayers)
    named = dict.fromkeys(name for r in replayers for name in r.options.uncapturable_ops)
    lines += [f"uncapturable_ops: no operator is named {n!r}" for n in named if not is_registered_operator(n)]
    for device, state in backend.devices().items():
        lines += _explain_memory(device, state, [r for r in replayers if r.region.device == device])
    return "\n".join(lines)


def _explain(replayer: Replayer) -> list[str]:
    region = replayer.region
    lines = [f"{region.name} on {region.device}"]
    lines += [f"  from {span}" for span in region.source_lines]
    if region.refusal is not None:
        lines.append(f"  not captured: {region.refusal}")
    planner = replayer.state.planner if replayer.state is not None else None
    probed = planner.probed if planner is not None else {}
    dims = planner.dims if planner is not None else region.dims
    lines += [f"  dim {_explain_dim(dim, sorted(probed.get(dim.name, ())))}" for dim in dims]
    postponed = Counter(reason for reasons in planner.postponed.values() for reason in reasons) if planner else {}
    lines += [f"  the probe could not tell at {count} calls: {reason}" for reason, count in postponed.items()]
    if captured := sorted({sizes for place in _places(replayer) for sizes in place.graphs}):
        lines.append(f"  buckets: {_bucket_sizes(replayer, captured)}")
    lines += [f"  ran uncaptured {count} times: {reason}" for reason, count in replayer.counters.fallbacks.items()]
    counters, sizes = replayer.counters, _output_bytes(replayer)
    lines.append(f"  {_graph_count(replayer)} graphs, {counters.captures} captures, {counters.replays} replays")
    if (padding := _padding(replayer)) is not None:
        lines += [f"  {line}" for line in _explain_padding(padding)]
    lines.append(f"  inputs: {counters.staged_copies} copied, {counters.read_in_place} read in place")
    lines.append(
        f"  outputs: {max(sizes, default=0)} bytes pooled, {sum(sizes)} as separate buckets; "
        f"{_output_copies(replayer)} copied in graphs"
    )
    return lines


def _explain_padding(padding: Padding) -> Iterator[str]:
    def share(rows: Rows, of: str) -> str:
        return f"{rows.padded} of {rows.real + rows.padded} {of} ({rows.padded_percent:.1f} %)"

    yield "padded: " + ", ".join(share(rows, f"rows of {dim}") for dim, rows in padding.dims.items())
    if len(padding.dims) > 1:
        product = " × ".join(padding.dims)
        yield f"padded: {share(padding.product, f'entries of {product}')}"
    if padding.existing_percent is not None:
        yield (
            f"{padding.calls_in_existing} of {padding.calls} calls took a bucket that existed and not their own: "
            f"its inputs may have {padding.existing_percent:g} % more bytes"
        )


def _padding(replayer: Replayer) -> Padding | None:
    """Return what padding cost a region; ``None`` if it pads nothing, or was not called."""
    if (state := replayer.state) is None:
        return None
    served = list(state.planner.served.values())  # at once, as other threads may call
    padding = padding_of(replayer.region.name, served, state.planner.allowance())
    return padding if padding.calls and padding.dims else None


def _explain_memory(device: torch.device, state: Device, replayers: Sequence[Replayer]) -> list[str]:
    """Return what is held on a device, next to what it would be without sharing where that is known."""
    separate = sum(sum(_output_bytes(replayer)) for replayer in replayers)
    executables, graphs = sum(map(_executable_bytes, replayers)), sum(map(_graph_count, replayers))
    return [
        f"memory on {device}",
        f"  output pool: {state.pool.nbytes} bytes; outputs as separate buckets: {separate}",
        f"  staging: {_staging_bytes(replayers)} bytes of the output pool, shared with outputs",
        f"  scratch: {state.driver.scratch_nbytes()} bytes, shared by all graphs",
        f"  executables: {executables} bytes, outside of all allocators, for {graphs} graphs",
    ]


def _unmatched_fills(replayers: Sequence[Replayer]) -> list[str]:
    """Report names in the option ``fill`` that no input has.

    One region may well lack an input, but a name that all lack is likely misspelt, or that of an argument that the
    model does not use.
    """
    lines, seen = [], []
    for fills in (replayer.options.fill for replayer in replayers):
        if not isinstance(fills, Mapping) or fills in seen:
            continue
        seen.append(fills)
        inputs = [i for r in replayers if r.options.fill == fills for i in r.region.inputs if i.given is not None]
        used = {key_of(fills, i.given) for i in inputs if i.given is not None}
        known = dict.fromkeys(i.given.path for i in inputs if i.given is not None and i.role == "staged")
        lines += [f"fill: no input is named {k!r} (inputs: {', '.join(known)})" for k in fills if k not in used]
    return lines


def _explain_dim(dim: DynamicDim, probed: Sequence[int]) -> str:
    """Describe a dim; ``probed`` are the buckets in which it passed the probe."""
    sizes = f"{dim.name} ({'any size' if dim.upper is None else f'up to {dim.upper}'})"
    if dim.refusal is not None:
        unproven = f" (not proven: {dim.to_probe})" if dim.to_probe is not None else ""
        return f"{sizes}: not padded, one graph per size: {dim.refusal}{unproven}"
    buckets = f"in buckets {', '.join(map(str, probed))}" if probed else "in no bucket yet"
    if dim.to_probe is not None:
        seen = "padded rows did not reach real rows" if probed else "padded where the probe sees nothing against it"
        return f"{sizes}: probed {buckets}: {seen} (not proven: {dim.to_probe})"
    needs = "what they hold matters" if dim.needs_fill else "they may hold anything"
    needs += f", masked {dim.masks} times" if dim.masks else ""
    if dim.forms:
        needs += f"; by the number of real rows: {', '.join(dict.fromkeys(dim.forms))}"
    return f"{sizes}: padded rows never reach real rows ({needs})" + (f", probed {buckets}" if probed else "")


def _bucket_sizes(replayer: Replayer, captured: Sequence[Sizes]) -> str:
    dims = replayer.region.dims
    if not dims:
        return "one, for its fixed sizes"
    values = [replayer.region.values(sizes) for sizes in captured]
    rows = ["×".join(str(at[next(iter(dim.symbols))]) for dim in dims) for at in values]
    return f"{', '.join(rows)} ({' × '.join(dim.name for dim in dims)})"


def _buckets(replayer: Replayer) -> Collection[Bucket]:
    return replayer.state.planner.buckets.values() if replayer.state is not None else ()


def _places(replayer: Replayer) -> Collection[Place]:
    return replayer.state.places.listed if replayer.state is not None else ()


def _graph_count(replayer: Replayer) -> int:
    return sum(len(place.graphs) for place in _places(replayer))


def _executable_bytes(replayer: Replayer) -> int:
    return sum(graph.executable_nbytes for place in _places(replayer) for graph in place.graphs.values())


def _output_copies(replayer: Replayer) -> int:
    buckets = {bucket.sizes: bucket for bucket in _buckets(replayer)}
    return sum(buckets[sizes].copied for place in _places(replayer) for sizes in place.graphs)


def _output_bytes(replayer: Replayer) -> list[int]:
    """Return, per captured bucket, the bytes of its outputs."""
    return [bucket.layout.nbytes for bucket in _buckets(replayer) if bucket.layout is not None]


def _staging_bytes(replayers: Sequence[Replayer]) -> int:
    """Count the bytes of the pool to which inputs of these regions are copied."""
    return sum(
        end - first for first, end in merged(s for r in replayers for place in _places(r) for s in place.staging)
    )


@dataclass(frozen=True, slots=True)
class AliasInfo:
    """Where in the output pool a tensor lies.

    Attributes:
        region: name of the region that it is an output of, as in ``explain()``.
        output: index among the region's outputs.
        start, end: the tensor's bytes in ``output_pool(device).tensor``, end exclusive.
        step: PyTorch's step counters when the output was made.
    """

    region: str
    output: int
    start: int
    end: int
    step: tuple[int, int]


def alias_info_of(backend: Backend, tensor: torch.Tensor) -> AliasInfo | None:
    """Return the region and the output that ``tensor`` is or is a view of; ``None`` if it is not in the pool."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"alias_info: got a {type(tensor).__name__}; accepted is a torch.Tensor")
    device = backend.devices().get(tensor.device)
    if device is None or tensor.layout != torch.strided:
        return None
    taken = device.pool.holder(tensor.untyped_storage())
    if taken is None or taken.loan is None:
        return None
    start = tensor.data_ptr() - device.pool.tensor.data_ptr()
    inside = start - taken.offset
    output = next((i for i, first, last in taken.loan.outputs if first <= inside < last), None)
    if output is None:
        return None
    end = start + extent(tensor.shape, tensor.stride()) * tensor.element_size()
    return AliasInfo(taken.loan.region, output, start, end, taken.step)
