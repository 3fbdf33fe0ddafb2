"""Example: one call of a function, which can be made at any size of the dims that change. For ``warmup``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from cudagraph_backend import torch_internals
from cudagraph_backend.errors import WarmupError
from cudagraph_backend.torch_internals import Bounds

Size: TypeAlias = "tuple[int, ...]"
"""One size per axis."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Dims that change together: as long as each other, ``length``, in the inputs given."""

    length: int
    lower: int | None
    upper: int | None

    def joined(self, bounds: Bounds) -> Axis:
        """Return the axis with the bounds of one more dim. Raises ``WarmupError`` if they contradict its own."""
        for own, other in zip((self.lower, self.upper), bounds, strict=True):
            if None not in (own, other) and own != other:
                raise WarmupError(
                    f"warmup: two marked dims of length {self.length} have different bounds, {own} and {other}; "
                    "accepted are equal ones for dims that change together; let others differ in length in the inputs"
                )
        lower, upper = bounds
        return Axis(self.length, self.lower if lower is None else lower, self.upper if upper is None else upper)

    @property
    def example(self) -> int:
        """A size to compile for: as given, but within the bounds, and not 1, which is compiled apart."""
        return min(max(self.length, self.lower or 2, 2), self.upper or self.length + 1)

    def __str__(self) -> str:
        return f"the dim of length {self.length}"


@dataclass(frozen=True, slots=True)
class ExampleCall:
    """One call of ``fn`` at any size. ``dims`` are those that change, with their bounds, by the tensor's ``id``."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dims: Mapping[int, Mapping[int, Bounds]]
    axes: tuple[Axis, ...]
    backward: bool

    @classmethod
    def of(cls, fn: Callable[..., Any], inputs: Any, kwargs: Any, backward: bool) -> ExampleCall:
        if not callable(fn):
            raise WarmupError(f"warmup: fn: got {fn!r}; accepted is a compiled function or module")
        if isinstance(inputs, Mapping) and kwargs is None:
            inputs, kwargs = (), inputs
        if not isinstance(inputs, (tuple, list)) or not isinstance(kwargs, (Mapping, type(None))):
            raise WarmupError(
                f"warmup: got inputs of type {type(inputs).__name__} and kwargs of type {type(kwargs).__name__}; "
                "accepted is a tuple of positional arguments, as in warmup(fn, (x,)), or a dict of keyword arguments, "
                "or both, as in warmup(fn, (x,), kwargs={'mask': mask})"
            )
        args, kwargs = tuple(inputs), dict(kwargs or {})
        tensors = [t for t in torch_internals.tensors_in((args, kwargs)) if not torch_internals.has_static_address(t)]
        dims = _dynamic_dims(tensors)
        return cls(fn, args, kwargs, dims, _axes(tensors, dims), backward)

    def run(self, size: Size) -> None:
        """Call ``fn`` with copies of that size; its results are dropped."""
        args, kwargs = self._at(dict(zip([axis.length for axis in self.axes], size, strict=True)))
        result = self.fn(*args, **kwargs)
        if self.backward:
            _run_backward(result)

    def _at(self, lengths: Mapping[int, int]) -> tuple[Any, Any]:
        copies: dict[int, torch.Tensor] = {}  # what is passed twice stays one tensor

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if torch_internals.has_static_address(tensor):
                return tensor
            if id(tensor) not in copies:
                copies[id(tensor)] = _marked_copy(tensor, self.dims[id(tensor)], lengths)
            return copies[id(tensor)]

        args, kwargs = torch_internals.map_tensors(copied, (self.args, dict(self.kwargs)))
        return args, kwargs


def _dynamic_dims(tensors: Sequence[torch.Tensor]) -> dict[int, dict[int, Bounds]]:
    dims = {id(tensor): torch_internals.marked_dims(tensor) for tensor in tensors}
    if any(dims.values()):
        return dims
    if not tensors or tensors[0].dim() == 0:
        found = "the first tensor has no dims" if tensors else "there is no tensor among them"
        raise WarmupError(
            f"warmup: no dim of the inputs is marked, and {found}; accepted are inputs with rows, or with what changes "
            "marked: torch._dynamo.mark_dynamic(tensor, dim, min=2, max=…)"
        )
    rows = tensors[0].size(0)
    return {id(t): {0: (None, None)} if t.dim() and t.size(0) == rows else {} for t in tensors}


def _axes(tensors: Sequence[torch.Tensor], dims: Mapping[int, Mapping[int, Bounds]]) -> tuple[Axis, ...]:
    axes: dict[int, Axis] = {}
    for tensor in tensors:
        for dim, bounds in dims[id(tensor)].items():
            length = tensor.size(dim)
            if length == 0:
                raise WarmupError(f"warmup: dim {dim} of an input is empty; accepted is at least one row, to repeat it")
            axes[length] = axes.get(length, Axis(length, None, None)).joined(bounds)
    return tuple(axes.values())


def _marked_copy(tensor: torch.Tensor, dims: Mapping[int, Bounds], lengths: Mapping[int, int]) -> torch.Tensor:
    sizes = {dim: lengths[tensor.size(dim)] for dim in dims}
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        copy = with_lengths(tensor.detach(), sizes)
    copy.requires_grad_(tensor.requires_grad)
    for dim, bounds in dims.items():
        if sizes[dim] > 1:
            torch_internals.mark_dim(copy, dim, bounds)
    return copy


def with_lengths(tensor: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor:
    """Return a copy whose dims have these lengths: entries are repeated or cut. The order of dims in memory stays."""
    rows = tensor
    for dim, length in lengths.items():
        rows = rows.index_select(dim, torch.arange(length, device=tensor.device) % tensor.size(dim))
    if tensor.layout != torch.strided or type(tensor) is not torch.Tensor:
        return rows.clone()
    stride = list(tensor.stride())
    for dim, length in lengths.items():
        end = stride[dim] * tensor.size(dim)
        # What steps over all rows now steps over more of them, or fewer; a gap between the steps goes along.
        outer = [i != dim and 0 < end <= step for i, step in enumerate(stride)]
        stride = [s // tensor.size(dim) * length if over else s for s, over in zip(stride, outer, strict=True)]
    copy = torch.empty_strided(rows.shape, stride, dtype=tensor.dtype, device=tensor.device)
    once = tuple(slice(1) if step == 0 else slice(None) for step in stride)  # torch copies to no address twice
    copy[once].copy_(rows[once])
    return copy


def _run_backward(result: Any) -> None:
    """Compute gradients of the summed outputs for all that they were computed from; they are added to no ``.grad``."""
    outputs = [tensor for tensor in torch_internals.tensors_in(result) if tensor.grad_fn is not None]
    if not outputs:
        raise WarmupError(
            "warmup: backward: got a result without tensors that need gradients; accepted are calls with gradients "
            "enabled, of parameters or inputs that require them (and a result in containers that pytree knows)"
        )
    ones = [torch.ones_like(output) for output in outputs]
    torch.autograd.grad(outputs, _leaves(outputs), ones, allow_unused=True)


def _leaves(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors whose gradients a backward from ``outputs`` would add up."""
    leaves: list[torch.Tensor] = []
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        waiting += new
    return leaves
