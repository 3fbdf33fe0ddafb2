"""The memory of tensors: who uses a storage, where it lies, who may read it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing import reductions

StorageWeakRef = reductions.StorageWeakRef  # expired() tells whether it is dead

# CUDA builds only
_ADDRESSES_EQUAL = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
_FORBID_ACCESS = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)
CAN_FORBID_ACCESS = _FORBID_ACCESS is not None

same_storage: Callable[[torch.Tensor, Sequence[int], Sequence[int], int], torch.Tensor] = (
    torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
)
"""A new tensor of the same dtype on a tensor's storage, no view of it: size, stride, offset in elements.

What Inductor's code makes its views with; it does not go through the dispatcher.
"""


def storage_users(cdata: int) -> int:
    """Return how many references hold the storage at address ``cdata`` (``UntypedStorage._cdata``)."""
    return torch._C._storage_Use_Count(cdata)


def addresses_equal(tensors: list[Any], addresses: list[int | None], indices: list[int]) -> bool:
    """Return whether the tensors at ``indices`` are at their ``addresses`` (a list as long as ``tensors``)."""
    if _ADDRESSES_EQUAL is not None:
        return _ADDRESSES_EQUAL(tensors, addresses, indices)
    return all(tensors[i].data_ptr() == addresses[i] for i in indices)


def borrowed_memory(address: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """Return a storage over memory that somebody else owns, and that must be there whenever it is read or written."""
    return torch._C._construct_storage_from_data_pointer(address, device, nbytes)  # type: ignore[return-value]


def forbid_access(storage: torch.UntypedStorage, message: str) -> None:
    """Make every later access to the storage's memory raise ``RuntimeError(message)``; it is no longer held.

    CPU builds of torch can't do that: there, every tensor on it that Python knows becomes of a class that raises.
    """
    if _FORBID_ACCESS is not None:
        _FORBID_ACCESS(storage._cdata, message)
        return
    forbidden = _forbidden(message)
    for tensor in [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # not every tensor has a storage
            if tensor.untyped_storage()._cdata == storage._cdata:
                tensor.__class__ = forbidden


def _forbidden(message: str) -> type[torch.Tensor]:
    def raises(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(message)

    return type("Overwritten", (torch.Tensor,), {"__torch_function__": classmethod(raises)})


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Let buffers made meanwhile be ordinary tensors, usable from inference mode and from outside of it alike."""
    with torch.inference_mode(False), torch.no_grad():
        yield
