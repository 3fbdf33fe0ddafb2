"""Arguments that are neither tensors nor sizes: generators, process groups and other registered objects."""

from __future__ import annotations

from typing import Any

import torch
from torch._library.fake_class_registry import FakeScriptObject

# Registered objects came with torch 2.11.
_is_constant_type = getattr(getattr(torch._library, "opaque_object", None), "is_opaque_value_type", None)


def is_generator(value: Any) -> bool:
    """Return whether an argument is a ``torch.Generator``, or stands for one while a region is compiled."""
    return isinstance(_real_object(value), torch.Generator)


def never_changes(value: Any) -> bool:
    """Return whether an argument's state stays as it is: that of a process group or mesh, or a registered constant.

    What other registered objects hold may be another thing at every call.
    """
    real = _real_object(value)
    kinds = [getattr(torch.distributed, name, None) for name in ("ProcessGroup", "DeviceMesh")]
    if any(isinstance(kind, type) and isinstance(real, kind) for kind in kinds):
        return True
    return _is_constant_type is not None and _is_constant_type(type(real))


def kind_of(value: Any) -> str:
    """Return the name of an argument's class."""
    return type(_real_object(value)).__name__


def _real_object(value: Any) -> Any:
    return value.real_obj if isinstance(value, FakeScriptObject) else value
