"""What sigma of each group of a weight costs, beside sigma of all as one.

``python -m tests.tools.benchmarks.groups`` prints, for some links, the time of
the normalization of the weight and its gradient, taken in turn in one process.
Set ``OPENBLAS_NUM_THREADS=1`` and ``OMP_NUM_THREADS=1``.
"""
from __future__ import annotations

import argparse
from typing import Any, Callable, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer.links as L
import numpy as np

from tests.tools.benchmarks import cpu
from tests.tools.benchmarks.report import Budget, measure, number, text_table

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
SETTINGS = {'one matrix': None, "groups='each'": 'each'}
HEADER = ('link', *(f'{name}, us' for name in SETTINGS), 'ratio')


def step_of(make_link: Callable[[], Any], groups: str | None) -> Any:
    """A forward and a backward of the normalization in a step."""
    np.random.seed(0)
    link = make_link()
    hook = sn_function.SpectralNormalization(groups=groups)
    link.add_hook(hook)
    gY = np.random.normal(size=link.W.shape).astype('f')

    def step() -> None:
        Y = hook.normalize_weight(link)
        Y.grad = gY
        link.W.cleargrad()
        Y.backward()

    return step


def row_of(name: str, n_rounds: int) -> tuple[str, ...]:
    times = measure({
        setting: step_of(LINKS[name], groups)
        for setting, groups in SETTINGS.items()
    }, cpu.time_on_host, Budget(600), n_rounds, seconds=.02)
    cells, medians = [name], []
    for setting in SETTINGS:
        wall = times[setting]['wall']
        medians.append(wall['median'])
        median, *spread = (
            number(wall[key]) for key in ('median', 'p20', 'p80'))
        cells.append(f'{median} ({"-".join(spread)})')
    return (*cells, f'{medians[1] / medians[0]:.2f}')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=30,
                        help='number of times each')
    args = parser.parse_args(argv)
    print(cpu.machine(), '\n')
    print(text_table(HEADER, [row_of(name, args.rounds) for name in LINKS]))


if __name__ == '__main__':
    main()
