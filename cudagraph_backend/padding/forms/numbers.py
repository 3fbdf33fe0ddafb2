"""Sizes that are numbers among an operator's arguments: a tensor without dims takes their place."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy

from cudagraph_backend.torch_internals import SYMBOLIC, expr, operator_schema

from ..editor import Editor, convert, value
from ..lattice import RefusePadding
from .site import Site


def tensors_for_numbers(site: Site) -> Proxy:
    """Call the overload that takes tensors where this one takes numbers, at the precision that the operator has.

    Torch computes in float32 what it then rounds to bfloat16 or float16, and a number is not rounded before.
    """
    sized = [name for name, argument in site.arguments.items() if is_number(argument) and isinstance(argument, Proxy)]
    overload = _taking_tensors(site.target, sized)
    tensors = [value(argument) for argument in site.arguments.values() if _is_tensor(argument)]
    dtypes = [tensor.dtype for tensor in (*tensors, site.val)]
    floating = next((_precision(dtype) for dtype in dtypes if dtype.is_floating_point), None)

    def argument(name: str, type_name: str) -> Any:
        given = site[name]
        if is_number(given) and "Tensor" in type_name:
            return tensor_of_number(site.editor, given, floating)
        return convert(given, _precision(value(given).dtype)) if _is_tensor(given) else given

    schema = operator_schema(overload).arguments
    positional = [argument(one.name, str(one.type)) for one in schema if not one.kwarg_only]
    keywords = {one.name: argument(one.name, str(one.type)) for one in schema if one.kwarg_only}
    made: Proxy = site.editor(overload, *positional, **keywords)
    return convert(made, site.val.dtype) if value(made).dtype == _precision(site.val.dtype) else made


def tensor_of_number(editor: Editor, number: Any, floating: torch.dtype | None) -> Proxy:
    """Return a number as a tensor without dims: an integer as int64, a fraction as ``floating``, or else float64."""
    if not isinstance(number, Proxy):
        is_float = isinstance(number, float)
        return editor.constant(number, (floating or torch.float64) if is_float else None)
    size = expr(value(number))
    if isinstance(value(number), torch.SymBool):
        raise RefusePadding("a comparison of sizes reaches values")
    is_float = isinstance(value(number), torch.SymFloat)
    return editor.counted(size, (floating or torch.float64) if is_float else torch.int64)


def is_number(argument: Any) -> bool:
    """Return whether an argument is a number, symbolic or not."""
    if isinstance(argument, Proxy):
        return isinstance(value(argument), SYMBOLIC)
    return isinstance(argument, (int, float))


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, Proxy) and isinstance(value(argument), torch.Tensor)


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _taking_tensors(target: Any, sized: list[str]) -> Any:
    """Return the overload with the same arguments that takes tensors for those that are ``sized``."""
    names = {argument.name for argument in operator_schema(target).arguments}
    packet = target.overloadpacket
    for overload in (target, *(getattr(packet, name) for name in packet.overloads())):
        types = {argument.name: str(argument.type) for argument in operator_schema(overload).arguments}
        if sized and types.keys() == names and all("Tensor" in types[name] for name in sized):
            return overload
    raise RefusePadding("no overload takes tensors for the numbers that change")
