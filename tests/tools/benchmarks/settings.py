"""What a setting of the hook costs, beside another one.

``python -m tests.tools.benchmarks.settings`` prints the time of the
normalization of a weight and its gradient by the hook: with several vectors,
for weights of networks, with ``groups='each'``, for some links, and with
``norm='operator'``, as a part of a layer's step with 64 images.  All settings
are timed in turn in one process.  Set ``OPENBLAS_NUM_THREADS=1`` and
``OMP_NUM_THREADS=1``.

``--certify`` prints the time of certificates instead, by the clock.
"""
from __future__ import annotations

import argparse
import time
from typing import Any, Callable, Iterator, Sequence
from unittest import mock

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np

from tests.tools.benchmarks import contenders, cpu
from tests.tools.benchmarks.report import (
    Budget,
    measure,
    number,
    shape_of,
    text_table,
)

VECTORS: dict[str, dict[str, int]] = {
    '1 vector': {},
    'K = 5': {'n_power_iteration': 5},
    '8 vectors': {'n_vectors': 8},
    '16 vectors': {'n_vectors': 16},
}
GROUPS: dict[str, dict[str, Any]] = {
    'one matrix': {}, "groups='each'": {'groups': 'each'}}
LINKS: dict[str, Callable[[], Any]] = {
    'Convolution2D(64, 64, 3, groups=4)':
        lambda: L.Convolution2D(64, 64, 3, groups=4),
    'Convolution2D(256, 256, 3, groups=4)':
        lambda: L.Convolution2D(256, 256, 3, groups=4),
    'Convolution2D(256, 256, 3, groups=32)':
        lambda: L.Convolution2D(256, 256, 3, groups=32),
    'Convolution2D(256, 256, 3, groups=256)':
        lambda: L.Convolution2D(256, 256, 3, groups=256),
    'Convolution2D(1024, 1024, 3, groups=4)':
        lambda: L.Convolution2D(1024, 1024, 3, groups=4),
    'Deconvolution2D(256, 256, 4, groups=4)':
        lambda: L.Deconvolution2D(256, 256, 4, groups=4),
    'DepthwiseConvolution2D(256, 1, 3)':
        lambda: L.DepthwiseConvolution2D(256, 1, 3),
}
# Channels, and the size of images.
LAYERS = {'512 x 512 x 3 x 3, 8 x 8': (512, 8),
          '256 x 256 x 3 x 3, 16 x 16': (256, 16),
          '128 x 128 x 3 x 3, 32 x 32': (128, 32)}
MAPS: dict[str, dict[str, Any]] = {
    'layer': {},
    'matrix': {'norm': 'matrix'},
    'operator, detach_uv': {'norm': 'operator', 'detach_uv': True},
    'operator': {'norm': 'operator'},
    'operator, 8 vectors': {'norm': 'operator', 'n_vectors': 8},
}
# Shape of a Gaussian weight, and the stride.
CERTIFIED = {'96 x 96 x 3 x 3': ((96, 96, 3, 3), 1),
             '256 x 128 x 4 x 4, stride 2': ((256, 128, 4, 4), 2),
             '384 x 192 x 3 x 3, stride 2': ((384, 192, 3, 3), 2),
             '512 x 512 x 3 x 3': ((512, 512, 3, 3), 1)}
RTOLS = 1e-2, 1e-3


def step_of(link: Any, gY: Any, settings: dict[str, Any]) -> Any:
    """A forward and a backward of the normalization in a step."""
    hook = sn_function.SpectralNormalization(**settings)
    link.add_hook(hook)

    def step() -> None:
        Y = hook.normalize_weight(link)
        Y.grad = gY
        link.W.cleargrad()
        Y.backward()

    return step


def time_of_processor(step: Any, n: int) -> tuple[float, float]:
    """As :func:`.cpu.time_on_host`, but others do not disturb it as much."""
    with mock.patch.object(time, 'perf_counter', time.process_time):
        return cpu.time_on_host(step, n)


def of_weight(shape: str) -> Callable[[dict[str, Any]], Any]:
    case = contenders.case_of(shape_of(shape))
    return lambda settings: step_of(
        contenders.Weight(case.W, case.gY), case.gY, settings)


def of_link(name: str) -> Callable[[dict[str, Any]], Any]:
    def make(settings: dict[str, Any]) -> Any:
        np.random.seed(0)
        link = LINKS[name]()
        gY = np.random.normal(size=link.W.shape).astype('f')
        return step_of(link, gY, settings)
    return make


def of_layer(name: str) -> Callable[[dict[str, Any]], Any]:
    """The step of a layer, or what a hook adds to it."""
    def make(settings: dict[str, Any]) -> Any:
        np.random.seed(0)
        channels, size = LAYERS[name]
        link = L.Convolution2D(channels, channels, 3, pad=1)
        if settings:
            more = {'insize': size} if settings['norm'] == 'operator' else {}
            gY = np.random.normal(size=link.W.shape).astype('f')
            return step_of(link, gY, {**settings, **more})
        x, gy = (np.random.normal(
            size=(64, channels, size, size)).astype('f') for _ in range(2))

        def step() -> None:
            y = link(chainer.Variable(x))
            y.grad = gy
            link.cleargrads()
            y.backward()

        return step
    return make


def row_of(
        name: str, make: Callable[[dict[str, Any]], Any],
        settings: dict[str, dict[str, Any]], timer: Any, n_rounds: int,
) -> tuple[str, ...]:
    """The medians, the first in microseconds and the others over that."""
    times = measure(
        {key: make(setting) for key, setting in settings.items()},
        timer, Budget(600), n_rounds, seconds=.02)
    first, *others = (times[key]['wall']['median'] for key in settings)
    return name, number(first), *[f'{x / first:.3g}' for x in others]


def tables(timer: Any, n_rounds: int) -> Iterator[str]:
    for title, names, make, settings in (
            ('weight', cpu.SHAPES, of_weight, VECTORS),
            ('link', list(LINKS), of_link, GROUPS),
            ('layer', list(LAYERS), of_layer, MAPS)):
        first, *others = settings
        yield text_table(
            (title, f'{first}, us', *others),
            [row_of(name, make(name), settings, timer, n_rounds)
             for name in names])


def certificate_row(
        shape: tuple[int, ...], stride: int, n_rounds: int) -> list[str]:
    """The median seconds for each tolerance."""
    m, n, *ksize = shape
    link = L.Convolution2D(n, m, ksize, stride)
    link.W.array[...] = np.random.RandomState(0).normal(size=shape)
    row = []
    for rtol in RTOLS:
        times = []
        for _ in range(n_rounds):
            start = time.perf_counter()
            sn_function.certify(link, rtol, time_limit=None)
            times.append(time.perf_counter() - start)
        row.append(f'{np.median(times):.2f}')
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=30,
                        help='number of times each')
    parser.add_argument('--wall', action='store_true',
                        help='time of the clock, not of the processor')
    parser.add_argument('--certify', action='store_true',
                        help='times of certificates')
    args = parser.parse_args(argv)
    if args.certify:
        print(cpu.machine(), text_table(
            ('weight', *(f'to {rtol:g}, s' for rtol in RTOLS)),
            [(name, *certificate_row(shape, stride, args.rounds))
             for name, (shape, stride) in CERTIFIED.items()]), sep='\n\n')
        return
    timer = cpu.time_on_host if args.wall else time_of_processor
    print(cpu.machine())
    for table in tables(timer, args.rounds):
        print(f'\n{table}', flush=True)


if __name__ == '__main__':
    main()
