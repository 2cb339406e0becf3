"""Pictures of the symbol of a convolution, and of bounds on its norm.

``python -m tests.tools.symbols DIR`` writes those of docs/lipschitz.rst:
``symbol.png``, the norm of the symbol of a kernel over all frequencies, with
the cells of a branch and bound, and ``bounds.png``, several bounds on the
norms of layers beside each other.  All but the certified intervals is
computed here, by NumPy.
"""
from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import sys
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import chainer.links as L
import numpy as np

from tests.tools import bounds

SIZE = 32  # of the images that bounds are compared on
N_GRID = 32  # points of a grid along an axis
RTOL = 1e-2


# Symbols

def symbol(W: Any, stride: int, w: Any) -> Any:
    """Returns F(w), ``(..., m, n s^2)``, of a convolution of images.

    Args:
        W: Weight, shape ``(m, n, k, k)``.
        stride: That along both axes.
        w: Frequencies, shape ``(..., 2)``.

    """
    m, n, *kernel = W.shape
    F = np.zeros((*w.shape[:-1], m, stride ** 2, n), complex)
    for tap in itertools.product(*map(range, kernel)):
        shift, phase = np.divmod(tap, stride)
        wave = np.exp(1j * (w @ shift))[..., None, None]
        F[..., phase @ (stride, 1), :] += wave * W[(..., *tap)]
    return F.reshape(*w.shape[:-1], m, -1)


def norms(W: Any, stride: int, w: Any) -> Any:
    """Returns the norms of F(w), shape ``(...)``."""
    F = symbol(W, stride, w)
    adjoint = F.conj().swapaxes(-1, -2)
    G = F @ adjoint if F.shape[-2] <= F.shape[-1] else adjoint @ F
    return np.sqrt(np.linalg.eigvalsh(G)[..., -1])


def grid(n: int, start: float = 0.) -> Any:
    """Returns ``n`` frequencies along each axis, shape ``(n, n, 2)``."""
    w = start + 2 * np.pi * np.arange(n) / n
    return np.stack(np.meshgrid(w, w, indexing='ij'), axis=-1)


class Cell(NamedTuple):
    """A square of frequencies that a bound did not have to be split in."""

    center: Any
    half: float


def cells(W: Any, rtol: float) -> Iterator[Cell]:
    """Yields cells whose norms surely are at most (1 + rtol) the largest.

    Stride 1.  In a cell that holds the largest norm, that at the center is at
    least the cosine of half the degrees times the half width below it.
    """
    degrees = sum(k - 1 for k in W.shape[2:])
    largest = norms(W, 1, grid(128)).max()
    todo = [Cell(w, np.pi / 4) for w in grid(
        4, np.pi / 4 - np.pi).reshape(-1, 2)]
    while todo:
        cell = todo.pop()
        angle = degrees * cell.half / 2
        if angle < np.pi / 2 and norms(W, 1, cell.center) <= (
                1 + rtol) * largest * math.cos(angle):
            yield cell
            continue
        half = cell.half / 2
        todo += [Cell(cell.center + half * np.array(corner), half)
                 for corner in itertools.product((-1, 1), repeat=2)]


def draw_symbol(path: pathlib.Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    W = np.random.RandomState(27).normal(size=(8, 4, 3, 3)) / 9
    figure = Figure(figsize=(7.6, 3.5))
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    values = norms(W, 1, grid(48, -np.pi))
    for axes in left, right:
        image = axes.imshow(
            values.T, origin='lower', cmap='viridis', aspect='equal',
            interpolation='nearest', extent=(-np.pi, np.pi) * 2)
        axes.set_xticks([-np.pi, 0, np.pi], [r'$-\pi$', '0', r'$\pi$'])
        axes.set_yticks([-np.pi, 0, np.pi], [r'$-\pi$', '0', r'$\pi$'])
    top = np.unravel_index(values.argmax(), values.shape)
    left.set_title('a grid of 16 x 16', fontsize=10)
    left.plot(*grid(16, -np.pi).reshape(-1, 2).T, '.', color='white',
              markersize=2)
    right.set_title('cells of branch and bound, to 1 %', fontsize=10)
    for cell in cells(W, 1e-2):
        right.add_patch(Rectangle(
            cell.center - cell.half, 2 * cell.half, 2 * cell.half,
            fill=False, edgecolor='white', linewidth=0.5))
    for axes in left, right:
        axes.plot(*grid(48, -np.pi)[top], '+', color='red', markersize=9)
    figure.colorbar(image, ax=[left, right], label='|F(w)|')
    figure.savefig(path, dpi=110, bbox_inches='tight')


# Bounds

def tensor_bound(W: Any) -> float:
    """S. Singla and S. Feizi, https://arxiv.org/abs/1911.10258."""
    m, n, h, w = W.shape
    matrices = [
        W.transpose(0, 2, 1, 3).reshape(m * h, n * w),
        W.transpose(0, 3, 1, 2).reshape(m * w, n * h),
        W.reshape(m, n * h * w),
        W.transpose(0, 2, 3, 1).reshape(m * h * w, n)]
    return math.sqrt(h * w) * min(np.linalg.norm(A, 2) for A in matrices)


def grid_maximum(W: Any, stride: int) -> float:
    """That of circular images of 32 x 32: no bound for padding by zeros."""
    w = grid(N_GRID // stride).reshape(-1, 2)
    return max(norms(W, stride, each).max() for each in np.split(w, 16))


BOUNDS: dict[str, Callable[[Any, Any, int], float]] = {
    'reshaped\nweight': lambda link, W, stride: np.linalg.norm(
        W.reshape(len(W), -1), 2),
    'windows\n(Tsuzuku et al.)': lambda link, W, stride: (
        bounds.windows_bound(link)),
    'tensor\n(Singla, Feizi)': lambda link, W, stride: (
        tensor_bound(W)),
    'largest on\na grid': lambda link, W, stride: grid_maximum(W, stride),
}


def flat(W: Any) -> Any:
    """The nearest matrix whose singular values are all 1."""
    u, _, v = np.linalg.svd(W.reshape(len(W), -1), full_matrices=False)
    return (u @ v).reshape(W.shape)


def trained(network: str, n_iterations: int) -> list[chainer.Link]:
    """The convolutions of a network, but for those with most channels."""
    train, _, settings, _ = bounds.NETWORKS[network]
    found: list[chainer.Link] = []
    n_done = 0

    def watch(model: chainer.Link) -> None:
        nonlocal n_done
        n_done += 1
        if n_done == n_iterations:
            found.extend(
                link for link in sn_function.bake(model).links()
                if isinstance(link, L.Convolution2D)
                and max(link.W.shape[:2]) <= 256)

    train({**settings, 'norm': 'matrix'}, n_iterations, watch)
    return found


def drawn() -> list[chainer.Link]:
    """Convolutions with Gaussian weights."""
    np.random.seed(0)
    return [L.Convolution2D(n, m, k, stride, initialW=chainer.initializers
                            .HeNormal(dtype='f'))
            for m, n, k, stride in (
                (64, 3, 3, 1), (32, 32, 3, 1), (64, 64, 3, 1),
                (64, 16, 5, 1), (24, 24, 5, 1), (32, 32, 1, 1),
                (32, 16, 4, 2), (64, 32, 3, 2))]


def flattened() -> list[chainer.Link]:
    links = drawn()
    for link in links:
        link.W.array = flat(link.W.array)
    return links


SOURCES: dict[str, tuple[str, Callable[[], list[chainer.Link]]]] = {
    'trained': ('o', lambda: trained('demo', 200) + trained('resnet', 10)),
    'Gaussian': ('^', drawn),
    'equal singular values': ('s', flattened)}


def ratios(link: chainer.Link) -> list[float]:
    """Returns the bounds, divided by the norm of the map of images."""
    link.W.array = W = link.W.array.astype(np.float64)
    norm = bounds.map_norm(link, (SIZE, SIZE))
    stride = link.stride[0]
    interval = sn_function.certify(link, RTOL, None)
    return [x / norm for x in (
        *(bound(link, W, stride) for bound in BOUNDS.values()), *interval)]


def draw_bounds(path: pathlib.Path) -> None:
    from matplotlib import cm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = [*BOUNDS, 'certify, lo', 'certify, hi']
    colors = [cm.viridis(0.9 * i / (len(names) - 1))
              for i in range(len(names))]
    figure = Figure(figsize=(8.2, 3.8))
    axes = figure.add_subplot()
    axes.axhline(1, color='0.4', linewidth=0.8, zorder=0)
    random = np.random.RandomState(0)
    for label, (marker, make) in SOURCES.items():
        found = np.array(list(map(ratios, make())))
        print(label, len(found), 'layers; median ratios, and smallest:',
              np.median(found, axis=0).round(4),
              found.min(axis=0).round(4), flush=True)
        axes.plot([], [], marker, color='0.4', markersize=5, label=label)
        for i, column in enumerate(found.T):
            axes.plot(i + random.uniform(-.25, .25, len(column)), column,
                      marker, color=colors[i], markersize=4.5, alpha=.8)
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(FixedLocator([.3, .5, .7, 1, 1.5, 2, 3, 5]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel(f'divided by the norm for {SIZE} x {SIZE}')
    axes.grid(axis='y', alpha=.3)
    axes.legend(fontsize=8, loc='upper right')
    figure.savefig(path, dpi=110, bbox_inches='tight')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.symbols',
        description=__doc__.split('\n')[0])
    parser.add_argument('directory', type=pathlib.Path)
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    draw_symbol(args.directory / 'symbol.png')
    draw_bounds(args.directory / 'bounds.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
