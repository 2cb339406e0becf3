"""Bounds on the norms of convolutions as maps, beside each other.

``python -m tests.tools.bounds demo`` trains the discriminator of the example,
``resnet`` that of SNGAN for images of 64 x 64, once with ``norm='matrix'`` and
once with ``norm='operator'``.  For each layer, as it is called in test mode,
it prints

* the norm of its map of images of the size that it gets, by the method of
  Lanczos, without any code of the package;
* the norm of its reshaped weight times the square root of the largest number
  of windows that an entry of an image is in (Y. Tsuzuku et al.,
  https://arxiv.org/abs/1802.04034): a bound that is easy to have;
* the interval of :func:`sn_function.certify`, for images of every size, and
  the upper end of that for images of this size;

and their products over all layers.
"""
from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from typing import Any, Callable, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from tests import reference
from tests.tools import estimates
from tests.tools.benchmarks import cpu, models

STEPS = 100  # of Lanczos
# For larger maps the bound for every size is one for their size, too.
SMALL = 4096
DECONVOLUTIONS = L.Deconvolution2D, L.DeconvolutionND


class Row(NamedTuple):
    """What is known of a layer, or the products over all of them."""

    name: str
    shape: str
    norm: float
    windows: float
    lo: float
    hi: float
    hi_at_size: float


# Norms of maps

def n_windows(link: chainer.Link) -> int:
    """Returns the largest number of outputs that an entry of the input is in.

    Written as a matrix, a convolution repeats its weight for every window of
    the input, and a pixel is in ``n`` of these; so its norm is at most
    ``sqrt(n)`` times that of the weight.
    """
    kernel = link.W.shape[2:]
    if isinstance(link, DECONVOLUTIONS):
        return math.prod(kernel)
    if not kernel:
        return 1
    stride, dilate = (
        np.broadcast_to(getattr(link, name, 1), len(kernel)).tolist()
        for name in ('stride', 'dilate'))
    return math.prod([-(-k * math.gcd(s, d) // s)
                      for k, s, d in zip(kernel, stride, dilate)])


def windows_bound(link: chainer.Link) -> float:
    axis = int(isinstance(link, DECONVOLUTIONS))
    return reference.true_norm(link.W.array, axis) * math.sqrt(n_windows(link))


def map_norm(link: chainer.Link, size: tuple[int, ...]) -> float:
    """The norm of the map of images of a size, as far as Lanczos finds it."""
    W = link.W.array
    if W.ndim == 2:
        return reference.true_norm(W)
    link = copy.deepcopy(link)
    link.W.array, link.b = W.astype(np.float64), None
    channels = (W.shape[0] if isinstance(link, DECONVOLUTIONS)
                else W.shape[1] * getattr(link, 'groups', 1))

    def gram(x: Any) -> Any:
        """The adjoint of the map, of the map, by a gradient."""
        x = chainer.Variable(x)
        y = link(x)
        gx, = chainer.grad([y], [x], [chainer.as_variable(y.array)])
        return gx.array

    v = np.random.RandomState(0).normal(size=(1, channels, *size))
    v, before, beta = v / np.linalg.norm(v), np.zeros_like(v), 0.
    diagonal, beside = [], []
    for _ in range(min(STEPS, v.size)):
        w = gram(v)
        diagonal.append(float(np.vdot(v, w)))
        w -= diagonal[-1] * v + beta * before
        beta = float(np.linalg.norm(w))
        if beta < 1e-12 * diagonal[0]:
            break
        beside.append(beta)
        v, before = w / beta, v
    k = len(diagonal)
    T = np.diag(diagonal) + np.diag(beside[:k - 1], 1)
    return math.sqrt(np.linalg.eigvalsh(T, 'U')[-1])


# Networks

class Sizes(chainer.LinkHook):
    """Keeps the sizes of the images that links with a weight get."""

    name = 'Sizes'

    def __init__(self) -> None:
        self.of: dict[int, tuple[int, ...]] = {}

    def forward_preprocess(self, args: Any) -> None:
        if isinstance(getattr(args.link, 'W', None), chainer.Variable):
            self.of[id(args.link)] = args.args[0].shape[2:]


def measured(
        model: chainer.Link, call: Callable[[chainer.Link], Any],
        rtol: float, time_limit: float | None) -> list[Row]:
    """Measures the layers as a call in test mode uses them.

    Args:
        model: The network, with hooks.
        call: Calls it with images.
        rtol: Of the certificates.
        time_limit: Likewise.

    """
    plain = sn_function.bake(model)
    with chainer.using_config('train', False), chainer.no_backprop_mode(), \
            Sizes() as sizes:
        call(plain)
    links = {id(link): (path[1:], link) for path, link in plain.namedlinks()}
    rows = []
    for key, size in sizes.of.items():  # in the order of the calls
        name, link = links[key]
        interval = hi_at_size = sn_function.certify(link, rtol, time_limit)
        if link.W.ndim > 2 and len(link.W) * math.prod(size) <= SMALL:
            hi_at_size = sn_function.certify(
                link, rtol, time_limit, insize=size)
        rows.append(Row(
            name, 'x'.join(map(str, link.W.shape)), map_norm(link, size),
            windows_bound(link), *interval, hi_at_size.hi))
    return rows


def product(rows: Sequence[Row]) -> Row:
    return Row('product', '', *[
        math.prod(column) for column in list(zip(*rows))[2:]])


# Training

Watch = Callable[[chainer.Link], None]  # is called after each step


def train_demo(
        settings: dict[str, Any], n_iterations: int, watch: Watch) -> None:
    def step(update: Callable[[], None], dis: chainer.Link) -> None:
        update()
        watch(dis)
    estimates.train(settings, 0, n_iterations, step)


def call_demo(dis: chainer.Link) -> Any:
    return dis(np.zeros((1, 1, 8, 8), 'f'), np.zeros(1, 'i'))


def train_resnet(
        settings: dict[str, Any], n_iterations: int, watch: Watch) -> None:
    """Tells smooth random images from rough ones, by the hinge loss."""
    np.random.seed(0)
    model = models.ResNet()
    model.add_hook(sn_function.ChainSpectralNormalization(**settings))
    optimizer = chainer.optimizers.Adam(1e-4, beta1=0.).setup(model)
    for _ in range(n_iterations):
        smooth, rough = (
            np.random.uniform(-1, 1, (2, 3, size, size)).astype('f')
            for size in (16, 64))
        smooth = smooth.repeat(4, axis=2).repeat(4, axis=3)
        with sn_function.cached(model):
            loss = F.mean(F.relu(1 - model(smooth))) + F.mean(
                F.relu(1 + model(rough)))
            model.cleargrads()
            loss.backward()
            del loss
            optimizer.update()
        watch(model)


def call_resnet(model: chainer.Link) -> Any:
    return model(np.zeros((1, 3, 64, 64), 'f'))


# The settings of the demo are its own.
NETWORKS: dict[str, tuple[Any, Any, dict[str, Any], list[int]]] = {
    'demo': (train_demo, call_demo, {'n_vectors': 16}, [1, 400]),
    'resnet': (train_resnet, call_resnet, {'n_vectors': 8}, [1, 30]),
}


def states(
        network: str, settings: dict[str, Any], steps: Sequence[int],
        rtol: float, time_limit: float | None) -> dict[str, list[Row]]:
    """Measures a network after so many steps of training."""
    train, call, own, _ = NETWORKS[network]
    found: dict[str, list[Row]] = {}
    n_done = 0

    def watch(model: chainer.Link) -> None:
        nonlocal n_done
        n_done += 1
        if n_done in steps:
            found[f'step {n_done}'] = measured(model, call, rtol, time_limit)

    train({**own, **settings}, max(steps), watch)
    return found


# Tables

HEADER = ('layer', 'weight', 'norm of the map', 'by windows', 'lo', 'hi',
          'hi for the size')


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [HEADER, *(
        (row.name, row.shape, *(f'{x:.5g}' for x in row[2:]))
        for row in [*rows, product(rows)])]


def show(rows: Sequence[Row], as_rst: bool) -> None:
    lines = cells(rows)
    if as_rst:
        print('.. csv-table::\n    :header-rows: 1\n')
        print('\n'.join(f'    {", ".join(line)}' for line in (
            [f'"{cell}"' for cell in row] for row in lines)), '\n')
        return
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print('  '.join(cell.ljust(width) for cell, width in
                        zip(line, widths)).rstrip())
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.bounds',
        description=__doc__.split('\n')[0])
    parser.add_argument('network', choices=NETWORKS)
    parser.add_argument('--steps', type=int, nargs='+',
                        help='of the training, after which to measure')
    parser.add_argument('--norms', nargs='+', default=['matrix', 'operator'],
                        help='of the hook')
    parser.add_argument('--hook-rtol', type=float, help='of the hook')
    parser.add_argument('--n-vectors', type=int, help='of the hook')
    parser.add_argument('--rtol', type=float, default=1e-2)
    parser.add_argument('--time-limit', type=float, help='of a certificate')
    parser.add_argument('--rst', action='store_true', help='as in the docs')
    args = parser.parse_args(argv)
    settings: dict[str, Any] = {}
    if args.hook_rtol is not None:
        settings['rtol'] = args.hook_rtol
    if args.n_vectors is not None:
        settings['n_vectors'] = args.n_vectors
    print(cpu.machine(), '\n')
    for norm in args.norms:
        start = time.monotonic()
        found = states(
            args.network, {'norm': norm, **settings},
            args.steps or NETWORKS[args.network][3], args.rtol,
            args.time_limit)
        for state, rows in found.items():
            print(f"norm='{norm}', {state}\n")
            show(rows, args.rst)
        print(f'{time.monotonic() - start:.0f} s\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
