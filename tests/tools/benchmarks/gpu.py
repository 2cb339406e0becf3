"""The normalization of weights of well-known networks, on a CUDA device.

``python -m tests.tools.benchmarks.gpu`` times forward, backward and both of
the hook of this package, of Chainer's and of PyTorch's, counts their launches
and their memory, and prints tables; see ``docs/benchmarks/README.md``.

Statistics and tables are in :mod:`tests.tools.benchmarks.report`.  CuPy and
PyTorch are imported only when they are measured.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import itertools
import math
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any, Callable, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np
from chainer import link_hooks
from chainer.backends import cuda

from sn_function._arithmetic import kernels
from tests.tools.benchmarks.report import (
    DTYPES,
    PARTS,
    Budget,
    as_json,
    as_markdown,
    as_text,
    floors,
    measure,
    shape_of,
    text_of,
)

# Weights of the discriminators of SNGAN (for 32 x 32 pixels: the plain one;
# for 64 x 64: the ResNet) and of BigGAN (128 x 128); one that is square.
# The most important come first, as the time may be up before the end.
SHAPES = (
    '64x3x3x3', '128x64x4x4', '256x128x4x4', '512x256x4x4', '512x512x3x3',
    '1024x1024x3x3', '1536x1536x3x3', '4096x4096', '1x8192', '1000x1536',
    '128x128x3x3', '256x256x3x3', '1024x512x3x3', '96x3x3x3', '192x96x3x3',
    '768x384x3x3', '1x1536', '12x96x1x1')
QUICK_SHAPES = ('64x3x3x3', '256x128x4x4', '512x512x3x3')
# Compiling takes a minute a shape.
COMPILED_SHAPES = ('512x512x3x3', '64x3x3x3')
# One block takes long for more: nobody would choose it.
LARGEST_FUSED = 1 << 20
SWEEP = range(10, 21)


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


def profiled_kernels(step: Callable[[], Any]) -> int:
    """Counts launches as PyTorch's profiler sees them."""
    import torch

    step()
    cuda.cupy.cuda.runtime.deviceSynchronize()
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        cuda.cupy.cuda.runtime.deviceSynchronize()
    count = sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(('Memcpy', 'Memset'))
        for event in profile.events())
    if count == 0:
        raise RuntimeError('the profiler saw no kernel')
    return count


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


# The contenders

class Contender(NamedTuple):
    """What is timed: calls without arguments.

    ``backward`` runs through the same graph each time.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    both: Callable[[], Any]
    clear: Callable[[], Any]
    is_torch: bool = False


def chainer_contender(
        hook: Any, W: Any, gY: Any, fused_size: int | None = None
) -> Contender:
    """Either hook on a link that has that weight."""
    link = chainer.Link()
    with link.init_scope():
        link.W = chainer.Parameter(W.copy())
    link.to_device(chainer.backend.get_device_from_array(W))
    link.add_hook(hook)

    def forward() -> Any:
        if fused_size is not None:
            kernels.FUSED_SIZE = fused_size
        return hook.normalize_weight(link)

    def differentiate(Y: Any) -> Any:
        link.W.cleargrad()
        Y.grad = gY
        Y.backward()
        return link.W.grad

    Y = forward()
    return Contender(
        forward, lambda: differentiate(Y), lambda: differentiate(forward()),
        link.W.cleargrad)


def torch_contender(W: Any, gY: Any, is_compiled: bool) -> Contender:
    """PyTorch's parametrization of a module that has that weight."""
    import torch

    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(
        torch.from_numpy(cuda.to_cpu(W)).cuda())
    gradient = torch.from_numpy(cuda.to_cpu(gY)).cuda()
    torch.nn.utils.parametrizations.spectral_norm(module)
    original = module.parametrizations.weight.original
    if is_compiled:
        compiled = torch.compile(module.parametrizations.weight[0])

        def forward() -> Any:
            return compiled(original)
    else:
        def forward() -> Any:
            return module.weight

    def differentiate(Y: Any, retain_graph: bool) -> Any:
        return torch.autograd.grad(
            Y, original, gradient, retain_graph=retain_graph)

    Y = forward()
    return Contender(
        forward, lambda: differentiate(Y, True),
        lambda: differentiate(forward(), False), gc.collect, True)


def makers(
        W: Any, gY: Any, torch_reason: str | None
) -> dict[str, Callable[[], Contender]]:
    """Returns what makes each contender; it may raise anything."""
    def ours(detach_uv: bool, is_fused: bool) -> Contender:
        return chainer_contender(
            sn_function.SpectralNormalization(detach_uv=detach_uv), W, gY,
            W.size if is_fused else 0)

    result: dict[str, Callable[[], Contender]] = {}
    for mode, is_fused in itertools.product(
            ('detached', 'exact'), (True, False)):
        if is_fused and W.size > LARGEST_FUSED:
            continue
        result[mode + (', fused' if is_fused else '')] = functools.partial(
            ours, mode == 'detached', is_fused)
    result['Chainer'] = lambda: chainer_contender(
        link_hooks.SpectralNormalization(), W, gY)
    if torch_reason is None:
        result['PyTorch'] = lambda: torch_contender(W, gY, False)
    return result


def examine(
        contenders: dict[str, Contender], budget: Budget, n_rounds: int
) -> dict[str, dict[str, Any]]:
    """Returns all numbers of each of these."""
    results: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for part in PARTS:
        found = measure(
            {name: getattr(c, part) for name, c in contenders.items()},
            time_on_device, budget, n_rounds)
        for name, numbers in found.items():
            results[name][part] = numbers
    for name, contender in contenders.items():
        for part in PARTS:
            numbers = results[name][part]
            if 'error' not in numbers and budget.left > 0:
                add_graph(
                    contender, part, numbers,
                    results[name].setdefault('notes', {}), n_rounds, budget)
        if budget.left > 0:
            try:
                results[name]['extra bytes'] = extra_bytes(contender)
            except Exception as error:
                results[name].setdefault('notes', {})['memory'] = text_of(
                    error)
    return results


def add_graph(
        contender: Contender, part: str, numbers: dict[str, Any],
        found_notes: dict[str, str], n_rounds: int, budget: Budget) -> None:
    """Adds the number of launches and, if possible, the time of a replay."""
    step = getattr(contender, part)
    try:
        if contender.is_torch:
            # Its backward is bound to the stream of its forward.
            if part != 'both':  # the profiler takes its time
                numbers['kernels'] = profiled_kernels(step)
            return
        with Captured(step) as graph, graph.stream:
            numbers['kernels'] = graph.types.count(KERNEL)
            replayed = measure(
                {'': graph.launch}, time_on_device, budget, n_rounds)['']
            if 'device' in replayed:
                numbers['graph'] = replayed['device']
    except Exception as error:
        found_notes[f'graph of {part}'] = text_of(error)
        if 'kernels' not in numbers and not contender.is_torch:
            with contextlib.suppress(Exception):
                numbers['kernels'] = profiled_kernels(step)


def extra_bytes(contender: Contender) -> int:
    """The peak of the bytes that forward and backward take, gW included."""
    contender.clear()
    if not contender.is_torch:
        return peak_memory(contender.both)
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.both()
    return torch.cuda.max_memory_allocated() - before


# The run

class Run:
    """All measurements; whatever fails becomes an entry of the report."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args = args
        self.budget = Budget(args.seconds)
        self.n_rounds = 5 if args.quick else 10
        self.torch_reason = why_no_torch()
        self.report: dict[str, Any] = {
            'machine': dict(machine(), command=command),
            'fused size': kernels.FUSED_SIZE, 'bandwidth': math.nan,
            'weights': [], 'sweep': [], 'notes': []}
        if self.torch_reason is not None:
            self.report['notes'].append(f'PyTorch: {self.torch_reason}')

    def __call__(self) -> dict[str, Any]:
        default = kernels.FUSED_SIZE
        try:
            self.attempt('bandwidth', self.measure_bandwidth)
            for dtype in DTYPES:
                for shape in QUICK_SHAPES if self.args.quick else SHAPES[:6]:
                    self.attempt(shape, self.measure_weight, shape, dtype)
            self.attempt('sweep', self.measure_sweep, self.budget.share(0.4))
            if self.torch_reason is None and not self.args.quick:
                for shape in COMPILED_SHAPES:
                    self.attempt('torch.compile', self.compile, shape)
            for dtype in DTYPES:
                for shape in () if self.args.quick else SHAPES[6:]:
                    self.attempt(shape, self.measure_weight, shape, dtype)
        except KeyboardInterrupt:
            self.report['notes'].append('interrupted')
        finally:
            kernels.FUSED_SIZE = default
        self.save()
        return self.report

    def attempt(self, what: str, function: Callable[..., Any],
                *args: Any) -> None:
        if self.budget.left <= 0:
            note = f'{what}: the time was up'
            if note not in self.report['notes']:
                self.report['notes'].append(note)
            return
        try:
            function(*args)
        except Exception as error:
            self.report['notes'].append(f'{what}: {text_of(error)}')
        # Blocks of the last weight do not fit the next one.
        with contextlib.suppress(Exception):
            gc.collect()
            cuda.cupy.get_default_memory_pool().free_all_blocks()
        # Nothing here ends a compiler that hangs; the caller may set a limit.
        self.save()

    def save(self) -> None:
        for path, render_it in (
                (self.args.out, as_json), (self.args.markdown, as_markdown)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(render_it(self.report), encoding='utf-8')

    def time_copy(self, nbytes: int) -> dict[str, Any]:
        source = cuda.cupy.zeros(nbytes, np.uint8)
        target = cuda.cupy.empty_like(source)
        runtime = cuda.cupy.cuda.runtime

        def copy() -> None:
            runtime.memcpyAsync(
                target.data.ptr, source.data.ptr, nbytes,
                runtime.memcpyDeviceToDevice,
                cuda.cupy.cuda.get_current_stream().ptr)

        numbers = measure(
            {'': copy}, time_on_device, self.budget, self.n_rounds)['']
        with contextlib.suppress(Exception), Captured(copy) as graph, \
                graph.stream:
            replayed = measure({'': graph.launch}, time_on_device,
                               self.budget, self.n_rounds)['']
            numbers['graph'] = replayed['device']
        return numbers

    def measure_bandwidth(self) -> None:
        free, _ = cuda.cupy.cuda.runtime.memGetInfo()
        nbytes = 1 << min(30, int(math.log2(free / 4)))
        numbers = self.time_copy(nbytes)
        numbers['nbytes'] = nbytes
        self.report['copy'] = numbers
        self.report['bandwidth'] = (
            2 * nbytes / numbers['device']['median'] * 1e6)

    def arrays(self, shape: str, dtype: str) -> tuple[Any, Any]:
        random = np.random.RandomState(0)
        W, gY = (random.normal(size=shape_of(shape)) for _ in range(2))
        # As an initializer has them; and gY no smaller than float16 can be.
        W = W * 0.05
        return tuple(cuda.to_gpu(x.astype(DTYPES[dtype])) for x in (W, gY))

    def measure_weight(self, shape: str, dtype: str) -> None:
        W, gY = self.arrays(shape, dtype)
        weight: dict[str, Any] = {
            'shape': shape, 'dtype': dtype, 'nbytes': W.nbytes,
            'floors': floors(W.nbytes, self.report['bandwidth']),
            'copy': self.time_copy(W.nbytes), 'contenders': {}}
        self.report['weights'].append(weight)
        self.examine(weight, makers(W, gY, self.torch_reason))
        print(f'{shape} {dtype}: {self.budget.left:.0f} s left', flush=True)

    def examine(
            self, weight: dict[str, Any],
            to_make: dict[str, Callable[[], Contender]]) -> None:
        made = {}
        for name, make in to_make.items():
            weight['contenders'][name] = {}
            try:
                made[name] = make()
            except Exception as error:
                weight['contenders'][name] = {'error': text_of(error)}
        weight['contenders'].update(
            examine(made, self.budget, self.n_rounds))

    def compile(self, shape: str) -> None:
        if self.budget.left < 60:
            raise TimeoutError(f'{shape}: less than a minute was left')
        weight = next((x for x in self.report['weights'] if (
            x['shape'], x['dtype']) == (shape, 'float32')), None)
        if weight is not None:
            W, gY = self.arrays(shape, 'float32')
            self.examine(weight, {
                'torch.compile': lambda: torch_contender(W, gY, True)})

    def measure_sweep(self, budget: Budget) -> None:
        exponents = SWEEP[::2] if self.args.quick else SWEEP
        for dtype, exponent in itertools.product(DTYPES, exponents):
            if budget.left <= 0:
                self.report['notes'].append(
                    f'sweep from 2^{exponent} {dtype}: the time was up')
                break
            rows = 1 << (exponent // 2)
            W, gY = self.arrays(f'{rows}x{(1 << exponent) // rows}', dtype)
            contenders = {
                how: chainer_contender(
                    sn_function.SpectralNormalization(), W, gY, size)
                for how, size in (('fused', W.size), ('separate', 0))}
            found = measure({how: c.both for how, c in contenders.items()},
                            time_on_device, budget, self.n_rounds)
            for how, contender in contenders.items():
                if 'error' in found[how]:
                    self.report['notes'].append(
                        f'sweep, 2^{exponent} {dtype}, {how}: '
                        f'{found[how]["error"]}')
                else:
                    add_graph(contender, 'both', found[how], {},
                              self.n_rounds, budget)
            self.report['sweep'].append(dict(
                found, size=W.size, dtype=dtype))


def why_no_torch() -> str | None:
    try:
        import torch
        return None if torch.cuda.is_available() else 'it sees no device'
    except Exception as error:
        return text_of(error)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    cupy = cuda.cupy
    runtime = cupy.cuda.runtime

    def driver() -> str:
        return subprocess.run(
            ['nvidia-smi', '--query-gpu=driver_version',
             '--format=csv,noheader'], check=True, stdout=subprocess.PIPE,
            timeout=20).stdout.decode().split()[0]

    def torch_version() -> str:
        import torch
        return torch.__version__

    def device_name() -> str:
        name = runtime.getDeviceProperties(cupy.cuda.Device().id)['name']
        return name.decode() if isinstance(name, bytes) else name

    found: dict[str, Any] = {}
    for key, get in {
            'device': device_name,
            'driver': driver,
            'CUDA of the driver': runtime.driverGetVersion,
            'CUDA runtime': runtime.runtimeGetVersion,
            'Python': platform.python_version,
            'NumPy': lambda: np.__version__,
            'CuPy': lambda: cupy.__version__,
            'Chainer': lambda: chainer.__version__,
            'sn_function': lambda: sn_function.__version__,
            'PyTorch': torch_version,
            'date': lambda: datetime.datetime.now(
                datetime.timezone.utc).strftime('%Y-%m-%d'),
    }.items():
        try:
            found[key] = get()
        except Exception as error:
            found[key] = f'n/a ({text_of(error)})'
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=pathlib.Path, help='JSON file')
    parser.add_argument('--markdown', type=pathlib.Path, help='Markdown file')
    parser.add_argument('--quick', action='store_true', help='few weights')
    parser.add_argument('--seconds', type=float, default=200.0,
                        help='measuring stops after this time')
    parser.add_argument('--check', action='store_true',
                        help='only say whether there is a device')
    args = parser.parse_args(argv)
    reason = why_no_device()
    if reason is not None:
        sys.exit(f'No CUDA device. {reason}')
    if args.check:
        print(machine()['device'])
        return
    options = sys.argv[1:] if argv is None else argv
    run = Run(
        args, ' '.join(['python -m tests.tools.benchmarks.gpu', *options]))
    print(as_text(run()))


if __name__ == '__main__':
    main()
