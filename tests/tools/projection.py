"""How near SpectralNormProjection keeps the norms of weights to its bound.

``python -m tests.tools.projection`` prints the table of docs/monitoring.rst:
of the largest true norm of a model's weights, in float64, after each update.
"""
from __future__ import annotations

import sn_function  # isort: skip  # before chainer, which it repairs

from typing import Callable

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from sn_function.optimizer_hooks import SpectralNormProjection
from tests import reference
from tests.tools.benchmarks.cpu import machine

assert sn_function  # it is imported for what it does

ITERATIONS = 1, 5, 20
TOLERANCE = 1e-6


class Watch:
    """Keeps the largest true norm of all layers after each update."""

    name = 'Watch'
    timing = 'post'
    call_for_each_param = False

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(self, optimizer: chainer.Optimizer) -> None:
        self.norms.append(max(
            reference.true_norm(link.W.array)
            for link in optimizer.target.links()
            if isinstance(link, L.Linear)))


def watched(
        optimizer: chainer.Optimizer, hook: SpectralNormProjection) -> Watch:
    watch = Watch()
    optimizer.add_hook(hook)
    optimizer.add_hook(watch)  # after it
    return watch


def regression(
        hook: SpectralNormProjection, alpha: float, seed: int,
        steps: int) -> list[float]:
    """The norms of three layers that Adam trains."""
    np.random.seed(seed)
    model = chainer.Sequential(
        L.Linear(20, 128), F.relu, L.Linear(128, 128), F.relu,
        L.Linear(128, 1))
    optimizer = chainer.optimizers.Adam(alpha).setup(model)
    watch = watched(optimizer, hook)
    direction = np.random.normal(size=(20, 1)).astype('f')
    for _ in range(steps):
        x = np.random.normal(size=(64, 20)).astype('f')
        t = 3 * np.sin(x.dot(direction))
        optimizer.update(lambda: F.mean_squared_error(model(x), t))  # NOQA: B023
    return watch.norms


def drift(
        hook: SpectralNormProjection, shape: tuple[int, int], size: float,
        seed: int, steps: int) -> list[float]:
    """The norms of a Gaussian weight whose updates are Gaussian.

    Args:
        hook: The hook.
        shape: Shape of the weight.
        size: About the norm of an update.
        seed: Of the weight and the updates.
        steps: Number of updates.

    """
    rng = np.random.RandomState(seed)
    link = L.Linear(shape[1], shape[0], nobias=True, initialW=(
        1.5 / sum(np.sqrt(shape)) * rng.normal(size=shape)))
    optimizer = chainer.optimizers.SGD(1).setup(link)
    watch = watched(optimizer, hook)
    for _ in range(steps):
        gW = size / sum(np.sqrt(shape)) * rng.normal(size=shape)
        link.W.grad = gW.astype('f')
        optimizer.update()
    return watch.norms


def square(hook: SpectralNormProjection, seed: int) -> list[float]:
    """The norms of an 8 x 8 weight on its way from 4 to 0.3."""
    W = np.random.RandomState(seed).normal(size=(8, 8))
    link = L.Linear(8, 8, nobias=True, initialW=(
        W * 4 / reference.true_norm(W)))
    optimizer = chainer.optimizers.SGD(0.5).setup(link)
    watch = watched(optimizer, hook)
    x = np.float32(8 ** 0.5) * np.eye(8, dtype='f')
    for _ in range(300):
        optimizer.update(lambda: F.mean_squared_error(link(x), 0.3 * x))
    return watch.norms


# The name, what is run for each seed, and the number of seeds.
CASES: list[tuple[str, Callable[..., list[float]], int]] = [
    ('8 x 8, from 4 to 0.3', square, 10),
    ('3 layers, Adam with 1e-3',
     lambda hook, seed: regression(hook, 1e-3, seed, 300), 10),
    ('3 layers, Adam with 1e-2',
     lambda hook, seed: regression(hook, 1e-2, seed, 300), 10),
    ('64 x 64, steps of 0.01',
     lambda hook, seed: drift(hook, (64, 64), 0.01, seed, 300), 3),
    ('64 x 64, steps of 0.1',
     lambda hook, seed: drift(hook, (64, 64), 0.1, seed, 300), 3),
    ('256 x 512, steps of 0.01',
     lambda hook, seed: drift(hook, (256, 512), 0.01, seed, 60), 1),
    ('256 x 512, steps of 0.1',
     lambda hook, seed: drift(hook, (256, 512), 0.1, seed, 60), 1),
]


def measured(
        run: Callable[..., list[float]], n_seeds: int, K: int) -> list[str]:
    norms = np.array([
        norm for seed in range(n_seeds)
        for norm in run(SpectralNormProjection(1., K), seed)])
    return [f'{max(0., norms.max() - 1):.0e}',
            f'{100 * np.mean(norms > 1 + TOLERANCE):.1f}%',
            f'{np.median(norms):.3f}']


def show(row: list[str]) -> None:
    print('  '.join(cell.ljust(24) for cell in row).rstrip(), flush=True)


def main() -> None:
    print(machine())
    print('Largest excess, updates with an excess above 1e-6, median norm:')
    show(['iterations', *map(str, ITERATIONS)])
    for name, run, n_seeds in CASES:
        show([name, *(', '.join(measured(run, n_seeds, K))
                      for K in ITERATIONS)])


if __name__ == '__main__':
    main()
