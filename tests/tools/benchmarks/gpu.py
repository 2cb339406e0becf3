"""The normalization of weights of well-known networks, on a CUDA device.

``python -m tests.tools.benchmarks.gpu`` times forward, backward and both of
the hook of this package and of Chainer's, counts their launches and their
memory, and prints tables; see ``docs/benchmarks/README.md``.  PyTorch has a
process of its own, :mod:`tests.tools.benchmarks.gpu_torch`.

Clocks are in :mod:`tests.tools.benchmarks.device`, tables in
:mod:`tests.tools.benchmarks.gpu_report`.  CuPy is imported only when it is
measured.
"""
from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import itertools
import math
import platform
import subprocess
import sys
from typing import Any, Callable, NamedTuple, Sequence
from unittest import mock

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np
from chainer import link_hooks
from chainer.backends import cuda

from sn_function._arithmetic import kernels
from tests.tools.benchmarks import models
from tests.tools.benchmarks.device import (  # NOQA: F401  used by tests
    HOST,
    KERNEL,
    MEMCPY,
    Captured,
    peak_memory,
    time_on_device,
    why_no_device,
)
from tests.tools.benchmarks.gpu_report import PARTS, entry, floor
from tests.tools.benchmarks.gpu_run import GOAL_SHAPES, N_ROUNDS, Run
from tests.tools.benchmarks.report import (
    BUILT_IN,
    DTYPES,
    NO_HOOK,
    Budget,
    measure,
    shape_of,
    text_of,
)
from tests.tools.gpu.steps import NOT_HERE

OTHER_SHAPES = (
    '1536x1536x3x3', '1x8192', '1000x1536', '128x128x3x3', '256x256x3x3',
    '1024x512x3x3', '96x3x3x3', '192x96x3x3', '768x384x3x3', '1x1536',
    '12x96x1x1')
SWEEP = range(10, 21)  # one block takes long for more
DEVICE = '@cupy:0'
BATCH_SIZE = 32  # of the training steps
WEIGHTS, STEP = 'All weights, without layers', 'A training step'
WAYS = (NO_HOOK, BUILT_IN, 'chain hook', 'chain hook, detached',
        'chain hook, cached', 'the same, detached')


# The contenders

class Contender(NamedTuple):
    """What is timed: calls without arguments.

    ``backward`` runs through the same graph each time.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    both: Callable[[], Any]
    clear: Callable[[], Any]


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


def arrays(shape: str, dtype: str) -> tuple[Any, Any]:
    """W and gY, on the device."""
    random = np.random.RandomState(0)
    W, gY = (random.normal(size=shape_of(shape)) for _ in range(2))
    # As an initializer has them; and gY no smaller than float16 can be.
    W = W * 0.05
    return tuple(cuda.to_gpu(x.astype(DTYPES[dtype])) for x in (W, gY))


def makers(
        W: Any, gY: Any, fused_size: int | None = None
) -> dict[str, Callable[[], Contender]]:
    """Returns what makes each contender; it may raise anything."""
    def ours(detach_uv: bool) -> Contender:
        return chainer_contender(
            sn_function.SpectralNormalization(detach_uv=detach_uv), W, gY,
            fused_size)

    return {
        'detached': functools.partial(ours, True),
        'exact': functools.partial(ours, False),
        BUILT_IN: lambda: chainer_contender(
            link_hooks.SpectralNormalization(), W, gY)}


def examine(
        contenders: dict[str, Contender], budget: Budget
) -> dict[str, dict[str, Any]]:
    """Returns all numbers of each of these."""
    results: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for part in PARTS:
        found = measure(
            {name: getattr(c, part) for name, c in contenders.items()},
            time_on_device, budget, N_ROUNDS)
        for name, numbers in found.items():
            results[name][part] = numbers
    for name, contender in contenders.items():
        for part in PARTS:
            add_graph(getattr(contender, part), results[name][part], budget)
        if budget.left > 0:
            try:
                contender.clear()
                results[name]['extra bytes'] = peak_memory(contender.both)
            except Exception as error:
                results[name]['notes'] = {'memory': text_of(error)}
    return results


def add_graph(
        step: Callable[[], Any], numbers: dict[str, Any], budget: Budget
) -> None:
    """Adds the number of launches and, if possible, the time of a replay."""
    if 'error' in numbers or budget.left <= 0:
        return
    try:
        with Captured(step) as graph, graph.stream:
            numbers['kernels'] = graph.types.count(KERNEL)
            replayed = measure(
                {'': graph.launch}, time_on_device, budget, N_ROUNDS)['']
            if 'device' in replayed:
                numbers['graph'] = replayed['device']
    except Exception as error:
        numbers['no graph'] = text_of(error)


def time_copy(nbytes: int, budget: Budget) -> dict[str, Any]:
    source = cuda.cupy.zeros(nbytes, np.uint8)
    target = cuda.cupy.empty_like(source)
    runtime = cuda.cupy.cuda.runtime

    def copy() -> None:
        runtime.memcpyAsync(
            target.data.ptr, source.data.ptr, nbytes,
            runtime.memcpyDeviceToDevice,
            cuda.cupy.cuda.get_current_stream().ptr)

    numbers = measure({'': copy}, time_on_device, budget, N_ROUNDS)['']
    add_graph(copy, numbers, budget)
    return numbers


class DeviceRun(Run):

    name = 'gpu'
    parts = 'goals', 'models', 'sweep', 'float16', 'others'

    def machine(self) -> dict[str, Any]:
        return machine()

    def __call__(self) -> dict[str, Any]:
        self.report['fused size'] = kernels.FUSED_SIZE
        return super().__call__()

    def clean(self) -> None:
        # Blocks of the last weight do not fit the next one.
        with contextlib.suppress(Exception):
            gc.collect()
            cuda.cupy.get_default_memory_pool().free_all_blocks()

    # The parts

    def goals(self) -> None:
        self.measure_weights(GOAL_SHAPES, 'float32')

    def float16(self) -> None:
        self.measure_weights(GOAL_SHAPES, 'float16')

    def others(self) -> None:
        self.measure_weights(OTHER_SHAPES, 'float32')

    def models(self) -> None:
        makers: dict[tuple[str, str], Callable[[], Any]] = {
            (WEIGHTS, name): functools.partial(
                models.model_makers, shapes, DEVICE)
            for name, shapes in models.MODELS.items()}
        makers[STEP, 'the demo'] = lambda: models.demo_makers(0)
        makers[STEP, 'SNGAN ResNet 64x64'] = lambda: models.gan_makers(
            models.ResNet, 64, DEVICE, BATCH_SIZE)
        for kind, name in (
                (WEIGHTS, 'SNGAN ResNet 64x64'), (STEP, 'the demo'),
                (STEP, 'SNGAN ResNet 64x64'), (WEIGHTS, 'SNGAN 32x32'),
                (WEIGHTS, 'BigGAN 128x128')):
            self.attempt(f'{kind}: {name}', self.measure_model, kind, name,
                         makers[kind, name])

    def sweep(self) -> None:
        """One block or many: forward and backward of square weights."""
        for dtype, exponent in itertools.product(DTYPES, SWEEP):
            self.attempt(
                f'sweep at 2^{exponent}, {dtype}', self.measure_size,
                exponent, dtype)

    # Each of them

    def measure_weights(self, shapes: Sequence[str], dtype: str) -> None:
        if self.report['bandwidth'] is None:
            self.attempt('bandwidth', self.measure_bandwidth)
        for shape in shapes:
            self.attempt(
                f'{shape} {dtype}', self.measure_weight, shape, dtype)

    def measure_bandwidth(self) -> None:
        free, _ = cuda.cupy.cuda.runtime.memGetInfo()
        nbytes = 1 << min(30, int(math.log2(free / 4)))
        numbers = time_copy(nbytes, self.budget)
        self.report['copy'] = dict(numbers, nbytes=nbytes)
        self.report['bandwidth'] = (
            2 * nbytes / numbers['device']['median'] * 1e6)

    def measure_weight(self, shape: str, dtype: str) -> None:
        W, gY = arrays(shape, dtype)
        weight = entry(self.report, 'weights', shape=shape, dtype=dtype)
        weight.update(
            nbytes=W.nbytes,
            floor=floor(W.nbytes, self.report['bandwidth']),
            copy=time_copy(W.nbytes, self.budget))
        made = self.make(weight, makers(W, gY))
        weight['contenders'].update(examine(made, self.budget))

    def measure_model(
            self, kind: str, name: str, to_make: Callable[[], Any]) -> None:
        model = entry(self.report, 'models', kind=kind, name=name)
        made = self.make(model, {
            way: make for way, make in to_make().items() if way in WAYS})
        found = measure(
            {way: contender.step for way, contender in made.items()},
            time_on_device, self.budget, N_ROUNDS)
        model['contenders'].update(found)
        if kind == WEIGHTS:  # layers call libraries that refuse it
            for way, numbers in found.items():
                add_graph(made[way].step, numbers, self.budget)

    def make(self, to: dict[str, Any], to_make: dict[str, Any]) -> Any:
        """Returns those that could be made."""
        made = {}
        for name, make in to_make.items():
            try:
                made[name] = make()
            except Exception as error:
                to['contenders'][name] = {'error': text_of(error)}
        return made

    def measure_size(self, exponent: int, dtype: str) -> None:
        with mock.patch.object(kernels, 'FUSED_SIZE', kernels.FUSED_SIZE):
            self.measure_both_ways(exponent, dtype)

    def measure_both_ways(self, exponent: int, dtype: str) -> None:
        rows = 1 << (exponent // 2)
        W, gY = arrays(f'{rows}x{(1 << exponent) // rows}', dtype)
        found = measure(
            {name: makers(W, gY, size)['exact']().both
             for name, size in (('fused', W.size), ('separate', 0))},
            time_on_device, self.budget, N_ROUNDS)
        for name, size in (('fused', W.size), ('separate', 0)):
            kernels.FUSED_SIZE = size
            add_graph(
                makers(W, gY, size)['exact']().both, found[name], self.budget)
        self.report['sweep'] = [
            point for point in self.report['sweep']
            if (point['size'], point['dtype']) != (W.size, dtype)]
        self.report['sweep'].append(dict(found, size=W.size, dtype=dtype))


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    cupy = cuda.cupy
    runtime = cupy.cuda.runtime

    def driver() -> str:
        return subprocess.run(
            ['nvidia-smi', '--query-gpu=driver_version',
             '--format=csv,noheader'], check=True, stdout=subprocess.PIPE,
            timeout=20).stdout.decode().split()[0]

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
            # Importing it here would mix its libraries with CuPy's.
            'PyTorch': lambda: importlib.metadata.version('torch'),
            'date': lambda: datetime.datetime.now(
                datetime.timezone.utc).strftime('%Y-%m-%d'),
    }.items():
        try:
            found[key] = get()
        except Exception as error:
            found[key] = f'n/a ({text_of(error)})'
    return found


def check() -> None:
    """Says which device there is, and what there is for it."""
    with contextlib.suppress(Exception):
        print(subprocess.run(
            ['nvidia-smi'], stdout=subprocess.PIPE, timeout=20
            ).stdout.decode())
    found = machine()
    for key, value in found.items():
        print(f'{key}: {value}')
    print(found['device'])


def main(argv: Sequence[str] | None = None) -> None:
    parser = DeviceRun.parser(__doc__.split('\n')[0])
    parser.add_argument('--check', action='store_true',
                        help='only say which device there is')
    args = DeviceRun.parse_args(parser, argv)
    reason = why_no_device()
    if reason is not None:
        print(f'No CUDA device. {reason}')
        sys.exit(NOT_HERE)
    if args.check:
        check()
    else:
        DeviceRun.main(args)


if __name__ == '__main__':
    main()
