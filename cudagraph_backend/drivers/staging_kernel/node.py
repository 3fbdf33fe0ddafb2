"""The staging kernel as the first node of a graph: a call sets its parameters, and staging needs no launch of its own.

The parameters of one node of an executable can be set before each launch (``cuGraphExecKernelNodeSetParams``); launches
under way keep theirs. So a graph begins with a kernel that knows nothing, and a call tells it its table, its number of
programs, and where the arguments are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch

from cudagraph_backend.drivers.staging_kernel.jobs import MAX_SOURCES
from cudagraph_backend.drivers.staging_kernel.launches import DeviceTable

_HIDDEN = 8  # Triton passes null pointers behind a kernel's own arguments: two, in 3.6 and 3.7
_PACK = [struct.Struct(f"={1 + count}Q").pack_into for count in range(MAX_SOURCES + 1)]


class StagingNode:
    """The node of one graph. ``idle`` is the table it was captured with, which does nothing.

    The graph was captured with ``keep_graph`` (nodes are named by the graph that an executable was made of), and is
    instantiated.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, idle: DeviceTable):
        """Take the graph's first node. Raises ``RuntimeError`` if it is not the kernel as it was launched."""
        from cuda.bindings import driver

        self._driver = driver
        self._graph = graph
        self.dims = idle.dims
        raw = driver.CUgraph(graph.raw_cuda_graph())
        _, count = self._call("cuGraphGetRootNodes", raw, 0)
        if count != 1:
            raise RuntimeError(f"the graph begins with {count} nodes")
        (node,), _ = self._call("cuGraphGetRootNodes", raw, count)
        if self._call("cuGraphNodeGetType", node) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            raise RuntimeError("the graph does not begin with a kernel")
        self._params = self._call("cuGraphKernelNodeGetParams", node)
        self._check_captured([idle.address, *[0] * MAX_SOURCES])
        self._target = driver.CUgraphExec(graph.raw_cuda_graph_exec()), node
        self._values = (ctypes.c_uint64 * (1 + MAX_SOURCES + _HIDDEN))()
        first, size = ctypes.addressof(self._values), ctypes.sizeof(ctypes.c_uint64)
        self._pointers = (ctypes.c_void_p * len(self._values))(*[first + size * n for n in range(len(self._values))])
        self._params.kernelParams = ctypes.addressof(self._pointers)
        self._set_params, self._set_enabled = driver.cuGraphExecKernelNodeSetParams, driver.cuGraphNodeSetEnabled
        self._is_on = True
        self._table: DeviceTable | None = idle  # what its parameters are; ``None``: not known
        self._sources: Sequence[int] = ()

    def _check_captured(self, values: Sequence[int]) -> None:
        address = self._params.kernelParams
        if not address:
            raise RuntimeError("the kernel's arguments are not given one by one")
        pointers = (ctypes.c_void_p * len(values)).from_address(int(address))
        captured = [ctypes.c_uint64.from_address(pointer or 0).value for pointer in pointers]
        if captured != values:
            raise RuntimeError("the kernel was not captured with the arguments that it was launched with")

    def stage(self, table: DeviceTable, sources: Sequence[int]) -> None:
        """Stage at the next launch of the graph, with the kernel for as many dims as ``self.dims``."""
        if self._is_on and table is self._table and sources == self._sources:
            return
        self._table = None  # in case that this fails
        _PACK[len(sources)](self._values, 0, table.address, *sources)
        self._params.gridDimX = table.programs
        self._check(self._set_params(*self._target, self._params))
        self._table, self._sources = table, sources
        if not self._is_on:
            self._check(self._set_enabled(*self._target, 1))
            self._is_on = True

    def skip(self) -> None:
        """Let the node do nothing at the next launch of the graph."""
        if self._is_on:
            self._check(self._set_enabled(*self._target, 0))
            self._is_on = False

    def _check(self, result: tuple[Any]) -> None:
        if result[0]:
            raise RuntimeError(f"the parameters of the staging kernel can't be set: {result[0].name}")

    def _call(self, name: str, *args: Any) -> Any:
        error, *results = getattr(self._driver, name)(*args)
        if error:
            raise RuntimeError(f"{name} failed with {error.name}")
        return results[0] if len(results) == 1 else results
