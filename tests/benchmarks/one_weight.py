"""Forward plus backward of the normalization of one weight, on the CPU.

``python -m tests.benchmarks.one_weight`` prints the time of Chainer's hook
and of ours, exact and detached, taken in turn in one process: median and
20/80 percentiles in microseconds, and the ratio of the medians.  Set
``OPENBLAS_NUM_THREADS=1`` and ``OMP_NUM_THREADS=1`` for comparable numbers.
"""
import argparse
import platform
import time

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
from chainer import link_hooks

HOOKS = {
    'Chainer 7.8.1': link_hooks.SpectralNormalization,
    'exact': sn_function.SpectralNormalization,
    'detached': lambda: sn_function.SpectralNormalization(detach_uv=True),
}


def make_step(make_hook, shape):
    """A call that normalizes a weight and differentiates it."""
    m, n, *ksize = shape
    hook = make_hook()
    link = L.ConvolutionND(len(ksize), n, m, tuple(ksize), nobias=True)
    link.add_hook(hook)
    gY = np.random.normal(size=shape).astype('f')

    def step():
        link.W.cleargrad()
        Y = hook.normalize_weight(link)
        Y.grad = gY
        Y.backward()

    return step


def measure(shape, n_rounds=30, seconds=0.02):
    """Returns, for each hook, the seconds a step, one number a round."""
    steps = {name: make_step(make, shape) for name, make in HOOKS.items()}
    counts = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        counts[name] = max(1, int(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in steps}
    for _ in range(n_rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                step()
            times[name].append((time.perf_counter() - start) / counts[name])
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        'shape', nargs='*', default=['64x3x3x3'], help='e.g. 64x3x3x3')
    args = parser.parse_args()
    print(f'{platform.machine()}, Python {platform.python_version()}, NumPy '
          f'{np.__version__}, Chainer {chainer.__version__}, float32, K = 1')
    for text in args.shape:
        times = measure(tuple(map(int, text.split('x'))))
        base = np.median(times['Chainer 7.8.1'])
        for name, values in times.items():
            low, median, high = np.percentile(values, [20, 50, 80]) * 1e6
            print(f'{text:>16} {name:>14} {median:10.1f} us '
                  f'({low:.1f} to {high:.1f})  x {median / base / 1e6:.3f}')


if __name__ == '__main__':
    main()
