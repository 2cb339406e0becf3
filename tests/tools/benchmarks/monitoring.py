"""What a report of sigma, its picture and the penalty take, on the CPU.

``python -m tests.tools.benchmarks.monitoring`` prints the table of
``docs/monitoring.rst``.
"""
from __future__ import annotations

import sn_function  # isort: skip  # before chainer, which it repairs

import os
import tempfile
import time
from typing import Any, Callable

import chainer
import chainer.links as L
import numpy as np

from sn_function._monitoring import plot
from sn_function.extensions import SpectralNormReport
from sn_function.optimizer_hooks import SpectralNormPenalty
from tests.tools.benchmarks.cpu import MODELS, machine


def model_of(shapes: Any, hook: bool) -> chainer.ChainList:
    """Layers with random weights of these shapes."""
    links = [
        L.Linear(shape[1], shape[0]) if len(shape) == 2
        else L.Convolution2D(shape[1], shape[0], shape[2:])
        for shape in shapes]
    return chainer.ChainList(*[
        link.add_hook(sn_function.SpectralNormalization()) if hook else link
        for link in links])


def milliseconds(function: Callable[[], Any]) -> str:
    """The median of some calls."""
    times: list[float] = []
    function()
    while len(times) < 3 or (len(times) < 30 and sum(times) < 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return f'{1000 * float(np.median(times)):,.1f}'


def show(row: list[str]) -> None:
    print('  '.join(cell.ljust(18) for cell in row).rstrip(), flush=True)


def measured(name: str, directory: str) -> list[str]:
    """The row of a model."""
    shapes = MODELS[name]
    model = model_of(shapes, hook=True)
    report = SpectralNormReport(model)
    exact = SpectralNormReport(model, true_sigma=True)
    history = [
        {'iteration': i, **{
            f'{kind}/{layer.name}': 1. + i for layer in report.measure()
            for kind in ('sigma', 'residual')}}
        for i in range(100)]
    bare = model_of(shapes, hook=False)
    optimizer = chainer.optimizers.SGD(0).setup(bare)
    bare.zerograds()
    penalty = SpectralNormPenalty(1e-3)
    return [name, str(len(shapes)), milliseconds(report.measure),
            milliseconds(exact.measure),
            milliseconds(lambda: plot.draw(
                history, os.path.join(directory, 'sigma.png'))),
            milliseconds(lambda: penalty(optimizer))]


def main() -> None:
    print(machine())
    head = ['discriminator', 'weights', 'report', 'true_sigma=True',
            'picture', 'penalty']
    with tempfile.TemporaryDirectory() as directory:
        show(head)
        for name in MODELS:
            show(measured(name, directory))


if __name__ == '__main__':
    main()
