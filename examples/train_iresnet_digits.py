#!/usr/bin/env python
"""A classifier of handwritten digits that can be run backwards.

An invertible residual network: see iresnet_models.py.  It is trained twice,
with the same seed: with the norm of each convolution, as a map of images, kept
below 0.9, and with that of its weight reshaped to a matrix instead.  After
every step of training, held-out images are computed back from their features.
These files are written to the directory --out:

    inversion.png     how far from the images they are, over training
    inversion.json    the same, as numbers
    operator.npz,     the trained networks
    matrix.npz

It needs matplotlib, rich and scikit-learn, the extra `examples`, and takes one
to four minutes on a CPU.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from typing import Any, NamedTuple

# For layers as small as these one thread of BLAS is faster than two, which
# wait for each other.  It has to be set before NumPy is imported.  OpenBLAS
# and MKL read it, where their own variables are not set.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# Before Chainer: with sn_function, Chainer 7.8.1 can be imported on current
# versions of NumPy and setuptools.
import sn_function

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L
import digits_data
import numpy
from iresnet_models import IResNet, fixed_point
from matplotlib.figure import Figure  # draws with Agg, needs no display
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sn_function.extensions import SpectralNormReport

NORMS = {'operator': 'norm of the map', 'matrix': 'norm of the matrix'}
N_INVERTED = 16     # held-out images that are computed back
TOLERANCE = 1e-5    # pixels are in [-1, 1]


class Step(NamedTuple):
    """What is recorded in a step of training."""

    loss: float
    error: float        # the largest one of any pixel
    n_iterations: int   # the most of any block


class Run(NamedTuple):
    """A model with what was recorded in its training."""

    model: IResNet
    steps: list[Step]
    accuracy: float
    seconds: float


def train(
        norm: str, images: digits_data.Images,
        args: argparse.Namespace) -> Run:
    """Trains a network, and inverts it after each step."""
    start = time.perf_counter()
    random.seed(args.seed)
    numpy.random.seed(args.seed)
    model = IResNet(norm, args.cap)
    optimizer = chainer.optimizers.Adam(args.alpha).setup(model)
    iterator = chainer.iterators.SerialIterator(
        chainer.datasets.TupleDataset(images.train, images.train_labels),
        args.batchsize)
    steps = []
    for _ in track(range(args.iteration), 'training',
                   disable=not sys.stdout.isatty()):
        x, t = chainer.dataset.concat_examples(next(iterator))
        loss = F.softmax_cross_entropy(model(x), t)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        steps.append(Step(
            float(loss.array), *invert(model, images.test[:N_INVERTED])))
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        accuracy = F.accuracy(model(images.test), images.test_labels)
    return Run(model, steps, float(accuracy.array),
               time.perf_counter() - start)


def invert(model: IResNet, images: numpy.ndarray) -> tuple[float, int]:
    """Returns the error of the inverse, and the number of iterations."""
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        features = model.features(images).array
        with numpy.errstate(over='ignore', invalid='ignore'):   # it diverges
            inverse, n_iterations = model.images(features)
            return max_error(inverse, images), n_iterations


def max_error(actual: numpy.ndarray, expected: numpy.ndarray) -> float:
    error = float(abs(actual - expected).max())
    return math.inf if math.isnan(error) else error


def invert_positive_kernel(norm: str, cap: float) -> tuple[float, int]:
    """Inverts x + conv(x), where all entries of the kernel are positive.

    Such a kernel has the largest norm as a map, compared with that of the
    reshaped weight.
    """
    random = numpy.random.RandomState(0)
    conv = L.Convolution2D(
        8, 8, 3, pad=1, nobias=True,
        initialW=random.uniform(size=(8, 8, 3, 3)).astype(numpy.float32))
    conv.add_hook(sn_function.SpectralNormalization(norm=norm, cap=cap))
    x = random.uniform(-1, 1, (1, 8, 4, 4)).astype(numpy.float32)
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        inverse, n_iterations = fixed_point(conv, x + conv(x).array)
    return max_error(inverse, x), n_iterations


def print_kernels(console: Console, args: argparse.Namespace) -> None:
    table = Table(title='x + conv(x), positive kernel')
    table.add_column(f'kept below {args.cap:g}')
    for column in ('error', 'iterations'):
        table.add_column(column, justify='right')
    for norm, text in NORMS.items():
        error, n_iterations = invert_positive_kernel(norm, args.cap)
        table.add_row(text, f'{error:.1e}', str(n_iterations))
    console.print(table)


def print_runs(
        console: Console, runs: dict[str, Run],
        args: argparse.Namespace) -> None:
    table = Table(title='Networks inverted after each step of training')
    table.add_column(f'kept below {args.cap:g}')
    for column in ('largest error', f'steps above {TOLERANCE:g}',
                   'most iterations', 'accuracy', 'seconds'):
        table.add_column(column, justify='right')
    for norm, run in runs.items():
        errors = [step.error for step in run.steps]
        table.add_row(
            NORMS[norm], f'{max(errors):.1e}',
            f'{sum(error > TOLERANCE for error in errors)} of {len(errors)}',
            str(max(step.n_iterations for step in run.steps)),
            f'{run.accuracy:.1%}', f'{run.seconds:.0f}')
    console.print(table)


def print_layers(
        console: Console, norm: str, model: IResNet,
        insize: tuple[int, ...]) -> None:
    """Prints what bounds each convolution as it is used, and each g."""
    table = Table(title=f'Convolutions divided by the {NORMS[norm]}')
    table.add_column('layer')
    table.add_column('weight shape', no_wrap=True)
    for column in (NORMS[norm], 'certified norm as used',
                   'Lipschitz constant of g'):
        table.add_column(column, justify='right')
    layers = {layer.name: layer
              for layer in SpectralNormReport(model.blocks).measure()}
    for i, block in enumerate(model.blocks):
        bound = 1.
        for conv in block.children():
            layer = layers[f'{i}/{conv.name}']
            lo, hi = sn_function.certify(conv, insize=insize)
            bound *= hi
            is_last = conv is block.conv3
            table.add_row(
                layer.name, str(layer.shape), f'{layer.sigma:.4f}',
                f'{lo:.4f} to {hi:.4f}',
                f'at most {bound:.3f}' if is_last else '',
                end_section=is_last)
    console.print(table)


def draw(runs: dict[str, Run], cap: float, path: str) -> None:
    """Draws the errors and the numbers of iterations over training."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    figure.suptitle(
        f'{N_INVERTED} images computed back from their features, after each '
        f'step of training', fontsize=11)
    left, right = figure.subplots(1, 2)
    for norm, run in runs.items():
        label = f'{NORMS[norm]} at most {cap:g}'
        steps = numpy.arange(1, len(run.steps) + 1)
        left.plot(steps, [step.error for step in run.steps])
        right.plot(
            steps, [step.n_iterations for step in run.steps], label=label)
    left.axhline(TOLERANCE, color='black', linestyle=':', linewidth=1)
    left.set(yscale='log', xlabel='step', ylabel='largest error of a pixel')
    right.set(ylim=(0, None), xlabel='step',
              ylabel='iterations of a block, at most 100')
    right.legend(loc='center right', frameon=False)
    figure.savefig(path, dpi=110)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not 1 or more')
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Train an invertible network on handwritten digits.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--norm', choices=(*NORMS, 'both'), default='both',
        help='that of a convolution which is kept below --cap')
    add('--cap', type=float, default=0.9, help='the largest norm of a layer')
    add('--iteration', '-i', type=positive_int, default=300,
        help='steps of training')
    add('--batchsize', '-b', type=positive_int, default=64,
        help='images in a step')
    add('--alpha', type=float, default=3e-3, help='step size of Adam')
    add('--seed', type=int, default=0, help='of all random numbers')
    add('--out', '-o', default='result-iresnet', metavar='DIRECTORY',
        help='all files go there')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    images = digits_data.load('digits')
    os.makedirs(args.out, exist_ok=True)
    # Without a terminal, which would give its width, wide enough.
    console = Console(width=None if sys.stdout.isatty() else 100)
    print_kernels(console, args)

    runs: dict[str, Any] = {}
    for norm in NORMS if args.norm == 'both' else (args.norm,):
        print(f'Training, {NORMS[norm]} kept below {args.cap:g}', flush=True)
        runs[norm] = train(norm, images, args)
    insize = tuple([size // 2 for size in images.test.shape[2:]])
    for norm, run in runs.items():
        print_layers(console, norm, run.model, insize)
        chainer.serializers.save_npz(
            os.path.join(args.out, f'{norm}.npz'), run.model)
    print_runs(console, runs, args)

    with open(os.path.join(args.out, 'inversion.json'), 'w') as f:
        json.dump({norm: [step._asdict() for step in run.steps]
                   for norm, run in runs.items()}, f, indent=4)
    draw(runs, args.cap, os.path.join(args.out, 'inversion.png'))
    print(f'Picture, numbers and networks: {args.out}')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)   # as a shell has it after Ctrl-C
