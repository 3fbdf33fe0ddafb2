"""Compacting: what a forward has saved may have the strides of a bucket, which a backward's code does not expect."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from cudagraph_backend.memory.copies import compact
from cudagraph_backend.memory.strides import Shape, same_places
from cudagraph_backend.region import Region, SizeInput, TensorInput, Values, evaluate_all
from cudagraph_backend.torch_internals import Compiled

_SIZES_REMEMBERED = 1024


def may_be_strided(tensor: TensorInput) -> bool:
    """Return whether an input of a backward has other strides in a bucket."""
    return tensor.role == "staged" and any(step.free_symbols for step in tensor.stride)


def compacting(compiled: Compiled, region: Region) -> Compiled:
    """Return the code of a region for arguments of whatever strides: it relies on those that it was compiled for."""
    strided = [tensor for tensor in region.inputs if may_be_strided(tensor)]
    if region.kind != "backward" or not strided:
        return compiled
    return functools.partial(_compacted, compiled, region.sizes, _Shapes(region, strided))


def _compacted(compiled: Compiled, sizes: Sequence[SizeInput], shapes: _Shapes, args: list[Any]) -> Sequence[Any]:
    for index, (size, stride) in shapes.at(tuple([read.read(args) for read in sizes])):
        if not same_places(size, args[index].stride(), stride):
            args[index] = compact(args[index], stride)
    return compiled(args)


class _Shapes:
    """The shapes that a region was compiled for."""

    def __init__(self, region: Region, tensors: Sequence[TensorInput]):
        self._region = region
        self._tensors = tensors
        self.at = functools.lru_cache(_SIZES_REMEMBERED)(self._at)

    def _at(self, sizes: Sequence[int]) -> list[tuple[int, Shape]]:
        values: Values = self._region.values(sizes)
        return [(t.index, (evaluate_all(t.size, values), evaluate_all(t.stride, values))) for t in self._tensors]
