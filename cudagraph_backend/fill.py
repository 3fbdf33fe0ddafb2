"""What the padded rows of inputs hold: the option ``fill``, looked up for each input by the name the user gave it."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from cudagraph_backend.errors import OptionError

Word: TypeAlias = Literal["replica", "zero"]
Fill: TypeAlias = Word | float
Fills: TypeAlias = Fill | Mapping[str, Fill]

WORDS = get_args(Word)


@dataclass(frozen=True, slots=True)
class InputName:
    """How the user's call names an input.

    Attributes:
        path: the way to it from an argument, joined by dots: ``labels``, ``batch.labels``, ``args.0``.
        last: the path's last identifier: ``labels`` for ``batch['labels']``, ``batch.labels`` and ``labels[0]``.
    """

    path: str
    last: str

    @staticmethod
    def of(source: str) -> InputName:
        """Read Dynamo's expression for an input, e.g. ``L['batch']['labels']``; any other text names itself."""
        try:
            parts = _parts(ast.parse(source, mode="eval").body)
        except (SyntaxError, ValueError):
            return InputName(source, source)
        return InputName(".".join(map(str, parts)), next((p for p in reversed(parts) if isinstance(p, str)), source))


def _parts(expression: ast.expr) -> list[Any]:
    match expression:
        case ast.Name(name):
            return [name]
        case ast.Attribute(value, name):
            return [*_parts(value), name]
        case ast.Subscript(ast.Name("L" | "G"), key):  # Dynamo's locals and globals
            return [ast.literal_eval(key)]
        case ast.Subscript(value, key):
            return [*_parts(value), ast.literal_eval(key)]
    raise ValueError("no path of names and keys")


def key_of(fills: Mapping[str, Fill], name: InputName) -> str | None:
    """Return the key that means an input: its whole path, or else its last identifier; ``None`` if there is neither."""
    return next((key for key in (name.path, name.last) if key in fills), None)


def fill_for(fills: Fills, name: InputName | None, dtype: torch.dtype, *, padded: bool) -> Fill:
    """Return what the padded rows of one input hold.

    Args:
        name: ``None`` for what is no tensor of the user's call (tangents, saved activations, parts of a subclass):
            only ``"replica"`` and zeros given for all inputs apply to it, as no other number is known to fit.
        padded: whether the input has a dynamic dim. Without one only a number given by name must fit.

    Raises:
        OptionError: a number that ``dtype`` can't hold.
    """
    if isinstance(fills, Mapping):
        key = None if name is None else key_of(fills, name)
        found = "replica" if key is None else fills[key]
    else:
        key, found = None, fills
    if isinstance(found, str):
        return found
    if found == 0:
        return "zero"
    if name is None or (key is None and not padded):
        return "replica"
    return _number(found, key or name.path, dtype)


def _number(value: float, name: str, dtype: torch.dtype) -> float:
    number = _held(value, dtype)
    if number is None:
        raise OptionError(
            f"option 'fill': got {value!r} for input {name!r} of {dtype}; accepted is {_range(dtype)}, "
            f"'replica' or 'zero': give this input another one with fill={{{name!r}: …}}"
        )
    return number


def _held(value: float, dtype: torch.dtype) -> float | None:
    """Return ``value`` as a number of the kind of ``dtype``; ``None`` if that can't hold it. Floats may be rounded."""
    if not _is_float(dtype):
        lowest, highest = _limits(dtype)
        return int(value) if lowest <= value <= highest and value == int(value) else None
    try:
        number = float(value)
    except OverflowError:
        return None
    if math.isinf(number):
        return None if "fn" in str(dtype) else number  # so are the 8-bit kinds named that are finite
    return number if math.isnan(number) or abs(number) <= torch.finfo(dtype).max else None


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    return (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _range(dtype: torch.dtype) -> str:
    if _is_float(dtype):
        return f"a number from {-torch.finfo(dtype).max:g} to {torch.finfo(dtype).max:g}"
    return "a whole number from {} to {}".format(*_limits(dtype))


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
