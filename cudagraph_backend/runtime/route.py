"""Places and routes: at which addresses a region's graphs were captured, and how a call gets to one of them.

A *place* is a region called with certain addresses: those of its static inputs, where in the output pool it reads its
other inputs, and the ranges that it writes its outputs to. All buckets share a place's addresses, one graph each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cudagraph_backend.drivers import Graph
from cudagraph_backend.memory.copies import StagedCopy, Staging
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.memory.output_range import OutputRange
from cudagraph_backend.memory.spans import Span, meets, merged
from cudagraph_backend.region import Region
from cudagraph_backend.runtime.plan import Sizes
from cudagraph_backend.runtime.readings import Reading, Where
from cudagraph_backend.torch_internals import StorageWeakRef


class Copies:
    """What became of the copies that calls got of one range, which tells whether it might be lent as well."""

    def __init__(self, watched: int) -> None:
        self._last: deque[StorageWeakRef] = deque(maxlen=watched)
        self._died = 0

    def add(self, copy: torch.UntypedStorage) -> int:
        """Note a new copy; return how many in a row were made since when an older one had died young."""
        self._died = self._died + 1 if self._last and self._last[0].expired() else 0
        self._last.append(StorageWeakRef(copy))
        return self._died


@dataclass(eq=False)
class Place:
    """The addresses of one place, and its graphs by bucket.

    ``static_addresses`` has the address of each static argument (``None`` for any other), ``inputs`` the bytes that
    graphs read, per staged input, and ``staging`` those among them to which an argument may be copied. ``copied`` are
    the indices of the ranges that are lent to nobody: a call gets a copy of what is written there. ``objects`` are the
    arguments at ``Region.objects``. ``used`` is the number of the region's call that used the place last.
    """

    static_addresses: list[int | None]
    inputs: tuple[Span, ...]
    staging: frozenset[Span]
    outputs: tuple[OutputRange, ...] = ()
    graphs: dict[Sizes, Graph] = field(default_factory=dict)
    copied: dict[int, Copies] = field(default_factory=dict)
    used: int = 0
    objects: tuple[Any, ...] = ()

    def accepts(self, readings: Sequence[Reading], where: Where) -> bool:
        """Return whether arguments found there are read here, and others can be copied to where they are read."""
        return all(
            found == span[0] if found is not None else span in self.staging and span[0] + reading.nbytes <= span[1]
            for reading, found, span in zip(readings, where, self.inputs, strict=True)
        )

    def holds(self, range_nbytes: Sequence[int]) -> bool:
        """Return whether outputs of these sizes fit."""
        return len(range_nbytes) <= len(self.outputs) and all(
            need <= taken.nbytes for need, taken in zip(range_nbytes, self.outputs, strict=False)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """How calls of certain sizes, whose arguments are found in certain places, are answered at a place.

    Attributes:
        sizes: those of the bucket.
        where: the arguments are read.
        inputs: what the bucket runs with: sizes and views of the pool by argument, ``None`` for static ones.
        copies: of the arguments that are copied.
        in_place: of those that are read where they lie; only their padded rows are written.
        written: those of ``copies`` whose arguments the region changes.
        writes: the bytes of the pool that a call writes, as merged spans.
        fixed: where the other arguments are, static or read in place, as merged spans of addresses; those that the
            region changes in ``fixed_written``. Both are empty for a region that changes none.
        stage: copies ``copies``, and fills the padded rows of these and of ``in_place``.
    """

    place: Place
    sizes: Sizes
    where: Where
    inputs: list[Any]
    copies: tuple[StagedCopy, ...]
    in_place: tuple[StagedCopy, ...]
    written: tuple[StagedCopy, ...]
    writes: list[Span]
    fixed: list[Span]
    fixed_written: list[Span]
    stage: Staging

    @property
    def graph(self) -> Graph | None:
        """The graph that answers such calls; ``None`` if it is not captured yet."""
        return self.place.graphs.get(self.sizes)

    def takes_apart(self, args: Sequence[Any]) -> bool:
        """Return whether an argument that the region changes meets another one in memory, and one of them is copied.

        The compiled region sees a change through both; AOTAutograd guards against the overlap only if there was one
        when it compiled.
        """
        copied = [(copy, copy.span(args)) for copy in self.copies]
        if any(meets(span, self.fixed_written) for _, span in copied):
            return True
        for written in self.written:
            span = written.span(args)
            others = merged(other for copy, other in copied if copy is not written)
            if meets(span, self.fixed) or meets(span, others):
                return True
        return False

    def blockers(self, pool: OutputPool) -> list[OutputRange]:
        """Return the ranges with live outputs that a call would overwrite."""
        return list(dict.fromkeys(taken for span in self.writes for taken in pool.live.within(span)))


def bucket_inputs(region: Region, sizes: Sizes, buffers: Mapping[int, torch.Tensor]) -> list[Any]:
    """Return what a bucket runs with, by argument: its sizes and buffers; ``None`` for what the call itself gives."""
    indices = [i.index for i in region.inputs] + [s.index for s in region.sizes]
    inputs: list[Any] = [None] * (1 + max(indices, default=-1))
    for source, size in zip(region.sizes, sizes, strict=True):
        if source.dim is None:
            inputs[source.index] = size
    for index, buffer in buffers.items():
        inputs[index] = buffer
    return inputs
