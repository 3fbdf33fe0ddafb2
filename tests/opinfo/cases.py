"""What the sweep judges: an operator's sample with one dynamic dim, traced into the graph that Inductor would get."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_flatten, tree_unflatten

from cudagraph_backend.torch_internals import expr
from tests.support.oracle import Region, traced

_DTYPES = (torch.float32, torch.int64, torch.complex64, torch.bool, torch.float64)
Dims = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One call of an operator: a function of its tensors alone.

    Attributes:
        number: its place in the operator's list of samples.
        function: calls the operator and returns its tensors.
        tensors: the tensor arguments.
    """

    number: int
    function: Callable[..., list[torch.Tensor]]
    tensors: tuple[torch.Tensor, ...]


#: Stands for the samples of an operator that has none on the CPU.
NO_SAMPLE = Sample(-1, list, ())


def dtype_of(op: OpInfo) -> torch.dtype:
    """Float32 if the operator takes it, else the first other that it does."""
    supported = op.supported_dtypes("cpu")
    return next((dtype for dtype in _DTYPES if dtype in supported), next(iter(sorted(supported, key=str))))


def samples_of(op: OpInfo, at_most: int) -> list[Sample]:
    """``at_most`` of the operator's samples, spread over its list; the same ones whenever called.

    Those of which no dim could be dynamic (numbers, empty tensors) are left out, if there are others.
    """
    seed = zlib.crc32(op.formatted_name.encode())
    for plant in (torch.manual_seed, random.seed, numpy.random.seed):
        plant(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inputs = list(op.sample_inputs("cpu", dtype_of(op), requires_grad=False))
        except Exception:  # some operators' samples are for a GPU
            inputs = []
    samples = [_sample(op, number, given) for number, given in enumerate(inputs)]
    samples = [sample for sample in samples if _places(sample.tensors)] or samples
    last, count = len(samples) - 1, min(at_most, len(samples))
    return [samples[round(i * last / max(count - 1, 1))] for i in range(count)]


def _sample(op: OpInfo, number: int, given: Any) -> Sample:
    flat, spec = tree_flatten((given.input, given.args, given.kwargs))
    places = [place for place, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]

    def function(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            leaves[place] = tensor
        first, args, kwargs = tree_unflatten(leaves, spec)
        results = tree_flatten(op.op(first, *args, **kwargs))[0]
        return [result for result in results if isinstance(result, torch.Tensor)]

    return Sample(number, function, tuple(_copy(flat[place]) for place in places))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own: no view, no entry in memory twice."""
    return tensor.detach().clone()


def groups_of(sample: Sample) -> list[Dims]:
    """Sets of dims that may be dynamic together: those which the operator's own checks find to be equal.

    If it can't be run with all sizes symbolic, every dim alone, and with those of its size at its place.
    """
    try:
        return _unified(sample)
    except Exception:  # whatever an operator may raise on symbolic sizes
        return _guessed(sample.tensors)


def _unified(sample: Sample) -> list[Dims]:
    shape_env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor, symbolic_context=_all_dynamic(tensor)) for tensor in sample.tensors]
    with mode, enable_python_dispatcher(), torch.no_grad(), _quiet():
        sample.function(*fakes)
    groups: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for place in _places(sample.tensors):
        size = shape_env.replace(expr(fakes[place[0]].shape[place[1]]))
        groups[size if size.is_Symbol else place].append(place)
    return [tuple(group) for group in groups.values()]


def _guessed(tensors: Sequence[torch.Tensor]) -> list[Dims]:
    places = _places(tensors)
    alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for arg, dim in places:
        alike[dim, tensors[arg].shape[dim]].append((arg, dim))
    return list(dict.fromkeys([*((place,) for place in places), *map(tuple, alike.values())]))


def _places(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    full = [(arg, tensor) for arg, tensor in enumerate(tensors) if tensor.numel()]
    return [(arg, dim) for arg, tensor in full for dim, size in enumerate(tensor.shape) if size > 1]


def _all_dynamic(tensor: torch.Tensor) -> StatelessSymbolicContext[Any, Any]:
    kinds = [DimDynamic.DYNAMIC if size > 1 else DimDynamic.STATIC for size in tensor.shape]
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def trace(sample: Sample, dims: Dims) -> Region:
    """The sample's graph, functional and decomposed as for Inductor, with ``dims`` dynamic and all others fixed."""
    args = [_copy(tensor) for tensor in sample.tensors]
    for arg, dim in dims:
        marked: set[int] = getattr(args[arg], "_dynamo_dynamic_indices", set())
        args[arg]._dynamo_dynamic_indices = marked | {dim}  # type: ignore[attr-defined]
    with _quiet():
        return traced(_functional(sample.function), *args)


def _functional(function: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    """As AOTAutograd does it: no operator writes in place, except for ``copy_`` into the inputs at the very end."""

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        with FunctionalTensorMode():
            wrapped = [FunctionalTensor.to_functional(tensor) for tensor in tensors]
            results = function(*wrapped)
        found = [_unwrapped(result) for result in results]
        for tensor, after in zip(tensors, map(_unwrapped, wrapped), strict=True):
            if after is not tensor:
                tensor.copy_(after)
        return found

    return run


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cases_of(op: OpInfo, at_most: int) -> Iterator[tuple[Sample, Dims]]:
    """Every sample of ``op`` with every set of dims; a sample without any dim comes once, with none."""
    for sample in samples_of(op, at_most) or [NO_SAMPLE]:
        yield from itertools.product([sample], groups_of(sample) or [()])
