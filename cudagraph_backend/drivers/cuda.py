"""The CUDA driver: torch.cuda.CUDAGraph, one capture stream and one memory pool for all captures of a device."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudagraph_backend.drivers.staging_kernel.launches import DeviceTable, KernelStaging, Launches
from cudagraph_backend.drivers.staging_kernel.node import StagingNode
from cudagraph_backend.errors import CaptureError, is_out_of_memory
from cudagraph_backend.memory.copies import StagedCopy, Staging
from cudagraph_backend.torch_internals import (
    clear_cublas_workspaces,
    current_stream,
    end_failed_capture,
    generator_state_apart,
    is_current_stream_capturing,
    register_generator,
)

log = logging.getLogger("cudagraph_backend")


class CudaMemory:
    """Device memory that grows without moving: addresses are reserved once, and physical memory is mapped on demand.

    Uses CUDA's virtual memory management (``cuMemAddressReserve``, ``cuMemCreate``, ``cuMemMap``) through NVIDIA's
    ``cuda-bindings``, which CUDA builds of torch depend on.
    """

    def __init__(self, device: torch.device):
        from cuda.bindings import driver

        self._driver = driver
        self._process = os.getpid()
        self.device = device
        self._handles: list[tuple[int, int, Any]] = []
        self.nbytes = 0
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes sure that the primary context exists
            self._prop = driver.CUmemAllocationProp()
            self._prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            self._prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            self._prop.location.id = device.index
            minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self._granularity = self._call("cuMemGetAllocationGranularity", self._prop, minimum)
            total = torch.cuda.get_device_properties(device).total_memory
            self._reserved = self._rounded(total)
            self.address = int(self._call("cuMemAddressReserve", self._reserved, 0, 0, 0))

    def grow(self, nbytes: int) -> None:
        more = self._rounded(nbytes) - self.nbytes
        if more <= 0:
            return
        if self.nbytes + more > self._reserved:
            raise torch.OutOfMemoryError(f"the output pool needs {nbytes} bytes; the device has {self._reserved}")
        handle = self._call("cuMemCreate", more, self._prop, 0)
        address = self.address + self.nbytes
        self._call("cuMemMap", address, more, 0, handle, 0)
        self._handles.append((address, more, handle))
        access = self._driver.CUmemAccessDesc()
        access.location = self._prop.location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, more, [access], 1)
        self.nbytes += more

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.as_tensor(_CudaBytes(self, self.address + offset, nbytes), device=self.device)

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self._granularity) * self._granularity

    def _call(self, name: str, *args: Any) -> Any:
        error, *results = getattr(self._driver, name)(*args)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            kind = torch.OutOfMemoryError if "OUT_OF_MEMORY" in error.name else RuntimeError
            raise kind(f"{name} failed with {error.name} for the output pool of {self.device}")
        return results[0] if results else None

    def __del__(self) -> None:
        # Nothing refers to the memory any more: every tensor on it holds this object.
        if getattr(self, "address", None) is None or os.getpid() != self._process:
            return  # it was never had, or a forked child, to which CUDA is closed, drops its copy of this object
        torch.cuda.synchronize(self.device)
        for address, nbytes, handle in self._handles:
            self._driver.cuMemUnmap(address, nbytes)
            self._driver.cuMemRelease(handle)
        self._driver.cuMemAddressFree(self.address, self._reserved)


class _CudaBytes:
    """A piece of the memory in the form that ``torch.as_tensor`` takes; the tensor keeps ``memory`` alive."""

    def __init__(self, memory: CudaMemory, address: int, nbytes: int):
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """The memory pool of all captures. ``anchor``, a graph of its own, keeps the allocators from giving it up."""

    pool: torch.cuda.MemPool
    anchor: torch.cuda.CUDAGraph

    @property
    def handle(self) -> Any:
        """As ``CUDAGraph.capture_begin`` takes it."""
        return self.pool.id


@dataclass(frozen=True, slots=True)
class CudaGraph:
    graph: torch.cuda.CUDAGraph
    memory: MemoryPool  # must outlive the graph
    executable_nbytes: int
    node: StagingNode | None = None

    def replay(self, staging: Staging, args: Sequence[Any]) -> None:
        staging(args, self.node)
        self.graph.replay()


class CudaDriver:
    poison = False

    def __init__(self, device: torch.device):
        torch.cuda.init()  # raises torch's own error in a child that was forked after CUDA was used
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._memory: MemoryPool | None = None
        self._launches = Launches(device)
        self._has_nodes = True
        self._streams: dict[tuple[int, int, int], torch.cuda.Stream] = {}  # that called

    def new_memory(self) -> CudaMemory:
        return CudaMemory(self.device)

    def allocate(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=self.device)

    def capture(
        self, run: Callable[[], None], *, draws: bool, stages: bool, generators: Sequence[torch.Generator] = ()
    ) -> CudaGraph:
        try:
            return self._capture(run, draws, stages, generators)
        except CaptureError as error:
            if not (isinstance(error.__cause__, Exception) and is_out_of_memory(error.__cause__)):
                raise
        torch.cuda.empty_cache()  # which the allocator does by itself, but not in a capture
        return self._capture(run, draws, stages, generators)

    def _capture(
        self, run: Callable[[], None], draws: bool, stages: bool, generators: Sequence[torch.Generator]
    ) -> CudaGraph:
        with self._on_capture_stream(), _collector_off():
            try:
                memory = self._open_pool()
                idle = self._launches.idle() if stages and self._has_nodes else None
            except Exception as error:
                raise _capture_error(error) from error
            torch.cuda.synchronize(self.device)
            # cuBLAS workspaces from before are not in the memory pool; those made during capture must not stay in it.
            clear_cublas_workspaces()
            # Kept, as the node of an executable is named by the graph that it was made of.
            graph, taken = torch.cuda.CUDAGraph(keep_graph=idle is not None), self._taken_outside_allocator()
            self._begin(graph, memory, draws=draws, generators=generators)
            try:
                if idle is not None:
                    self._launches.launch(idle, ())
                run()
                clear_cublas_workspaces()
                graph.capture_end()
            except BaseException as error:
                self._abort(graph, memory, generators)
                if isinstance(error, Exception):
                    raise _capture_error(error) from error
                raise
            node = None if idle is None else self._staging_node(graph, idle)
            executable = max(self._taken_outside_allocator() - taken, 0)
        if idle is not None and node is None:
            return self._capture(run, draws, stages, generators)  # again, without the kernel
        return CudaGraph(graph, memory, executable, node)

    def _staging_node(self, graph: torch.cuda.CUDAGraph, idle: DeviceTable) -> StagingNode | None:
        """Instantiate the graph. ``None`` where its parameters can't be set, which is told once."""
        try:
            graph.instantiate()
        except Exception as error:
            raise _capture_error(error) from error
        try:
            return StagingNode(graph, idle)
        except Exception as error:
            self._has_nodes = False
            log.warning("inputs are staged before graphs, not in them: %s", repr(error))  # no reference to the frames
            return None

    def _taken_outside_allocator(self) -> int:
        """Return the bytes of the device that are in use, without what PyTorch's allocator holds (scratch, workspaces).

        What other processes take or free is in it, too: a difference is an estimate where the device is shared.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    def _begin(
        self,
        graph: torch.cuda.CUDAGraph,
        memory: MemoryPool,
        *,
        draws: bool,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        for generator in generators:
            register_generator(graph, generator)
        if draws or generators:
            graph.capture_begin(memory.handle, "thread_local")
            return
        with generator_state_apart(self.device):
            graph.capture_begin(memory.handle, "thread_local")

    def _abort(self, graph: torch.cuda.CUDAGraph, memory: MemoryPool, generators: Sequence[torch.Generator]) -> None:
        """End a capture that went wrong, and make the allocators and random number generators usable again.

        Where it can't be ended as any other, the memory pool may stay in the state of being captured to, so later
        captures get a new one; graphs that exist keep theirs. Opening it ends with a successful capture, which takes
        the generators out of their capturing state.
        """
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
            return
        end_failed_capture(self.device, memory.pool.id)
        self._memory = None
        self._open_pool(draws=True, generators=generators)

    def _open_pool(self, *, draws: bool = False, generators: Sequence[torch.Generator] = ()) -> MemoryPool:
        """Return the memory pool, made at the first use, on the capture stream."""
        if self._memory is None:
            pool, anchor, scrap = torch.cuda.MemPool(), torch.cuda.CUDAGraph(), torch.zeros(1, device=self.device)
            torch.cuda.synchronize(self.device)
            memory = MemoryPool(pool, anchor)
            self._begin(anchor, memory, draws=draws, generators=generators)
            scrap.add_(1)  # an empty graph would be warned about; this one is never replayed
            anchor.capture_end()
            self._memory = memory
        return self._memory

    def seconds(self, run: Callable[[], object]) -> float | None:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def prepare_staging(self, copies: Sequence[StagedCopy], in_place: Sequence[StagedCopy]) -> Staging:
        return KernelStaging(self._launches, copies, in_place)

    def join(self) -> None:
        current = current_stream(self.device)
        if current not in self._streams:
            self._streams[current] = torch.cuda.current_stream(self.device)
        if len(self._streams) > 1:
            for other in self._others(current):
                self._streams[current].wait_stream(other)

    def _others(self, current: tuple[int, int, int]) -> list[torch.cuda.Stream]:
        return [stream for key, stream in self._streams.items() if key != current]

    def is_capturing(self) -> bool:
        return is_current_stream_capturing()

    def scratch_nbytes(self) -> int:
        return sum(s["total_size"] for s in self._memory.pool.snapshot()) if self._memory is not None else 0

    @contextlib.contextmanager
    def _on_capture_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def _capture_error(error: Exception) -> CaptureError:
    return CaptureError(f"{type(error).__name__}: {error}".partition("\n")[0])


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Keep the garbage collector off: in a capture it may free CUDA objects, which breaks the capture, and is slow."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
