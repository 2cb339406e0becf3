"""Clocks, CUDA graphs and memory of a device, for what is measured on it.

CuPy is imported only when something is measured.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import time
from typing import Any, Callable

import sn_function  # isort: skip  # before chainer, which it repairs
from chainer.backends import cuda

from tests.tools.benchmarks.report import text_of

assert sn_function  # it is imported for what it does


def why_no_device() -> str | None:
    """Returns what is missing, or ``None`` where there is a device."""
    if not cuda.available:
        error = getattr(cuda, '_resolution_error', 'not installed')
        return f'CuPy cannot be used: {error}'
    try:
        count = cuda.cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return text_of(error)
    return None if count > 0 else 'CuPy sees none'


def time_on_device(
        step: Callable[[], Any], n: int) -> tuple[float, float]:
    """Seconds of one of ``n`` calls: wall clock, and between two events."""
    cupy = cuda.cupy
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    # Not of a stream: PyTorch has its own.
    cupy.cuda.runtime.deviceSynchronize()
    before = time.perf_counter()
    start.record()
    for _ in range(n):
        step()
    stop.record()
    cupy.cuda.runtime.deviceSynchronize()
    wall = time.perf_counter() - before
    return wall / n, cupy.cuda.get_elapsed_time(start, stop) / 1e3 / n


# CUgraphNodeType
KERNEL, MEMCPY, MEMSET, HOST = range(4)


def node_types(graph: int) -> list[int]:
    """Returns the type of each node of a CUDA graph."""
    driver = ctypes.CDLL('libcuda.so.1')

    def call(name: str, *args: Any) -> None:
        status = getattr(driver, name)(*args)
        if status != 0:
            raise RuntimeError(f'{name} returned {status}')

    n = ctypes.c_size_t()
    call('cuGraphGetNodes', ctypes.c_void_p(graph), None, ctypes.byref(n))
    if n.value == 0:
        return []
    nodes = (ctypes.c_void_p * n.value)()
    call('cuGraphGetNodes', ctypes.c_void_p(graph), nodes, ctypes.byref(n))
    types = []
    for node in nodes:
        kind = ctypes.c_int()
        call('cuGraphNodeGetType', ctypes.c_void_p(node),
             ctypes.byref(kind))
        types.append(kind.value)
    return types


@functools.lru_cache(maxsize=None)
def capture_stream() -> Any:
    # The stream that handles of libraries were last set to must stay alive.
    return cuda.cupy.cuda.Stream(non_blocking=True)


class Captured:
    """A call, captured as a CUDA graph, so that it cannot wait for the host.

    A call that synchronizes or copies to the host raises here.

    Attributes:
        value: What the call returned; its arrays are written by each replay.
        types: Type of each node of the graph.

    """

    def __init__(self, step: Callable[[], Any]) -> None:
        cupy = cuda.cupy
        runtime = cupy.cuda.runtime
        self.stream = stream = capture_stream()
        # A replay writes where the call wrote, long after that memory was
        # freed: no other array may have got it since.
        self.pool = cupy.cuda.MemoryPool()
        runtime.deviceSynchronize()
        with cupy.cuda.using_allocator(self.pool.malloc), stream:
            for _ in range(3):  # compiles, and fills the pool of this stream
                step()
            stream.synchronize()
            runtime.streamBeginCapture(
                stream.ptr, runtime.streamCaptureModeRelaxed)
            try:
                self.value = step()
            except BaseException:
                with contextlib.suppress(Exception):
                    runtime.graphDestroy(runtime.streamEndCapture(stream.ptr))
                raise
            self._graph = runtime.streamEndCapture(stream.ptr)
        self._exec = runtime.graphInstantiate(self._graph)

    @property
    def types(self) -> list[int]:
        return node_types(self._graph)

    def launch(self) -> None:
        cuda.cupy.cuda.runtime.graphLaunch(self._exec, self.stream.ptr)

    def __enter__(self) -> Captured:
        return self

    def __exit__(self, *_: Any) -> None:
        runtime = cuda.cupy.cuda.runtime
        self.stream.synchronize()
        runtime.graphExecDestroy(self._exec)
        runtime.graphDestroy(self._graph)


def peak_memory(step: Callable[[], Any]) -> int:
    """The peak of the bytes that a call takes from CuPy's memory pool."""
    class Hook(cuda.cupy.cuda.MemoryHook):
        name = 'peak'
        now = peak = 0

        def malloc_postprocess(self, **kwargs: Any) -> None:
            if kwargs['mem_ptr']:
                self.now += kwargs['mem_size']
                self.peak = max(self.peak, self.now)

        def free_postprocess(self, **kwargs: Any) -> None:
            self.now -= kwargs['mem_size']

    gc.collect()
    with Hook() as hook:
        step()
    return hook.peak
