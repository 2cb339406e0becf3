"""The normalization of weights of well-known networks, on a CUDA device.

``python -m tests.benchmarks.gpu`` times forward, backward and both of the
hook of this package, of Chainer's and of PyTorch's, counts their launches and
their memory, and prints tables; see ``docs/benchmarks/README.md``.

Statistics, floors and tables are functions of numbers and come first.  What
follows needs a device, and imports CuPy and PyTorch only when it is called.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import itertools
import json
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

from sn_function import _kernels

# Weights of the discriminators of SNGAN (for 32 x 32 pixels: the plain one;
# for 64 x 64: the ResNet) and of BigGAN (128 x 128); one that is square.
# What must not be missing when the time is up comes first.
SHAPES = (
    '64x3x3x3', '128x64x4x4', '256x128x4x4', '512x256x4x4', '512x512x3x3',
    '1024x1024x3x3', '1536x1536x3x3', '4096x4096', '1x8192', '1000x1536',
    '128x128x3x3', '256x256x3x3', '1024x512x3x3', '96x3x3x3', '192x96x3x3',
    '768x384x3x3', '1x1536', '12x96x1x1')
QUICK_SHAPES = ('64x3x3x3', '256x128x4x4', '512x512x3x3')
# Compiling takes a minute a shape.
COMPILED_SHAPES = ('512x512x3x3', '64x3x3x3')
DTYPES = {'float32': np.float32, 'float16': np.float16}
PARTS = ('forward', 'backward', 'both')
CLOCKS = ('wall', 'device', 'graph')
# One block takes long for more: nobody would choose it.
LARGEST_FUSED = 1 << 20
SWEEP = range(10, 21)


class Budget:
    """The seconds that are left; measuring stops when none are."""

    def __init__(
            self, seconds: float,
            clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def share(self, fraction: float) -> Budget:
        """A budget of a part of what is left."""
        return Budget(self.left * fraction, self._clock)


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split('x')))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and 20/80 percentiles of seconds, in microseconds."""
    low, median, high = np.percentile(values, [20, 50, 80]) * 1e6
    return {'median': float(median), 'p20': float(low), 'p80': float(high)}


def floors(nbytes: int, bandwidth: float) -> dict[str, float]:
    """The least times in microseconds, if memory were all that counts.

    Forward reads the weight for each of the two products and for Y, which it
    writes.  Backward reads W and gY for their product, and gY for gW, which
    it writes; the exact gradient takes one more product.

    Args:
        nbytes: Size of the weight.
        bandwidth: Bytes a second that a copy reads and writes.

    """
    one = nbytes / bandwidth * 1e6
    return {'forward': 4 * one, 'backward, detached': 4 * one,
            'backward, exact': 5 * one}


def floor_of(
        name: str, part: str, least: dict[str, float]) -> float:
    """The floor of a part of what a contender does."""
    backward = least['backward, exact' if 'exact' in name
                     else 'backward, detached']
    return {'forward': least['forward'], 'backward': backward,
            'both': least['forward'] + backward}[part]


def best_median(part: dict[str, Any]) -> float | None:
    """The time with the least of the host in it."""
    for clock in ('graph', 'device'):
        if clock in part:
            return part[clock]['median']
    return None


def measure(
        steps: dict[str, Callable[[], Any]],
        timer: Callable[[Callable[[], Any], int], tuple[float, float]],
        budget: Budget, n_rounds: int = 10, seconds: float = 0.003,
) -> dict[str, dict[str, Any]]:
    """Times the steps in turn; a step that raises has its error instead.

    Args:
        steps: What is timed, by name.
        timer: Called with a step and a number of calls; returns the seconds a
            call takes by the wall clock and on the device.
        budget: Where it is over, what has no time has an error.
        n_rounds: Number of times each.
        seconds: Time of a round.

    Returns:
        By name, the summaries ``wall`` and ``device``, or ``error``.

    """
    times: dict[str, list[tuple[float, float]]] = {}
    errors: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, step in steps.items():
        try:
            if budget.left <= 0:
                raise TimeoutError('not measured: the time was up')
            timer(step, 3)  # compiles, and fills the memory pool
            wall, _ = timer(step, 3)
            counts[name] = max(1, min(500, int(seconds / max(wall, 1e-9))))
            times[name] = []
        except Exception as error:
            errors[name] = text_of(error)
    for _ in range(n_rounds):
        for name in list(times):
            if budget.left <= 0 and times[name]:
                continue
            try:
                times[name].append(timer(steps[name], counts[name]))
            except Exception as error:
                errors[name] = text_of(error)
                del times[name]
    result: dict[str, dict[str, Any]] = {}
    for name in steps:
        if name in errors:
            result[name] = {'error': errors[name]}
        else:
            walls, devices = zip(*times[name])
            result[name] = {
                'wall': summary(walls), 'device': summary(devices),
                'rounds': len(walls), 'calls': counts[name]}
    return result


def text_of(error: BaseException) -> str:
    """An error in one line that fits in a note."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}'[:300]


def crossing(
        sizes: Sequence[int], fused: Sequence[float],
        separate: Sequence[float]) -> int | None:
    """The largest size up to which the fused kernels are never slower."""
    best = None
    for size, a, b in sorted(zip(sizes, fused, separate)):
        if a > b:
            break
        best = size
    return best


# Tables

def number(x: float | None) -> str:
    """Three digits, without an exponent."""
    if x is None or not math.isfinite(x):
        return 'n/a'
    if x == 0:
        return '0'
    return f'{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}'


def times_text(part: dict[str, Any]) -> str:
    """``wall / device / graph``, medians."""
    if 'wall' not in part:
        return 'n/a'
    return ' / '.join(
        number(part.get(clock, {}).get('median')) for clock in CLOCKS)


def launches_text(contender: dict[str, Any]) -> str:
    counts = [contender.get(part, {}).get('kernels')
              for part in ('forward', 'backward')]
    return ' + '.join('n/a' if n is None else str(n) for n in counts)


HEADER = ('contender', 'forward us', 'backward us', 'both us',
          'both, 20 to 80 %', 'launches', 'extra MiB', 'of floor')


def weight_rows(weight: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table of one weight and dtype."""
    rows = []
    for name, contender in weight['contenders'].items():
        parts = [contender.get(part, {}) for part in PARTS]
        wall = parts[-1].get('wall')
        time_us = best_median(parts[-1])
        least = floor_of(name, 'both', weight['floors'])
        memory = contender.get('extra bytes')
        rows.append((
            name, *map(times_text, parts),
            f'{number(wall["p20"])} to {number(wall["p80"])}' if wall
            else 'n/a',
            launches_text(contender),
            number(None if memory is None else memory / 2 ** 20),
            f'{number(100 * least / time_us)} %'
            if time_us and math.isfinite(least) else 'n/a'))
    return rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns are aligned, the first to the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(
        text.rjust(width) if i else text.ljust(width)
        for i, (text, width) in enumerate(zip(line, widths))).rstrip()
        for line in lines)


def markdown_table(
        header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def notes(report: dict[str, Any]) -> list[str]:
    """What could not be measured, and why; each reason once."""
    where: dict[str, list[str]] = {}
    for weight in report['weights']:
        for name, contender in weight['contenders'].items():
            found = dict(contender.get('notes', {}))
            for part in PARTS:
                error = contender.get(part, {}).get('error')
                if error:
                    found[part] = error
            if 'error' in contender:
                found['setup'] = contender['error']
            for what, error in found.items():
                places = where.setdefault(f'{name}, {what}: {error}', [])
                places.append(f'{weight["shape"]} {weight["dtype"]}')
    lines = [f'{error} ({", ".join(places)})'
             for error, places in where.items()]
    return lines + report.get('notes', [])


def sweep_rows(sweep: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(f'2^{int(math.log2(point["size"]))}', point['dtype'],
             times_text(point['fused']), times_text(point['separate']))
            for point in sweep]


def crossings(sweep: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each dtype and clock: up to where fused kernels win."""
    lines = []
    for dtype, clock in itertools.product(DTYPES, CLOCKS):
        points = [point for point in sweep if point['dtype'] == dtype
                  and all(clock in point[how] for how in (
                      'fused', 'separate'))]
        if points:
            size = crossing(
                [point['size'] for point in points],
                *([point[how][clock]['median'] for point in points]
                  for how in ('fused', 'separate')))
            lines.append(
                f'{dtype}, {clock}: fused kernels are never slower up to '
                f'{"no" if size is None else size} entries')
    return lines


def render(
        report: dict[str, Any],
        table: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
        title: Callable[[str], str]) -> str:
    """The report as text, with these tables and titles."""
    bandwidth = report['bandwidth']
    blocks = [
        title('Normalization of a weight on a CUDA device'),
        '\n'.join(f'* {key}: {value}'
                  for key, value in report['machine'].items()),
        f'K = 1. Times are medians in microseconds: wall clock, batch of '
        f'calls between two events, replay of the call as a CUDA graph. '
        f'Launches are forward + backward. "of floor" is the least time that '
        f'its traffic takes at the {number(bandwidth / 1e9)} GB/s, read and '
        f'written, of a large copy, over the last of the times of "both"; '
        f'what stays in the cache can be above 100 %. fused: one block for '
        f'each direction; the default up to '
        f'{report["fused size"]} entries.']
    for weight in report['weights']:
        copy = best_median(weight['copy'])
        blocks += [
            title(f'{weight["shape"]}, {weight["dtype"]}'),
            f'A copy of it takes {number(copy)} us; the floors are '
            + ', '.join(f'{number(value)} us ({name})'
                        for name, value in weight['floors'].items()) + '.',
            table(HEADER, weight_rows(weight))]
    if report['sweep']:
        blocks += [
            title('Fused kernels or not'),
            'Forward and backward of square weights, exact gradient.',
            table(('entries', 'dtype', 'fused us', 'not fused us'),
                  sweep_rows(report['sweep'])),
            '\n'.join(f'* {line}' for line in crossings(report['sweep']))]
    lines = notes(report)
    if lines:
        blocks += [title('Not measured'),
                   '\n'.join(f'* {line}' for line in lines)]
    return '\n\n'.join(blocks) + '\n'


def as_text(report: dict[str, Any]) -> str:
    return render(report, text_table, lambda text: f'== {text}')


def as_markdown(report: dict[str, Any]) -> str:
    titles = itertools.chain('#', itertools.repeat('##'))
    return render(
        report, markdown_table, lambda text: f'{next(titles)} {text}')


# The device

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
    # The stream that handles of libraries were last set to has to live on.
    return cuda.cupy.cuda.Stream(non_blocking=True)


class Captured:
    """A call, captured as a CUDA graph; so it neither waits nor is waited for.

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
        # freed: nobody else may have got it meanwhile.
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
    """Bytes that a call has of CuPy's memory pool at most."""
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

    ``backward`` goes again and again through one graph.
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
            _kernels.FUSED_SIZE = fused_size
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
    """Returns what makes each contender; may raise what it likes."""
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
    """Bytes that forward and backward have at most, gW included."""
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
            'fused size': _kernels.FUSED_SIZE, 'bandwidth': math.nan,
            'weights': [], 'sweep': [], 'notes': []}
        if self.torch_reason is not None:
            self.report['notes'].append(f'PyTorch: {self.torch_reason}')

    def __call__(self) -> dict[str, Any]:
        default = _kernels.FUSED_SIZE
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
            _kernels.FUSED_SIZE = default
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
        # Nothing ends a compiler that hangs, but whoever started this may.
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


def as_json(report: dict[str, Any]) -> str:
    def strict(x: Any) -> Any:
        # NaN is not JSON.
        if isinstance(x, dict):
            return {key: strict(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [strict(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(strict(report), indent=1, default=str) + '\n'


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
    run = Run(args, ' '.join(['python -m tests.benchmarks.gpu', *options]))
    print(as_text(run()))


if __name__ == '__main__':
    main()
